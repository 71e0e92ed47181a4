//! The driver's side of a split ring (virtio 1.3, 2.7): descriptors, available and used ring in guest memory that
//! may be scattered, optionally with indirect tables and event indices. Knows descriptors, not what they carry.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::addr::{Iova, PAGE, Permission};
use super::dma::{DmaBuffer, DmaSpace, Segment};
use super::error::{Error, Result};
use super::front_end::QueueSetup;
use super::wire;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const NO_NOTIFY: u16 = 1;
const DESC_SIZE: u64 = 16;
/// Descriptors in an indirect table.
const TABLE_LEN: usize = 64;

/// How a ring is built.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// Entries: a power of two.
    pub size: u16,
    /// Chains go through indirect tables (needs VIRTIO_RING_F_INDIRECT_DESC).
    pub indirect: bool,
    /// Notifications by index (needs VIRTIO_RING_F_EVENT_IDX).
    pub event_idx: bool,
    /// Where in its first page the descriptor table starts: 16-byte aligned. With an offset near the end of the page,
    /// even a small ring spans pages that are not contiguous.
    pub start: u64,
}

impl RingConfig {
    /// A ring like those of the stock driver.
    pub fn new(size: u16) -> Self {
        Self { size, indirect: true, event_idx: true, start: 0 }
    }
}

/// A completed chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// The head, as [`Virtqueue::submit`] returned it.
    pub head: u16,
    /// Bytes that the device says it has written.
    pub len: u32,
}

/// A split ring, seen from the driver.
#[derive(Debug)]
pub struct Virtqueue {
    config: RingConfig,
    memory: DmaBuffer,
    tables: DmaBuffer,
    available: u64,
    used: u64,
    free: Vec<u16>,
    in_flight: HashMap<u16, Vec<u16>>,
    next_available: u16,
    last_used: u16,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    kicks: u64,
}

impl Virtqueue {
    /// A ring in fresh guest memory.
    pub fn new(space: &DmaSpace, config: RingConfig) -> Result<Self> {
        let size = u64::from(config.size);
        let available = config.start + DESC_SIZE * size;
        let used = (available + 6 + 2 * size).next_multiple_of(64);
        let bytes = used + 6 + 8 * size;
        let memory = space.allocate_coherent(bytes.div_ceil(PAGE) as usize, Permission::ReadWrite)?;
        let table_bytes = size * TABLE_LEN as u64 * DESC_SIZE;
        let tables = space.allocate(table_bytes.div_ceil(PAGE) as usize, Permission::ReadOnly)?;
        let event = || EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(Error::io("create an eventfd"));
        let mut ring = Self {
            config,
            memory,
            tables,
            available,
            used,
            free: Vec::new(),
            in_flight: HashMap::new(),
            next_available: 0,
            last_used: 0,
            kick: event()?,
            call: event()?,
            error: event()?,
            kicks: 0,
        };
        ring.reset()?;
        Ok(ring)
    }

    /// Starts over with an empty ring, as a driver does after a reset. Chains in flight are forgotten.
    pub fn reset(&mut self) -> Result<()> {
        let len = self.memory.pages() as u64 * PAGE;
        self.memory.write(0, &vec![0; len as usize])?;
        self.free = (0..self.config.size).rev().collect();
        self.in_flight.clear();
        (self.next_available, self.last_used) = (0, 0);
        Ok(())
    }

    /// The addresses that the front-end sends to the back-end.
    pub fn setup(&self) -> QueueSetup<'_> {
        QueueSetup {
            size: self.config.size,
            descriptors: self.memory.address(self.config.start),
            available: self.memory.address(self.available),
            used: self.memory.address(self.used),
            kick: &self.kick,
            call: &self.call,
            error: &self.error,
        }
    }

    /// The memory that the ring lies in.
    pub fn memory(&self) -> &DmaBuffer {
        &self.memory
    }

    /// The memory that the ring lies in, to replace its frames.
    pub fn memory_mut(&mut self) -> &mut DmaBuffer {
        &mut self.memory
    }

    /// Chains in flight.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// How often the device was kicked.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Puts a chain into the available ring: first what the device reads, then what it writes. [`Self::notify`]
    /// tells the device.
    pub fn submit(&mut self, readable: &[Segment], writable: &[Segment]) -> Result<u16> {
        let chain: Vec<_> = readable
            .iter()
            .map(|&segment| (segment, 0))
            .chain(writable.iter().map(|&segment| (segment, DESC_WRITE)))
            .collect();
        let indirect = self.config.indirect && chain.len() > 1 && chain.len() <= TABLE_LEN;
        let needed = if indirect { 1 } else { chain.len() };
        if self.free.len() < needed || needed == 0 {
            return Err(Error::RingFull { needed, free: self.free.len() });
        }
        let taken = self.free.split_off(self.free.len() - needed);
        let head =
            if indirect { self.write_table(taken[0], &chain)? } else { self.write_chain(&taken, &chain)? };
        self.in_flight.insert(head, taken);
        self.publish(head)?;
        Ok(head)
    }

    fn write_chain(&self, taken: &[u16], chain: &[(Segment, u16)]) -> Result<u16> {
        for (i, &(segment, flags)) in chain.iter().enumerate() {
            let (flags, next) = taken.get(i + 1).map_or((flags, 0), |&next| (flags | DESC_NEXT, next));
            let at = self.config.start + DESC_SIZE * u64::from(taken[i]);
            self.memory.write(at, &descriptor(segment, flags, next))?;
        }
        Ok(taken[0])
    }

    fn write_table(&self, head: u16, chain: &[(Segment, u16)]) -> Result<u16> {
        let table = u64::from(head) * TABLE_LEN as u64 * DESC_SIZE;
        for (i, &(segment, flags)) in chain.iter().enumerate() {
            let flags = if i + 1 < chain.len() { flags | DESC_NEXT } else { flags };
            self.tables.write(table + i as u64 * DESC_SIZE, &descriptor(segment, flags, i as u16 + 1))?;
        }
        let whole = Segment { at: self.tables.address(table), len: (chain.len() as u64 * DESC_SIZE) as u32 };
        let at = self.config.start + DESC_SIZE * u64::from(head);
        self.memory.write(at, &descriptor(whole, DESC_INDIRECT, 0))?;
        Ok(head)
    }

    /// Writes a descriptor unchecked, and makes `head` available: for hostile rings.
    pub fn submit_raw(&mut self, head: u16, bytes: &[u8; DESC_SIZE as usize]) -> Result<()> {
        if head < self.config.size {
            let at = self.config.start + DESC_SIZE * u64::from(head);
            self.memory.write(at, bytes)?;
            self.free.retain(|&free| free != head);
            self.in_flight.insert(head, vec![head]);
        }
        self.publish(head)
    }

    fn publish(&mut self, head: u16) -> Result<()> {
        let slot = u64::from(self.next_available % self.config.size);
        self.memory.write(self.available + 4 + 2 * slot, &head.to_le_bytes())?;
        self.next_available = self.next_available.wrapping_add(1);
        self.memory.store(self.available + 2, self.next_available)
    }

    /// Sets the available index to any value: for hostile rings.
    pub fn jump(&mut self, to: u16) -> Result<()> {
        self.next_available = to;
        self.memory.store(self.available + 2, to)
    }

    /// Kicks the device, unless it has suppressed notifications (virtio 1.3, 2.7.10). `added` chains were submitted
    /// since the last call.
    pub fn notify(&mut self, added: u16) -> Result<()> {
        // ORDERING: the new available index is visible before the device's wish is read (virtio 1.3, 2.7.13.4.1).
        fence(Ordering::SeqCst);
        let size = u64::from(self.config.size);
        let wanted = if self.config.event_idx {
            let event = self.memory.load(self.used + 4 + 8 * size)?;
            crossed(event, self.next_available, self.next_available.wrapping_sub(added))
        } else {
            self.memory.load(self.used)? & NO_NOTIFY == 0
        };
        if wanted { self.kick() } else { Ok(()) }
    }

    /// Kicks the device, even if notifications are suppressed.
    pub fn kick(&mut self) -> Result<()> {
        self.kicks += 1;
        self.kick.write(1).map_err(Error::io("ring a kick eventfd"))
    }

    /// Takes the completions that are there.
    pub fn take_used(&mut self) -> Result<Vec<Used>> {
        let mut taken = Vec::new();
        let index = self.memory.load(self.used + 2)?;
        while self.last_used != index {
            let mut entry = [0; 8];
            let slot = u64::from(self.last_used % self.config.size);
            self.memory.read(self.used + 4 + 8 * slot, &mut entry)?;
            let number = |range: std::ops::Range<usize>| entry[range].try_into().map(u32::from_le_bytes);
            let (id, len) = (number(0..4).unwrap_or(u32::MAX), number(4..8).unwrap_or(u32::MAX));
            let known = u16::try_from(id).ok().and_then(|head| Some((head, self.in_flight.remove(&head)?)));
            let (head, descriptors) = known.ok_or(Error::NotInFlight { index: self.last_used, head: id })?;
            self.free.extend(descriptors);
            self.last_used = self.last_used.wrapping_add(1);
            taken.push(Used { head, len });
        }
        Ok(taken)
    }

    /// Takes completions, waiting for the device's interrupt while there is none.
    pub fn wait_used(&mut self, timeout: Duration) -> Result<Vec<Used>> {
        let deadline = Instant::now() + timeout;
        loop {
            self.want_interrupt()?;
            let taken = self.take_used()?;
            if !taken.is_empty() {
                return Ok(taken);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let rung = wire::wait_readable(&[self.call.as_raw_fd()], Some(left));
            if rung.map_err(Error::io("poll a call eventfd"))?.is_none() {
                return Err(self.nothing_came(timeout)?);
            }
            // It was readable, and nothing else reads it.
            let _ = self.call.read();
        }
    }

    fn nothing_came(&self, after: Duration) -> Result<Error> {
        let waiting = self.used_index()?.wrapping_sub(self.last_used);
        if waiting != 0 {
            return Ok(Error::LostInterrupt { waiting, after });
        }
        Ok(Error::Timeout { what: format!("Completion of {} chains", self.in_flight.len()), after })
    }

    fn want_interrupt(&mut self) -> Result<()> {
        if self.config.event_idx {
            let at = self.available + 4 + 2 * u64::from(self.config.size);
            self.memory.store(at, self.last_used)?;
        }
        // ORDERING: the request is visible before the used index is read again (virtio 1.3, 2.7.14).
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Interrupts since the last call, without waiting.
    pub fn interrupts(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    /// Whether the device has signalled that the ring is broken, waiting up to `timeout`.
    pub fn is_broken_within(&self, timeout: Duration) -> Result<bool> {
        let rung = wire::wait_readable(&[self.error.as_raw_fd()], Some(timeout));
        Ok(rung.map_err(Error::io("poll an error eventfd"))?.is_some())
    }

    /// The used index, as the device has written it.
    pub fn used_index(&self) -> Result<u16> {
        self.memory.load(self.used + 2)
    }

    /// Where the device finds the first byte of the used ring, and how long it is.
    pub fn used_range(&self) -> (Iova, u64) {
        (self.memory.address(self.used), 6 + 8 * u64::from(self.config.size))
    }
}

fn descriptor(segment: Segment, flags: u16, next: u16) -> [u8; DESC_SIZE as usize] {
    let mut bytes = [0; DESC_SIZE as usize];
    bytes[..8].copy_from_slice(&segment.at.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&segment.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// Whether an index that moved from `old` to `new` has passed `event` (virtio 1.3, 2.7.10).
fn crossed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[cfg(test)]
#[path = "virtqueue_tests.rs"]
mod tests;
