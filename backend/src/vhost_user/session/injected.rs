//! What `--inject` does to a session, at its seams: what goes into it, what comes out of it, and what stands in the mirror
//! afterwards. The session itself knows nothing of it. Everything is empty while nothing is turned on.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use device_model::addr::{ByteRange, Iova, PAGE_SIZE, SpaceId};
use device_model::mmu::{HostRange, InFlight, MappedRange, MirrorWriter, Permissions};
use device_model::session::Update;
use device_model::session::miss_port::MissRequest;

use crate::faults::{Bug, Injection};

/// Pages of which it is remembered where they were.
const REMEMBERED: usize = 1 << 14;

/// The last UPDATE, for the bugs that take it for more than it is.
#[derive(Clone, Copy, Debug)]
struct LastUpdate {
    range: ByteRange<Iova>,
    host: HostRange,
    claimed: Permissions,
    /// An INVALIDATE of its range came since.
    invalidated: bool,
}

/// What misbehaves in a session, and what it keeps for that.
pub(super) struct InjectedFaults {
    injection: Arc<Injection>,
    /// What the INVALIDATE that is being drained should have taken away.
    unzapped: Vec<MappedRange>,
    /// Where pages were before an INVALIDATE took them away.
    before: BTreeMap<Iova, u64>,
    last_update: Option<LastUpdate>,
    /// Requests for misses that are held back, with the time at which they may go on.
    late: VecDeque<(Duration, MissRequest)>,
    /// The INVALIDATE that is being drained was acked already.
    acked_early: bool,
}

impl InjectedFaults {
    /// Nothing has happened yet.
    pub(super) fn new(injection: Arc<Injection>) -> Self {
        let (unzapped, before, late) = (Vec::new(), BTreeMap::new(), VecDeque::new());
        Self { injection, unzapped, before, last_update: None, late, acked_early: false }
    }

    /// An INVALIDATE has come; returns the range that the session is told.
    pub(super) fn invalidating(&mut self, mirror: &MirrorWriter, range: ByteRange<Iova>) -> ByteRange<Iova> {
        if let Some(update) = &mut self.last_update {
            update.invalidated |= update.range.page_aligned().overlaps(range.page_aligned());
        }
        self.note(mirror, range);
        if self.injection.fires(Bug::DrainEverything) { ByteRange::everything() } else { range }
    }

    /// Notes what an INVALIDATE is about to take away.
    fn note(&mut self, mirror: &MirrorWriter, range: ByteRange<Iova>) {
        let [keep, remember] = [Bug::DropZap, Bug::StaleTranslation].map(|bug| self.injection.is_on(bug));
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

    /// Whether the ack of an INVALIDATE goes out before its drain is over, though this is in flight. Says so once.
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

    /// Whether the INVALIDATE that is being drained was acked already.
    pub(super) fn has_acked_early(&self) -> bool {
        self.acked_early
    }

    /// The drain of an INVALIDATE is over; returns whether it was acked before. What should be gone is there again, with
    /// the seeded bug "drop zap".
    pub(super) fn drained(&mut self, mirror: &mut MirrorWriter) -> bool {
        for kept in self.unzapped.drain(..) {
            self.injection.fires(Bug::DropZap);
            map(mirror, kept);
        }
        std::mem::take(&mut self.acked_early)
    }

    /// An UPDATE has come.
    pub(super) fn updated(&mut self, update: &Update) {
        let Update { range, host, claimed, .. } = *update;
        self.last_update = host.map(|host| LastUpdate { range, host, claimed, invalidated: false });
    }

    /// A MISS is granted. An UPDATE that was invalidated meanwhile is cached all the same, with the seeded bug "keep staged
    /// update".
    pub(super) fn granted(&mut self, mirror: &mut MirrorWriter) {
        if let Some(LastUpdate { range, host, claimed, invalidated: true }) = self.last_update.take()
            && self.injection.fires(Bug::KeepStagedUpdate)
        {
            // What cannot be mapped does no harm.
            let _ = mirror.map(SpaceId::DEVICE, range, host, claimed);
        }
    }

    /// The mirror has the answer to a MISS. The seeded bugs: it has the page where it was before, or with what the UPDATE
    /// claimed.
    pub(super) fn mapped(
        &mut self,
        mirror: &mut MirrorWriter,
        page: Iova,
        (range, host, permissions): (ByteRange<Iova>, HostRange, Permissions),
    ) {
        if let Some(LastUpdate { claimed, .. }) = self.last_update
            && self.injection.fires(Bug::CacheClaimedPermission)
        {
            let _ = mirror.map(SpaceId::DEVICE, range, host, claimed);
        }
        if self.injection.is_on(Bug::StaleTranslation)
            && let (Some(host), Ok(range)) =
                (self.before.get(&page).copied(), ByteRange::new(page, PAGE_SIZE))
        {
            self.injection.fires(Bug::StaleTranslation);
            map(mirror, MappedRange { space: SpaceId::DEVICE, range, host, permissions });
        }
    }

    /// Memory goes away: nothing that leads there is kept.
    pub(super) fn forget(&mut self) {
        self.unzapped.clear();
        self.before.clear();
        self.last_update = None;
    }

    /// Takes a request for misses; it comes back from [`Self::due`] when it may be sent, in order.
    pub(super) fn hold_back(&mut self, now: Duration, request: MissRequest) {
        let delay = self.injection.delay(Bug::DelayMiss).unwrap_or_default();
        let behind = self.late.back().map(|(due, _)| *due).unwrap_or_default();
        self.late.push_back((now.saturating_add(delay).max(behind), request));
    }

    /// A request whose time has come.
    pub(super) fn due(&mut self, now: Duration) -> Option<MissRequest> {
        self.late.front().filter(|(due, _)| *due <= now)?;
        self.late.pop_front().map(|(_, request)| request)
    }

    /// When the next request may be sent.
    pub(super) fn next_due(&self) -> Option<Duration> {
        self.late.front().map(|(due, _)| *due)
    }

    /// The device has stopped: requests are void.
    pub(super) fn forget_misses(&mut self) {
        self.late.clear();
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
    // `InjectedFaults::forget` comes before that.
    let host = unsafe { HostRange::new(start, len) };
    // What cannot be mapped does no harm.
    let _ = mirror.map(space, range, host, permissions);
}
