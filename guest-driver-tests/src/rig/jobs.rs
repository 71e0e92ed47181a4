//! Jobs of the guest, mode by mode: what the guest counted and what the back-end did for it must agree. Knows nothing
//! of what a job does: the agent has compared every byte.

use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::instruments::Verdicts;
use crate::rig::report::{self, say};
use crate::rig::run::Run;
use crate::rig::scenario::{at_least, no_troubles, same, settled};
use crate::rig::stats::Stats;
use crate::rig::topology::Invalidations;
use guest_agent::jobs::CASES;
use guest_agent::protocol::{Command, Event, JobCounts, RingCounts};
use job_stream::Mode;

/// Jobs that are in flight while buffers come and go, in each mode.
const STORM: u32 = 40;

/// How often the test retries to find a flush that meets a job.
const MORE_ROUNDS: u32 = 8;

/// The waiting job, the one behind it, and those that overtake.
const JOBS_ON_RINGS: u64 = 5;

/// What one mode has shown.
#[derive(Clone, Copy, Debug)]
pub struct ModeRun {
    /// The mode of the context.
    pub mode: Mode,
    /// What the guest counted.
    pub guest: JobCounts,
    /// What the back-end counted meanwhile.
    pub backend: Stats,
    /// Its verdicts on jobs that an invalidation overlapped.
    pub verdicts: Verdicts,
}

impl ModeRun {
    /// What the guest did and what the back-end did for it: both counts agree.
    pub(super) fn compare(&self, due: u64) -> Result<(), RigError> {
        let Self { mode, guest, backend, verdicts } = self;
        let who = "the back-end";
        same(&format!("jobs in mode {mode}"), "the guest", guest.jobs, due)?;
        same(&format!("jobs that were submitted in mode {mode}"), who, backend.jobs_submitted, guest.jobs)?;
        same(&format!("jobs that were done in mode {mode}"), who, backend.jobs_done, guest.jobs)?;
        same(&format!("bytes moved in mode {mode}"), who, backend.bytes_moved, guest.bytes_moved)?;
        at_least(&format!("buffers beside jobs in mode {mode}"), guest.buffers_churned, 1)?;
        same(&format!("verdicts against a good driver in mode {mode}"), who, verdicts.accusations(), 0)
    }
}

/// Jobs in each mode through the stock driver: every byte is correct, and both counts agree.
pub(crate) fn jobs(run: &mut Run<'_>) -> Result<(), RigError> {
    match through_the_driver(run)?.as_slice() {
        [] => say("QEMU's own device takes no jobs: nothing to check"),
        modes => {
            for shown in modes {
                say(&line(shown));
                let mut met = met_invalidations(run.topology.invalidations, shown);
                // A lazy guest flushes at any time: on a busy machine that may be between two jobs, for a while.
                for _ in 0..MORE_ROUNDS {
                    if met.is_err() && run.topology.invalidations == Invalidations::Lazy {
                        met = met_invalidations(Invalidations::Lazy, &in_mode(run, shown.mode)?);
                    }
                }
                met?;
            }
        }
    }
    Ok(())
}

/// Rings of contexts have their own timelines: a waiting job holds back its own ring, and nothing else.
pub(crate) fn rings(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let counts = match run.ask("What the guest saw of rings", Command::Rings)? {
        Event::Rings(counts) => counts,
        other => return Err(unexpected(&other)),
    };
    let after = settled(run)?.unwrap_or_default();
    no_troubles(&before, &after)?;
    same("jobs on rings that were done", "the back-end", after.since(&before).jobs_done, JOBS_ON_RINGS)?;
    let wanted = RingCounts { blob: true, context_init: true, overtook: 3, in_order: true };
    if counts == wanted {
        return Ok(());
    }
    Err(RigError::check(format!("Beside a job that waits, the guest saw {counts:?}, not {wanted:?}")))
}

/// What one mode has shown, in a line.
pub fn line(shown: &ModeRun) -> String {
    let ModeRun { mode, guest, backend, verdicts } = shown;
    format!(
        "{} jobs in mode {mode}, {} of buffers compared; {} invalidations, {} with work in flight, {} found benign; \
         frozen {}",
        guest.jobs,
        report::bytes(guest.bytes_compared),
        backend.invalidations,
        backend.invalidations_with_work_in_flight,
        verdicts.benign,
        report::duration(backend.frozen_ns)
    )
}

/// Runs the test jobs in each mode; none with QEMU's own device, which does not support them.
pub fn through_the_driver(run: &mut Run<'_>) -> Result<Vec<ModeRun>, RigError> {
    if run.stats()?.is_none() {
        return Ok(Vec::new());
    }
    Mode::ALL.iter().map(|&mode| in_mode(run, mode)).collect()
}

fn in_mode(run: &mut Run<'_>, mode: Mode) -> Result<ModeRun, RigError> {
    let shown = run_jobs(run, mode, Command::Jobs { mode, storm: STORM })?;
    shown.compare(u64::from(STORM) + CASES.len() as u64)?;
    Ok(shown)
}

/// Runs jobs in the guest, and compares what both sides count meanwhile.
pub(super) fn run_jobs(run: &mut Run<'_>, mode: Mode, command: Command) -> Result<ModeRun, RigError> {
    let (before, verdicts) = (settled(run)?.unwrap_or_default(), run.verdicts(mode)?);
    let guest = match run.ask("The end of the guest's jobs", command)? {
        Event::Ran(counts) => counts,
        other => return Err(unexpected(&other)),
    };
    let after = settled(run)?.unwrap_or_default();
    no_troubles(&before, &after)?;
    let verdicts = run.verdicts(mode)?.since(&verdicts);
    Ok(ModeRun { mode, guest, backend: after.since(&before), verdicts })
}

/// Where the guest flushes its whole domain, invalidations hit jobs; where it unmaps page by page, none does.
fn met_invalidations(expected: Invalidations, shown: &ModeRun) -> Result<(), RigError> {
    let ModeRun { mode, backend, verdicts, .. } = shown;
    let hits = backend.invalidations_with_work_in_flight;
    let what = format!("invalidations that found work in flight in mode {mode}");
    match expected {
        Invalidations::None => same("invalidations", "the back-end", backend.invalidations, 0),
        Invalidations::Strict => {
            at_least(&format!("invalidations in mode {mode}"), backend.invalidations, 1)?;
            same(&what, "the back-end", hits, 0)
        }
        Invalidations::Lazy => {
            at_least(&what, hits, 1)?;
            if *mode != Mode::RegistrationCache {
                at_least(&format!("benign verdicts in mode {mode}"), verdicts.benign, 1)?;
            }
            let cached = u64::from(*mode == Mode::RegistrationCache && backend.incoherent_pins > 0);
            let due = u64::from(*mode == Mode::RegistrationCache);
            same(&format!("modes that kept a pin without coherence, of {mode}"), "the back-end", cached, due)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_job_or_byte_that_only_one_side_knows_is_noticed() {
        let guest = JobCounts { jobs: 3, bytes_moved: 9, buffers_churned: 1, ..JobCounts::default() };
        let backend = Stats { jobs_submitted: 3, jobs_done: 3, bytes_moved: 9, ..Stats::default() };
        let check = |guest, backend, due| {
            let verdicts = Verdicts { benign: 1, ..Verdicts::default() };
            ModeRun { mode: Mode::Fence, guest, backend, verdicts }
                .compare(due)
                .map_err(|error| error.to_string())
        };
        assert_eq!(check(guest, backend, 3), Ok(()));
        let text = |found: &str, what: &str, who: &str, due: &str| {
            Err(format!("Counted {found} {what} in mode fence by {who}, where {due} were due"))
        };
        assert_eq!(check(guest, backend, 4), text("3", "jobs", "the guest", "4"));
        let fewer = Stats { jobs_submitted: 2, ..backend };
        assert_eq!(check(guest, fewer, 3), text("2", "jobs that were submitted", "the back-end", "3"));
        let lost = Stats { jobs_done: 2, ..backend };
        assert_eq!(check(guest, lost, 3), text("2", "jobs that were done", "the back-end", "3"));
        let short = Stats { bytes_moved: 8, ..backend };
        assert_eq!(check(guest, short, 3), text("8", "bytes moved", "the back-end", "9"));
        let calm = JobCounts { buffers_churned: 0, ..guest };
        assert!(check(calm, backend, 3).is_err());
        let blamed = Verdicts { untold: 1, ..Verdicts::default() };
        assert!(ModeRun { mode: Mode::Fence, guest, backend, verdicts: blamed }.compare(3).is_err());
    }

    #[test]
    fn a_hit_in_strict_mode_and_none_in_lazy_mode_are_noticed() {
        let shown = |hits| ModeRun {
            mode: Mode::Fence,
            guest: JobCounts::default(),
            backend: Stats { invalidations: 5, invalidations_with_work_in_flight: hits, ..Stats::default() },
            verdicts: Verdicts { benign: hits, ..Verdicts::default() },
        };
        assert!(met_invalidations(Invalidations::Strict, &shown(0)).is_ok());
        assert!(met_invalidations(Invalidations::Strict, &shown(1)).is_err());
        assert!(met_invalidations(Invalidations::Lazy, &shown(1)).is_ok());
        assert!(met_invalidations(Invalidations::Lazy, &shown(0)).is_err());
        assert!(met_invalidations(Invalidations::None, &shown(0)).is_err());
    }
}
