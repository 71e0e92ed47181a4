//! Pins: all translations that a job needs, copied out and held over many steps. They are built like an interval
//! notifier: look up, then register under a short lock unless an invalidation began meanwhile. Knows nothing of jobs,
//! nor of when a holder drops its pin.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Shared;
use super::memory::{HostSpan, MemoryError};
use super::missing::{Missing, MissingList};
use super::page_table::{FANOUT, NODE_BYTES};
use super::registry::{Place, Places};
use super::section::Reader;
use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use crate::sync::lock;

/// Translations that one section looks up, so that a large pin does not delay a drain.
const LOOKUPS_A_SECTION: usize = 1024;

/// Pages after a missing one that are checked, to request them too if they are missing.
const PAGES_AHEAD: u64 = 63;

/// A range that a job wants to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinRange {
    /// The address space.
    pub space: DomainId,
    /// Which bytes; their whole pages are pinned.
    pub range: ByteRange<Iova>,
    /// The access. A range that is read and written is listed twice.
    pub access: Access,
}

/// How an invalidation treats a pin of its range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PinMode {
    /// It waits until the holder drops the pin, and tells it to after the drain timeout.
    #[default]
    Fence,
    /// It tells the holder at once to drop the pin at its next step, and waits for that.
    Preempt,
    /// It does not wait: the holder keeps using what it has. Only memory that is unmapped altogether is waited for
    /// ([`super::MirrorWriter::begin_for_good`]).
    RegistrationCache,
}

/// Why a pin failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PinError {
    /// These pages are missing: all of them, merged, or the first 256. Hold nothing, request them, start again.
    #[error("{} ranges of the pin are not in the mirror", .0.len())]
    Missing(Vec<Missing>),
    /// A part of it is being invalidated: try again when that has ended.
    #[error("A part of the pin is being invalidated")]
    Invalidating,
    /// It needs more tables than the mirror may have, so it could never be complete.
    #[error("The pin may need {needed} bytes of page tables, and the limit is {limit}")]
    TooLarge {
        /// Bytes of tables that it may need.
        needed: usize,
        /// The mirror's limit.
        limit: usize,
    },
}

/// Pages that are contiguous in both address spaces.
#[derive(Clone, Copy, Debug)]
struct Segment {
    place: Place,
    host: u64,
}

/// The segments of a pin for one access, ordered by space and address.
#[derive(Debug)]
struct Segments {
    all: Vec<Segment>,
    /// Where the last one was found: with sequential accesses, the next one is there or directly after it.
    last: Cell<usize>,
}

impl Segments {
    fn new(all: Vec<Segment>) -> Self {
        Self { all, last: Cell::new(0) }
    }

    /// The segment that contains a byte.
    fn find(&self, space: DomainId, at: Iova) -> Option<&Segment> {
        let last = self.last.get();
        let mut near = self.all.iter().enumerate().skip(last).take(2);
        let (index, segment) = near.find(|(_, segment)| segment.holds(space, at)).or_else(|| {
            let is_before =
                |segment: &Segment| (segment.place.space, segment.place.range.last()) < (space, at);
            let index = self.all.partition_point(is_before);
            Some((index, self.all.get(index).filter(|segment| segment.holds(space, at))?))
        })?;
        self.last.set(index);
        Some(segment)
    }
}

impl Segment {
    fn holds(&self, space: DomainId, at: Iova) -> bool {
        self.place.space == space && self.place.range.contains(at)
    }
}

/// Held translations. Every overlapping invalidation waits until the pin is dropped, unless [`PinMode`] says otherwise.
#[must_use = "a pin that is not held pins nothing"]
pub struct Pin {
    shared: crate::sync::Arc<Shared>,
    id: u64,
    evicted: Arc<AtomicBool>,
    reads: Segments,
    writes: Segments,
}

impl Pin {
    /// Whether an invalidation wants this pin to be dropped at the holder's next step.
    pub fn evicted(&self) -> bool {
        // ORDERING: a request, see `PinEntry::evict`.
        self.evicted.load(Ordering::Relaxed)
    }

    /// Ends it, as dropping it does.
    pub fn release(self) {}

    /// Where a byte is. The result borrows the pin, so it is valid only while that is held.
    pub(super) fn find(
        &self,
        space: DomainId,
        at: Iova,
        access: Access,
    ) -> Result<HostSpan<'_>, MemoryError> {
        let segments = match access {
            Access::Read => &self.reads,
            Access::Write => &self.writes,
        };
        let Some(segment) = segments.find(space, at) else {
            return Err(MemoryError::NotPinned(Missing { space, range: at.page_range(), access }));
        };
        let range = segment.place.range;
        let offset = at.raw() - range.first().raw();
        Ok(HostSpan::new(segment.host + offset, range.last().raw() - at.raw() + 1))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let awaited = lock(&self.shared.registry).release(self.id);
        if awaited {
            self.shared.waker.wake();
        }
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("id", &self.id).field("evicted", &self.evicted()).finish()
    }
}

impl Reader {
    /// Pins all of `wanted`, or says what prevents it, and then holds nothing.
    pub fn pin(&self, wanted: &[PinRange]) -> Result<Pin, PinError> {
        self.pin_as(PinMode::Fence, wanted)
    }

    /// As [`Self::pin`], with a mode.
    pub fn pin_as(&self, mode: PinMode, wanted: &[PinRange]) -> Result<Pin, PinError> {
        let of = |access| {
            let places = wanted.iter().filter(move |range| range.access == access);
            Places::new(places.map(|range| Place { space: range.space, range: range.range.page_aligned() }))
        };
        let (reads, writes) = (of(Access::Read), of(Access::Write));
        let mut all = Places::new(reads.iter().chain(writes.iter()));
        self.check_size(&all)?;
        loop {
            let sequence = lock(&self.shared.registry).read_begin(&all).ok_or(PinError::Invalidating)?;
            let mut missing = MissingList::default();
            let reads = self.look_up(&reads, Access::Read, &mut missing);
            let writes = self.look_up(&writes, Access::Write, &mut missing);
            let missing = missing.into_vec();
            if !missing.is_empty() {
                return Err(PinError::Missing(missing));
            }
            let evicted = Arc::new(AtomicBool::new(false));
            let registered =
                lock(&self.shared.registry).register(sequence, all, (mode, Arc::clone(&evicted)));
            match registered {
                Ok(id) => {
                    return Ok(Pin {
                        shared: self.shared.clone(),
                        id,
                        evicted,
                        reads: Segments::new(reads),
                        writes: Segments::new(writes),
                    });
                }
                // An invalidation of it began, and may have ended: the next iteration finds out.
                Err(places) => all = places,
            }
        }
    }

    /// The other missing pages among the next pages of `wanted` after a miss, for the same access. They are requested
    /// with it, so that a job that holds nothing between its steps does not wait for each page in turn.
    pub fn missing_ahead(&self, wanted: &[PinRange], missing: Missing) -> Vec<Missing> {
        let mut ahead = MissingList::default();
        let mut pages = PAGES_AHEAD;
        let Some(from) = missing.range.last().checked_add(1) else { return Vec::new() };
        for range in
            wanted.iter().filter(|range| (range.space, range.access) == (missing.space, missing.access))
        {
            let range = range.range.page_aligned();
            let Some(rest) = ByteRange::inclusive(from.max(range.first()), range.last()) else { continue };
            let most = rest.first().checked_add(pages.saturating_mul(PAGE_SIZE).saturating_sub(1));
            let last = most.map_or(rest.last(), |most| most.min(rest.last()));
            let Some(window) = ByteRange::inclusive(rest.first(), last).filter(|_| pages > 0) else { break };
            pages =
                pages.saturating_sub(u64::try_from(window.len() / u128::from(PAGE_SIZE)).unwrap_or(pages));
            let place = Place { space: missing.space, range: window };
            // Bounded by the window: one section.
            let _ = self.look_up_some(place, window.first(), missing.access, (&mut Vec::new(), &mut ahead));
        }
        ahead.into_vec()
    }

    /// Refuses what could never be in the tables at once: 512 pages per table, and a path for each end.
    fn check_size(&self, all: &Places) -> Result<(), PinError> {
        let limit = self.shared.table_limit;
        let tables = |place: Place| place.range.len() / u128::from(PAGE_SIZE * FANOUT) + 2;
        let needed = all.iter().map(tables).sum::<u128>().saturating_mul(NODE_BYTES as u128);
        if needed <= limit as u128 {
            return Ok(());
        }
        Err(PinError::TooLarge { needed: usize::try_from(needed).unwrap_or(usize::MAX), limit })
    }

    fn look_up(&self, places: &Places, access: Access, missing: &mut MissingList) -> Vec<Segment> {
        let mut segments = Vec::new();
        for place in places.iter() {
            let mut next = Some(place.range.first());
            while let Some(at) = next.filter(|_| !missing.is_full()) {
                next = self.look_up_some(place, at, access, (&mut segments, missing));
            }
        }
        segments
    }

    /// Looks up a bounded part of `place` from `at` on, in one section; returns where to continue.
    fn look_up_some(
        &self,
        place: Place,
        mut at: Iova,
        access: Access,
        (segments, missing): (&mut Vec<Segment>, &mut MissingList),
    ) -> Option<Iova> {
        let section = self.enter();
        for _ in 0..LOOKUPS_A_SECTION {
            let end = match section.translate(place.space, at, access) {
                Ok(span) => {
                    let most = place.range.last().raw() - at.raw();
                    let end = Iova::new(at.raw() + most.min(span.len() - 1));
                    let range = ByteRange::inclusive(at, end)?;
                    push(segments, Segment { place: Place { range, ..place }, host: span.address() });
                    end
                }
                Err(page) => {
                    missing.push(page);
                    page.range.last()
                }
            };
            at = end.checked_add(1).filter(|&next| next <= place.range.last() && !missing.is_full())?;
        }
        Some(at)
    }
}

/// Appends `segment`, or merges it into the last one if it continues that in both address spaces.
fn push(segments: &mut Vec<Segment>, segment: Segment) {
    if let Some(last) = segments.last_mut() {
        let (old, new) = (last.place.range, segment.place.range);
        let follows = last.place.space == segment.place.space
            && old.last().checked_add(1) == Some(new.first())
            && last.host + (new.first().raw() - old.first().raw()) == segment.host;
        if let Some(range) = ByteRange::inclusive(old.first(), new.last()).filter(|_| follows) {
            last.place.range = range;
            return;
        }
    }
    segments.push(segment);
}
