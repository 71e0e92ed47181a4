//! The memory that a job may touch, in compact form: which bytes of which backings. Jobs that name one backing share
//! its list of pages, however many of them there are. What a job adds is bounded by its packets, which have a quota.
//! Knows nothing of what it is used for.

use std::sync::Arc;

use crate::addr::{Access, ByteRange, Iova};
use crate::jobs::backing::{Entries, Stretch};
use crate::jobs::offsets::OffsetSet;

/// What a job may touch, from its first step to its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct WorkingSet {
    parts: Box<[BackingPart]>,
}

/// What a job may touch of one backing.
#[derive(Clone, Debug)]
pub(crate) struct BackingPart {
    pub(crate) entries: Arc<Entries>,
    pub(crate) reads: OffsetSet,
    pub(crate) writes: OffsetSet,
}

impl WorkingSet {
    pub(crate) fn new(parts: impl Iterator<Item = BackingPart>) -> Self {
        Self { parts: parts.collect() }
    }

    /// The parts, one for each backing.
    pub(crate) fn parts(&self) -> &[BackingPart] {
        &self.parts
    }

    /// Pieces of all parts: the cost of one pass through the set.
    pub(crate) fn len(&self) -> usize {
        self.parts.iter().map(BackingPart::len).sum()
    }
}

impl BackingPart {
    /// What it uses with this access.
    pub(crate) fn of(&self, access: Access) -> &OffsetSet {
        match access {
            Access::Read => &self.reads,
            Access::Write => &self.writes,
        }
    }

    /// Pieces for both accesses.
    pub(crate) fn len(&self) -> usize {
        self.reads.len().saturating_add(self.writes.len())
    }

    /// The guest memory that it uses with this access, stretch by stretch, ordered by offset.
    pub(crate) fn memory(&self, access: Access) -> impl Iterator<Item = ByteRange<Iova>> + '_ {
        let stretches = self.of(access).outline().flat_map(|piece| self.entries.behind(piece));
        stretches.flat_map(move |stretch| self.parts_of(access, stretch))
    }

    /// What it uses of a stretch with this access: the ranges lie exactly on the pages that it touches.
    pub(crate) fn parts_of(
        &self,
        access: Access,
        stretch: Stretch,
    ) -> impl Iterator<Item = ByteRange<Iova>> + '_ {
        self.of(access).within(stretch.offsets).filter_map(move |piece| stretch.part(piece))
    }

    /// Whether it uses any of a stretch.
    pub(crate) fn uses(&self, stretch: Stretch) -> bool {
        [Access::Read, Access::Write].iter().any(|access| self.parts_of(*access, stretch).next().is_some())
    }
}
