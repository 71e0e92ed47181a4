//! Device address spaces, as a guest sees them: the commands about them, one row each, and the bits of a page-table
//! entry. The manual, the C header, the device's decoder and its walk come of these two tables. Knows layouts; knows
//! nothing of walks.

use alloc::vec::Vec;

use crate::error::Problem;
use crate::field::{Field, Words};
use crate::table::FieldInfo;

/// Bits of a Gva, an address in an address space.
pub const GVA_BITS: u32 = 48;
/// The last Gva.
pub const LAST_GVA: u64 = (1 << GVA_BITS) - 1;
/// Levels of a page table. The root is of level 3; the entries of level 0 map pages of 4 KiB.
pub const LEVELS: u32 = 4;
/// The highest level at which an entry may be a leaf: 1 GiB.
pub const HIGHEST_LEAF: u32 = 2;
/// log2 of the entries of a table.
pub const INDEX_BITS: u32 = 9;
/// The first number that is no asid.
pub const ASIDS: u32 = 1 << 31;

/// A command about address spaces: a virtio-gpu command of the control queue, with a type of its own.
#[derive(Clone, Copy, Debug)]
pub struct AsCommandInfo {
    /// Its type (`virtio_gpu_ctrl_hdr.type`).
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// What it does, in lines of Markdown; the first one is the summary.
    pub text: &'static [&'static str],
    /// What follows the header.
    pub fields: &'static [FieldInfo],
}

macro_rules! messages {
    ($(#[$table_doc:meta])* $TABLE:ident: $(
        $(#[doc = $text:literal])+
        $number:literal $NAME:ident $Command:ident { $($field:ident: $kind:ty, $field_text:literal;)* }
    )*) => {
        $(
            $(#[doc = $text])+
            #[derive(Clone, Copy, Debug, PartialEq, Eq)]
            pub struct $Command {
                $(#[doc = $field_text] pub $field: $kind,)*
            }

            impl $Command {
                /// Its type.
                pub const NUMBER: u32 = $number;
                /// Bytes behind the header.
                pub const BYTES: usize = 4 * (0 $(+ <$kind as Field>::WORDS as usize)*);

                /// Reads what follows the header; `None`: that is too short. What is left over is ignored.
                pub fn parse(bytes: &[u8]) -> Option<Self> {
                    let (words, _) = bytes.get(..Self::BYTES)?.as_chunks::<4>();
                    let words: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
                    Self::decode(&mut Words::new(&words)).ok()
                }

                /// What follows the header.
                pub fn words(&self) -> Vec<u32> {
                    let mut words = Vec::new();
                    $(self.$field.encode(&mut words);)*
                    words
                }

                fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
                    Ok(Self { $($field: Field::decode(words)?),* })
                }
            }
        )*

        $(#[$table_doc])*
        pub const $TABLE: &[AsCommandInfo] = &[$(AsCommandInfo {
            number: $number,
            name: stringify!($NAME),
            text: &[$($text),+],
            fields: &[$(FieldInfo {
                name: stringify!($field),
                kind: <$kind as Field>::KIND,
                text: $field_text,
            }),*],
        }),*];
    };
}

messages! {
    /// The table of the commands.
    COMMANDS:

    /// Creates an address space of the context.
    /// The asid is the driver's choice, as a resource id is; two address spaces of a device cannot have the same one,
    /// of whatever contexts they are. The root table need not be mapped yet: the device reads page tables when a job
    /// needs them.
    0x4d00 AS_CREATE AsCreate {
        asid: u32, "The number of the address space, below 0x80000000.";
        flags: u32, "FAULTS (bit 0): the driver answers faults. Else 0.";
        root: u64, "The IOVA of the root table: a multiple of 4096, below 2^52.";
    }

    /// Ends an address space of the context.
    /// The asid can be given to another address space at once. Jobs that were submitted before go on with the old one;
    /// the answer comes when they have ended. From then on the device reads no table of it and uses no translation of
    /// it. CTX_DESTROY does the same for all address spaces of the context.
    0x4d01 AS_DESTROY AsDestroy {
        asid: u32, "The address space.";
        padding: u32, "Ignored.";
    }

    /// Makes the device forget translations of an address space.
    /// Needed after an entry was changed so that it permits less, or leads elsewhere. The answer comes when no packet uses
    /// a translation from before the command any more: every step that had begun has ended. It waits for no job, no miss
    /// and no other answer. Send it without a fence, because the answer to a command with a fence waits for the fences
    /// before it.
    0x4d02 AS_INVALIDATE AsInvalidate {
        asid: u32, "The address space.";
        flags: u32, "LEAVES (bit 0): only leaves have changed, and the device may keep what it knows of tables. Else 0.";
        first: u64, "The first Gva of the range.";
        last: u64, "The last Gva of the range, below 2^48. The range is grown to whole pages.";
    }

    /// Asks for the next fault of an address space that was created with FAULTS.
    /// The answer, AS_FAULT, comes when there is one: send a few of these ahead, without a fence, and send one again for
    /// each that was answered. The end of the address space answers them with an error.
    0x4d03 AS_FETCH_FAULT AsFetchFault {
        asid: u32, "The address space.";
        padding: u32, "Ignored.";
    }

    /// Answers a fault that AS_FETCH_FAULT has brought.
    /// With REPLAY the job goes on where it stopped, and reads the page tables again: change them first. With FAIL the job
    /// fails. Each fault is answered once.
    0x4d04 AS_ANSWER_FAULT AsAnswerFault {
        asid: u32, "The address space.";
        action: u32, "0: REPLAY. 1: FAIL.";
        id: u64, "The number of the fault.";
    }
}

messages! {
    /// The table of the responses that carry something.
    RESPONSES:

    /// A fault that the driver has to answer.
    /// A job has come to an address that the page tables do not permit it to use, and is parked there.
    0x4d80 AS_FAULT AsFault {
        id: u64, "The number of the fault, for AS_ANSWER_FAULT. No other fault of the device has it.";
        asid: u32, "The address space.";
        access: u32, "What the packet does: 1 reads, 2 writes, 3 both in one piece (ATOMIC).";
        gva: u64, "The address.";
        pte: u64, "The entry that ended the walk; of level 0, or a leaf, if the access is not permitted by it.";
        level: u32, "The level of that entry.";
        denied: u32, "0: nothing is mapped there. 1: the leaf does not permit the access.";
        packet: u32, "The packet of the job, counted from 0.";
        repeats: u32, "How often the job has raised a fault for this page and this access before, in turn.";
    }
}

/// The flag FAULTS of AS_CREATE.
pub const CREATE_FAULTS: u32 = 1;
/// The flag LEAVES of AS_INVALIDATE.
pub const INVALIDATE_LEAVES: u32 = 1;
/// The action REPLAY of AS_ANSWER_FAULT.
pub const FAULT_REPLAY: u32 = 0;
/// The action FAIL of AS_ANSWER_FAULT.
pub const FAULT_FAIL: u32 = 1;

/// A bit, or some bits, of a page-table entry.
#[derive(Clone, Copy, Debug)]
pub struct PteBits {
    /// The name.
    pub name: &'static str,
    /// The lowest bit.
    pub low: u32,
    /// The highest bit.
    pub high: u32,
    /// What they mean.
    pub text: &'static str,
}

macro_rules! pte_bits {
    ($($NAME:ident = $low:literal..=$high:literal, $text:literal;)*) => {
        /// The bits of a page-table entry by name, as masks.
        pub mod pte {
            $(
                #[doc = $text]
                pub const $NAME: u64 = u64::MAX >> (63 - ($high - $low)) << $low;
            )*
        }

        /// The table of the bits of a page-table entry. Bits that are not in it must be 0.
        pub const PTE_BITS: &[PteBits] =
            &[$(PteBits { name: stringify!($NAME), low: $low, high: $high, text: $text }),*];
    };
}

pte_bits! {
    VALID = 0..=0, "The entry means something. If it is 0, the other bits are the driver's, and nothing is mapped.";
    READ = 1..=1, "Of a leaf: packets may read.";
    WRITE = 2..=2, "Of a leaf: packets may write.";
    ATOMIC = 3..=3, "Of a leaf: ATOMIC may change values; needs READ and WRITE too.";
    NULL = 5..=5, "Of a leaf: there is no memory. It reads as 0, and what is written vanishes. The IOVA must be 0.";
    LEAF = 6..=6, "Of an entry of level 1 or 2: it is a leaf, of 2 MiB or 1 GiB, and its IOVA is a multiple of that. At other levels it must be 0.";
    IOVA = 12..=51, "The IOVA of the page or table, without its lowest 12 bits.";
    SOFTWARE = 52..=58, "The driver's. The device ignores them.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_read_back_as_it_was_written() {
        let sent = AsCreate { asid: 7, flags: 1, root: 0x1_2345_6000 };
        let bytes: Vec<u8> = sent.words().into_iter().flat_map(u32::to_le_bytes).collect();
        assert_eq!((AsCreate::BYTES, bytes.len()), (16, 16));
        assert_eq!(AsCreate::parse(&bytes), Some(sent));
        assert_eq!(AsCreate::parse(&bytes[..15]), None);
    }

    #[test]
    fn the_bits_of_an_entry_do_not_overlap() {
        assert_eq!(pte::IOVA, 0x000f_ffff_ffff_f000);
        let masks =
            [pte::VALID, pte::READ, pte::WRITE, pte::ATOMIC, pte::NULL, pte::LEAF, pte::IOVA, pte::SOFTWARE];
        let sum = masks.iter().fold(0, |sum: u64, mask| {
            assert_eq!(sum & mask, 0);
            sum | mask
        });
        assert_eq!(sum.count_ones(), PTE_BITS.iter().map(|bits| bits.high - bits.low + 1).sum());
    }
}
