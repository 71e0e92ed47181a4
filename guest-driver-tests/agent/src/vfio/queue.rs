//! A split ring that is polled (virtio 1.3, 2.7). A command has a slot of its own, of two descriptors: what the device
//! reads, and where it answers. Knows descriptors; knows nothing of what a command says.

use super::container::Container;
use crate::error::{AgentError, Doing};
use crate::mapping::Mapping;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Memory of a queue: a page for the ring, and one for each slot.
pub(crate) const BYTES: usize = PAGE * (1 + SLOTS);

const PAGE: usize = 4096;
const SLOTS: usize = 32;
const SIZE: u16 = 2 * SLOTS as u16;
const AVAILABLE: usize = 0x400;
const USED: usize = 0x800;
/// Where in a slot's page the device answers, and how much it may say.
const ANSWER: usize = 0xe00;
const ANSWER_BYTES: u32 = 0x100;
const NEXT: u16 = 1;
const WRITES: u16 = 2;
const NO_INTERRUPT: u16 = 1;
const LOOK: Duration = Duration::from_micros(200);

/// Where a queue lies for the device.
#[derive(Clone, Copy)]
pub(crate) struct Addresses {
    pub(crate) size: u16,
    /// Descriptors, available ring, used ring.
    pub(crate) parts: [u64; 3],
}

/// What answers are written over.
const BLANK: u8 = 0xff;

/// An answer of the device.
pub(crate) struct Answer {
    /// What the device says that it wrote.
    pub(crate) bytes: Vec<u8>,
    /// Whether nothing behind it was written.
    pub(crate) rest_intact: bool,
    /// How many were answered before.
    pub(crate) order: u64,
}

impl Answer {
    /// Its type.
    pub(crate) fn kind(&self) -> u32 {
        self.bytes.first_chunk().map_or(0, |word| u32::from_le_bytes(*word))
    }
}

/// A command on its way.
#[must_use = "its slot is free again when it has been waited for"]
pub(crate) struct Ticket {
    slot: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    OnItsWay,
    /// So many bytes were written, and so many commands were answered before.
    Answered(usize, u64),
}

/// The queue.
pub(crate) struct Queue {
    memory: Mapping,
    iova: u64,
    slots: [Slot; SLOTS],
    next_available: u16,
    next_used: u16,
    answered: u64,
}

impl Queue {
    /// An empty queue in memory of its own, which the device sees from `iova` on.
    pub(crate) fn new(container: &mut Container, iova: u64) -> Result<Self, AgentError> {
        let memory = Mapping::anonymous(BYTES)?;
        memory.store(AVAILABLE, NO_INTERRUPT);
        container.map(iova, &memory, BYTES, true)?;
        Ok(Self { memory, iova, slots: [Slot::Free; SLOTS], next_available: 0, next_used: 0, answered: 0 })
    }

    pub(crate) fn addresses(&self) -> Addresses {
        let part = |offset: usize| self.iova + offset as u64;
        Addresses { size: SIZE, parts: [part(0), part(AVAILABLE), part(USED)] }
    }

    /// Puts a command into the ring. The device has to be notified then.
    pub(crate) fn submit(&mut self, command: &[u8]) -> Result<Ticket, AgentError> {
        self.take_used()?;
        let free = self.slots.iter_mut().enumerate().find(|(_, slot)| **slot == Slot::Free);
        let fits = command.len() <= ANSWER;
        let Some((slot, state)) = free.filter(|_| fits) else {
            return Err(AgentError::QueueFull { slots: SLOTS, bytes: command.len() });
        };
        *state = Slot::OnItsWay;
        let (page, head) = (PAGE * (1 + slot), 2 * slot as u16);
        self.memory.write(page, command);
        self.memory.write(page + ANSWER, &[BLANK; ANSWER_BYTES as usize]);
        self.describe(head, (page, command.len() as u32), NEXT, head + 1);
        self.describe(head + 1, (page + ANSWER, ANSWER_BYTES), WRITES, 0);
        let entry = AVAILABLE + 4 + 2 * usize::from(self.next_available % SIZE);
        self.memory.write(entry, &head.to_le_bytes());
        self.next_available = self.next_available.wrapping_add(1);
        self.memory.store(AVAILABLE + 2, self.next_available);
        Ok(Ticket { slot })
    }

    /// Whether the device has answered.
    pub(crate) fn is_answered(&mut self, ticket: &Ticket) -> Result<bool, AgentError> {
        self.take_used()?;
        Ok(matches!(self.slots.get(ticket.slot), Some(Slot::Answered(..))))
    }

    /// The answer, if it comes within `limit`; else the ticket, to wait again.
    pub(crate) fn wait(
        &mut self,
        ticket: Ticket,
        limit: Duration,
    ) -> Result<Result<Answer, Ticket>, AgentError> {
        let end = Instant::now() + limit;
        loop {
            self.take_used()?;
            if let Some(Slot::Answered(len, order)) = self.slots.get(ticket.slot).copied() {
                return Ok(Ok(self.answer(ticket.slot, len, order)));
            }
            if Instant::now() >= end {
                return Ok(Err(ticket));
            }
            thread::sleep(LOOK);
        }
    }

    fn answer(&mut self, slot: usize, len: usize, order: u64) -> Answer {
        let mut bytes = vec![0; ANSWER_BYTES as usize];
        self.memory.read(PAGE * (1 + slot) + ANSWER, &mut bytes);
        self.slots.iter_mut().skip(slot).take(1).for_each(|slot| *slot = Slot::Free);
        let rest_intact = bytes.iter().skip(len).all(|byte| *byte == BLANK);
        bytes.truncate(len);
        Answer { bytes, rest_intact, order }
    }

    fn describe(&self, index: u16, (at, len): (usize, u32), flags: u16, next: u16) {
        let mut bytes = (self.iova + at as u64).to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write(16 * usize::from(index), &bytes);
    }

    fn take_used(&mut self) -> Result<(), AgentError> {
        while self.next_used != self.memory.load(USED + 2) {
            let (mut head, mut len) = ([0; 4], [0; 4]);
            let entry = USED + 4 + 8 * usize::from(self.next_used % SIZE);
            self.memory.read(entry, &mut head);
            self.memory.read(entry + 4, &mut len);
            let slot = self.slots.get_mut(u32::from_le_bytes(head) as usize / 2);
            match slot {
                Some(slot) if *slot == Slot::OnItsWay => {
                    *slot = Slot::Answered(u32::from_le_bytes(len) as usize, self.answered);
                    self.answered += 1;
                }
                _ => return Err(io::Error::other("it is not on its way")).doing("take a used command"),
            }
            self.next_used = self.next_used.wrapping_add(1);
        }
        Ok(())
    }
}
