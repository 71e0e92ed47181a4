//! The operands of a program, resolved: the backing of each space, and the guest memory that operands name in it.
//! Checks at submission that each operand lies in its resource; afterwards a program names only what it may touch.

use std::collections::BTreeMap;
use std::sync::Arc;

use job_stream::{At, Context, Operand, Packet, Program};

use crate::addr::{Access, ByteRange, Iova, SpaceId};
use crate::gpu::error::CommandError;
use crate::jobs::backing::Backing;
use crate::jobs::offsets::{OffsetSet, Offsets, joined};
use crate::jobs::transfer::merged;
use crate::jobs::working_set::{BackingPart, WorkingSet};
use crate::mmu::PinRange;

/// A resource as a space: its length, and its backing.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    pub(crate) bytes: u64,
    pub(crate) backing: Backing,
}

/// A program with the memory that its operands name.
#[derive(Debug)]
pub(crate) struct Operands {
    program: Program,
    spaces: BTreeMap<u32, Space>,
    /// What all packets touch, computed once and shared.
    touches: Arc<WorkingSet>,
}

/// Bytes of spaces, by space and access.
type Wanted = BTreeMap<(u32, Access), Vec<Offsets>>;

impl Operands {
    /// Resolves all operands; `find` gives the resource of a space. A refused program leaves nothing behind.
    pub(crate) fn new(
        program: Program,
        find: impl Fn(u32) -> Result<Space, CommandError>,
    ) -> Result<Self, CommandError> {
        let mut spaces = BTreeMap::new();
        for (packet, operand) in program.operands() {
            let id = operand.range.space.raw();
            let space = match spaces.get(&id) {
                Some(space) => space,
                None => spaces.entry(id).or_insert(find(id)?),
            };
            check(space, packet, &operand)?;
        }
        let mut this = Self { program, spaces, touches: Arc::default() };
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

    /// Where a byte is, and how many follow it in the same entry of the backing.
    pub(crate) fn locate(&self, at: At) -> Option<(Iova, u64)> {
        self.spaces.get(&at.space.raw())?.backing.locate(at.address)
    }

    /// What the packets from `first` on touch, and the user fence.
    ///
    /// Ranges of a space are joined before they are looked up, so that the work is bounded by operands plus entries,
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
            let entries = self.spaces.get(&id)?.backing.share_entries();
            Some(BackingPart { entries, reads: OffsetSet::new(reads), writes: OffsetSet::new(writes) })
        };
        Arc::new(WorkingSet::new(parts.into_iter().filter_map(part)))
    }

    fn pins(&self, operands: impl Iterator<Item = Operand>) -> Vec<PinRange> {
        let mut pins: BTreeMap<Access, Vec<ByteRange<Iova>>> = BTreeMap::new();
        for ((id, access), offsets) in wanted(operands) {
            let Some(space) = self.spaces.get(&id) else { continue };
            for offsets in joined(offsets) {
                pins.entry(access).or_default().extend(space.backing.behind(offsets));
            }
        }
        let pin = |access, range| PinRange { space: SpaceId::DEVICE, range, access };
        pins.into_iter()
            .flat_map(|(access, ranges)| merged(ranges).into_iter().map(move |range| pin(access, range)))
            .collect()
    }
}

/// Groups the bytes that operands name by space and access.
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
fn check(space: &Space, packet: usize, operand: &Operand) -> Result<(), CommandError> {
    let Operand { field, range, is_value, .. } = *operand;
    let outside = CommandError::OperandOutside { packet, field, range, bytes: space.bytes };
    let last = range.last().filter(|last| *last < space.bytes).ok_or(outside.clone())?;
    space.backing.locate(last).ok_or(outside.clone())?;
    let (at, in_entry) = space.backing.locate(range.address).ok_or(outside)?;
    if is_value && (!at.raw().is_multiple_of(range.length) || in_entry < range.length) {
        return Err(CommandError::OperandSplit { packet, field, range });
    }
    Ok(())
}
