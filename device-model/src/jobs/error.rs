//! Why memory that a command names cannot be used by a job. Knows ranges; knows nothing of ids, which the command checks.

use crate::addr::RangeError;

/// Why a backing, a transfer or a program is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMemory {
    /// An entry of a backing is empty or wraps.
    #[error("Entry {index} of a backing is no range")]
    BadEntry {
        /// Which one, from 0.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: RangeError,
    },
    /// The rows of a transfer would end past 2^64 - 1 bytes in the backing.
    #[error("Transfer from offset {offset:#x} of a backing wraps")]
    OffsetWraps {
        /// Offset in the backing.
        offset: u64,
    },
    /// An operand of a job does not lie in its resource.
    #[error("Packet {packet}, {field}: {range} lies outside of the {bytes:#x} bytes of its resource")]
    OperandOutside {
        /// Packet, counted from 0.
        packet: usize,
        /// Field that names it.
        field: &'static str,
        /// The bytes.
        range: job_stream::Range,
        /// The length of the resource.
        bytes: u64,
    },
    /// A value is not in one aligned piece of the backing.
    #[error("Packet {packet}, {field}: {range} is split, or not aligned, by the backing of its resource")]
    OperandSplit {
        /// Packet, counted from 0.
        packet: usize,
        /// Field that names it.
        field: &'static str,
        /// The bytes.
        range: job_stream::Range,
    },
}
