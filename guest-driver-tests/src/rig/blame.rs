//! Deliberate driver bugs, and what the back-end has to report about them: reports, and a trace. Knows which bug
//! needs which report; knows nothing of how the back-end detects them.

use crate::rig::error::RigError;
use crate::rig::instruments::{self, Trace, Violation};
use crate::rig::run::Run;
use crate::rig::vfio;
use guest_agent::protocol::Bug;
use job_stream::Mode;
use std::path::Path;

/// What is shown: in fence mode the unmap waits for the job until the device preempts it; in strict mode the job
/// continues, and finds other memory.
const SHOWN: [(Mode, Bug); 2] = [(Mode::Fence, Bug::UnmapBeforeFence), (Mode::Strict, Bug::RemapBeforeFence)];

/// The results of the bugs.
pub struct Blame {
    /// What the guest saw of each, in a line.
    pub told: Vec<String>,
    /// The back-end's reports; `None` if it cannot make any.
    pub violations: Option<Vec<Violation>>,
    /// The trace of its flight recorder; `None` if it has none.
    pub trace: Option<Trace>,
}

/// Runs the bugs, and queries the back-end about them. The trace goes to `trace`.
pub fn break_and_ask(run: &mut Run<'_>, trace: &Path) -> Result<Blame, RigError> {
    let last =
        instruments::violations(run)?.and_then(|known| known.iter().map(|violation| violation.id).max());
    run.expect_faults();
    vfio::take(run)?;
    let mut told = Vec::new();
    for (mode, bug) in SHOWN {
        let broken = vfio::break_on_purpose(run, mode, bug)?;
        told.push(vfio::told(mode, bug, &broken));
    }
    vfio::give_back(run)?;
    let violations = instruments::violations_after(run, last, SHOWN.len())?;
    Ok(Blame { told, violations, trace: instruments::record(run, trace)? })
}

impl Blame {
    /// Prints all of it.
    pub fn print(&self) {
        println!("\nBroken on purpose, by a driver in user space that has the device through VFIO:");
        self.told.iter().for_each(|line| println!("- {line}"));
        match &self.violations {
            Some(violations) => violations.iter().for_each(print_violation),
            None => println!(
                "This back-end does not know the command `violations`: it cannot say whose fault it was."
            ),
        }
        match &self.trace {
            Some(Trace { path, events }) => println!(
                "\nThe flight recorder's last {events} events, for ui.perfetto.dev: {}",
                path.display()
            ),
            None => println!("This back-end does not know the command `record`: there is no trace."),
        }
    }
}

fn print_violation(violation: &Violation) {
    println!();
    violation.report.lines().for_each(|line| println!("    {line}"));
}
