//! Jobs that wait for fences: of other jobs, by files and by points of a timeline, and of another driver; and buffers
//! that are shared with it. Knows what Linux itself does there; knows nothing of the calls.

use super::{ask, counted_since, ended, no_contexts};
use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::report::{self, say};
use crate::rig::run::Run;
use crate::rig::scenario::settled;
use crate::rig::variation::Variation;
use guest_agent::protocol::Event;
use guest_agent::stock_words::{Foreign, Points, Shared, StockCommand, StockEvent};

/// A driver that has memory, and fences that a program signals.
pub(crate) const VGEM: Variation = Variation { modules: &["vgem"], ..Variation::NONE };
/// Jobs that complete with and without the points of a timeline: kernels before 6.6 have no syncobjs here.
const JOBS: u32 = 6;
const JOBS_WITHOUT: u32 = 2;
/// vgem's fences expire after ten seconds, which its timer rounds.
const EXPIRY_NS: std::ops::Range<u64> = 9_000_000_000..15_000_000_000;
/// Linux 6.12 accepts no buffer of another driver.
const ENODEV: i32 = 19;

/// Merged sync_files, a wait for a point of a timeline before anything will signal it, an eventfd, and jobs behind
/// points.
pub(crate) fn points(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let found = match ask(run, StockCommand::Points)? {
        StockEvent::Points(found) => found,
        other => return Err(unexpected(&Event::Stock(other))),
    };
    let timelines = run.topology.has_all_features();
    let all = Points {
        offered: true,
        timelines,
        merged: true,
        waited_before_submit: true,
        eventfd: true,
        counted: true,
        // Where all contexts share a timeline, Linux assumes that the device keeps their jobs in order, and waits for
        // nothing. The device promises no order between contexts.
        held_back: timelines,
        done: JOBS,
    };
    let due = if found.offered {
        all
    } else {
        Points { timelines, merged: true, done: JOBS_WITHOUT, ..Points::default() }
    };
    if !found.offered {
        say("This driver has no syncobjs: only merged files were looked at");
    }
    if found != due {
        return Err(RigError::check(format!(
            "Of jobs behind fences the guest saw {found:?}, where {due:?} was due"
        )));
    }
    ended(&counted_since(run, &before)?, due.done.into(), 0)?;
    no_contexts(run)
}

/// A job behind a fence of another driver waits, in the call that submits it; others continue; the waiting process
/// can be killed; and vgem limits the life of its fences.
pub(crate) fn foreign(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let found = match ask(run, StockCommand::Foreign)? {
        StockEvent::Foreign(found) => found,
        other => return Err(unexpected(&Event::Stock(other))),
    };
    say(&format!("A fence that nobody signals held a job for {}", report::duration(found.expired_ns)));
    let due = Foreign { stood: true, beside: 5, went_on: true, killed: true, expired_ns: found.expired_ns };
    if found != due || !EXPIRY_NS.contains(&found.expired_ns) {
        return Err(RigError::check(format!(
            "Of a fence of another driver's the guest saw {found:?}, not {due:?}"
        )));
    }
    ended(&counted_since(run, &before)?, 7, 0)?;
    no_contexts(run)
}

/// Buffers are exported to another driver and imported again, and exist as long as there is a reference, also under a
/// job in flight. Linux 6.12 refuses those of another driver, without harm.
pub(crate) fn share(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let found = match ask(run, StockCommand::Share)? {
        StockEvent::Shared(found) => found,
        other => return Err(unexpected(&Event::Stock(other))),
    };
    let due = Shared { seen: true, outlives: true, comes_back: true, import_error: ENODEV, done: 2 };
    if found != due {
        return Err(RigError::check(format!(
            "Of shared buffers the guest saw {found:?}, where {due:?} was due"
        )));
    }
    ended(&counted_since(run, &before)?, 2, 0)?;
    no_contexts(run)
}
