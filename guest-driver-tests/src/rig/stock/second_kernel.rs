//! Another kernel takes over the device from one that has ended or crashed, with a job of the old one that keeps
//! writing. Knows what of the old kernel is still in force when the new one begins, and what must not be written any
//! more then.

use super::platform::{release_screen, works};
use super::{ask, ended, inject, inject_no_more};
use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::memory::{self, Pages};
use crate::rig::process::wait_until;
use crate::rig::report::say;
use crate::rig::run::{Mark, Run};
use crate::rig::scenario::{at_least, picture, same, settled};
use crate::rig::stats::Stats;
use crate::rig::variation::Variation;
use guest_agent::protocol::{Amount, Command, Event, Way, Word};
use guest_agent::stock_words::{StockCommand, WRITER};
use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

const MIB: u32 = 1024;
/// A guest that reserves memory for a second kernel.
pub(crate) const KDUMP: Variation =
    Variation { guest: "crashkernel=256M", memory: Some(MIB), second_kernel: true, ..Variation::NONE };
/// A guest that has a second kernel, and all memory for either.
pub(crate) const KEXEC: Variation = Variation { memory: Some(MIB), second_kernel: true, ..Variation::NONE };
/// The engine is slow, so that the job outlives the start of a second kernel.
const STEP: &str = "1ms";
/// For a kernel to end and another to begin.
const START_LIMIT: Duration = Duration::from_secs(120);
const PAGE: u64 = 4096;
/// Pages of the old kernel that the new one reads.
const READ: usize = 64;
const AMOUNT: Amount = Amount { page_flips: 5, dirty_flushes: 5, cursor_moves: 5 };
/// What Linux says first.
const FIRST_LINE: &str = "] Linux version ";
/// What it prints when it takes over an IOMMU that translates.
const TAKEN_OVER: &str = "Copied translation tables from previous kernel";

/// The kernel crashes, and the reserved one dumps its memory. Until that resets the device, the job continues to
/// write where it may: the old translations are in force. It never writes to the reserved memory, it has ended when
/// the new driver begins, and what it wrote is in the dump.
pub(crate) fn crash(run: &mut Run<'_>) -> Result<(), RigError> {
    let reserved = load(run, Way::Crash)?
        .ok_or_else(|| RigError::check("The kernel has kept no memory for a second one"))?;
    let before = begin_writer(run)?;
    let mark = run.console_mark();
    enter(run, Way::Crash, mark)?;
    run.forgive(mark, "Kernel panic");
    let counts = comes_up(run, mark)?.since(&before);
    ended(&counts, 0, 1)?;
    let pages = left_behind(run, &reserved)?;
    if run.console_since(mark).contains(TAKEN_OVER) {
        taken_over(run, &counts)?;
    }
    is_in_the_dump(run, &pages)?;
    as_after_a_boot(run)?;
    if left_behind(run, &reserved)? != pages {
        let text = "What the crashed kernel's job had written has changed after its end";
        return Err(RigError::Corrupted(text.into()));
    }
    Ok(())
}

/// The kernel ends as for a reboot, and jumps into another. Before it jumps the job has stopped: nothing is written
/// under the new kernel, which owns all memory.
pub(crate) fn jump(run: &mut Run<'_>) -> Result<(), RigError> {
    load(run, Way::Jump)?;
    let before = begin_writer(run)?;
    let mark = run.console_mark();
    enter(run, Way::Jump, mark)?;
    let at_the_jump = run.stats()?.unwrap_or_default();
    let after = comes_up(run, mark)?;
    ended(&after.since(&before), 0, 1)?;
    let written = after.since(&at_the_jump).bytes_moved;
    same("bytes moved for the old kernel under the new one", "the back-end", written, 0)?;
    as_after_a_boot(run)
}

/// Makes the guest enter its second kernel, and waits until that prints its name.
fn enter(run: &mut Run<'_>, way: Way, mark: Mark) -> Result<(), RigError> {
    run.tell(Command::Enter { way })?;
    wait_until("The second kernel's first line", START_LIMIT, || {
        Ok(run.console_since(mark).contains(FIRST_LINE))
    })
}

/// Waits for the agent in the second kernel. Returns what had been counted when all work had ended there.
fn comes_up(run: &mut Run<'_>, mark: Mark) -> Result<Stats, RigError> {
    match run.hear("The agent in the second kernel")? {
        Event::Ready { .. } => {}
        other => return Err(unexpected(&other)),
    }
    // A reset of virtio-iommu removes its translations, and it comes up before the devices behind it.
    run.forgive(mark, "fault from EP");
    let counts = settled(run)?.unwrap_or_default();
    inject_no_more(run, "step-delay")?;
    Ok(counts)
}

/// Loads the guest's second kernel, and returns which memory was reserved for it, if any.
fn load(run: &mut Run<'_>, way: Way) -> Result<Option<RangeInclusive<u64>>, RigError> {
    match run.ask("The load of a second kernel", Command::Load { way })? {
        Event::Loaded { reserved } => Ok(reserved.map(|[first, last]| first..=last)),
        other => Err(unexpected(&other)),
    }
}

/// Starts the job that writes; returns what had been counted before.
fn begin_writer(run: &mut Run<'_>) -> Result<Stats, RigError> {
    let before = settled(run)?.unwrap_or_default();
    inject(run, "step-delay", STEP)?;
    ask(run, StockCommand::Write)?;
    Ok(before)
}

/// The new kernel took over the IOMMU as it was: it flushed translations with the old job in flight, and the old job
/// continued with those that it found again.
fn taken_over(run: &mut Run<'_>, counts: &Stats) -> Result<(), RigError> {
    let hits = counts.invalidations_with_work_in_flight;
    say(&format!("{hits} invalidations of a second kernel found the first one's job in flight"));
    // It does not know whether the device caches translations, and flushes none.
    if !run.topology.has_ats() {
        at_least("invalidations that found the old job in flight", hits, 1)?;
    }
    same("pages that the old job was refused", "the back-end", counts.miss_refused, 0)
}

/// What the writer has left in memory: its whole buffer, as it was when it was stopped in the middle of a pass; and
/// nothing in the reserved memory.
fn left_behind(run: &mut Run<'_>, reserved: &RangeInclusive<u64>) -> Result<Pages, RigError> {
    let pages = memory::written(run, MIB)?;
    if let Some((address, value)) = pages.iter().find(|(address, _)| reserved.contains(address)) {
        return Err(RigError::Corrupted(format!(
            "The old kernel's job has written {value:#x} to {address:#x}, which was kept for the new one"
        )));
    }
    same("pages of the job's that are as it wrote them", "the rig", pages.len() as u64, WRITER.bytes / PAGE)?;
    let values: BTreeSet<u32> = pages.values().copied().collect();
    match (values.first(), values.last()) {
        (Some(first), Some(last)) if last - first <= 1 => Ok(pages),
        _ => Err(RigError::check(format!("The job has left pages of these passes: {values:#x?}"))),
    }
}

/// The new kernel reads in the old one's memory what is there.
fn is_in_the_dump(run: &mut Run<'_>, pages: &Pages) -> Result<(), RigError> {
    let wanted: Vec<_> = pages.iter().map(|(&address, &value)| Word { address, value }).take(READ).collect();
    let addresses = wanted.iter().map(|word| word.address).collect();
    match run.ask("What is in the dump", Command::Dump { addresses })? {
        Event::Dumped { words } if words == wanted => Ok(()),
        Event::Dumped { words } => {
            Err(RigError::check(format!("The dump has {words:#x?}, where {wanted:#x?} is in memory")))
        }
        other => Err(unexpected(&other)),
    }
}

/// The device works as after a boot.
fn as_after_a_boot(run: &mut Run<'_>) -> Result<(), RigError> {
    if run.topology.has_display {
        picture(run, AMOUNT)?;
        release_screen(run)?;
    }
    works(run)
}
