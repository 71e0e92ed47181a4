//! Scenarios for the stock driver in a real guest: what the guest saw, by fences and in memory, and what the back-end
//! counted have to agree. One file per group; the guest's half is in the agent's `stock`. Knows how to query and
//! compare; knows nothing of how a guest is booted.

mod fences;
mod life_cycle;
mod memory;
mod platform;
mod pressure;
mod second_kernel;
mod survival;
mod sync;

use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::hot_plug::SLOT;
use crate::rig::process::wait_until;
use crate::rig::run::{Mark, Run};
use crate::rig::scenario::{Needs, same, settled};
use crate::rig::stats::Stats;
use crate::rig::variation::Variation;
use guest_agent::protocol::{Command, Event};
use guest_agent::stock_words::{Amount, Standing, StockCommand, StockEvent, Until};
use serde_json::{Value, json};
use std::time::Duration;

/// A scenario, by its numbers in the table of scenarios.
pub struct Stock {
    /// Its numbers.
    pub numbers: &'static [u32],
    /// Its name.
    pub name: &'static str,
    /// What it requires.
    pub needs: Needs,
    /// The machine that it needs.
    pub variation: Variation,
    /// What it does.
    pub run: fn(&mut Run<'_>) -> Result<(), RigError>,
}

impl Stock {
    const fn new(
        numbers: &'static [u32],
        name: &'static str,
        run: fn(&mut Run<'_>) -> Result<(), RigError>,
    ) -> Self {
        Self { numbers, name, needs: Needs::Nothing, variation: Variation::NONE, run }
    }

    /// The same on its own machine.
    const fn on(self, variation: Variation) -> Self {
        Self { variation, ..self }
    }

    /// The same where this is present.
    const fn with(self, needs: Needs) -> Self {
        Self { needs, ..self }
    }
}

/// All of them, in an order in which each leaves a guest that the next can use.
pub const ALL: [Stock; 28] = [
    Stock::new(&[44], "close-in-flight", life_cycle::close_in_flight),
    Stock::new(&[44], "end-context-in-flight", life_cycle::end_context_in_flight),
    Stock::new(&[44, 42], "kill-in-flight", life_cycle::kill_in_flight),
    Stock::new(&[51], "strangers", life_cycle::strangers),
    Stock::new(&[32], "fences-in-order", fences::in_order),
    Stock::new(&[33], "fences-between-contexts", fences::between_contexts),
    Stock::new(&[34], "delayed-fence", fences::delayed),
    Stock::new(&[34], "failed-job", fences::failed),
    Stock::new(&[35], "hang", fences::hang),
    Stock::new(&[88], "lost-interrupt", fences::interrupts),
    Stock::new(&[90], "points", sync::points),
    Stock::new(&[104], "full-queue", pressure::full_queue),
    Stock::new(&[103], "frozen-briefly", pressure::frozen_briefly),
    Stock::new(&[103], "frozen", pressure::frozen).on(pressure::PATIENT),
    Stock::new(&[64], "huge-buffer", memory::huge),
    Stock::new(&[105, 45], "unload", platform::unload),
    Stock::new(&[99], "removed", platform::remove),
    Stock::new(&[46], "function-reset", platform::reset),
    Stock::new(&[56], "domain", platform::domain).with(Needs::Iommu),
    Stock::new(&[98], "sleep", platform::sleep).on(platform::SHORT_SLEEP),
    Stock::new(&[100], "balloon", memory::balloon).on(memory::BALLOON),
    Stock::new(&[48], "hot-plug", memory::hot_plug).on(SLOT),
    Stock::new(&[60], "bouncing", memory::bouncing).on(memory::BOUNCING),
    Stock::new(&[102], "kdump", second_kernel::crash).on(second_kernel::KDUMP),
    Stock::new(&[115], "kexec", second_kernel::jump).on(second_kernel::KEXEC),
    Stock::new(&[50], "backend-killed", survival::backend_killed).on(survival::ALONE),
    Stock::new(&[91], "foreign-fence", sync::foreign).on(sync::VGEM),
    Stock::new(&[91], "shared-buffers", sync::share).on(sync::VGEM),
];

/// Answers of the device, as Linux prints them.
const FAILED: &str = "response 0x1200 (command 0x207)";
const NO_SUCH_RESOURCE: &str = "response 0x1203 (command 0x207)";
const NO_SUCH_CONTEXT: &str = "response 0x1204 (command 0x207)";
const CLEAN_LIMIT: Duration = Duration::from_secs(10);

/// Sends the agent a request for the stock driver.
fn ask(run: &mut Run<'_>, command: StockCommand) -> Result<StockEvent, RigError> {
    answer(run.ask(&format!("What came of {command:?}"), Command::Stock(command))?)
}

/// The agent's answer, if it has this type.
fn answer(event: Event) -> Result<StockEvent, RigError> {
    match event {
        Event::Stock(event) => Ok(event),
        other => Err(unexpected(&other)),
    }
}

/// Sends a request whose answer is the state of the jobs.
fn standing(run: &mut Run<'_>, command: StockCommand) -> Result<Standing, RigError> {
    match ask(run, command)? {
        StockEvent::Standing(standing) => Ok(standing),
        other => Err(unexpected(&Event::Stock(other))),
    }
}

/// Starts this many jobs.
fn begin(run: &mut Run<'_>, jobs: u32, until: Until) -> Result<Standing, RigError> {
    standing(run, StockCommand::Begin(Amount { jobs, until }))
}

/// What the back-end has counted since, once all work has ended.
fn counted_since(run: &mut Run<'_>, before: &Stats) -> Result<Stats, RigError> {
    Ok(settled(run)?.unwrap_or_default().since(before))
}

/// The guest's jobs are in the expected state.
fn stands(found: Standing, wanted: Standing) -> Result<(), RigError> {
    if found == (Standing { waited_ns: found.waited_ns, ..wanted }) {
        return Ok(());
    }
    Err(RigError::check(format!("The guest's jobs stand so: {found:?}, where {wanted:?} was due")))
}

/// All jobs succeeded; each has filled its page, and touched no other.
fn all_done(found: Standing, jobs: u32) -> Result<(), RigError> {
    let poison = 16 - jobs;
    let wanted = Standing {
        submitted: jobs,
        signalled: jobs,
        done: jobs,
        filled: jobs,
        poison,
        ..Standing::default()
    };
    stands(found, wanted)
}

/// All jobs wait before their gate, and have touched nothing.
fn in_flight(found: Standing, jobs: u32) -> Result<(), RigError> {
    stands(found, Standing { submitted: jobs, poison: 16, ..Standing::default() })
}

/// The back-end completed this many jobs, and this many failed or were discarded.
fn ended(counts: &Stats, done: u64, failed: u64) -> Result<(), RigError> {
    let who = "the back-end";
    same("jobs that were done", who, counts.jobs_done, done)?;
    same("jobs that failed or were stopped", who, counts.jobs_failed + counts.jobs_discarded, failed)?;
    same("jobs that were submitted", who, counts.jobs_submitted, done + failed)
}

/// The back-end has no context left that has ever had a job, and none waits for the end of its last. (The context of
/// a held screen has no job and no mode.)
fn no_contexts(run: &mut Run<'_>) -> Result<(), RigError> {
    let mut left = Value::Null;
    let waited = wait_until("The end of the last context", CLEAN_LIMIT, || {
        left = run.control("contexts", json!({}))?.unwrap_or_default();
        let contexts = left.get("contexts").and_then(Value::as_array);
        let is_idle =
            |context: &Value| context.get("context").is_some_and(Value::is_u64) && context["mode"].is_null();
        Ok(contexts.is_none_or(|all| all.iter().all(is_idle)))
    });
    match waited {
        Err(RigError::Late { .. }) => {
            Err(RigError::check(format!("Contexts are left in the back-end: {left}")))
        }
        waited => waited,
    }
}

/// Turns a fault injection of the back-end on.
fn inject(run: &mut Run<'_>, name: &str, argument: &str) -> Result<(), RigError> {
    let arguments = match argument {
        "" => json!({ "on": name }),
        argument => json!({ "on": name, "argument": argument }),
    };
    run.control("inject", arguments).map(drop)
}

/// Turns it off.
fn inject_no_more(run: &mut Run<'_>, name: &str) -> Result<(), RigError> {
    run.control("inject", json!({ "off": name })).map(drop)
}

/// Linux has printed up to this many lines with these words since the mark, and was right: the back-end has counted
/// as many refusals. (It prints at most ten in five seconds, so fewer say nothing.)
fn refused(run: &mut Run<'_>, mark: Mark, words: &'static str, due: usize) -> Result<(), RigError> {
    let found = run.forgive(mark, words);
    if found <= due {
        return Ok(());
    }
    Err(RigError::check(format!(
        "The kernel has printed {found} lines with \"{words}\", where {due} had a cause"
    )))
}
