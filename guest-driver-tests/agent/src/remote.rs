//! The words by which a scenario on the host does things with a driver in the guest's user space: one operation, one
//! answer. Knows memory, mappings and commands as bytes; knows nothing of what they are for.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most bytes that one operation reads or writes: a line has to go through a serial port.
pub const MOST_BYTES: usize = 4096;
/// What memory holds that nobody has written to.
pub const POISON: u8 = 0xa5;

/// Bytes; in JSON, base64.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64_STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64_STANDARD.decode(text).map(Self).map_err(D::Error::custom)
    }
}

/// Some pieces of an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pieces {
    /// The area.
    pub area: u32,
    /// The first piece.
    pub first: usize,
    /// How many.
    pub count: usize,
}

/// What the driver does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Operation {
    /// Take memory of `count` pieces of `bytes` bytes, full of poison, and map it from `at` on, piece by piece;
    /// answered by `Done`.
    Map {
        /// The area that it becomes, and how many pieces.
        pieces: Pieces,
        /// Bytes of a piece.
        bytes: usize,
        /// Where the device finds the first.
        at: u64,
        /// Whether the device may write.
        write: bool,
        /// The area whose memory it is, if it is not new.
        of: Option<u32>,
    },
    /// Take memory from this NUMA node from here on, or from wherever the kernel likes; answered by `Done`.
    TakeFrom {
        /// Its number.
        node: Option<u32>,
    },
    /// Take pieces away from the device; answered by `Unmapped`.
    Unmap {
        /// Which.
        pieces: Pieces,
        /// Whether the memory is another's from now on, and watched; the pieces get new memory.
        retire: bool,
    },
    /// Map pieces again at their place; answered by `Done`.
    MapAgain {
        /// Which.
        pieces: Pieces,
        /// Whether the device may write.
        write: bool,
    },
    /// Unmap what is mapped of an area, and forget it; answered by `Done`.
    Free {
        /// Which.
        area: u32,
    },
    /// Write; answered by `Done`.
    Write {
        /// Where.
        area: u32,
        /// From which byte on.
        at: usize,
        /// What.
        bytes: Bytes,
    },
    /// Read; answered by `Bytes`.
    Read {
        /// Where.
        area: u32,
        /// From which byte on.
        at: usize,
        /// How much.
        len: usize,
    },
    /// Compute the CRC-32C of some bytes, for those who know what it should be; answered by `Checksum`.
    Checksum {
        /// Where.
        area: u32,
        /// From which byte on.
        at: usize,
        /// How much.
        len: usize,
    },
    /// Say whether memory that was retired has been written since; answered by `Late`.
    Late,
    /// Watch retired memory no longer; answered by `Done`.
    Forget,
    /// Hand a command to the device; answered by `Submitted`.
    Submit {
        /// Header and body.
        command: Bytes,
    },
    /// Look for an answer for so long; answered by `Answered`.
    Wait {
        /// Whose.
        ticket: u64,
        /// Milliseconds.
        limit: u64,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The device has acked that they are gone.
    Unmapped {
        /// Nanoseconds that this took.
        ns: u64,
    },
    /// What was read.
    Bytes {
        /// All of it.
        bytes: Bytes,
    },
    /// The CRC-32C.
    Checksum {
        /// That.
        crc: u32,
    },
    /// How many bytes of retired memory were written.
    Late {
        /// Bytes.
        bytes: u64,
    },
    /// It is on its way.
    Submitted {
        /// To ask for its answer with.
        ticket: u64,
    },
    /// The answer, if there was one.
    Answered {
        /// As the device wrote it.
        answer: Option<Answer>,
    },
}

/// An answer of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What the device says that it wrote.
    pub bytes: Bytes,
    /// Whether nothing behind it was written.
    pub rest_intact: bool,
    /// How many were answered before.
    pub order: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_flat_objects_with_bytes_as_text() {
        let write = Operation::Write { area: 1, at: 2, bytes: Bytes(vec![0, 255]) };
        let line = serde_json::to_string(&write).unwrap();
        assert_eq!(line, r#"{"op":"write","area":1,"at":2,"bytes":"AP8="}"#);
        assert_eq!(serde_json::from_str::<Operation>(&line).unwrap(), write);
        assert!(serde_json::from_str::<Bytes>(r#""no base64!""#).is_err());
    }
}
