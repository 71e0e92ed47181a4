//! What is injected into a session: what the mirror keeps that it should not, and misses that are held back. Everything
//! is empty while nothing is turned on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use device_model::addr::{ByteRange, Iova, PAGE_SIZE, SpaceId};
use device_model::mmu::{HostRange, Invalidation, MappedRange, MirrorWriter, Permissions};

use crate::faults::{Bug, Injection};
use device_model::session::miss_port::MissRequest;

/// Pages of which it is remembered where they were.
const REMEMBERED: usize = 1 << 14;

/// What misbehaves in a session, and what it keeps for that.
pub struct Seeded {
    /// What is turned on.
    pub injection: Arc<Injection>,
    /// What the INVALIDATE that is being drained should have taken away.
    unzapped: Vec<MappedRange>,
    /// Where pages were before an INVALIDATE took them away.
    before: BTreeMap<Iova, u64>,
    /// What the last UPDATE claimed.
    claimed: Permissions,
    late: VecDeque<(Duration, MissRequest)>,
}

impl Seeded {
    /// Nothing has happened yet.
    pub fn new(injection: Arc<Injection>) -> Self {
        let (unzapped, before) = (Vec::new(), BTreeMap::new());
        let claimed = Permissions { read: false, write: false };
        Self { injection, unzapped, before, claimed, late: VecDeque::new() }
    }

    /// Notes what an INVALIDATE is about to take away.
    pub fn note(&mut self, mirror: &MirrorWriter, range: ByteRange<Iova>) {
        let (keep, remember) =
            (self.injection.is_on(Bug::DropZap), self.injection.is_on(Bug::StaleTranslation));
        if !keep && !remember {
            return;
        }
        mirror.mapped_ranges(SpaceId::DEVICE, range.page_aligned(), |mapped| {
            let Some(part) = part_of(mapped, range.page_aligned()) else { return };
            if remember {
                let pages = (part.range.first().raw()..=part.range.last().raw()).step_by(PAGE_SIZE as usize);
                let hosts = (part.host..).step_by(PAGE_SIZE as usize);
                let room = REMEMBERED.saturating_sub(self.before.len());
                self.before.extend(pages.map(Iova::new).zip(hosts).take(room));
            }
            if keep {
                self.unzapped.push(part);
            }
        });
    }

    /// The seeded bug "drop zap": what should be gone is there again.
    pub fn undo_zap(&mut self, mirror: &mut MirrorWriter) {
        for kept in self.unzapped.drain(..) {
            self.injection.fires(Bug::DropZap);
            map(mirror, kept);
        }
    }

    /// The seeded bug "stale translation": a page that was mapped just now is where it was before.
    pub fn use_stale(&mut self, mirror: &mut MirrorWriter, page: Iova, permissions: Permissions) {
        if !self.injection.is_on(Bug::StaleTranslation) {
            return;
        }
        if let Some(host) = self.before.get(&page).copied() {
            self.injection.fires(Bug::StaleTranslation);
            map(mirror, MappedRange { space: SpaceId::DEVICE, range: page.page_range(), host, permissions });
        }
    }

    /// Memory goes away: nothing that leads there is kept.
    pub fn forget(&mut self) {
        self.unzapped.clear();
        self.before.clear();
    }

    /// Notes what an UPDATE claims.
    pub fn claims(&mut self, claimed: Permissions) {
        self.claimed = claimed;
    }

    /// The permission that is cached for a miss that has proved `proved`.
    pub fn permissions(&self, proved: Permissions) -> Permissions {
        if !self.injection.fires(Bug::CacheClaimedPermission) {
            return proved;
        }
        Permissions { read: proved.read || self.claimed.read, write: proved.write || self.claimed.write }
    }

    /// Takes a request for misses; it comes back from [`Self::due`] when it may be sent, in order.
    pub fn hold_back(&mut self, now: Duration, request: MissRequest) {
        let delay = self.injection.delay(Bug::DelayMiss).unwrap_or_default();
        let behind = self.late.back().map(|(due, _)| *due).unwrap_or_default();
        self.late.push_back((now.saturating_add(delay).max(behind), request));
    }

    /// A request whose time has come.
    pub fn due(&mut self, now: Duration) -> Option<MissRequest> {
        self.late.front().filter(|(due, _)| *due <= now)?;
        self.late.pop_front().map(|(_, request)| request)
    }

    /// When the next request may be sent.
    pub fn next_due(&self) -> Option<Duration> {
        self.late.front().map(|(due, _)| *due)
    }

    /// Nobody waits for misses any more.
    pub fn forget_misses(&mut self) {
        self.late.clear();
    }

    /// Whether a drain is taken for done by one of the seeded bugs.
    pub fn skips(&self, invalidation: &Invalidation) -> bool {
        let injection = &self.injection;
        let [section, pin] = [Bug::SkipSection, Bug::SkipPin].map(|bug| injection.is_on(bug));
        if injection.fires(Bug::AckBeforeDrain) {
            return true;
        }
        if !section && !pin {
            return false;
        }
        let left = invalidation.in_flight();
        let only_sections = left.pins == 0 && left.sections > 0;
        let only_pins = left.sections == 0 && left.pins > 0;
        only_sections && injection.fires(Bug::SkipSection) || only_pins && injection.fires(Bug::SkipPin)
    }
}

/// The part of what is mapped that lies in `range`.
fn part_of(mapped: MappedRange, range: ByteRange<Iova>) -> Option<MappedRange> {
    let first = mapped.range.first().max(range.first());
    let part = ByteRange::inclusive(first, mapped.range.last().min(range.last()))?;
    let host = mapped.host + (first.raw() - mapped.range.first().raw());
    Some(MappedRange { range: part, host, ..mapped })
}

fn map(mirror: &mut MirrorWriter, mapped: MappedRange) {
    let MappedRange { space, range, host, permissions } = mapped;
    let Ok(len) = usize::try_from(range.len()) else { return };
    let start = std::ptr::with_exposed_provenance_mut(host as usize);
    // SAFETY: INVARIANT: the mirror had this range, and what it was made from is there until the memory table changes;
    // `Seeded::forget` comes before that.
    let host = unsafe { HostRange::new(start, len) };
    // What cannot be mapped does no harm.
    let _ = mirror.map(space, range, host, permissions);
}
