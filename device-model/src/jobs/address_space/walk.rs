//! The walk of a page table in guest memory: from a Gva to the leaf that maps it. Reads entries by aligned loads of eight
//! bytes, through the mirror like any access of a job. Knows the layout of tables (`job_stream::address_space`); knows
//! nothing of jobs, or of what is cached.

use job_stream::address_space::{HIGHEST_LEAF, INDEX_BITS, LAST_GVA, LEVELS, pte};

use super::fault::{FaultKind, GvaAccess};
use crate::addr::{DomainId, Gva, Iova, PAGE_SHIFT};
use crate::mmu::{AtomicOperation, JobMemory, MemoryError, Width};

/// Bits of an entry that may be set, by what it is.
const LEAF_BITS: u64 = TABLE_BITS | pte::READ | pte::WRITE | pte::ATOMIC | pte::NULL;
const TABLE_BITS: u64 = pte::VALID | pte::IOVA | pte::SOFTWARE;

/// An entry that maps memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// The level of its table.
    pub(crate) level: u32,
    /// The entry.
    pub(crate) pte: u64,
}

/// Where a byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// At this address of the device.
    Iova(Iova),
    /// Nowhere: it reads as 0, and what is written vanishes.
    Null,
}

/// What an entry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Leaf(Leaf),
    Table(Iova),
    Bad(FaultKind),
}

/// Why a walk has ended without a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// This entry is not in the mirror, or cannot be read.
    Unread { entry: Iova, level: u32, error: MemoryError },
    /// An entry maps nothing.
    At { kind: FaultKind, level: u32, pte: u64 },
}

/// log2 of the bytes that an entry of this level maps.
pub(crate) const fn shift(level: u32) -> u32 {
    // OVERFLOW: at most 12 + 9 * 3: levels come from `walk` alone.
    PAGE_SHIFT.saturating_add(INDEX_BITS.saturating_mul(level))
}

/// The offset in a page of this size.
const fn offset(gva: Gva, level: u32) -> u64 {
    gva.raw() & !(u64::MAX << shift(level))
}

/// The level of a root table.
pub(crate) const ROOT_LEVEL: u32 = LEVELS - 1;

/// Finds the leaf that maps `gva`, from a table of this level on. `passed` is called for each table below that one.
pub(crate) fn walk(
    memory: &impl JobMemory,
    (level, table): (u32, Iova),
    gva: Gva,
    mut passed: impl FnMut(u32, Iova),
) -> Result<Leaf, Ended> {
    let mut table = table;
    for level in (0..=level).rev() {
        let index = (gva.raw() & LAST_GVA) >> shift(level) & !(u64::MAX << INDEX_BITS);
        // A table is an aligned page, so this stays in it.
        let entry = Iova::new(table.raw() | index << 3);
        let loaded = memory.atomic(DomainId::DEVICE, entry, Width::Wide, AtomicOperation::Load);
        let pte = loaded.map_err(|error| Ended::Unread { entry, level, error })?;
        match decode(pte, level) {
            Entry::Leaf(leaf) => return Ok(leaf),
            Entry::Table(next) => {
                table = next;
                passed(level.saturating_sub(1), next);
            }
            Entry::Bad(kind) => return Err(Ended::At { kind, level, pte }),
        }
    }
    // An entry of level 0 is a leaf or ends the walk.
    Err(Ended::At { kind: FaultKind::NotPresent, level: 0, pte: 0 })
}

fn decode(pte: u64, level: u32) -> Entry {
    if pte & pte::VALID == 0 {
        return Entry::Bad(FaultKind::NotPresent);
    }
    let is_large = (1..=HIGHEST_LEAF).contains(&level) && pte & pte::LEAF != 0;
    let known = match (level, is_large) {
        (_, true) => LEAF_BITS | pte::LEAF,
        (0, false) => LEAF_BITS,
        (_, false) => TABLE_BITS,
    };
    let iova = Iova::new(pte & pte::IOVA);
    let is_aligned = iova.raw() & !(u64::MAX << shift(level)) == 0;
    let is_leaf = level == 0 || is_large;
    if pte & !known != 0 || is_leaf && !is_aligned || pte & pte::NULL != 0 && iova.raw() != 0 {
        return Entry::Bad(FaultKind::ReservedBits);
    }
    if is_leaf { Entry::Leaf(Leaf { level, pte }) } else { Entry::Table(iova) }
}

impl Leaf {
    /// Whether it grants nothing that `other`, an entry of the page tables, does not grant now.
    pub(crate) fn is_within(self, other: Self, gva: Gva) -> bool {
        const GRANTED: u64 = pte::READ | pte::WRITE | pte::ATOMIC;
        self.place(gva).0 == other.place(gva).0 && self.pte & GRANTED & !other.pte == 0
    }

    /// Whether it permits the access.
    pub(crate) fn check(self, access: GvaAccess) -> Result<(), FaultKind> {
        let (needed, denied) = match access {
            GvaAccess::Read => (pte::READ, FaultKind::ReadDenied),
            GvaAccess::Write => (pte::WRITE, FaultKind::WriteDenied),
            GvaAccess::Atomic => (pte::READ | pte::WRITE | pte::ATOMIC, FaultKind::AtomicDenied),
        };
        if self.pte & needed == needed { Ok(()) } else { Err(denied) }
    }

    /// Where `gva`, which it maps, is, and how many bytes follow in the same page.
    pub(crate) fn place(self, gva: Gva) -> (Place, u64) {
        let offset = offset(gva, self.level);
        let place = if self.pte & pte::NULL == 0 {
            Place::Iova(Iova::new(self.pte & pte::IOVA | offset))
        } else {
            Place::Null
        };
        (place, (1_u64 << shift(self.level)).saturating_sub(offset))
    }
}

#[cfg(test)]
mod tests;
