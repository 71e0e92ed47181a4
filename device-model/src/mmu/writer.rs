//! The writer's half of the mirror: maps what a MISS proved, begins and ends invalidations. Owned by the session. Knows
//! tables and the registry; knows nothing of messages and of what a MISS is.

use std::fmt;

use super::invalidation::{Drained, Ended, Invalidation, WaitsFor};
use super::memory::HostRange;
use super::registry::Place;
use super::table_writer::{Mapping, NoTable, Pages, TableWriter};
use super::{Permissions, Shared};
use crate::addr::{ByteRange, DomainId, Iova, PAGE_SHIFT, PAGE_SIZE};
use crate::sync::{Arc, lock};

/// Why a translation is not cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// The two sides differ in length.
    #[error("Range {range} cannot be mapped to {host} bytes of host memory")]
    Lengths {
        /// The IOVA side.
        range: ByteRange<Iova>,
        /// Bytes on the host side.
        host: u64,
    },
    /// The two sides have different offsets in their pages.
    #[error("Range {range} lies otherwise in its page than the host memory does")]
    Misaligned {
        /// The IOVA side.
        range: ByteRange<Iova>,
    },
    /// The range contains no whole page.
    #[error("Range {range} has no whole page")]
    NoWholePage {
        /// The IOVA side.
        range: ByteRange<Iova>,
    },
    /// No permission was proved.
    #[error("Range {range} cannot be mapped without a permission")]
    NoPermission {
        /// The IOVA side.
        range: ByteRange<Iova>,
    },
    /// There is no such address space.
    #[error("There is no address space {}", .0.raw())]
    NoSpace(DomainId),
    /// A part of it is being invalidated: what is known of it may be out of date.
    #[error("Range {range} is being invalidated")]
    Invalidating {
        /// The IOVA side.
        range: ByteRange<Iova>,
    },
    /// The limit on page tables is below what this range alone may need.
    #[error("Range {range} may need {needed} bytes of page tables, more than the limit")]
    TooLarge {
        /// The IOVA side.
        range: ByteRange<Iova>,
        /// Bytes of tables that it may need.
        needed: usize,
    },
    /// Tables cannot be reused because a section that may see them does not end: try again later.
    #[error("Range {range} finds no free page table: a section does not end")]
    Busy {
        /// The IOVA side.
        range: ByteRange<Iova>,
    },
}

impl MapError {
    /// Whether the same call may succeed a moment later: the range is fine, and has to be requested again.
    pub fn is_momentary(&self) -> bool {
        matches!(self, Self::Busy { .. } | Self::Invalidating { .. })
    }
}

/// The effect of a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mapped {
    /// Pages that had another frame before. No INVALIDATE announced that, so nothing waits for users of the old one:
    /// later lookups find the new frame, and open sections and pins keep using the old one.
    pub replaced: u64,
}

/// A part of the mirror's contents, for people and for audits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRange {
    /// The address space.
    pub space: DomainId,
    /// Pages with equal permissions and contiguous host memory.
    pub range: ByteRange<Iova>,
    /// Host address of the first byte, as a number.
    pub host: u64,
    /// What was proved.
    pub permissions: Permissions,
}

impl MappedRange {
    /// Absorbs `next` if it continues this range in every respect.
    pub fn append(&mut self, next: &Self) -> bool {
        let whole = ByteRange::inclusive(self.range.first(), next.range.last());
        let whole = whole.filter(|_| goes_on(self, next));
        self.range = whole.unwrap_or(self.range);
        whole.is_some()
    }
}

/// The writer of the mirror: there is one, and it is not shared.
pub struct MirrorWriter {
    shared: Arc<Shared>,
    tables: TableWriter,
}

impl MirrorWriter {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let tables = TableWriter::new(shared.table_limit);
        Self { shared, tables }
    }

    /// Caches the translation of `range` to `host` with the permissions that its MISS has proved (I7). If the mirror
    /// has the same frame, they are added; if it has another one, it is replaced. Only whole pages are cached. Other
    /// translations may be evicted to make room.
    pub fn map(
        &mut self,
        space: DomainId,
        range: ByteRange<Iova>,
        host: HostRange,
        permissions: Permissions,
    ) -> Result<Mapped, MapError> {
        let mapping = checked(range, host, permissions)?;
        let place = Place { space, range: range.page_aligned() };
        if lock(&self.shared.registry).is_invalidating(place) {
            return Err(MapError::Invalidating { range });
        }
        let roots = self.shared.roots(space).ok_or(MapError::NoSpace(space))?;
        match self.tables.map(roots, &self.shared.slots, mapping) {
            Ok(replaced) => Ok(Mapped { replaced }),
            Err(NoTable::Limit { needed }) => Err(MapError::TooLarge { range, needed }),
            Err(NoTable::Limbo) => Err(MapError::Busy { range }),
        }
    }

    /// Begins to invalidate `range`, grown to whole pages: from now on it cannot be pinned, no later section finds it,
    /// and what uses it is known. The cost depends on how much of it is mapped, not on its size.
    pub fn begin(&mut self, space: DomainId, range: ByteRange<Iova>) -> Invalidation {
        self.begin_and_wait_for(WaitsFor::Coherent, space, range)
    }

    /// As [`Self::begin`] for memory that is unmapped altogether: pins of all modes are waited for.
    pub fn begin_for_good(&mut self, space: DomainId, range: ByteRange<Iova>) -> Invalidation {
        let invalidation = self.begin_and_wait_for(WaitsFor::All, space, range);
        self.shared.memory_is_gone();
        invalidation
    }

    fn begin_and_wait_for(
        &mut self,
        waits_for: WaitsFor,
        space: DomainId,
        range: ByteRange<Iova>,
    ) -> Invalidation {
        let range = range.page_aligned();
        // Registered before the tables change: a pin that is looked up from what is zapped now finds this.
        let id = lock(&self.shared.registry).begin(Place { space, range });
        if let Some(roots) = self.shared.roots(space) {
            self.tables.zap(roots, pages_of(range));
        }
        // Read only after the zap, with a fence between (see `section`).
        let open = self.shared.slots.open();
        self.tables.retire(&self.shared.slots);
        Invalidation::new(Arc::clone(&self.shared), (id, space, waits_for), range, open)
    }

    /// Ends a drained invalidation: its range can be mapped and pinned again. The caller wakes the jobs whose pins were
    /// refused because of it, and acks.
    pub fn end(&mut self, drained: Drained) -> Ended {
        lock(&self.shared.registry).end(drained.id);
        Ended::new(&drained)
    }

    /// Bytes of page tables now, including those that wait for sections to leave.
    pub fn table_bytes(&self) -> usize {
        self.tables.bytes()
    }

    /// Calls `found` for the mirror's mappings of `range`, grown to whole pages, in address order, merged. The cost
    /// depends on how much of it is mapped, not on its size.
    pub fn mapped_ranges(&self, space: DomainId, range: ByteRange<Iova>, found: impl FnMut(MappedRange)) {
        // Without a bound nothing is left over.
        let _ = self.mapped_in(space, range, usize::MAX, found);
    }

    /// As [`Self::mapped_ranges`] from an address on, with bounded work: it visits `budget` table entries. Returns
    /// where to go on, if there is more; a budget too small to reach the lowest level makes no progress.
    pub fn mapped_some(
        &self,
        space: DomainId,
        from: Iova,
        budget: usize,
        found: impl FnMut(MappedRange),
    ) -> Option<Iova> {
        let rest = ByteRange::inclusive(from, ByteRange::<Iova>::everything().last())?;
        self.mapped_in(space, rest, budget, found)
    }

    fn mapped_in(
        &self,
        space: DomainId,
        range: ByteRange<Iova>,
        budget: usize,
        mut found: impl FnMut(MappedRange),
    ) -> Option<Iova> {
        let roots = self.shared.roots(space)?;
        let mut pending: Option<MappedRange> = None;
        let next = self.tables.leaves(roots, pages_of(range.page_aligned()), budget, &mut |leaf| {
            let Some(leaf) = as_range(space, leaf) else { return };
            if !pending.as_mut().is_some_and(|last| last.append(&leaf)) {
                pending.replace(leaf).into_iter().for_each(&mut found);
            }
        });
        pending.into_iter().for_each(found);
        next.map(|page| Iova::new(page << PAGE_SHIFT))
    }
}

impl Drop for MirrorWriter {
    fn drop(&mut self) {
        let mut orphans = crate::locking::lock(&self.shared.orphans);
        orphans.extend(self.tables.take_limbo());
    }
}

impl fmt::Debug for MirrorWriter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MirrorWriter").field("table_bytes", &self.table_bytes()).finish()
    }
}

/// The mapping of the whole pages in `range`.
fn checked(range: ByteRange<Iova>, host: HostRange, permissions: Permissions) -> Result<Mapping, MapError> {
    if range.len() != u128::from(host.len()) {
        return Err(MapError::Lengths { range, host: host.len() });
    }
    if permissions.is_none() {
        return Err(MapError::NoPermission { range });
    }
    if range.first().page_offset() != host.address() & (PAGE_SIZE - 1) {
        return Err(MapError::Misaligned { range });
    }
    let whole = range.whole_pages().ok_or(MapError::NoWholePage { range })?;
    let skipped = whole.first().raw() - range.first().raw();
    Ok(Mapping { pages: pages_of(whole), host: host.address() + skipped, permissions })
}

fn pages_of(range: ByteRange<Iova>) -> Pages {
    Pages { first: range.first().raw() >> PAGE_SHIFT, last: range.last().raw() >> PAGE_SHIFT }
}

fn as_range(space: DomainId, leaf: Mapping) -> Option<MappedRange> {
    let first = Iova::new(leaf.pages.first << PAGE_SHIFT);
    let last = Iova::new(leaf.pages.last << PAGE_SHIFT | (PAGE_SIZE - 1));
    let range = ByteRange::inclusive(first, last)?;
    Some(MappedRange { space, range, host: leaf.host, permissions: leaf.permissions })
}

fn goes_on(last: &MappedRange, next: &MappedRange) -> bool {
    let distance = next.range.first().raw().wrapping_sub(last.range.first().raw());
    last.range.last().checked_add(1) == Some(next.range.first())
        && last.host.checked_add(distance) == Some(next.host)
        && last.permissions == next.permissions
}
