//! Fault injection (`--inject`) at the session's seams: what goes in, what comes out, and what the mirror holds
//! afterwards. The session itself knows nothing of it. Everything here is empty while no fault is turned on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use device_model::addr::{ByteRange, DomainId, Iova, PAGE_SIZE};
use device_model::mmu::{HostRange, InFlight, MappedRange, MirrorWriter, Permissions};
use device_model::session::Update;
use device_model::session::miss_port::MissRequest;

use crate::fault_injection::{Bug, Injection};

/// Maximum number of pages whose old translation is remembered.
const REMEMBERED: usize = 1 << 14;

/// An UPDATE whose MISS the front-end has not granted yet, for the seeded bug that believes it all the same.
#[derive(Clone, Copy, Debug)]
struct Staged {
    range: ByteRange<Iova>,
    host: HostRange,
    /// An INVALIDATE of its range has come since.
    invalidated: bool,
}

/// The seeded bugs of a session, and the data that they need.
pub(super) struct InjectedFaults {
    injection: Arc<Injection>,
    /// The ranges that the INVALIDATE being drained should have removed.
    unzapped: Vec<MappedRange>,
    /// Translations of pages before an INVALIDATE removed them.
    before: BTreeMap<Iova, u64>,
    /// The permissions that the last UPDATE claimed.
    claimed: Option<Permissions>,
    /// By first address, and only while the bug is on.
    staged: BTreeMap<Iova, Staged>,
    /// Miss requests that are held back, with the time at which they may be sent.
    late: VecDeque<(Duration, MissRequest)>,
    /// The INVALIDATE being drained was already acked.
    acked_early: bool,
}

impl InjectedFaults {
    /// Nothing is held back or remembered.
    pub(super) fn new(injection: Arc<Injection>) -> Self {
        Self {
            injection,
            unzapped: Vec::new(),
            before: BTreeMap::new(),
            claimed: None,
            staged: BTreeMap::new(),
            late: VecDeque::new(),
            acked_early: false,
        }
    }

    /// An INVALIDATE has come; returns the range that is passed on to the session.
    pub(super) fn invalidating(&mut self, mirror: &MirrorWriter, range: ByteRange<Iova>) -> ByteRange<Iova> {
        for staged in self.staged.values_mut() {
            staged.invalidated |= staged.range.page_aligned().overlaps(range.page_aligned());
        }
        self.note(mirror, range);
        if self.injection.fires(Bug::DrainEverything) { ByteRange::everything() } else { range }
    }

    /// Remembers the translations that an INVALIDATE is about to remove.
    fn note(&mut self, mirror: &MirrorWriter, range: ByteRange<Iova>) {
        let [keep, remember] = [Bug::DropZap, Bug::StaleTranslation].map(|bug| self.injection.is_on(bug));
        if !keep && !remember {
            return;
        }
        mirror.mapped_ranges(DomainId::DEVICE, range.page_aligned(), |mapped| {
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

    /// Whether an INVALIDATE is acked before the end of its drain, while `left` is in flight. True once per drain.
    pub(super) fn acks_early(&mut self, left: InFlight) -> bool {
        if self.acked_early {
            return false;
        }
        let injection = &self.injection;
        let (only_sections, only_pins) =
            (left.pins == 0 && left.sections > 0, left.sections == 0 && left.pins > 0);
        self.acked_early = injection.fires(Bug::AckBeforeDrain)
            || only_sections && injection.fires(Bug::SkipSection)
            || only_pins && injection.fires(Bug::SkipPin);
        self.acked_early
    }

    /// Whether the INVALIDATE being drained was already acked.
    pub(super) fn has_acked_early(&self) -> bool {
        self.acked_early
    }

    /// The drain of an INVALIDATE is complete; returns whether it was acked before. The seeded bug "drop zap" restores
    /// the removed ranges here.
    pub(super) fn drained(&mut self, mirror: &mut MirrorWriter) -> bool {
        for kept in self.unzapped.drain(..) {
            self.injection.fires(Bug::DropZap);
            map(mirror, kept);
        }
        std::mem::take(&mut self.acked_early)
    }

    /// An UPDATE has come. The seeded bug "keep staged update" gives it the memory of the UPDATE before it, if an
    /// INVALIDATE came in between and the MISS was therefore sent again.
    pub(super) fn updated(&mut self, update: &mut Update) {
        let Update { range, host, claimed, .. } = update;
        self.claimed = host.map(|_| *claimed);
        if !self.injection.is_on(Bug::KeepStagedUpdate) {
            return self.staged.clear();
        }
        let Some(new) = host else { return };
        let before = self.staged.remove(&range.first());
        if let Some(Staged { host: old, .. }) = before.filter(|old| old.invalidated && old.range == *range) {
            self.injection.fires(Bug::KeepStagedUpdate);
            *new = old;
        } else if self.staged.len() < REMEMBERED {
            self.staged.insert(range.first(), Staged { range: *range, host: *new, invalidated: false });
        }
    }

    /// The mirror has the answer to a MISS. The seeded bugs map the page where it was before, or with the permissions
    /// that the UPDATE claimed.
    pub(super) fn mapped(
        &mut self,
        mirror: &mut MirrorWriter,
        page: Iova,
        (range, host, permissions): (ByteRange<Iova>, HostRange, Permissions),
    ) {
        self.staged.remove(&range.first());
        if let Some(claimed) = self.claimed
            && self.injection.fires(Bug::CacheClaimedPermission)
        {
            let _ = mirror.map(DomainId::DEVICE, range, host, claimed);
        }
        if self.injection.is_on(Bug::StaleTranslation)
            && let (Some(host), Ok(range)) =
                (self.before.get(&page).copied(), ByteRange::new(page, PAGE_SIZE))
        {
            self.injection.fires(Bug::StaleTranslation);
            map(mirror, MappedRange { space: DomainId::DEVICE, range, host, permissions });
        }
    }

    /// Memory is being removed: translations that lead to it are dropped.
    pub(super) fn forget(&mut self) {
        self.unzapped.clear();
        self.before.clear();
        self.claimed = None;
        self.staged.clear();
    }

    /// Holds a miss request back; [`Self::due`] returns it when it may be sent, in order.
    pub(super) fn hold_back(&mut self, now: Duration, request: MissRequest) {
        let delay = self.injection.delay(Bug::DelayMiss).unwrap_or_default();
        let behind = self.late.back().map(|(due, _)| *due).unwrap_or_default();
        self.late.push_back((now.saturating_add(delay).max(behind), request));
    }

    /// A request that may be sent now.
    pub(super) fn due(&mut self, now: Duration) -> Option<MissRequest> {
        self.late.front().filter(|(due, _)| *due <= now)?;
        self.late.pop_front().map(|(_, request)| request)
    }

    /// When the next request may be sent.
    pub(super) fn next_due(&self) -> Option<Duration> {
        self.late.front().map(|(due, _)| *due)
    }

    /// The device has stopped: requests held back are void.
    pub(super) fn forget_misses(&mut self) {
        self.late.clear();
    }
}

/// The part of a mapped range that lies in `range`.
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
    // SAFETY: INVARIANT: the mirror had this range, and the memory behind it exists until the memory table changes;
    // `InjectedFaults::forget` is called before that.
    let host = unsafe { HostRange::new(start, len) };
    // A range that cannot be mapped is not added, which is harmless.
    let _ = mirror.map(space, range, host, permissions);
}
