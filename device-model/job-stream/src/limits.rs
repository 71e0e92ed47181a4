//! What a device takes: how much of a stream, which packets, which modes. Knows numbers; knows nothing of streams.

use crate::choice::ModeSet;
use crate::packets::{Opcode, PACKETS};

/// A set of packets: bit n is the packet with the opcode n.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PacketSet([u32; 8]);

impl PacketSet {
    /// No packet.
    pub const NONE: Self = Self([0; 8]);

    /// All packets that the table has.
    pub fn all() -> Self {
        PACKETS.iter().fold(Self::NONE, |set, packet| set.with(packet.opcode))
    }

    /// The set with these bits, bit 0 of the first word first.
    pub const fn from_bits(bits: [u32; 8]) -> Self {
        Self(bits)
    }

    /// The bits of the set.
    pub const fn bits(self) -> [u32; 8] {
        self.0
    }

    /// The set with `opcode` too.
    #[must_use]
    pub fn with(mut self, opcode: Opcode) -> Self {
        let (word, bit) = Self::place(opcode);
        self.0.iter_mut().skip(word).take(1).for_each(|bits| *bits |= bit);
        self
    }

    /// Whether `opcode` is in the set.
    pub fn contains(self, opcode: Opcode) -> bool {
        let (word, bit) = Self::place(opcode);
        self.0.get(word).is_some_and(|bits| bits & bit != 0)
    }

    fn place(opcode: Opcode) -> (usize, u32) {
        (usize::from(opcode.raw() >> 5), 1 << (opcode.raw() & 31))
    }
}

/// What a device takes. A guest finds it in the capability set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Words of a stream.
    pub words: u32,
    /// Packets of a stream.
    pub packets: u32,
    /// Bytes of an operand.
    pub operand_bytes: u64,
    /// Nanoseconds of a SPIN.
    pub spin_ns: u64,
    /// Nanoseconds of a WAIT.
    pub wait_ns: u64,
    /// Address spaces; 0: an operand cannot lie in one.
    pub address_spaces: u32,
    /// The packets that the device offers.
    pub offered: PacketSet,
    /// The modes that the device offers.
    pub modes: ModeSet,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            words: 65_536,
            packets: 8_192,
            operand_bytes: 1 << 32,
            spin_ns: 10_000_000_000,
            wait_ns: 60_000_000_000,
            address_spaces: 64,
            offered: PacketSet::all(),
            modes: ModeSet::COHERENT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_packets_has_those_that_were_put_in() {
        let set = PacketSet::NONE.with(Opcode::Nop).with(Opcode::Signal);
        assert_eq!(set.bits(), [1 << 1, 1, 0, 0, 0, 0, 0, 0]);
        assert!(set.contains(Opcode::Signal) && !set.contains(Opcode::Wait));
        assert!(PACKETS.iter().all(|packet| PacketSet::all().contains(packet.opcode)));
    }
}
