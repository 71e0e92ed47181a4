//! What is destroyed under jobs in flight: a buffer's handle, a context, a process. And contexts that are isolated
//! from each other. Knows what the device has to guarantee: jobs of surviving contexts succeed, others are stopped
//! and write nothing more.

use super::{FAILED, NO_SUCH_RESOURCE};
use super::{all_done, ask, begin, counted_since, ended, in_flight, no_contexts, refused, standing, stands};
use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::report::{self, say};
use crate::rig::run::Run;
use crate::rig::scenario::{same, settled};
use guest_agent::protocol::Event;
use guest_agent::stock_words::{Standing, StockCommand, StockEvent, Strangers, Until};

/// Jobs in flight.
const JOBS: u32 = 4;
/// Pages of the buffer that they fill.
const PAGES: u32 = 16;
/// What the two contexts of `strangers` do on their own memory.
const OWN: u32 = 4;
const TRESPASSES: u32 = 6;

/// A buffer is closed under jobs that write to it: the device holds it until they are done, and they succeed.
pub(crate) fn close_in_flight(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    in_flight(begin(run, JOBS, Until::Told)?, JOBS)?;
    in_flight(standing(run, StockCommand::CloseBuffer)?, JOBS)?;
    all_done(standing(run, StockCommand::Finish)?, JOBS)?;
    let counts = counted_since(run, &before)?;
    ended(&counts, JOBS.into(), 0)?;
    same("commands that were refused", "the back-end", counts.command_errors, 0)?;
    no_contexts(run)
}

/// A context is closed under its jobs: they are stopped, their fences come, and nothing is written any more.
pub(crate) fn end_context_in_flight(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let mark = run.console_mark();
    in_flight(begin(run, JOBS, Until::Told)?, JOBS)?;
    let found = standing(run, StockCommand::Abandon)?;
    say(&format!("Fences of a context that was closed came after {}", report::duration(found.waited_ns)));
    let due = Standing { submitted: JOBS, signalled: JOBS, poison: PAGES, ..Standing::default() };
    stands(found, due)?;
    let counts = counted_since(run, &before)?;
    ended(&counts, 0, JOBS.into())?;
    same("commands that were refused", "the back-end", counts.command_errors, JOBS.into())?;
    refused(run, mark, FAILED, JOBS as usize)?;
    no_contexts(run)
}

/// A process is killed with jobs in flight: it ends at once, its jobs are stopped, and its memory is not written any
/// more.
pub(crate) fn kill_in_flight(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let mark = run.console_mark();
    let found = standing(run, StockCommand::Kill { jobs: JOBS })?;
    say(&format!(
        "A process with jobs in flight was gone {} after its kill",
        report::duration(found.waited_ns)
    ));
    stands(found, Standing { submitted: JOBS, poison: PAGES, ..Standing::default() })?;
    let counts = counted_since(run, &before)?;
    ended(&counts, 0, JOBS.into())?;
    same("commands that were refused", "the back-end", counts.command_errors, JOBS.into())?;
    refused(run, mark, FAILED, JOBS as usize)?;
    no_contexts(run)
}

/// Two contexts cannot see each other's memory, whether they belong to one process or to two.
pub(crate) fn strangers(run: &mut Run<'_>) -> Result<(), RigError> {
    for process in [false, true] {
        let before = settled(run)?.unwrap_or_default();
        let mark = run.console_mark();
        let found = match ask(run, StockCommand::Strangers { process })? {
            StockEvent::Strangers(found) => found,
            other => return Err(unexpected(&Event::Stock(other))),
        };
        let due = Strangers { trespasses: TRESPASSES, refused: TRESPASSES, bytes_taken: 0, own: OWN };
        if found != due {
            return Err(RigError::check(format!(
                "Two contexts could do this to each other: {found:?}, not {due:?}"
            )));
        }
        let counts = counted_since(run, &before)?;
        ended(&counts, OWN.into(), 0)?;
        same("commands that were refused", "the back-end", counts.command_errors, TRESPASSES.into())?;
        refused(run, mark, NO_SUCH_RESOURCE, TRESPASSES as usize)?;
        no_contexts(run)?;
    }
    Ok(())
}
