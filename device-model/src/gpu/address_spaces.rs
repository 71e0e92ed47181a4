//! The address spaces of all contexts, by number. Knows who owns which and how many there may be; knows nothing of page
//! tables.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use job_stream::address_space::{ASIDS, CREATE_FAULTS, INVALIDATE_LEAVES, LAST_GVA, pte};
use job_stream::{AsCreate, AsInvalidate};

use crate::addr::{Asid, ByteRange, Gva, Iova};
use crate::gpu::context::ContextId;
use crate::gpu::error::CommandError;
use crate::gpu::quota::{Budget, Quota, Quotas};
use crate::jobs::address_space::AddressSpace;
use crate::jobs::address_space::tlb::{Flush, Flushed, TlbConfig, TlbPolicy};

/// All address spaces.
#[derive(Debug)]
pub(crate) struct AddressSpaces {
    by_asid: BTreeMap<Asid, (ContextId, Arc<AddressSpace>)>,
    /// Those that have no number any more, and that jobs may still use.
    leaving: Vec<Weak<AddressSpace>>,
    limit: u64,
    tlb: TlbConfig,
}

impl AddressSpaces {
    pub(crate) fn new(quotas: &Quotas, tlb: TlbPolicy) -> Self {
        let (limit, tlb) = (quotas.address_spaces, TlbConfig::new(tlb, quotas.tlb_entries));
        Self { by_asid: BTreeMap::new(), leaving: Vec::new(), limit, tlb }
    }

    /// AS_CREATE for a context.
    pub(crate) fn create(
        &mut self,
        context: ContextId,
        request: AsCreate,
    ) -> Result<&Arc<AddressSpace>, CommandError> {
        let AsCreate { asid, flags, root } = request;
        if asid >= ASIDS || flags & !CREATE_FAULTS != 0 || root & !pte::IOVA != 0 {
            return Err(CommandError::BadAddressSpace { asid, flags, root });
        }
        let number = Asid::new(asid);
        if self.by_asid.contains_key(&number) {
            return Err(CommandError::AddressSpaceExists { asid });
        }
        self.leaving.retain(|left| left.strong_count() > 0);
        let mut budget = Budget::new(Quota::AddressSpaces, self.limit);
        budget.take(self.usage())?;
        budget.take(1)?;
        let space = AddressSpace::new(number, Iova::new(root), self.tlb.clone());
        let space = if flags & CREATE_FAULTS == 0 { space } else { space.with_faults() };
        let (_, space) = self.by_asid.entry(number).or_insert((context, Arc::new(space)));
        Ok(space)
    }

    /// An address space of the context.
    pub(crate) fn find(&self, context: ContextId, asid: u32) -> Result<&Arc<AddressSpace>, CommandError> {
        let found = self.by_asid.get(&Asid::new(asid)).filter(|(owner, _)| *owner == context);
        found.map(|(_, space)| space).ok_or(CommandError::NoSuchAddressSpace { asid })
    }

    /// AS_INVALIDATE.
    pub(crate) fn invalidate(
        &self,
        context: ContextId,
        request: AsInvalidate,
    ) -> Result<Flush, CommandError> {
        let AsInvalidate { asid, flags, first, last } = request;
        let space = self.find(context, asid)?;
        let range = ByteRange::inclusive(Gva::new(first), Gva::new(last));
        let range = range.filter(|_| last <= LAST_GVA && flags & !INVALIDATE_LEAVES == 0);
        let range = range.ok_or(CommandError::BadFlush { asid, flags, first, last })?;
        let what = if flags & INVALIDATE_LEAVES == 0 { Flushed::All } else { Flushed::Leaves };
        Ok(space.flush(range, what))
    }

    /// AS_DESTROY. The number is free; jobs may still use the address space.
    pub(crate) fn destroy(
        &mut self,
        context: ContextId,
        asid: u32,
    ) -> Result<Arc<AddressSpace>, CommandError> {
        self.find(context, asid)?;
        let removed = self.by_asid.remove(&Asid::new(asid));
        let (_, space) = removed.ok_or(CommandError::NoSuchAddressSpace { asid })?;
        self.leaving.push(Arc::downgrade(&space));
        Ok(space)
    }

    /// The context is destroyed. Returns the numbers that are free now.
    pub(crate) fn destroy_all_of(&mut self, context: ContextId) -> Vec<Asid> {
        let Self { by_asid, leaving, .. } = self;
        let mut ended = Vec::new();
        by_asid.retain(|asid, (owner, space)| {
            let stays = *owner != context;
            if !stays {
                leaving.push(Arc::downgrade(space));
                ended.push(*asid);
            }
            stays
        });
        ended
    }

    /// A reset.
    pub(crate) fn clear(&mut self) {
        self.by_asid.clear();
        self.leaving.clear();
    }

    /// How many entries all TLBs have.
    pub(crate) fn tlb_entries(&self) -> u64 {
        self.tlb.used()
    }

    /// How many there are, with those that only jobs still use.
    pub(crate) fn usage(&self) -> u64 {
        let leaving = self.leaving.iter().filter(|left| left.strong_count() > 0).count();
        (self.by_asid.len() as u64).saturating_add(leaving as u64)
    }
}
