//! The life of an invalidation, in three values: [`Invalidation`] (begun and zapped), [`Drained`] (nothing of the
//! device is in its range), [`Ended`] (its range can be pinned again; what an ack takes). Only draining yields the
//! second. Knows sections and pins; knows nothing of messages, timeouts or who acks.

use std::fmt;

use super::Shared;
use super::pin::PinMode;
use super::registry::PinEntry;
use super::section::OpenSections;
use crate::addr::{ByteRange, DomainId, Iova};
use crate::sync::{Arc, lock};

/// An invalidation that has begun: its range is zapped, it cannot be pinned, and what still uses it is known. It stays
/// registered until [`super::MirrorWriter::end`]; one that is dropped before blocks pins of its range for ever.
#[must_use = "an invalidation that is not ended blocks its range for good"]
pub struct Invalidation {
    shared: Arc<Shared>,
    id: u64,
    space: DomainId,
    range: ByteRange<Iova>,
    sections: OpenSections,
    waits_for: WaitsFor,
}

/// The pins that an invalidation waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WaitsFor {
    /// All but those of registration caches.
    Coherent,
    /// All: the memory itself is unmapped.
    All,
}

impl WaitsFor {
    fn takes(self, pin: &PinEntry) -> bool {
        self == Self::All || pin.mode != PinMode::RegistrationCache
    }
}

/// What an invalidation still waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    /// Sections that were open when it began.
    pub sections: usize,
    /// Pins that overlap it.
    pub pins: usize,
}

impl InFlight {
    /// Whether it waits for nothing.
    pub fn is_none(self) -> bool {
        self.sections == 0 && self.pins == 0
    }
}

impl Invalidation {
    pub(super) fn new(
        shared: Arc<Shared>,
        (id, space, waits_for): (u64, DomainId, WaitsFor),
        range: ByteRange<Iova>,
        sections: OpenSections,
    ) -> Self {
        Self { shared, id, space, range, sections, waits_for }
    }

    /// Its address space.
    pub fn space(&self) -> DomainId {
        self.space
    }

    /// The range, grown to whole pages.
    pub fn range(&self) -> ByteRange<Iova> {
        self.range
    }

    /// What it waits for now. Directly after the start: the work that it found in flight.
    pub fn in_flight(&self) -> InFlight {
        let waits_for = |pin: &&PinEntry| self.waits_for.takes(pin);
        let pins = lock(&self.shared.registry).overlapping(self.space, self.range).filter(waits_for).count();
        InFlight { sections: self.sections.count(&self.shared.slots), pins }
    }

    /// Pins that it does not wait for: their jobs keep using what the guest has unmapped.
    pub fn incoherent(&self) -> usize {
        let not_awaited = |pin: &&PinEntry| !self.waits_for.takes(pin);
        lock(&self.shared.registry).overlapping(self.space, self.range).filter(not_awaited).count()
    }

    /// Whether it is drained; never waits. If it is not, it is returned to be parked, and the [`super::DrainWaker`] is
    /// called when the last section or pin that it waits for is gone.
    pub fn poll(mut self) -> Result<Drained, Self> {
        // Sections first: once they have left, none of them can register a pin of what it translated.
        let sections = self.sections.have_left_or_will_wake(&self.shared.slots);
        let pins = self.in_flight().pins > 0;
        if sections && !pins { Ok(self.drained()) } else { Err(self) }
    }

    /// A rung of the ladder: tells the holder of every overlapping pin to drop it at its next step
    /// ([`super::Pin::evicted`]). Returns how many were told.
    pub fn evict(&self) -> usize {
        let waits_for = |pin: &&PinEntry| self.waits_for.takes(pin);
        let registry = lock(&self.shared.registry);
        registry.overlapping(self.space, self.range).filter(waits_for).map(PinEntry::evict).count()
    }

    /// The last resort: what still runs can no longer reach the guest's memory.
    pub fn revoke(self, _proof: MemoryRevoked) -> Drained {
        self.drained()
    }

    fn drained(self) -> Drained {
        Drained { id: self.id, space: self.space, range: self.range }
    }
}

impl fmt::Debug for Invalidation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invalidation").field("id", &self.id).field("range", &self.range).finish()
    }
}

/// The proof that nothing of the device uses a translation from before the invalidation.
#[derive(Debug)]
#[must_use = "a drained invalidation has to be ended"]
pub struct Drained {
    pub(super) id: u64,
    space: DomainId,
    range: ByteRange<Iova>,
}

/// The proof that an invalidation was drained and ended. An ack consumes it.
#[derive(Debug)]
#[must_use = "an invalidation that has ended is to be acked"]
pub struct Ended {
    space: DomainId,
    range: ByteRange<Iova>,
}

impl Ended {
    pub(super) fn new(drained: &Drained) -> Self {
        Self { space: drained.space, range: drained.range }
    }

    /// The address space of the invalidation.
    pub fn space(&self) -> DomainId {
        self.space
    }

    /// The range, in whole pages.
    pub fn range(&self) -> ByteRange<Iova> {
        self.range
    }
}

/// The declaration that an error is deliberate, to prove that a test catches it.
#[derive(Clone, Copy, Debug)]
pub struct SeededBug(());

impl SeededBug {
    /// Only for `--inject signal-before-write` and for tests of tests: I5 does not hold afterwards.
    pub fn signal_before_write() -> Self {
        Self(())
    }
}

/// The claim that all guest memory of the session was replaced, so that no translation reaches the guest any more.
#[derive(Debug)]
pub struct MemoryRevoked(());

impl MemoryRevoked {
    /// For a caller that has just replaced every region of the memory table by zero pages, and failed the session.
    pub fn all_regions_replaced() -> Self {
        Self(())
    }
}
