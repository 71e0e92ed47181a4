//! An address space of a context: page tables that the guest writes, and what the device makes of them. Its numbers, its
//! commands and who may use it are `crate::gpu`'s business.

use crate::addr::{Asid, Gva, Iova};
use crate::mmu::{JobMemory, MemoryError};

pub(crate) mod fault;
pub(crate) mod walk;

pub use fault::{FaultKind, GvaAccess, TranslationFault};
use walk::{Ended, walk};
pub(crate) use walk::{Leaf, Place};

/// An address space. Jobs that use it share it, and it is gone when the last of them has ended.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    asid: Asid,
    root: Iova,
}

/// How far a translation has come: what is blamed if the page that it needs is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Walked {
    /// The fault that this would be.
    pub(crate) fault: TranslationFault,
    /// The page that it needs: of a table, or of the memory itself.
    pub(crate) page: Iova,
}

/// Why there is no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Untranslated {
    /// A table cannot be read.
    Memory(MemoryError, Walked),
    /// The tables do not permit the access.
    Fault(TranslationFault),
}

impl AddressSpace {
    pub(crate) fn new(asid: Asid, root: Iova) -> Self {
        Self { asid, root: root.page() }
    }

    /// Where `gva` is, how many bytes follow in the same page, and whom to blame if it cannot be reached.
    pub(crate) fn translate(
        &self,
        memory: &impl JobMemory,
        gva: Gva,
        access: GvaAccess,
    ) -> Result<(Place, u64, Option<Walked>), Untranslated> {
        let leaf = self.leaf(memory, gva, access)?;
        let Leaf { level, pte } = leaf;
        leaf.check(access)
            .map_err(|kind| Untranslated::Fault(self.fault(gva, access, (kind, level, pte))))?;
        let (place, rest) = leaf.place(gva);
        let walked = match place {
            Place::Iova(at) => {
                let fault = self.fault(gva, access, (FaultKind::Refused, level, pte));
                Some(Walked { fault, page: at.page() })
            }
            Place::Null => None,
        };
        Ok((place, rest, walked))
    }

    fn leaf(&self, memory: &impl JobMemory, gva: Gva, access: GvaAccess) -> Result<Leaf, Untranslated> {
        walk(memory, self.root, gva).map_err(|ended| match ended {
            Ended::Unread { entry, level, error } => {
                let fault = self.fault(gva, access, (FaultKind::Refused, level, 0));
                Untranslated::Memory(error, Walked { fault, page: entry.page() })
            }
            Ended::At { kind, level, pte } => {
                Untranslated::Fault(self.fault(gva, access, (kind, level, pte)))
            }
        })
    }

    fn fault(
        &self,
        gva: Gva,
        access: GvaAccess,
        (kind, level, pte): (FaultKind, u32, u64),
    ) -> TranslationFault {
        TranslationFault { asid: self.asid, gva, access, kind, level, pte }
    }
}
