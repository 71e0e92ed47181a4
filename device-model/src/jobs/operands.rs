//! The operands of a program, resolved: the backing of each resource, and the guest memory that operands name in it; and
//! the address spaces, in which the page tables decide. Checks at submission that each operand of a resource lies in
//! it; afterwards a program names only what it may touch.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use job_stream::{At, Context, Operand, Packet, Program};

use crate::addr::{Access, ByteRange, DomainId, Gva, Iova};
use crate::jobs::address_space::translation::TlbCounts;
use crate::jobs::address_space::{
    AddressSpace, GvaAccess, Place, SpaceUse, TranslationFault, Untranslated, Walked,
};
use crate::jobs::backing::Backing;
use crate::jobs::error::InvalidMemory;
use crate::jobs::job::JobError;
use crate::jobs::offsets::{OffsetSet, Offsets, joined};
use crate::jobs::transfer::merged;
use crate::jobs::working_set::{BackingPart, WorkingSet};
use crate::mmu::{JobMemory, MemoryError, Missing, PinRange};

/// The memory of a resource, as operands name it: its length, and its backing.
#[derive(Clone, Debug)]
pub(crate) struct ResourceMemory {
    pub(crate) bytes: u64,
    pub(crate) backing: Backing,
}

/// A program with the memory that its operands name.
#[derive(Debug)]
pub(crate) struct Operands {
    program: Program,
    resources: BTreeMap<u32, ResourceMemory>,
    address_spaces: BTreeMap<u32, SpaceUse>,
    /// The running time at the start of the current step.
    now: Cell<Duration>,
    /// A flush of an address space may be over, and has not been told.
    flush_ended: Cell<bool>,
    /// The last two places that were looked up, newest last, as far as they lie in address spaces.
    walked: Cell<[Option<Walked>; 2]>,
    /// What all packets touch, computed once and shared.
    touches: Arc<WorkingSet>,
}

/// Why an operand cannot be used now.
pub(crate) enum Unavailable {
    Memory(MemoryError),
    /// The driver may change that, and is asked to.
    Fault(TranslationFault),
    Error(JobError),
}

impl From<MemoryError> for Unavailable {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error)
    }
}

/// The pages of an operand that are looked up when one is missing: that one, and those ahead of it.
const PAGES_AHEAD: usize = 64;

/// Bytes of resources, by resource and access.
type Wanted = BTreeMap<(u32, Access), Vec<Offsets>>;

impl Operands {
    /// Resolves all operands, which lie in resources.
    #[cfg(test)]
    pub(crate) fn new(
        program: Program,
        find: impl Fn(u32) -> Result<ResourceMemory, InvalidMemory>,
    ) -> Result<Self, InvalidMemory> {
        Self::resolve(program, find, |asid| panic!("Operand in address space {asid}"))
    }

    /// Resolves all operands; `find` gives the resource of a space, and `translate` an address space. A refused program
    /// leaves nothing behind.
    pub(crate) fn resolve<E: From<InvalidMemory>>(
        program: Program,
        find: impl Fn(u32) -> Result<ResourceMemory, E>,
        translate: impl Fn(u32) -> Result<Arc<AddressSpace>, E>,
    ) -> Result<Self, E> {
        let (mut resources, mut address_spaces) = (BTreeMap::new(), BTreeMap::new());
        for (packet, operand) in program.operands() {
            let id = operand.range.space.raw();
            if let Some(asid) = operand.range.space.asid() {
                if let Entry::Vacant(new) = address_spaces.entry(id) {
                    new.insert(SpaceUse::new(translate(asid)?));
                }
                continue;
            }
            let memory = match resources.get(&id) {
                Some(memory) => memory,
                None => resources.entry(id).or_insert(find(id)?),
            };
            check(memory, packet, &operand)?;
        }
        let (now, flush_ended, walked) = (Cell::default(), Cell::default(), Cell::default());
        let touches = Arc::default();
        let mut this = Self { program, resources, address_spaces, now, flush_ended, walked, touches };
        this.touches = this.set(this.program.operands().map(|(_, operand)| operand));
        Ok(this)
    }

    pub(crate) fn program(&self) -> &Program {
        &self.program
    }

    /// The packet that names the user fence, if any.
    pub(crate) fn fence(&self) -> Option<&Context> {
        match self.program.packets().first() {
            Some(Packet::Context(context)) if context.fence.is_some() => Some(context),
            _ => None,
        }
    }

    /// Where a byte is, and how many follow it in the same entry of the backing, or in the same page.
    pub(crate) fn find(
        &self,
        memory: &impl JobMemory,
        at: At,
        access: GvaAccess,
    ) -> Result<Option<(Place, u64)>, Unavailable> {
        let Some(space) = self.address_spaces.get(&at.space.raw()) else {
            self.note(None);
            let located =
                self.resources.get(&at.space.raw()).and_then(|memory| memory.backing.locate(at.address));
            return Ok(located.map(|(at, rest)| (Place::Iova(at), rest)));
        };
        match space.translate(memory, Gva::new(at.address), access, self.now.get()) {
            Ok((place, rest, walked)) => {
                self.note(walked);
                Ok(Some((place, rest)))
            }
            Err(Untranslated::Memory(error, walked)) => {
                self.note(Some(*walked));
                Err(Unavailable::Memory(error))
            }
            Err(Untranslated::Fault(fault)) if space.raises(&fault) => Err(Unavailable::Fault(fault)),
            Err(Untranslated::Fault(fault)) => Err(Unavailable::Error(JobError::Translation(fault))),
        }
    }

    fn note(&self, walked: Option<Walked>) {
        let [_, last] = self.walked.get();
        self.walked.set([last, walked]);
    }

    /// What led to `missing`, the last that the job missed, in an address space.
    fn walked_to(&self, missing: Missing) -> Option<Walked> {
        let leads = |walked: &Walked| {
            missing.range.contains(walked.page) && walked.accesses.contains(&missing.access)
        };
        self.walked.get().into_iter().flatten().rev().find(leads)
    }

    /// How many flushes of the address space that led to `missing` had begun before; 0: none led there.
    pub(crate) fn flushes_before(&self, missing: Missing) -> u64 {
        self.walked_to(missing).map_or(0, |walked| walked.flushes)
    }

    /// The error of a job for which `missing`, the last that it missed, was refused.
    pub(crate) fn refusal(&self, missing: Missing) -> JobError {
        let Some(Walked { fault, .. }) = self.walked_to(missing) else { return JobError::Refused(missing) };
        self.address_spaces.values().for_each(|space| space.forget(&fault));
        JobError::Translation(fault)
    }

    /// The address space that a fault is about.
    pub(crate) fn space_of(&self, fault: &TranslationFault) -> Option<&Arc<AddressSpace>> {
        let mut spaces = self.address_spaces.values().map(SpaceUse::space);
        spaces.find(|space| space.asid() == fault.asid)
    }

    /// A step begins, at this running time.
    pub(crate) fn begin_step(&self, now: Duration) {
        self.now.set(now);
    }

    /// The step has ended: what it has looked up in address spaces is used no more.
    pub(crate) fn end_step(&self) {
        for space in self.address_spaces.values() {
            if space.end_step() {
                self.flush_ended.set(true);
            }
        }
    }

    /// Whether a flush of an address space may be over since the last call.
    pub(crate) fn take_flush_ended(&self) -> bool {
        self.flush_ended.take()
    }

    /// How often TLBs were asked since the last call.
    pub(crate) fn take_tlb_counts(&self) -> TlbCounts {
        self.address_spaces.values().fold(TlbCounts::default(), |sum, space| {
            let TlbCounts { hits, misses } = space.take_counts();
            TlbCounts { hits: sum.hits.saturating_add(hits), misses: sum.misses.saturating_add(misses) }
        })
    }

    /// A flush that is likely missing, as found since the last call.
    pub(crate) fn take_overdue(&self) -> Option<TranslationFault> {
        self.address_spaces.values().find_map(SpaceUse::take_overdue)
    }

    /// Whether an operand lies in an address space.
    pub(crate) fn is_translated(&self) -> bool {
        !self.address_spaces.is_empty()
    }

    /// The pages that `operand` needs from byte `done` on and the mirror lacks, apart from `missing`, added to `ahead`.
    /// Looks no further than the page tables can be read.
    pub(crate) fn look_ahead(
        &self,
        memory: &impl JobMemory,
        probe: &impl Fn(Iova, Access) -> Option<Missing>,
        (operand, done): (&Operand, u64),
        (missing, ahead): (Missing, &mut Vec<Missing>),
    ) {
        let Some(space) = self.address_spaces.get(&operand.range.space.raw()) else { return };
        let access = access_of(operand);
        let ends = operand.range.address.checked_add(done).zip(operand.range.last());
        let Some(rest) = ends.and_then(|(at, last)| ByteRange::inclusive(Gva::new(at), Gva::new(last)))
        else {
            return;
        };
        let mut lacks = |found: Missing| {
            if !missing.range.covers(found.range) && !ahead.contains(&found) {
                ahead.push(found);
            }
        };
        for gva in rest.pages().take(PAGES_AHEAD) {
            match space.peek(memory, gva, access) {
                Ok((Place::Iova(at), ..)) => {
                    access.accesses().iter().filter_map(|access| probe(at, *access)).for_each(&mut lacks);
                }
                Ok((Place::Null, ..)) => {}
                Err(Untranslated::Memory(MemoryError::Missing(table), _)) => lacks(table),
                Err(_) => return,
            }
        }
    }

    /// What the packets from `first` on touch, and the user fence.
    ///
    /// Ranges of a resource are joined before they are looked up, so that the work is bounded by operands plus entries,
    /// not by their product.
    pub(crate) fn working_set(&self, first: usize) -> Vec<PinRange> {
        let operands = self.program.operands();
        self.pins(operands.filter(|(packet, _)| *packet >= first || *packet == 0).map(|(_, operand)| operand))
    }

    /// What one packet touches.
    pub(crate) fn of_packet(&self, number: usize) -> Vec<PinRange> {
        self.pins(self.program.packets().get(number).into_iter().flat_map(Packet::operands))
    }

    /// The user fence alone.
    pub(crate) fn fence_only(&self) -> Vec<PinRange> {
        let context = self.fence().map(|context| Packet::Context(*context));
        self.pins(context.iter().flat_map(Packet::operands))
    }

    /// What all packets touch, and the user fence.
    pub(crate) fn touches(&self) -> Arc<WorkingSet> {
        Arc::clone(&self.touches)
    }

    /// The user fence alone.
    pub(crate) fn touches_fence_only(&self) -> Arc<WorkingSet> {
        let context = self.fence().map(|context| Packet::Context(*context));
        self.set(context.iter().flat_map(Packet::operands))
    }

    fn set(&self, operands: impl Iterator<Item = Operand>) -> Arc<WorkingSet> {
        let mut parts: BTreeMap<u32, (Vec<Offsets>, Vec<Offsets>)> = BTreeMap::new();
        for ((id, access), offsets) in wanted(operands) {
            let (reads, writes) = parts.entry(id).or_default();
            *(if access == Access::Read { reads } else { writes }) = offsets;
        }
        let part = |(id, (reads, writes))| {
            let entries = self.resources.get(&id)?.backing.share_entries();
            Some(BackingPart { entries, reads: OffsetSet::new(reads), writes: OffsetSet::new(writes) })
        };
        Arc::new(WorkingSet::new(parts.into_iter().filter_map(part)))
    }

    fn pins(&self, operands: impl Iterator<Item = Operand>) -> Vec<PinRange> {
        let mut pins: BTreeMap<Access, Vec<ByteRange<Iova>>> = BTreeMap::new();
        for ((id, access), offsets) in wanted(operands) {
            let Some(memory) = self.resources.get(&id) else { continue };
            for offsets in joined(offsets) {
                pins.entry(access).or_default().extend(memory.backing.behind(offsets));
            }
        }
        let pin = |access, range| PinRange { space: DomainId::DEVICE, range, access };
        pins.into_iter()
            .flat_map(|(access, ranges)| merged(ranges).into_iter().map(move |range| pin(access, range)))
            .collect()
    }
}

fn access_of(operand: &Operand) -> GvaAccess {
    match operand.access {
        job_stream::Access::Reads => GvaAccess::Read,
        job_stream::Access::Writes => GvaAccess::Write,
        job_stream::Access::Updates => GvaAccess::Atomic,
    }
}

/// Groups the bytes that operands name by resource and access.
fn wanted(operands: impl Iterator<Item = Operand>) -> Wanted {
    let mut wanted = Wanted::new();
    for operand in operands {
        let ends = operand.range.last().and_then(|last| Offsets::inclusive(operand.range.address, last));
        let Some(offsets) = ends else { continue };
        let id = operand.range.space.raw();
        if operand.access.reads() {
            wanted.entry((id, Access::Read)).or_default().push(offsets);
        }
        if operand.access.writes() {
            wanted.entry((id, Access::Write)).or_default().push(offsets);
        }
    }
    wanted
}

/// Whether the operand lies in its resource, and, if it is a single value, in one aligned piece.
fn check(memory: &ResourceMemory, packet: usize, operand: &Operand) -> Result<(), InvalidMemory> {
    let Operand { field, range, is_value, .. } = *operand;
    let outside = InvalidMemory::OperandOutside { packet, field, range, bytes: memory.bytes };
    let last = range.last().filter(|last| *last < memory.bytes).ok_or(outside.clone())?;
    memory.backing.locate(last).ok_or(outside.clone())?;
    let (at, in_entry) = memory.backing.locate(range.address).ok_or(outside)?;
    if is_value && (!at.raw().is_multiple_of(range.length) || in_entry < range.length) {
        return Err(InvalidMemory::OperandSplit { packet, field, range });
    }
    Ok(())
}
