//! Why a Gva cannot be accessed: a value that names all that the walk has found. Knows nothing of who is told.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::addr::{Access, Asid, Gva};

/// What a packet does at a Gva.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum GvaAccess {
    /// It reads.
    Read,
    /// It writes.
    Write,
    /// It reads and writes in one piece (ATOMIC).
    Atomic,
}

impl GvaAccess {
    /// The permissions that it needs of the mirror.
    pub fn accesses(self) -> &'static [Access] {
        match self {
            Self::Read => &[Access::Read],
            Self::Write => &[Access::Write],
            Self::Atomic => &[Access::Read, Access::Write],
        }
    }
}

impl fmt::Display for GvaAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Atomic => "atomic access",
        })
    }
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// The entry is not valid.
    NotPresent,
    /// The leaf does not permit reading.
    ReadDenied,
    /// The leaf does not permit writing.
    WriteDenied,
    /// The leaf does not permit ATOMIC.
    AtomicDenied,
    /// Bits are set that must be 0.
    ReservedBits,
    /// The TLB has led to an IOVA that the guest's IOMMU has mapped to other memory since.
    Moved,
    /// The TLB leads elsewhere than the page tables, or permits more, and the driver has not flushed for a second.
    NotFlushed,
    /// The front-end refuses the page that the walk came to, the table or the memory itself: the guest's IOMMU does not
    /// map it. It was refused twice, with no flush in between.
    Refused,
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotPresent => "is not present",
            Self::ReadDenied => "may not be read",
            Self::WriteDenied => "may not be written",
            Self::AtomicDenied => "may not be changed by ATOMIC",
            Self::ReservedBits => "has an entry with reserved bits",
            Self::Moved => "was reached through the TLB, and the IOMMU has mapped other memory there since",
            Self::NotFlushed => "is in the TLB, and the page tables say something else",
            Self::Refused => "lies behind a page that the IOMMU does not map",
        })
    }
}

/// An access to a Gva that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct TranslationFault {
    /// The address space.
    pub asid: Asid,
    /// The address.
    pub gva: Gva,
    /// The access.
    pub access: GvaAccess,
    /// What is wrong.
    pub kind: FaultKind,
    /// The level of the table whose entry ended the walk.
    pub level: u32,
    /// That entry; 0 if its table could not be read. Of a TLB entry, what it was made from.
    pub pte: u64,
    /// What the TLB had to do with it; `None`: nothing.
    pub cached: Option<CachedTranslation>,
}

/// What led to a fault, where the device had remembered it from an earlier access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct CachedTranslation {
    /// How long before, in nanoseconds of running time, it was read; `None`: it is a table that was remembered.
    pub age_ns: Option<u64>,
    /// The entry of the page tables now; `None`: it cannot be read.
    pub tables: Option<u64>,
    /// The page tables lead elsewhere now, or permit less.
    pub contradicts: bool,
    /// The last AS_INVALIDATE before it was read covers the address.
    pub after_flush: bool,
}

impl fmt::Display for CachedTranslation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.age_ns {
            Some(age) => write!(f, "from the TLB, read {:?} before", Duration::from_nanos(age))?,
            None => write!(f, "through a table that the device had read before")?,
        }
        match self.tables {
            Some(entry) if self.contradicts => write!(f, "; the page tables now have {entry:#018x}"),
            Some(_) => write!(f, "; the page tables still say the same"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for TranslationFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asid, gva, access, kind, level, pte, cached } = self;
        write!(
            f,
            "Address {gva} of address space {asid} {kind} ({access}, level {level}, page-table entry {pte:#018x}"
        )?;
        cached.map_or(Ok(()), |cached| write!(f, ", {cached}"))?;
        f.write_str(")")
    }
}

impl TranslationFault {
    /// Whether a change of the page tables can make the access succeed.
    pub(crate) fn is_replayable(&self) -> bool {
        use FaultKind::{AtomicDenied, NotPresent, ReadDenied, WriteDenied};
        matches!(self.kind, NotPresent | ReadDenied | WriteDenied | AtomicDenied)
    }

    /// Whether it is about the same page and access as another.
    pub(crate) fn repeats(&self, other: &Self) -> bool {
        (self.asid, self.gva.page(), self.access) == (other.asid, other.gva.page(), other.access)
    }

    /// What the author of the driver should check.
    pub fn advice(&self) -> &'static str {
        match self.kind {
            FaultKind::NotPresent => {
                "the page tables do not map the address: look whether the entry is written, all of it in one 64-bit \
                 store, before the job is submitted, and stays until the job has ended"
            }
            FaultKind::ReadDenied | FaultKind::WriteDenied | FaultKind::AtomicDenied => {
                "the page tables map the address without this permission: look whether the range was bound, or faulted \
                 in, for what the job does there"
            }
            FaultKind::ReservedBits => {
                "the entry has bits that must be 0: look at the level that it was written for, at the alignment of a \
                 large page, and at whether it is a page-table entry at all"
            }
            FaultKind::Moved | FaultKind::NotFlushed | FaultKind::Refused if self.cached.is_some() => {
                self.flush_advice()
            }
            FaultKind::Moved | FaultKind::NotFlushed | FaultKind::Refused => {
                "the page tables name an IOVA that is not mapped: look at the order of dma_unmap and clearing the \
                 entry, and whether the table page itself is mapped for the device to read"
            }
        }
    }

    /// What is wrong with the order of unmapping and flushing.
    fn flush_advice(&self) -> &'static str {
        match self.cached {
            Some(CachedTranslation { age_ns: None, .. }) => {
                "a page of page tables was unmapped while the device could still walk through it: clear the entry that \
                 points to it, send AS_INVALIDATE without LEAVES, wait for its answer, and only then unmap it"
            }
            Some(CachedTranslation { contradicts: true, after_flush: true, .. }) => {
                "the device read the old entry again after an AS_INVALIDATE, because the entry was changed only later: \
                 change the entry first, then send AS_INVALIDATE, wait for its answer, and only then unmap the page"
            }
            Some(CachedTranslation { contradicts: true, .. }) => {
                "the entry was changed, and the device was not told, or the page was unmapped before it was: after each \
                 change that takes something away send AS_INVALIDATE, wait for its answer, and only then unmap the page"
            }
            _ => {
                "the page was unmapped in the IOMMU while the page tables still map it: clear the entry first, send \
                 AS_INVALIDATE, wait for its answer, and only then unmap the page"
            }
        }
    }
}
