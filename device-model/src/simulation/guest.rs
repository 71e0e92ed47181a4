//! The model's guest: its IOMMU page table over scattered frames, and its driver, which knows what it has built. Says
//! which translations are valid at any moment: those of the table, and those that an INVALIDATE has taken that is not
//! acked yet. A frame that must not be used any more is poisoned at once, and is the next to be reused.

use std::collections::BTreeSet;

use job_stream::Mode;

use super::memory::{FRAMES, Memory};
use super::ops::Shape;
use super::submitted::ContextKey;
use super::world::{CONTEXTS, DEVICES, PAGES, RESOURCES};
use crate::addr::{Access, Address, ByteRange, Iova, PAGE_SIZE};
use crate::mmu::Permissions;

/// Pages below the gap: eight on each side of a large leaf's boundary.
const LOW_PAGES: usize = PAGES - 4;
const LOW: u64 = 0x401f_8000;
/// The last pages of the address space.
const HIGH: u64 = 0xffff_ffff_ffff_c000;

/// The address of a page.
pub(super) fn iova(page: usize) -> Iova {
    let number = page as u64;
    Iova::new(match number.checked_sub(LOW_PAGES as u64) {
        None => LOW + number * PAGE_SIZE,
        Some(high) => HIGH + high * PAGE_SIZE,
    })
}

/// The page that contains an address.
pub(super) fn page_at(at: Iova) -> Option<usize> {
    let (first, pages) = if at.raw() < HIGH { (LOW, 0..LOW_PAGES) } else { (HIGH, LOW_PAGES..PAGES) };
    let page = pages.start + usize::try_from(at.raw().checked_sub(first)? / PAGE_SIZE).ok()?;
    pages.contains(&page).then_some(page)
}

/// The page table entry of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) frame: usize,
    pub(super) permissions: Permissions,
}

/// A mapping that was unmapped.
#[derive(Clone, Copy, Debug)]
struct Old {
    page: usize,
    mapping: Mapping,
    /// Its INVALIDATE, once that is sent.
    invalidation: Option<u64>,
}

/// A resource, as the driver knows it.
#[derive(Clone, Debug, Default)]
pub(super) struct Resource {
    /// A picture's size.
    pub(super) size: Option<(u32, u32)>,
    /// A buffer's length, and the generation of its backing.
    pub(super) buffer: Option<(u64, u64)>,
    pub(super) backing: Option<Vec<(u64, u32)>>,
}

/// A context, as the driver knows it.
#[derive(Clone, Debug)]
pub(super) struct Context {
    pub(super) key: ContextKey,
    /// The mode that its first job requests, and later ones may.
    pub(super) mode: Option<Mode>,
    pub(super) has_jobs: bool,
    /// Buffers that its jobs may name.
    pub(super) attached: BTreeSet<u8>,
}

#[derive(Debug)]
pub(super) struct Guest {
    table: [Option<Mapping>; PAGES],
    old: Vec<Old>,
    free: Vec<usize>,
    /// When the contents of each page last changed.
    changed: [u64; PAGES],
    /// When each page was last mapped or unmapped.
    mapped: [u64; PAGES],
    /// When the device last acked an INVALIDATE of each page.
    told: [u64; PAGES],
    next_version: u64,
    next_invalidation: u64,
    next_generation: u64,
    /// A frame that was written to while it was unused.
    pub(super) touched_late: Option<usize>,
    pub(super) resources: [[Resource; RESOURCES]; DEVICES],
    pub(super) contexts: [[Option<Context>; CONTEXTS]; DEVICES],
}

impl Guest {
    pub(super) fn new() -> Self {
        Self {
            table: [None; PAGES],
            old: Vec::new(),
            free: (0..FRAMES).rev().collect(),
            changed: [0; PAGES],
            mapped: [0; PAGES],
            told: [0; PAGES],
            next_version: 1,
            next_invalidation: 0,
            next_generation: 0,
            touched_late: None,
            contexts: Default::default(),
            resources: Default::default(),
        }
    }

    pub(super) fn mapping(&self, page: usize) -> Option<Mapping> {
        self.table[page]
    }

    /// The entry of a page, if the contents that the device may see have not changed since.
    pub(super) fn unchanged_since(&self, page: usize, stamp: u64) -> Option<Mapping> {
        let ambiguous = self.old.iter().any(|old| old.page == page);
        self.table[page].filter(|_| !ambiguous && self.changed[page] < stamp)
    }

    /// Whether an INVALIDATE of the page is not acked yet.
    pub(super) fn is_being_taken(&self, page: usize) -> bool {
        self.old.iter().any(|old| old.page == page)
    }

    /// The pages with an INVALIDATE that is not acked yet.
    pub(super) fn pages_being_taken(&self) -> impl Iterator<Item = usize> {
        self.old.iter().map(|old| old.page)
    }

    /// Whether the device was permitted to access a page like this all the time since.
    pub(super) fn allowed_since(&self, page: usize, access: Access, stamp: u64) -> bool {
        self.mapped[page] < stamp && self.table[page].is_some_and(|mapping| mapping.permissions.allow(access))
    }

    /// Whether the entry of a page has changed since, or had changed before without an acked INVALIDATE.
    pub(super) fn remapped_since(&self, page: usize, stamp: u64) -> bool {
        self.mapped[page].max(self.told[page]) >= stamp || self.old.iter().any(|old| old.page == page)
    }

    /// Maps a page that is not mapped; returns whether it did.
    pub(super) fn map(
        &mut self,
        page: usize,
        permissions: Permissions,
        stamp: u64,
        memory: &mut Memory,
    ) -> bool {
        if self.table[page].is_some() {
            return false;
        }
        let Some(frame) = self.free.pop() else { return false };
        if !memory.is_untouched(frame) {
            self.touched_late = Some(frame);
        }
        self.table[page] = Some(Mapping { frame, permissions });
        self.mapped[page] = stamp;
        self.write(page, stamp, memory);
        true
    }

    pub(super) fn unmap(&mut self, page: usize, stamp: u64) -> Option<Mapping> {
        let mapping = self.table[page].take()?;
        self.changed[page] = stamp;
        self.mapped[page] = stamp;
        self.old.push(Old { page, mapping, invalidation: None });
        Some(mapping)
    }

    /// Maps a page to another frame, and optionally back to the previous one.
    pub(super) fn remap(&mut self, page: usize, back: bool, stamp: u64, memory: &mut Memory) -> bool {
        let Some(first) = self.table[page].filter(|_| !self.free.is_empty()) else { return false };
        self.unmap(page, stamp);
        self.map(page, first.permissions, stamp, memory);
        if back {
            self.unmap(page, stamp);
            self.table[page] = Some(first);
        }
        true
    }

    /// The device wrote to a frame.
    pub(super) fn written_by_device(&mut self, frame: usize, stamp: u64) {
        let has =
            |(_, mapping): &(usize, &Option<Mapping>)| mapping.is_some_and(|mapping| mapping.frame == frame);
        for (page, _) in self.table.iter().enumerate().filter(has) {
            self.changed[page] = stamp;
        }
    }

    /// A number that is unique among the driver's resources and contexts.
    pub(super) fn generation(&mut self) -> u64 {
        self.next_generation += 1;
        self.next_generation
    }

    /// The driver starts afresh.
    pub(super) fn forget_device(&mut self) {
        self.resources = Default::default();
        self.contexts = Default::default();
    }

    /// Writes new contents to a page.
    pub(super) fn write(&mut self, page: usize, stamp: u64, memory: &mut Memory) {
        if let Some(mapping) = self.table[page] {
            memory.fill(mapping.frame, self.next_version);
            self.next_version += 1;
            self.changed[page] = stamp;
        }
    }

    /// An INVALIDATE that is sent now: it covers all that was unmapped in its range so far.
    pub(super) fn invalidate(&mut self, page: usize, shape: Shape) -> Option<(u64, ByteRange<Iova>)> {
        let range = range(page, shape)?;
        let id = self.next_invalidation;
        self.next_invalidation += 1;
        let covered = range.page_aligned();
        for old in self.old.iter_mut().filter(|old| old.invalidation.is_none()) {
            if covered.contains(iova(old.page)) {
                old.invalidation = Some(id);
            }
        }
        Some((id, range))
    }

    /// An INVALIDATE is acked: the device does not use its mappings any more.
    pub(super) fn acked(&mut self, id: u64, stamp: u64, memory: &mut Memory) {
        let (gone, kept) = self.old.iter().partition::<Vec<_>, _>(|old| old.invalidation == Some(id));
        self.old = kept;
        for old in gone {
            let frame = old.mapping.frame;
            self.changed[old.page] = stamp;
            self.told[old.page] = stamp;
            let used = self.table.iter().flatten().any(|mapping| mapping.frame == frame)
                || self.old.iter().any(|old| old.mapping.frame == frame)
                || self.free.contains(&frame);
            if !used {
                memory.poison(frame);
                self.free.push(frame);
            }
        }
    }

    /// Whether the device may now access `frame` through `page`, with the permission for `access` if one is given.
    pub(super) fn allows(&self, page: usize, frame: usize, access: Option<Access>) -> bool {
        let good = |mapping: &Mapping| {
            mapping.frame == frame && access.is_none_or(|access| mapping.permissions.allow(access))
        };
        self.table[page].as_ref().is_some_and(good)
            || self.old.iter().any(|old| old.page == page && good(&old.mapping))
    }
}

fn range(page: usize, shape: Shape) -> Option<ByteRange<Iova>> {
    let at = iova(page);
    let within = Iova::new(at.raw() + 0x234);
    match shape {
        Shape::Exact => ByteRange::new(at, PAGE_SIZE).ok(),
        Shape::Rounded(order) => {
            let mask = (PAGE_SIZE << order) - 1;
            ByteRange::inclusive(Iova::new(at.raw() & !mask), Iova::new(at.raw() | mask))
        }
        Shape::Domain => Some(ByteRange::everything()),
        Shape::ToTheEnd => ByteRange::inclusive(within, Address::new(u64::MAX)),
        Shape::FromTheStart => ByteRange::inclusive(Address::new(0), within),
        Shape::Later => None,
    }
}
