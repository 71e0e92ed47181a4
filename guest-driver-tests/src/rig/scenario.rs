//! What is done to a running guest, and what must then hold on both sides: in the guest's counts, in the back-end's,
//! on the screen. Knows nothing of booting.

use crate::rig::console::COMMANDS_LEFT_BEHIND;
use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::process::wait_until;
use crate::rig::run::Run;
use crate::rig::stats::{self, Stats};
use crate::rig::topology::{Invalidations, Topology};
use guest_agent::protocol::{Amount, Command, Drawn, Driver, Event};
use serde_json::json;
use std::time::{Duration, Instant};

/// What a scenario usually draws.
const AMOUNT: Amount = Amount { page_flips: 30, dirty_flushes: 10, cursor_moves: 20 };
const STOPS: u32 = 10;
const CURSOR_PIXELS: u64 = 64 * 64;
const HITS_TO_SHOW: u64 = 20;
const TIME_TO_SHOW: Duration = Duration::from_secs(2);
const HIT_LIMIT: Duration = Duration::from_secs(30);
/// An audit asks for at most 16 pages a millisecond.
const AUDIT_LIMIT: Duration = Duration::from_secs(30);
/// An emulated guest on a busy machine continues to draw for a while.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);
const SILENCE: Duration = Duration::from_millis(50);

/// What a scenario requires.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: it can run anywhere.
    Nothing,
    /// A screen to look at.
    Screen,
    /// An IOMMU in front of the device.
    Iommu,
    /// A device that translates addresses by itself.
    Ats,
    /// A front-end that passes all feature bits of the device through.
    AllFeatures,
    /// An IOMMU that is notified of each unmap at once. (Requesting a page that is about to be unmapped leaves a
    /// fault in the guest's log.)
    Strict,
}

/// Whether a topology has what a scenario needs.
pub fn has(needs: Needs, topology: &Topology) -> bool {
    match needs {
        Needs::Nothing => true,
        Needs::Screen => topology.has_display,
        Needs::Iommu => topology.has_iommu(),
        Needs::Ats => topology.has_ats(),
        Needs::AllFeatures => topology.has_all_features(),
        Needs::Strict => topology.invalidations == Invalidations::Strict,
    }
}

/// Some drawing of each kind.
pub(crate) fn usual_picture(run: &mut Run<'_>) -> Result<(), RigError> {
    picture(run, AMOUNT).map(drop)
}

/// The guest draws; the screen shows it, and both counts agree.
pub fn picture(run: &mut Run<'_>, amount: Amount) -> Result<Drawn, RigError> {
    let before = settled(run)?;
    let drawn = run.draw(Command::Picture(amount))?;
    let Amount { page_flips, dirty_flushes, cursor_moves } = amount;
    same("page flips", "the guest", drawn.page_flips.into(), page_flips.into())?;
    same("dirty flushes", "the guest", drawn.dirty_flushes.into(), dirty_flushes.into())?;
    same("cursor moves", "the guest", drawn.cursor_moves.into(), cursor_moves.into())?;
    run.wait_for_picture(&drawn)?;
    if let (Some(before), Some(after)) = (before, settled(run)?) {
        no_troubles(&before, &after)?;
        compare(&drawn, &before, &after)?;
    }
    Ok(drawn)
}

/// The back-end met nothing that a correct, undisturbed driver does not do.
pub(super) fn no_troubles(before: &Stats, after: &Stats) -> Result<(), RigError> {
    match stats::troubles(before, after).as_slice() {
        [] => Ok(()),
        troubles => Err(RigError::check(format!("The back-end counted troubles: {troubles:?}"))),
    }
}

/// What the guest did and what the back-end did for it: both counts agree.
fn compare(drawn: &Drawn, before: &Stats, after: &Stats) -> Result<(), RigError> {
    let who = "the back-end";
    let shown = u64::from(drawn.mode_sets + drawn.page_flips + drawn.dirty_flushes);
    let images = u64::from(drawn.cursor_images);
    same("transfers", who, after.jobs_done - before.jobs_done, shown + images)?;
    same("cursor images", who, after.cursor_updates - before.cursor_updates, images)?;
    same("cursor moves", who, after.cursor_moves - before.cursor_moves, drawn.cursor_moves.into())?;
    let pixels = shown * u64::from(drawn.width) * u64::from(drawn.height) + images * CURSOR_PIXELS;
    same("bytes moved", who, after.bytes_moved - before.bytes_moved, pixels * 4)?;
    same("flushes", who, after.flushes - before.flushes, shown)
}

/// The invalidations of this topology came, and found only what they may find in flight.
pub(crate) fn invalidations(run: &mut Run<'_>) -> Result<(), RigError> {
    let expected = run.topology.invalidations;
    let before = run.stats()?;
    if expected == Invalidations::Lazy && before.is_some() {
        draw_until_hit(run, 1)?;
    }
    let (Some(before), Some(stats)) = (before, settled(run)?) else { return Ok(()) };
    no_troubles(&before, &stats)?;
    match expected {
        Invalidations::None => {
            same("misses", "the back-end", stats.misses, 0)?;
            same("invalidations", "the back-end", stats.invalidations, 0)
        }
        Invalidations::Strict => {
            at_least("invalidations", stats.invalidations, 1)?;
            let hits = stats.invalidations_with_work_in_flight;
            same("invalidations that found work in flight", "the back-end", hits, 0)
        }
        Invalidations::Lazy => at_least("invalidations", stats.invalidations, 1),
    }
}

/// Requests every translation that the device holds again: none has ended without an INVALIDATE.
pub(crate) fn audit(run: &mut Run<'_>) -> Result<(), RigError> {
    settled(run)?;
    let mut audit = run.control("audit", json!({ "restart": true }))?;
    wait_until("The end of the audit", AUDIT_LIMIT, || {
        let done = audit.as_ref().is_none_or(|audit| audit["state"] == "done");
        if !done {
            audit = run.control("audit", json!({}))?;
        }
        Ok(done)
    })?;
    let Some(audit) = audit else { return Ok(()) };
    at_least("translations in the audit", audit["checked"].as_u64().unwrap_or(0), 1)?;
    let is_good = audit["stale"] == json!([]) && audit["unanswered"] == 0 && audit["interrupted"] == false;
    if is_good { Ok(()) } else { Err(RigError::check(format!("The audit has found: {audit}"))) }
}

/// The guest draws, while buffers come and go, until there is enough to check: in lazy mode, invalidations that found
/// work in flight; otherwise some frames.
pub fn draw_under_invalidations(run: &mut Run<'_>) -> Result<Drawn, RigError> {
    if run.topology.invalidations == Invalidations::Lazy && run.stats()?.is_some() {
        return draw_until_hit(run, HITS_TO_SHOW);
    }
    start_drawing(run)?;
    std::thread::sleep(TIME_TO_SHOW);
    stop_drawing(run)
}

/// The guest draws until `hits` more invalidations have found work in flight.
fn draw_until_hit(run: &mut Run<'_>, hits: u64) -> Result<Drawn, RigError> {
    let in_flight = |stats: Option<Stats>| stats.unwrap_or_default().invalidations_with_work_in_flight;
    let before = in_flight(run.stats()?);
    start_drawing(run)?;
    wait_until("An invalidation that finds work in flight", HIT_LIMIT, || {
        Ok(in_flight(run.stats()?) >= before + hits)
    })?;
    stop_drawing(run)
}

/// The machine is stopped in the middle of drawing, again and again: no activity while it is stopped, nothing lost
/// after.
pub(crate) fn stop_and_cont(run: &mut Run<'_>) -> Result<(), RigError> {
    let begin = run.stats()?;
    start_drawing(run)?;
    for _ in 0..STOPS {
        run.qemu().qmp().stop()?;
        let standing = run.stats()?;
        std::thread::sleep(SILENCE);
        let (then, now) = (standing.map(|stats| touches(&stats)), run.stats()?.map(|stats| touches(&stats)));
        if now != then {
            let text = format!("The back-end went on while the machine was stopped: {then:?}, then {now:?}");
            return Err(RigError::check(text));
        }
        run.qemu().qmp().cont()?;
        let moved = |stats: Option<Stats>| stats.unwrap_or_default().flushes;
        let before = moved(standing);
        if standing.is_some() {
            wait_until("The next flush after `cont`", HIT_LIMIT, || Ok(moved(run.stats()?) > before))?;
        }
    }
    stop_drawing(run)?;
    match (begin, settled(run)?) {
        (Some(before), Some(after)) => no_troubles(&before, &after),
        _ => Ok(()),
    }
}

/// What cannot change without touching the guest's memory or sending MISSes to the front-end. (A job that ended just
/// before the stop may be counted after it.)
fn touches(stats: &Stats) -> [(&'static str, u64); 4] {
    [
        ("commands", stats.commands),
        ("cursor commands", stats.cursor_commands),
        ("bytes moved", stats.bytes_moved),
        ("misses", stats.misses),
    ]
}

/// The PCI driver is unbound from an idle device, with the IOMMU's domain; then everything is as after a boot.
pub(crate) fn rebind_idle(run: &mut Run<'_>) -> Result<(), RigError> {
    release_screen(run)?;
    settled(run)?;
    rebind(run, Driver::VirtioPci)
}

/// Releases the screen.
pub(crate) fn release_screen(run: &mut Run<'_>) -> Result<(), RigError> {
    match run.ask("The screen's release", Command::Release)? {
        Event::Released => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// The display's driver is unbound with transfers in flight; then everything is as after a boot. (In between, misses
/// may be refused and jobs fail: the driver unmaps their memory.)
pub(crate) fn rebind_drawing(run: &mut Run<'_>) -> Result<(), RigError> {
    start_drawing(run)?;
    leaving_commands_behind(run, |run| rebind(run, Driver::VirtioGpu))
}

/// Takes the device away from its driver while commands are in flight, and forgives the guest's kernel what it says then.
pub(super) fn leaving_commands_behind<T>(
    run: &mut Run<'_>,
    act: impl FnOnce(&mut Run<'_>) -> Result<T, RigError>,
) -> Result<T, RigError> {
    let mark = run.console_mark();
    let result = act(run);
    run.forgive_kernel(mark, &COMMANDS_LEFT_BEHIND);
    result
}

fn rebind(run: &mut Run<'_>, driver: Driver) -> Result<(), RigError> {
    match run.ask("The driver's return", Command::Rebind { driver })? {
        Event::Rebound => picture(run, AMOUNT).map(drop),
        other => Err(unexpected(&other)),
    }
}

/// The guest reboots with transfers in flight; then everything is as after the first boot. (In between, misses are
/// refused and rings break: Linux 6.12 switches the IOMMU off before it resets the device.)
pub(crate) fn reboot_drawing(run: &mut Run<'_>) -> Result<(), RigError> {
    start_drawing(run)?;
    run.reboot()?;
    picture(run, AMOUNT).map(drop)
}

fn start_drawing(run: &mut Run<'_>) -> Result<(), RigError> {
    match run.ask("The guest's first page flip", Command::Draw)? {
        Event::Drawing => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn stop_drawing(run: &mut Run<'_>) -> Result<Drawn, RigError> {
    let drawn = run.draw(Command::Stop)?;
    run.wait_for_picture(&drawn)?;
    Ok(drawn)
}

/// The back-end's counts once every job has ended, by itself or by a reset, and they no longer change.
pub(super) fn settled(run: &mut Run<'_>) -> Result<Option<Stats>, RigError> {
    let mut last = run.stats()?;
    let mut since = Instant::now();
    let wait = wait_until("The end of all work in the back-end", SETTLE_LIMIT, || {
        let now = run.stats()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        let ended = |stats: Stats| stats.jobs_done + stats.jobs_failed + stats.jobs_discarded;
        let all = last.is_none_or(|stats| stats.jobs_submitted == ended(stats));
        Ok(last.is_none() || all && since.elapsed() >= SILENCE)
    });
    match (wait, last) {
        (Err(RigError::Late { what, limit }), Some(last)) => {
            let what = format!("{what} (it has counted {last:?})");
            Err(RigError::Late { what, limit })
        }
        (wait, last) => wait.map(|()| last),
    }
}

pub(super) fn same(what: &str, who: &str, found: u64, wanted: u64) -> Result<(), RigError> {
    if found == wanted {
        return Ok(());
    }
    Err(RigError::check(format!("Counted {found} {what} by {who}, where {wanted} were due")))
}

pub(super) fn at_least(what: &str, found: u64, wanted: u64) -> Result<(), RigError> {
    if found >= wanted {
        return Ok(());
    }
    Err(RigError::check(format!("Counted {found} {what}, where {wanted} or more were due")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_transfer_flush_or_byte_too_few_is_noticed() {
        let drawn = Drawn {
            width: 2,
            height: 2,
            mode_sets: 1,
            page_flips: 2,
            dirty_flushes: 1,
            cursor_images: 1,
            ..Drawn::default()
        };
        let bytes_moved = 4 * 16 + 64 * 64 * 4;
        let after = Stats { flushes: 4, jobs_done: 5, cursor_updates: 1, bytes_moved, ..Stats::default() };
        let check = |after| compare(&drawn, &Stats::default(), &after).map_err(|error| error.to_string());
        assert_eq!(check(after), Ok(()));
        let text = |counted: &str, due: &str| {
            Err(format!("Counted {counted} by the back-end, where {due} were due"))
        };
        assert_eq!(check(Stats { jobs_done: 4, ..after }), text("4 transfers", "5"));
        assert_eq!(check(Stats { cursor_updates: 0, ..after }), text("0 cursor images", "1"));
        assert_eq!(check(Stats { bytes_moved: 1, ..after }), text("1 bytes moved", &bytes_moved.to_string()));
        assert_eq!(check(Stats { flushes: 3, ..after }), text("3 flushes", "4"));
    }
}
