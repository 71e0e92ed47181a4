//! An address space of a context: page tables that the guest writes, what the device has read of them ([`tlb`]), and how
//! a job goes through both ([`translation`]). Its numbers, its commands and who may use it are `crate::gpu`'s business.

use crate::addr::{Asid, ByteRange, Gva, Iova};
use crate::sync::Arc;

pub(crate) mod fault;
pub(crate) mod tlb;
pub(crate) mod translation;
pub(crate) mod walk;

pub use fault::{CachedTranslation, FaultKind, GvaAccess, TranslationFault};
pub use tlb::TlbPolicy;
use tlb::{Flush, Flushed, Tlb, TlbConfig};
pub(crate) use translation::{SpaceUse, Untranslated, Walked};
pub(crate) use walk::Place;

/// An address space. Jobs that use it share it, and it is gone when the last of them has ended.
#[derive(Debug)]
pub(crate) struct AddressSpace {
    asid: Asid,
    root: Iova,
    tlb: Arc<Tlb>,
    /// The driver answers faults.
    answers_faults: bool,
}

impl AddressSpace {
    pub(crate) fn new(asid: Asid, root: Iova, config: TlbConfig) -> Self {
        Self { asid, root: root.page(), tlb: Arc::new(Tlb::new(config)), answers_faults: false }
    }

    /// Its number.
    pub(crate) fn asid(&self) -> Asid {
        self.asid
    }

    /// With a driver that answers faults.
    pub(crate) fn with_faults(self) -> Self {
        Self { answers_faults: true, ..self }
    }

    /// AS_INVALIDATE.
    pub(crate) fn flush(&self, range: ByteRange<Gva>, what: Flushed) -> Flush {
        Tlb::flush(&self.tlb, range.page_aligned(), what)
    }
}
