//! The operands of a program, resolved: which backing each space stands for, and which guest memory that makes. Judges
//! at submission whether each operand lies in its resource; afterwards a program only names what it may touch.

use std::collections::BTreeMap;

use job_stream::{At, Context, Operand, Packet, Program};

use crate::addr::{Access, ByteRange, Iova, SpaceId};
use crate::gpu::error::CommandError;
use crate::jobs::backing::Backing;
use crate::jobs::transfer::merged;
use crate::mmu::PinRange;

/// A resource as a space: its bytes, and what backs them.
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
}

impl Operands {
    /// Resolves all operands; `find` gives the resource of a space. Nothing of a program that is refused is kept.
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
        Ok(Self { program, spaces })
    }

    pub(crate) fn program(&self) -> &Program {
        &self.program
    }

    /// The packet that names the user fence, if there is one.
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
    /// Ranges of a space are joined before they are looked up, so that the work is bounded by operands and entries,
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

    fn pins(&self, operands: impl Iterator<Item = Operand>) -> Vec<PinRange> {
        let mut wanted: BTreeMap<(u32, Access), Vec<(u64, u64)>> = BTreeMap::new();
        for operand in operands {
            let Some(last) = operand.range.last() else { continue };
            let id = operand.range.space.raw();
            let ends = (operand.range.address, last);
            if operand.access.reads() {
                wanted.entry((id, Access::Read)).or_default().push(ends);
            }
            if operand.access.writes() {
                wanted.entry((id, Access::Write)).or_default().push(ends);
            }
        }
        let mut pins: BTreeMap<Access, Vec<ByteRange<Iova>>> = BTreeMap::new();
        for ((id, access), ranges) in wanted {
            let Some(space) = self.spaces.get(&id) else { continue };
            for ends in joined(ranges) {
                pins.entry(access).or_default().extend(pieces(&space.backing, ends));
            }
        }
        let pin = |access, range| PinRange { space: SpaceId::DEVICE, range, access };
        pins.into_iter()
            .flat_map(|(access, ranges)| merged(ranges).into_iter().map(move |range| pin(access, range)))
            .collect()
    }
}

/// Whether the operand lies in its resource, and, if it is one value, in one aligned piece.
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

/// Sorts ranges, given by their ends, and joins those that touch.
fn joined(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match joined.last_mut() {
            Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
            _ => joined.push((first, last)),
        }
    }
    joined
}

/// The stretches of guest memory that lie behind the bytes from `first` to `last`.
fn pieces(backing: &Backing, (first, last): (u64, u64)) -> impl Iterator<Item = ByteRange<Iova>> + '_ {
    let mut next = Some(first);
    std::iter::from_fn(move || {
        let at = next.filter(|at| *at <= last)?;
        let (start, in_entry) = backing.locate(at)?;
        // OVERFLOW: the first byte is one of them.
        let len = in_entry.min(last.saturating_sub(at).saturating_add(1));
        next = at.checked_add(len);
        ByteRange::new(start, len).ok()
    })
}
