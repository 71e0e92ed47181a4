//! A full queue, and a stopped machine: nothing that a job or a command waits for may be given up. Knows what must
//! come in the end; knows nothing of timeouts.

use super::{all_done, answer, begin, counted_since, ended, no_contexts, standing};
use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::report::say;
use crate::rig::run::Run;
use crate::rig::scenario::{no_troubles, same, settled};
use crate::rig::variation::Variation;
use guest_agent::jobs::CASES;
use guest_agent::protocol::{Command, Event};
use guest_agent::stock_words::{Full, StockCommand, StockEvent, Until};
use job_stream::Mode;
use std::thread;
use std::time::Duration;

/// More than the control queue has room for, and less than the device accepts.
const MANY: u32 = 400;
/// Entries of the control queue of a device with VIRGL: each command of the driver takes one.
const ROOM: u32 = 256;
/// A back-end that tolerates a front-end that is silent for long: by default a MISS that was read has to be answered
/// within 1 s, and a front-end may be frozen just then.
pub(crate) const PATIENT: Variation = Variation { backend: &["--miss-timeout", "60s"], ..Variation::NONE };
/// How long QEMU is frozen: long, and shorter than the back-end's timeout.
const LONG: Duration = Duration::from_secs(5);
const BRIEF: Duration = Duration::from_millis(500);
/// Jobs that are in flight while it is.
const JOBS: u32 = 6;
const STORM: u32 = 100;

/// The control queue is full of jobs that do not end, and a buffer is destroyed behind them: Linux waits for room,
/// and everything comes in order once the jobs continue.
pub(crate) fn full_queue(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    run.tell(Command::Stock(StockCommand::Fill { jobs: MANY }))?;
    let found = match answer(run.hear("The end of a full queue")?)? {
        StockEvent::Full(found) => found,
        other => return Err(unexpected(&Event::Stock(other))),
    };
    say(&format!("{} jobs found room in the queue", found.found_room));
    let found_room = ROOM;
    let due = Full { found_room, close_waited: true, closed: true, done: MANY, signalled: MANY };
    if found != due {
        return Err(RigError::check(format!(
            "Of a full queue the guest saw {found:?}, where {due:?} was due"
        )));
    }
    ended(&counted_since(run, &before)?, MANY.into(), 0)?;
    no_contexts(run)
}

/// QEMU is frozen for long, once while jobs wait, and once while jobs run and memory is mapped and unmapped.
pub(crate) fn frozen(run: &mut Run<'_>) -> Result<(), RigError> {
    freezes(run, LONG, 1)
}

/// QEMU is frozen for a moment, again and again, with the back-end's default timeout.
pub(crate) fn frozen_briefly(run: &mut Run<'_>) -> Result<(), RigError> {
    freezes(run, BRIEF, 4)
}

/// No job fails, nothing is given up, and everything is correct afterwards.
fn freezes(run: &mut Run<'_>, time: Duration, times: u32) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    begin(run, JOBS, Until::Told)?;
    freeze(run, time)?;
    all_done(standing(run, StockCommand::Finish)?, JOBS)?;
    run.tell(Command::Jobs { mode: Mode::Fence, storm: STORM })?;
    for _ in 0..times {
        thread::sleep(Duration::from_millis(150));
        freeze(run, time)?;
    }
    let guest = match run.hear("The end of the guest's jobs")? {
        Event::Ran(counts) => counts,
        other => return Err(unexpected(&other)),
    };
    let after = settled(run)?.unwrap_or_default();
    no_troubles(&before, &after)?;
    let due = u64::from(STORM) + CASES.len() as u64;
    same("jobs around a frozen machine", "the guest", guest.jobs, due)?;
    ended(&after.since(&before), due + u64::from(JOBS), 0)?;
    no_contexts(run)
}

fn freeze(run: &mut Run<'_>, time: Duration) -> Result<(), RigError> {
    run.freeze()?;
    thread::sleep(time);
    run.thaw()
}
