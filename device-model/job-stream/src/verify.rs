//! The verifier: from words to native packets, or to the one reason why not. It looks at every word once, allocates
//! no more than the packets need, and has no effect. Knows streams and limits; whether a space exists and how long it
//! is, its caller checks with [`Program::operands`].

use alloc::vec::Vec;

use crate::address_space::LAST_GVA;
use crate::error::{Problem, StreamError};
use crate::limits::Limits;
use crate::operand::{Operand, Space};
use crate::packets::{Opcode, Packet, RESERVED_OPCODES};
use crate::table::{Fault, Place};

/// A stream that was verified whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    packets: Vec<Packet>,
}

impl Program {
    /// The packets, in their order.
    pub fn packets(&self) -> &[Packet] {
        &self.packets
    }

    /// All memory that the job may touch, each with the number of its packet.
    pub fn operands(&self) -> impl Iterator<Item = (usize, Operand)> {
        let numbered = self.packets.iter().enumerate();
        numbered.flat_map(|(index, packet)| packet.operands().map(move |operand| (index, operand)))
    }
}

/// Verifies a stream of bytes as they came from the guest.
pub fn verify_bytes(bytes: &[u8], limits: &Limits) -> Result<Program, StreamError> {
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        return Err(StreamError::NotWords { bytes: bytes.len() });
    }
    bounded(words.len(), limits)?;
    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
    verify(&words, limits)
}

/// Verifies a stream of words. An empty one is a job that does nothing.
pub fn verify(words: &[u32], limits: &Limits) -> Result<Program, StreamError> {
    bounded(words.len(), limits)?;
    let mut packets = Vec::new();
    let mut rest = words;
    while let Some(head) = Head::read(rest) {
        let at = words.len().saturating_sub(rest.len());
        let place = Place { index: packets.len(), limits };
        let (packet, length) =
            head.packet(rest, &place).map_err(|fault| head.blame(fault, place.index, at))?;
        packets.push(packet);
        rest = rest.get(length..).unwrap_or_default();
    }
    Ok(Program { packets })
}

fn bounded(words: usize, limits: &Limits) -> Result<(), StreamError> {
    let limit = limits.words as usize;
    if words > limit { Err(StreamError::TooManyWords { words, limit }) } else { Ok(()) }
}

/// The header of a packet, taken apart.
#[derive(Clone, Copy)]
struct Head {
    opcode: u8,
    flags: u8,
    length: usize,
}

impl Head {
    /// The header at the start of `words`, if there is a word.
    fn read(words: &[u32]) -> Option<Self> {
        let [opcode, flags, low, high] = words.first()?.to_le_bytes();
        Some(Self { opcode, flags, length: usize::from(u16::from_le_bytes([low, high])) })
    }

    /// The packet at the start of `words`, judged whole, and its length.
    fn packet(self, words: &[u32], place: &Place<'_>) -> Result<(Packet, usize), Fault> {
        let of_header = |problem| ("header", problem);
        let opcode = self.opcode(place).map_err(of_header)?;
        self.check_shape(opcode, words.len()).map_err(of_header)?;
        let body = words.get(1..self.length).unwrap_or_default();
        let packet = Packet::decode(opcode, self.flags, body)?;
        check_operands(&packet, place.limits)?;
        match packet.broken_rule(place) {
            None => Ok((packet, self.length)),
            Some(rule) => {
                let value = value_at(words, opcode, rule.field);
                Err((rule.field, Problem::Rule { value, rule: rule.text }))
            }
        }
    }

    fn opcode(self, place: &Place<'_>) -> Result<Opcode, Problem> {
        let limit = place.limits.packets as usize;
        if place.index >= limit {
            return Err(Problem::TooManyPackets { limit });
        }
        match Opcode::from_raw(self.opcode) {
            Some(known) if place.limits.offered.contains(known) => Ok(known),
            Some(_) => Err(Problem::NotOffered),
            None if RESERVED_OPCODES.contains(&self.opcode) => Err(Problem::ReservedOpcode),
            None => Err(Problem::UnknownOpcode),
        }
    }

    /// Whether length and flags are those of the packet, and all of it is there.
    fn check_shape(self, opcode: Opcode, available: usize) -> Result<(), Problem> {
        let (expected, more) = opcode.info().length();
        let expected = usize::from(expected);
        if self.length < expected || (self.length > expected && !more) {
            return Err(Problem::Length { found: self.length, expected });
        }
        let unknown = self.flags & !opcode.info().known_flags();
        if unknown != 0 {
            return Err(Problem::UnknownFlags { flags: unknown });
        }
        match self.length.saturating_sub(available) {
            0 => Ok(()),
            missing => Err(Problem::Truncated { missing }),
        }
    }

    /// The error that says where in the stream the fault lies.
    fn blame(self, (field, problem): Fault, packet: usize, at: usize) -> StreamError {
        let offset = Opcode::from_raw(self.opcode).map_or(0, |opcode| opcode.info().offset(field));
        let word = at.saturating_add(usize::from(offset));
        StreamError::Packet { packet, opcode: self.opcode, word, field, problem }
    }
}

/// The number that stands in a field of one or two words, for the message.
fn value_at(words: &[u32], opcode: Opcode, field: &str) -> u64 {
    let info = opcode.info();
    let mut found = words.iter().skip(usize::from(info.offset(field))).map(|word| u64::from(*word));
    let low = found.next().unwrap_or(0);
    match info.fields.iter().find(|known| known.name == field) {
        Some(known) if known.kind.words() == 2 => low | found.next().unwrap_or(0) << 32,
        _ => low,
    }
}

/// Whether the packet names memory in a way that makes sense, whatever the spaces hold.
fn check_operands(packet: &Packet, limits: &Limits) -> Result<(), Fault> {
    packet.operands().try_for_each(|operand| {
        check_operand(&operand, limits).map_err(|problem| (operand.field, problem))
    })?;
    let mut before: Option<Operand> = None;
    for operand in packet.operands() {
        if let Some(other) = before.filter(|other| other.range.overlaps(operand.range))
            && (other.access.writes() || operand.access.writes())
        {
            return Err((operand.field, Problem::Overlaps { range: operand.range, other: other.field }));
        }
        before = Some(operand);
    }
    Ok(())
}

fn check_operand(operand: &Operand, limits: &Limits) -> Result<(), Problem> {
    let Operand { range, alignment, .. } = *operand;
    if range.space == Space::NONE {
        return Err(Problem::NoSpace);
    }
    let is_translated = range.space.asid().is_some();
    if is_translated && limits.address_spaces == 0 {
        return Err(Problem::NoAddressSpaces { space: range.space });
    }
    if range.length == 0 {
        return Err(Problem::Empty);
    }
    if range.length > limits.operand_bytes {
        return Err(Problem::TooLong { length: range.length, limit: limits.operand_bytes });
    }
    let last = range.last().ok_or(Problem::Wraps { range })?;
    if is_translated && last > LAST_GVA {
        return Err(Problem::BeyondGva { range });
    }
    if !range.address.is_multiple_of(alignment) || !range.length.is_multiple_of(alignment) {
        return Err(Problem::Unaligned { range, unit: alignment });
    }
    Ok(())
}
