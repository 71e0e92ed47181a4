//! Why a stream is refused: which packet, which word, which field, and what is wrong with it. Knows how to say it;
//! knows nothing of responses or logs.

use core::fmt;

use crate::address_space::GVA_BITS;
use crate::operand::{Range, Space};
use crate::packets::Opcode;

/// What is wrong with a stream. A stream that is refused has had no effect at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamError {
    /// The stream is not made of words.
    NotWords {
        /// Its length.
        bytes: usize,
    },
    /// The stream is longer than the device takes.
    TooManyWords {
        /// Its length.
        words: usize,
        /// What the device takes.
        limit: usize,
    },
    /// A packet is wrong.
    Packet {
        /// Which packet, counted from 0.
        packet: usize,
        /// Its opcode, known or not.
        opcode: u8,
        /// The word of the stream, counted from 0, where what is wrong begins.
        word: usize,
        /// The field that it is in; `header` for the first word.
        field: &'static str,
        /// What is wrong.
        problem: Problem,
    },
}

/// What is wrong with a packet or with a field of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    /// No packet has this opcode.
    UnknownOpcode,
    /// The opcode is kept for packets about address spaces.
    ReservedOpcode,
    /// This device does not offer the packet.
    NotOffered,
    /// There are more packets than the device takes.
    TooManyPackets {
        /// What the device takes.
        limit: usize,
    },
    /// The header says a length that the packet does not have.
    Length {
        /// Words, by the header.
        found: usize,
        /// Words, by the manual.
        expected: usize,
    },
    /// The stream ends within the packet.
    Truncated {
        /// Words that are not there.
        missing: usize,
    },
    /// Flags are set that mean nothing.
    UnknownFlags {
        /// Those flags.
        flags: u8,
    },
    /// The value is none of the named ones.
    Choice {
        /// The names of the values.
        choice: &'static str,
        /// The value.
        value: u32,
    },
    /// An operand has no space.
    NoSpace,
    /// The space is an address space, and this device offers none.
    NoAddressSpaces {
        /// The space.
        space: Space,
    },
    /// An operand ends beyond the last address of an address space.
    BeyondGva {
        /// The operand.
        range: Range,
    },
    /// An operand that is not there, for its space is 0, has an address all the same.
    AddressWithoutSpace {
        /// The address.
        address: u64,
    },
    /// An operand has no bytes.
    Empty,
    /// An operand ends past 2^64 - 1.
    Wraps {
        /// The operand.
        range: Range,
    },
    /// An operand is longer than the device takes.
    TooLong {
        /// Its length.
        length: u64,
        /// What the device takes.
        limit: u64,
    },
    /// The address or the length of an operand is no multiple of its unit.
    Unaligned {
        /// The operand.
        range: Range,
        /// Bytes in a unit.
        unit: u64,
    },
    /// An operand that is written shares bytes with another one.
    Overlaps {
        /// The operand.
        range: Range,
        /// The field of the other.
        other: &'static str,
    },
    /// A rule of the packet is broken.
    Rule {
        /// The word that breaks it.
        value: u64,
        /// The rule.
        rule: &'static str,
    },
}

impl fmt::Display for StreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotWords { bytes } => write!(f, "Stream of {bytes} bytes is not made of 32-bit words"),
            Self::TooManyWords { words, limit } => {
                write!(f, "Stream of {words} words is longer than {limit} words")
            }
            Self::Packet { packet, opcode, word, field, problem } => {
                write!(f, "Packet {packet} ")?;
                match Opcode::from_raw(opcode) {
                    Some(known) => write!(f, "({known})")?,
                    None => write!(f, "(opcode {opcode:#04x})")?,
                }
                write!(f, ", {field} at word {word}: {problem}")
            }
        }
    }
}

impl core::error::Error for StreamError {}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnknownOpcode => f.write_str("no packet has this opcode"),
            Self::ReservedOpcode => f.write_str("this opcode is kept for packets about address spaces"),
            Self::NotOffered => f.write_str("this device does not offer the packet"),
            Self::TooManyPackets { limit } => write!(f, "the device takes {limit} packets"),
            Self::Length { found, expected } => write!(f, "the length is {found} words, not {expected}"),
            Self::Truncated { missing } => write!(f, "the stream ends {missing} words too early"),
            Self::UnknownFlags { flags } => write!(f, "flags {flags:#04x} mean nothing here"),
            Self::Choice { choice, value } => write!(f, "{value:#x} is no {choice}"),
            Self::NoSpace => f.write_str("the space is 0"),
            Self::NoAddressSpaces { space } => {
                write!(f, "{space} cannot be: the device has no address spaces")
            }
            Self::BeyondGva { range } => write!(f, "{range} ends past 2^{GVA_BITS} - 1"),
            Self::AddressWithoutSpace { address } => {
                write!(f, "the address is {address:#x} though the space is 0")
            }
            Self::Empty => f.write_str("the length is 0"),
            Self::Wraps { range } => write!(f, "{range} wraps around the end of the address space"),
            Self::TooLong { length, limit } => write!(f, "the length is {length:#x}, more than {limit:#x}"),
            Self::Unaligned { range, unit } => {
                write!(f, "{range} is not made of aligned units of {unit} bytes")
            }
            Self::Overlaps { range, other } => write!(f, "{range} overlaps `{other}`"),
            Self::Rule { value, rule } => write!(f, "{value:#x} breaks the rule that it {rule}"),
        }
    }
}
