//! Memory under stress: a buffer that is large for a table of translations, memory modules and a balloon that take
//! the guest's memory away, and a kernel that bounces all DMA. Knows what contents must be left where.

use super::platform::{JOBS, PAGES, works};
use super::{all_done, ask, begin, counted_since, ended, in_flight, no_contexts, standing, stands};
use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::hot_plug;
use crate::rig::process::wait_until;
use crate::rig::run::Run;
use crate::rig::scenario::{no_troubles, picture, same, settled};
use crate::rig::variation::Variation;
use guest_agent::protocol::{Amount, Command, Event};
use guest_agent::stock_words::{Huge, Standing, StockCommand, StockEvent, Until};
use job_stream::Mode;
use serde_json::{Value, json};
use std::time::Duration;

/// A guest that can give memory back.
pub(crate) const BALLOON: Variation = Variation {
    qemu: &["-device", "virtio-balloon-pci,id=balloon"],
    modules: &["virtio_balloon"],
    ..Variation::NONE
};
/// A kernel that bounces all DMA. Without `iommu_platform` the driver does not ask the kernel for addresses.
pub(crate) const BOUNCING: Variation =
    Variation { guest: "swiotlb=force", qemu: &["-set", "device.gpu.iommu_platform=on"], ..Variation::NONE };
/// MiB of the large buffer.
const HUGE: u32 = 64;
/// Bytes that its job does not touch.
const EDGES: u64 = 2 * 0x1234;
/// MiB that the guest keeps, and that it had.
const LEFT: u64 = 224;
const ALL: u64 = 512;
const BALLOON_LIMIT: Duration = Duration::from_secs(60);
const STORM: u32 = 40;
/// For fences that have to come.
const FENCE_MS: u64 = 20_000;
const AMOUNT: Amount = Amount { page_flips: 5, dirty_flushes: 5, cursor_moves: 0 };

/// One job fills a buffer of many thousand pages, and computes its checksum.
pub(crate) fn huge(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    let found = match ask(run, StockCommand::Huge { mib: HUGE })? {
        StockEvent::Huge(found) => found,
        other => return Err(unexpected(&Event::Stock(other))),
    };
    let all = u64::from(HUGE) << 20;
    let due = Huge { bytes: all - EDGES, filled: all - EDGES, poison: EDGES, checksum: true };
    if found != due {
        return Err(RigError::check(format!(
            "A job on a large buffer has left {found:?}, where {due:?} was due"
        )));
    }
    let after = settled(run)?.unwrap_or_default();
    no_troubles(&before, &after)?;
    let counts = after.since(&before);
    ended(&counts, 1, 0)?;
    same("bytes moved", "the back-end", counts.bytes_moved, 2 * all - EDGES)?;
    no_contexts(run)
}

/// A balloon takes most of the guest's memory away and returns it, while jobs come and go: none of them is affected.
pub(crate) fn balloon(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    begin(run, JOBS, Until::Told)?;
    inflate(run, LEFT)?;
    inflate(run, ALL)?;
    all_done(standing(run, StockCommand::Finish)?, JOBS)?;
    run.tell(Command::Jobs { mode: Mode::Fence, storm: STORM })?;
    inflate(run, LEFT)?;
    match run.hear("The end of the guest's jobs")? {
        Event::Ran(_) => {}
        other => return Err(unexpected(&other)),
    }
    inflate(run, ALL)?;
    let after = settled(run)?.unwrap_or_default();
    no_troubles(&before, &after)?;
    works(run)
}

/// A memory module is plugged in and unplugged under jobs in flight: they wait as before, and succeed. (Jobs in such
/// memory are shown by the user-space driver: the stock driver's memory cannot be unplugged.)
pub(crate) fn hot_plug(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    begin(run, JOBS, Until::Told)?;
    hot_plug::plug(run)?;
    in_flight(standing(run, StockCommand::Look { wait_ms: 0 })?, JOBS)?;
    hot_plug::unplug(run)?;
    in_flight(standing(run, StockCommand::Look { wait_ms: 0 })?, JOBS)?;
    all_done(standing(run, StockCommand::Finish)?, JOBS)?;
    let after = settled(run)?.unwrap_or_default();
    no_troubles(&before, &after)?;
    ended(&after.since(&before), JOBS.into(), 0)?;
    works(run)
}

/// Sets the balloon to leave this many MiB to the guest, and waits until it has.
fn inflate(run: &mut Run<'_>, mib: u64) -> Result<(), RigError> {
    run.qemu().qmp().execute("balloon", json!({ "value": mib << 20 }))?;
    wait_until("A balloon of that size", BALLOON_LIMIT, || {
        let answer = run.qemu().qmp().execute("query-balloon", json!({}))?;
        Ok(answer.get("actual").and_then(Value::as_u64) == Some(mib << 20))
    })
}

/// The kernel bounces all DMA. What the guest draws is copied over in time. What jobs write is not: Linux 6.12 never
/// copies it back while a buffer exists, so fences come and memory is unchanged. Behind an IOMMU nothing is bounced.
pub(crate) fn bouncing(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    begin(run, JOBS, Until::AtOnce)?;
    let found = standing(run, StockCommand::Look { wait_ms: FENCE_MS })?;
    if run.topology.has_iommu() {
        all_done(found, JOBS)?;
    } else {
        stands(found, Standing { submitted: JOBS, signalled: JOBS, poison: PAGES, ..Standing::default() })?;
    }
    standing(run, StockCommand::Forget)?;
    ended(&counted_since(run, &before)?, JOBS.into(), 0)?;
    no_contexts(run)?;
    if run.topology.has_display {
        picture(run, AMOUNT)?;
    }
    Ok(())
}
