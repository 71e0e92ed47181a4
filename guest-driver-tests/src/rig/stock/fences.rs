//! Fences: in order on a ring, without order between contexts, late, of jobs that failed, and without an interrupt.
//! Knows what Linux makes of the device's answers; knows nothing of how they come about.

use super::{FAILED, NO_SUCH_CONTEXT};
use super::{
    all_done, ask, begin, counted_since, ended, inject, inject_no_more, no_contexts, refused, standing,
};
use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::report::{self, say};
use crate::rig::run::Run;
use crate::rig::scenario::{at_least, same, settled};
use crate::rig::topology::Invalidations;
use guest_agent::protocol::Event;
use guest_agent::stock_words::{
    Amount, Failing, Failure, Order, Overtaking, Standing, StockCommand, StockEvent, Until,
};

/// Jobs on one ring.
const JOBS: u32 = 15;
/// How long answers are delayed, and how much of it a guest must at least have seen.
const DELAY: &str = "60ms";
const LEAST_DELAY_NS: u64 = 30_000_000;
/// How long a fence is watched that must not come.
const PATIENCE_MS: u64 = 500;
/// For a fence that has to come.
const LIMIT_MS: u64 = 20_000;
const DONE: u32 = 0x1100;

/// Fences of one ring come in the order of their jobs, each after its job's writes; also when each answer is delayed
/// by a different time.
pub(crate) fn in_order(run: &mut Run<'_>) -> Result<(), RigError> {
    for delay in ["", "..15ms"] {
        if !delay.is_empty() {
            inject(run, "delay-fence", delay)?;
        }
        let order = order(run)?;
        inject_no_more(run, "delay-fence")?;
        say(&format!("{} jobs of mixed lengths ended in order", order.jobs));
    }
    no_contexts(run)
}

/// A late fence is late for the guest, and nothing else changes.
pub(crate) fn delayed(run: &mut Run<'_>) -> Result<(), RigError> {
    inject(run, "delay-fence", DELAY)?;
    let order = order(run)?;
    inject_no_more(run, "delay-fence")?;
    at_least("nanoseconds between a job's end and its fence", order.least_delay_ns, LEAST_DELAY_NS)?;
    no_contexts(run)
}

fn order(run: &mut Run<'_>) -> Result<Order, RigError> {
    let before = settled(run)?.unwrap_or_default();
    let order = match ask(run, StockCommand::Order { jobs: JOBS })? {
        StockEvent::Order(order) => order,
        other => return Err(unexpected(&Event::Stock(other))),
    };
    let due = Order { jobs: JOBS, answers: JOBS, least_delay_ns: order.least_delay_ns, ..Order::default() };
    if order != due {
        return Err(RigError::check(format!(
            "The guest saw fences in this order: {order:?}, where {due:?} was due"
        )));
    }
    ended(&counted_since(run, &before)?, JOBS.into(), 0)?;
    Ok(order)
}

/// A job of one context waits, and another context's is done. Where contexts have their own timelines, its fence
/// comes too; where they share one, as with every `vhost-user-gpu-pci`, it has to wait for the earlier fences.
pub(crate) fn between_contexts(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let found = match ask(run, StockCommand::Overtaking)? {
        StockEvent::Overtaking(found) => found,
        other => return Err(unexpected(&Event::Stock(other))),
    };
    let timelines = run.topology.has_all_features();
    let due = Overtaking {
        timelines,
        done: true,
        signalled: timelines,
        first_stands: true,
        answered_last: timelines,
    };
    if found != due {
        return Err(RigError::check(format!(
            "Beside a job that waits, the guest saw {found:?}, not {due:?}"
        )));
    }
    ended(&counted_since(run, &before)?, 2, 0)?;
    no_contexts(run)
}

/// A job fails: its user fence says so, Linux prints the answer and still signals its fence; the context is lost, and
/// others continue.
pub(crate) fn failed(run: &mut Run<'_>) -> Result<(), RigError> {
    sound(run)?;
    fails(run, Failure::WaitsInVain)
}

/// A job hangs, and is killed: the same.
pub(crate) fn hang(run: &mut Run<'_>) -> Result<(), RigError> {
    fails(run, Failure::Hangs)
}

/// With a correct job none of it happens.
fn sound(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let found = failing(run, Failure::Not)?;
    let due = Failing {
        response: DONE,
        signalled: true,
        next_response: DONE,
        others: 3,
        took_ns: found.took_ns,
        ..Failing::default()
    };
    same_failing(found, due)?;
    ended(&counted_since(run, &before)?, 5, 0)?;
    no_contexts(run)
}

fn fails(run: &mut Run<'_>, how: Failure) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let mark = run.console_mark();
    let found = failing(run, how)?;
    say(&format!("The fence of a job that fails came after {}", report::duration(found.took_ns)));
    let due = Failing {
        response: 0x1200,
        says_failed: true,
        signalled: true,
        stopped_there: true,
        next_response: 0x1204,
        others: 3,
        took_ns: found.took_ns,
    };
    same_failing(found, due)?;
    let counts = counted_since(run, &before)?;
    ended(&counts, 3, 1)?;
    same("commands that were refused", "the back-end", counts.command_errors, 2)?;
    refused(run, mark, FAILED, 1)?;
    refused(run, mark, NO_SUCH_CONTEXT, 1)?;
    no_contexts(run)
}

fn failing(run: &mut Run<'_>, how: Failure) -> Result<Failing, RigError> {
    match ask(run, StockCommand::Failing { how })? {
        StockEvent::Failing(found) => Ok(found),
        other => Err(unexpected(&Event::Stock(other))),
    }
}

fn same_failing(found: Failing, due: Failing) -> Result<(), RigError> {
    if found == due {
        return Ok(());
    }
    Err(RigError::check(format!("Of a job that fails the guest saw {found:?}, where {due:?} was due")))
}

/// A completion without its interrupt: the value is in memory, and the fence does not come. Linux (6.12) has no
/// timeout there, and with EVENT_IDX no later completion interrupts before the driver has polled: so the next fence
/// does not come either. An interrupt without a completion brings both; more of these do nothing.
///
/// Where the guest's IOMMU is notified of unmaps late, an INVALIDATE of the whole domain may have removed the page
/// with the driver's event index, and the device interrupts rather than wait for it: there the next completion loses
/// its interrupt too.
pub(crate) fn interrupts(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    begin(run, 1, Until::AtOnce)?;
    all_done(look(run, LIMIT_MS)?, 1)?;
    inject(run, "no-interrupt", "1")?;
    more(run, 1)?;
    silent(look(run, PATIENCE_MS)?, 2)?;
    let wish_is_known = run.topology.invalidations != Invalidations::Lazy;
    if wish_is_known {
        inject_no_more(run, "no-interrupt")?;
    }
    more(run, 1)?;
    silent(look(run, PATIENCE_MS)?, 3)?;
    if !wish_is_known {
        inject_no_more(run, "no-interrupt")?;
    }
    inject(run, "spurious-interrupt", "")?;
    more(run, 1)?;
    all_done(look(run, LIMIT_MS)?, 4)?;
    more(run, 6)?;
    all_done(look(run, LIMIT_MS)?, 10)?;
    inject_no_more(run, "spurious-interrupt")?;
    all_done(standing(run, StockCommand::Finish)?, 10)?;
    ended(&counted_since(run, &before)?, 10, 0)?;
    no_contexts(run)
}

/// All jobs but the first have ended, and the guest knows it only by their user fences.
fn silent(found: Standing, jobs: u32) -> Result<(), RigError> {
    let seen =
        [("user fences", found.done, jobs), ("pages", found.filled, jobs), ("fences", found.signalled, 1)];
    seen.iter().try_for_each(|(what, found, due)| {
        same(&format!("{what} without an interrupt"), "the guest", u64::from(*found), u64::from(*due))
    })
}

fn more(run: &mut Run<'_>, jobs: u32) -> Result<Standing, RigError> {
    standing(run, StockCommand::More(Amount { jobs, until: Until::AtOnce }))
}

fn look(run: &mut Run<'_>, wait_ms: u64) -> Result<Standing, RigError> {
    standing(run, StockCommand::Look { wait_ms })
}
