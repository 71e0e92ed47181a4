//! The capability set with which MirrorGPU says that it takes job streams, and what it takes. One table, of which the
//! struct, its bytes and its rows in the manual and the C header come. Knows the layout; knows nothing of GET_CAPSET.
//!
//! The id is the highest but three of the 64 that the Linux driver can hand to user space: far from those that are
//! given out from 1 upwards (virgl 1, virgl2 2, gfxstream 3, venus 4, cross-domain 5, drm 6, up to 10 so far).

use alloc::vec::Vec;
use core::fmt;

use crate::address_space::GVA_BITS;
use crate::choice::{Choice, Mode, ModeSet};
use crate::error::Problem;
use crate::field::{Field, Kind, Words};
use crate::limits::{Limits, PacketSet};

/// The id of the capability set: far from those of others, which count up from 1, and below 31, for Linux (6.12) keeps
/// the set of ids that it takes for CONTEXT_INIT as `1 << id` of an `int`.
pub const CAPSET_ID: u32 = 30;
/// The version of the layout. A later one only appends; what is incompatible gets another id.
pub const CAPSET_VERSION: u32 = 2;

/// A field of the capability set.
#[derive(Clone, Copy, Debug)]
pub struct CapsetFieldInfo {
    /// Its name.
    pub name: &'static str,
    /// How it is written.
    pub kind: Kind,
    /// What it means.
    pub text: &'static str,
}

macro_rules! capset {
    ($($field:ident: $kind:ty, $text:literal;)*) => {
        /// What the device is and takes, as the guest reads it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct Capset {
            $(#[doc = $text] pub $field: $kind,)*
        }

        impl Capset {
            /// The table, in the order of the words.
            pub const FIELDS: &[CapsetFieldInfo] =
                &[$(CapsetFieldInfo { name: stringify!($field), kind: <$kind as Field>::KIND, text: $text }),*];

            fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
                Ok(Self { $($field: Field::decode(words)?),* })
            }

            fn encode(&self, words: &mut Vec<u32>) {
                $(self.$field.encode(words);)*
            }

            const WORDS: usize = 0 $(+ <$kind as Field>::WORDS as usize)*;
        }
    };
}

capset! {
    version: u32, "Version of this layout, from 1 up. A later version only appends fields.";
    size: u32, "Bytes of the capability set: 96 in version 1, 104 in version 2.";
    engines: u32, "Engines that execute jobs at the same time.";
    modes: u32, "Modes that a context can have: bit n is the mode with the number n.";
    default_mode: u32, "The mode of a context that asks for none.";
    max_words: u32, "Words of a stream, at the most.";
    max_packets: u32, "Packets of a stream, at the most.";
    max_jobs: u32, "Jobs of all contexts that may be submitted and not yet done, at the most.";
    packets: [u32; 8], "Packets that the device executes: bit n of the 256 is the packet with the opcode n.";
    max_operand: u64, "Bytes of an operand, at the most.";
    max_spin: u64, "Nanoseconds of a SPIN, at the most.";
    max_wait: u64, "Nanoseconds of a WAIT, at the most; what a timeout of 0 means.";
    max_wedge: u64, "Nanoseconds for which the device bears a SPIN that is wedged, or any job that will not leave, when it is asked to leave.";
    max_address_spaces: u32, "Address spaces of all contexts, at the most; 0: the device has none. From version 2 on.";
    gva_bits: u32, "Bits of an address in an address space. From version 2 on.";
}

/// The bytes of the capability set, in this version.
const BYTES: usize = 104;
/// The bytes of the capability set, in version 1.
const BYTES_1: usize = 96;
const _: () = assert!(Capset::WORDS * 4 == BYTES && CAPSET_ID < 31);

/// Why bytes are no capability set of a job-stream device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapsetError {
    /// They are too few.
    Short {
        /// How many there are.
        bytes: usize,
    },
    /// The version is 0, as in memory that nobody has written.
    Version,
}

impl fmt::Display for CapsetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short { bytes } => write!(f, "Capability set has {bytes} bytes, not {BYTES_1} or more"),
            Self::Version => f.write_str("Capability set has version 0"),
        }
    }
}

impl core::error::Error for CapsetError {}

impl Capset {
    /// The bytes of the capability set, in this version.
    pub const BYTES: usize = BYTES;

    /// The capability set of a device with so many engines and jobs, this default mode, and these limits.
    /// `max_wedge` is in nanoseconds.
    pub fn new(engines: u32, max_jobs: u32, default_mode: Mode, max_wedge: u64, limits: &Limits) -> Self {
        Self {
            version: CAPSET_VERSION,
            size: BYTES as u32,
            engines,
            modes: limits.modes.bits(),
            default_mode: default_mode.raw(),
            max_words: limits.words,
            max_packets: limits.packets,
            max_jobs,
            packets: limits.offered.bits(),
            max_operand: limits.operand_bytes,
            max_spin: limits.spin_ns,
            max_wait: limits.wait_ns,
            max_wedge,
            max_address_spaces: limits.address_spaces,
            gva_bits: GVA_BITS,
        }
    }

    /// What the device takes, for a guest that verifies its own streams.
    pub fn limits(&self) -> Limits {
        Limits {
            words: self.max_words,
            packets: self.max_packets,
            operand_bytes: self.max_operand,
            spin_ns: self.max_spin,
            wait_ns: self.max_wait,
            address_spaces: self.max_address_spaces,
            offered: PacketSet::from_bits(self.packets),
            modes: ModeSet::from_bits(self.modes),
        }
    }

    /// The bytes as the device sends them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut words = Vec::with_capacity(Self::WORDS);
        self.encode(&mut words);
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// Reads what a device has sent. What a later version has appended is left alone; what an earlier version did not
    /// have is 0.
    pub fn parse(bytes: &[u8]) -> Result<Self, CapsetError> {
        let short = CapsetError::Short { bytes: bytes.len() };
        let (words, _) = bytes.get(..BYTES.min(bytes.len())).unwrap_or_default().as_chunks::<4>();
        if bytes.len() < BYTES_1 {
            return Err(short);
        }
        let mut words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        words.resize(Self::WORDS, 0);
        match Self::decode(&mut Words::new(&words)) {
            Ok(capset) if capset.version != 0 => Ok(capset),
            Ok(_) => Err(CapsetError::Version),
            // Every word is there, and no field of the table refuses one.
            Err(_) => Err(short),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_capset_is_read_back_as_it_was_sent() {
        let sent = Capset::new(3, 1024, Mode::Fence, 50_000_000, &Limits::default());
        let mut bytes = sent.to_bytes();
        assert_eq!(bytes.len(), Capset::BYTES);
        bytes.extend([0xff; 32]);
        let read = Capset::parse(&bytes).unwrap();
        assert_eq!(read, sent);
        assert_eq!(read.limits(), Limits::default());
    }

    #[test]
    fn a_capset_of_version_1_has_no_address_spaces() {
        let mut bytes = Capset::new(3, 1024, Mode::Fence, 0, &Limits::default()).to_bytes();
        bytes.truncate(BYTES_1);
        let read = Capset::parse(&bytes).unwrap();
        assert_eq!((read.max_address_spaces, read.gva_bits, read.engines), (0, 0, 3));
        assert_eq!(read.limits(), Limits { address_spaces: 0, ..Limits::default() });
    }

    #[test]
    fn what_is_no_capset_is_refused() {
        assert_eq!(Capset::parse(&[0; 96]), Err(CapsetError::Version));
        assert_eq!(Capset::parse(&[1; 95]), Err(CapsetError::Short { bytes: 95 }));
    }
}
