//! What an access to guest memory is, and why it fails: the words that jobs and the mirror share. Knows nothing of
//! page tables, sections or pins, which stand behind [`JobMemory`].

use std::fmt;

use crate::addr::{Access, ByteRange, Iova, SpaceId};

/// Guest memory that a job wants to touch: what a pin is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinRange {
    /// Address space.
    pub space: SpaceId,
    /// Bytes.
    pub range: ByteRange<Iova>,
    /// What is done to them.
    pub access: Access,
}

/// Guest memory that has no mapping for this access: what a MISS is sent for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    /// Address space.
    pub space: SpaceId,
    /// Bytes; the mapping lacks at least on the first of their pages.
    pub range: ByteRange<Iova>,
    /// What was to be done to them.
    pub access: Access,
}

impl fmt::Display for PinRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.access, self.range)
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.access, self.range)
    }
}

/// Why guest memory could not be touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// There is no mapping: ask for it, without holding anything, and come back.
    #[error("No mapping for a {0}")]
    Missing(Missing),
    /// The pin does not cover this: the working set that it was made from was too small, a bug of ours.
    #[error("The pin does not cover a {0}")]
    NotPinned(PinRange),
}

/// Guest memory as the step of a job sees it: a section or a pin. It never blocks.
pub trait JobMemory {
    /// Copies guest memory from `at` on into all of `into`. After an error `into` holds any bytes.
    fn read(&self, space: SpaceId, at: Iova, into: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies all of `from` to guest memory at `at`. After an error any part of it may have been written.
    fn write(&self, space: SpaceId, at: Iova, from: &[u8]) -> Result<(), MemoryError>;
}
