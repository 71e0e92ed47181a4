//! A driver that has the device, with an IOMMU that it controls: the basis of scenarios about mappings, written once
//! for a guest without a VM (`soft`) and for a user-space driver of a real guest (`vfio`). Knows memory, mappings,
//! commands and answers; knows nothing of jobs.

pub mod soft;
pub mod vfio;

pub use crate::soft_guest::gpu::{Command, Response};
pub use crate::soft_guest::{Permission, SoftGuest};

use crate::suite::failure::{Failure, Result};
use crate::suite::results::Level;
use job_stream::Crc32c;
use serde_json::Value;
use std::ops::Range;
use std::time::Duration;

/// Memory that the device can be given access to: pieces that are mapped and unmapped one by one, at contiguous I/O
/// addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Which one.
    pub id: u32,
    /// Where the device finds its first byte.
    pub iova: u64,
    /// How many pieces it has.
    pub pieces: usize,
    /// Pages of each piece. The memory of different pieces is not contiguous.
    pub pages: usize,
}

impl Area {
    /// All pieces.
    pub fn all(&self) -> Range<usize> {
        0..self.pieces
    }

    /// Length in bytes.
    pub fn bytes(&self) -> u64 {
        (self.pieces * self.pages) as u64 * crate::soft_guest::PAGE
    }
}

/// What happens to memory that is unmapped from the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    /// It gets another owner, and is watched: the device must not touch it. The pieces get other memory, which is not
    /// mapped yet.
    Retire,
    /// It stays where it is, for another mapping.
    Keep,
}

/// A command in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[must_use = "its answer has to be waited for"]
pub struct Ticket(pub u64);

/// A driver with a device and an IOMMU.
pub trait Machine {
    /// Where it runs.
    fn level(&self) -> Level;

    /// Allocates memory and maps it: `pieces` mappings of `pages` pages each, full of poison.
    fn map(&mut self, pieces: usize, pages: usize, access: Permission) -> Result<Area>;

    /// Maps the memory of one area a second time, elsewhere. The two share their bytes.
    fn alias(&mut self, of: &Area, access: Permission) -> Result<Area>;

    /// Unmaps pieces; returns how long that took, when the device has acked it.
    fn unmap(&mut self, area: &Area, pieces: Range<usize>, then: Then) -> Result<Duration>;

    /// Maps pieces that are not mapped, at their old place.
    fn map_again(&mut self, area: &Area, pieces: Range<usize>, access: Permission) -> Result<()>;

    /// Frees an area: unmaps what of it is mapped.
    fn free(&mut self, area: &Area) -> Result<()>;

    /// Writes from the CPU.
    fn write(&mut self, area: &Area, at: u64, bytes: &[u8]) -> Result<()>;

    /// Reads from the CPU.
    fn read(&mut self, area: &Area, at: u64, len: usize) -> Result<Vec<u8>>;

    /// The CRC-32C of some bytes, to compare with the expected one.
    fn checksum(&mut self, area: &Area, at: u64, len: usize) -> Result<u32> {
        Ok(Crc32c::of(&self.read(area, at, len)?))
    }

    /// How much of the retired memory has been touched since (I1: none), in the machine's own unit. The soft guest
    /// sees reads too; a real guest only writes.
    fn late(&mut self) -> Result<u64>;

    /// Sends a command to the device.
    fn submit(&mut self, command: &Command) -> Result<Ticket>;

    /// The answer, if it comes within `limit`.
    fn answer(&mut self, ticket: Ticket, limit: Duration) -> Result<Option<Response>>;

    /// How many accesses of the device the guest's IOMMU reports as blocked.
    fn faults_logged(&mut self) -> Result<u64>;

    /// Sends a command to the back-end's control socket.
    fn control(&mut self, command: &str, arguments: Value) -> Result<Value>;

    /// Plugs memory into the running machine; later mappings use it.
    fn plug(&mut self) -> Result<()> {
        Err(Failure::Skip("it has no place for memory".into()))
    }

    /// Unplugs it. Nothing may be mapped there any more.
    fn unplug(&mut self) -> Result<()> {
        Err(Failure::Skip("it has no place for memory".into()))
    }

    /// The guest itself, if it is one without a VM: for operations that only such a guest supports.
    fn soft(&mut self) -> Option<&mut SoftGuest> {
        None
    }
}
