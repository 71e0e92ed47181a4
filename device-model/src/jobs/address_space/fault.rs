//! Why a Gva cannot be accessed: a value that names all that the walk has found. Knows nothing of who is told.

use std::fmt;

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
    /// The front-end refuses the page that the walk came to, the table or the memory itself: the guest's IOMMU does not
    /// map it. A second walk came to it again.
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
    /// That entry; 0 if its table could not be read.
    pub pte: u64,
}

impl fmt::Display for TranslationFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asid, gva, access, kind, level, pte } = self;
        write!(
            f,
            "Address {gva} of address space {asid} {kind} ({access}, level {level}, page-table entry {pte:#018x})"
        )
    }
}

impl TranslationFault {
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
            FaultKind::Refused => {
                "the page tables name an IOVA that is not mapped: look at the order of dma_unmap and clearing the \
                 entry, and whether the table page itself is mapped for the device to read"
            }
        }
    }
}
