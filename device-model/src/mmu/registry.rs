//! Where pins and invalidations meet: the pins that are held, the invalidations that are under way, and the last ones
//! that began. Protected by one short lock. Knows ranges; knows no translations and no threads.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::pin::PinMode;
use crate::addr::{ByteRange, DomainId, Iova};

/// Invalidations against which a pin under construction can be checked. If more began meanwhile, it is rebuilt.
const REMEMBERED: u64 = 64;

/// A range of a space, in whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) space: DomainId,
    pub(super) range: ByteRange<Iova>,
}

/// Places in order, without overlap.
#[derive(Clone, Debug, Default)]
pub(super) struct Places(Vec<Place>);

impl Places {
    /// Sorts and merges.
    pub(super) fn new(places: impl Iterator<Item = Place>) -> Self {
        let mut sorted: Vec<Place> = places.collect();
        sorted.sort_unstable_by_key(|place| (place.space, place.range.first()));
        let mut joined: Vec<Place> = Vec::with_capacity(sorted.len());
        for place in sorted {
            match joined
                .last_mut()
                .filter(|last| last.space == place.space && touches(last.range, place.range))
            {
                Some(last) => {
                    let end = last.range.last().max(place.range.last());
                    last.range = ByteRange::inclusive(last.range.first(), end).unwrap_or(last.range);
                }
                None => joined.push(place),
            }
        }
        Self(joined)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Place> {
        self.0.iter().copied()
    }

    fn overlap(&self, other: Place) -> bool {
        let first = (other.space, other.range.first());
        let after = self.0.partition_point(|place| (place.space, place.range.last()) < first);
        self.0.get(after).is_some_and(|place| place.space == other.space && place.range.overlaps(other.range))
    }
}

/// Whether `next`, which starts no lower, overlaps `range` or directly follows it.
fn touches(range: ByteRange<Iova>, next: ByteRange<Iova>) -> bool {
    range.last().checked_add(1).is_none_or(|end| next.first() <= end)
}

/// A pin as the registry knows it.
pub(super) struct PinEntry {
    pub(super) id: u64,
    pub(super) places: Places,
    pub(super) mode: PinMode,
    pub(super) evicted: Arc<AtomicBool>,
}

impl PinEntry {
    pub(super) fn evict(&self) {
        // ORDERING: a request that is polled; the release of the pin is what orders.
        self.evicted.store(true, Ordering::Relaxed);
    }
}

/// Pins and invalidations.
#[derive(Default)]
pub(super) struct Registry {
    /// How many invalidations have begun: the number of the next.
    sequence: u64,
    /// The last ones that began, newest last.
    recent: VecDeque<Place>,
    under_way: Vec<(u64, Place)>,
    pins: Vec<PinEntry>,
    next_pin: u64,
}

impl Registry {
    /// Registers an invalidation: from now on nothing of it can be pinned. Returns its number.
    pub(super) fn begin(&mut self, place: Place) -> u64 {
        let id = self.sequence;
        self.sequence += 1;
        if self.recent.len() as u64 == REMEMBERED {
            self.recent.pop_front();
        }
        self.recent.push_back(place);
        self.under_way.push((id, place));
        self.overlapping(place.space, place.range)
            .filter(|pin| pin.mode == PinMode::Preempt)
            .for_each(PinEntry::evict);
        id
    }

    pub(super) fn end(&mut self, id: u64) {
        self.under_way.retain(|&(other, _)| other != id);
    }

    /// Whether an invalidation that overlaps `place` is under way.
    pub(super) fn is_invalidating(&self, place: Place) -> bool {
        self.under_way
            .iter()
            .any(|(_, other)| other.space == place.space && other.range.overlaps(place.range))
    }

    /// The sequence number for looking up translations; `None` while an invalidation of them is under way.
    pub(super) fn read_begin(&self, places: &Places) -> Option<u64> {
        (!self.under_way.iter().any(|&(_, place)| places.overlap(place))).then_some(self.sequence)
    }

    /// Registers a pin of what was looked up under `sequence`. Returns it if an invalidation of it began meanwhile, or
    /// more invalidations than are remembered.
    pub(super) fn register(
        &mut self,
        sequence: u64,
        places: Places,
        (mode, evicted): (PinMode, Arc<AtomicBool>),
    ) -> Result<u64, Places> {
        let began = self.sequence - sequence;
        let missed = began > self.recent.len() as u64;
        if missed || self.recent.iter().rev().take(began as usize).any(|&place| places.overlap(place)) {
            return Err(places);
        }
        let id = self.next_pin;
        self.next_pin += 1;
        self.pins.push(PinEntry { id, places, mode, evicted });
        Ok(id)
    }

    /// Removes a pin. Returns whether an invalidation waited for it.
    pub(super) fn release(&mut self, id: u64) -> bool {
        let Some(index) = self.pins.iter().position(|pin| pin.id == id) else { return false };
        let pin = self.pins.swap_remove(index);
        self.under_way.iter().any(|&(_, place)| pin.places.overlap(place))
    }

    /// The pins that overlap `range`.
    pub(super) fn overlapping(
        &self,
        space: DomainId,
        range: ByteRange<Iova>,
    ) -> impl Iterator<Item = &PinEntry> {
        self.pins.iter().filter(move |pin| pin.places.overlap(Place { space, range }))
    }
}
