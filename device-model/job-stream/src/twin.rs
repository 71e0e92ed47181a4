//! The stupid twin of the engines: executes a program at once, packet by packet, on memory that never faults. Tests
//! and guest programs predict results with it. Knows what packets do; knows nothing of steps, pins, modes or time
//! limits.

use alloc::collections::BTreeMap;
use alloc::vec;
use alloc::vec::Vec;

use crate::choice::SpinBehaviour;
use crate::crc::Crc32c;
use crate::operand::{At, Range};
use crate::packets::{Atomic, Packet};
use crate::verify::Program;

/// What a program works on.
pub trait Memory {
    /// Fills `into` with the bytes from `at` on.
    fn read(&mut self, at: At, into: &mut [u8]) -> Result<(), OutOfBounds>;
    /// Writes `from` from `at` on.
    fn write(&mut self, at: At, from: &[u8]) -> Result<(), OutOfBounds>;
    /// The device's time in nanoseconds.
    fn now(&mut self) -> u64;
}

/// Memory that does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfBounds {
    /// The bytes.
    pub range: Range,
}

/// How a run of a program came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All packets were executed, and the user fence is written.
    Done,
    /// The WAIT with this number does not hold yet. [`resume`] there.
    Waits {
        /// The packet.
        packet: usize,
    },
    /// The packet with this number spins for ever.
    Wedged {
        /// The packet.
        packet: usize,
    },
}

/// Executes a program from its first packet.
pub fn interpret(program: &Program, memory: &mut dyn Memory) -> Result<Outcome, OutOfBounds> {
    resume(program, 0, memory)
}

/// Executes a program from the packet with number `first` on.
pub fn resume(program: &Program, first: usize, memory: &mut dyn Memory) -> Result<Outcome, OutOfBounds> {
    for (number, packet) in program.packets().iter().enumerate().skip(first) {
        match execute(packet, memory)? {
            Ended::Done => {}
            Ended::Waits => return Ok(Outcome::Waits { packet: number }),
            Ended::Wedged => return Ok(Outcome::Wedged { packet: number }),
        }
    }
    if let Some(Packet::Context(context)) = program.packets().first()
        && let Some(at) = context.fence
    {
        memory.write(at, &context.done.to_le_bytes())?;
    }
    Ok(Outcome::Done)
}

enum Ended {
    Done,
    Waits,
    Wedged,
}

fn execute(packet: &Packet, memory: &mut dyn Memory) -> Result<Ended, OutOfBounds> {
    match packet {
        Packet::Nop(_) | Packet::Barrier(_) | Packet::Context(_) => {}
        Packet::Fill(fill) => {
            let words = fill.to.length.div_ceil(4);
            let bytes: Vec<u8> = (0..words).flat_map(|_| fill.pattern.to_le_bytes()).collect();
            memory.write(fill.to.at(), &bytes)?;
        }
        Packet::Copy(copy) => {
            let bytes = read(memory, copy.from)?;
            memory.write(copy.to, &bytes)?;
        }
        Packet::Checksum(checksum) => {
            let value = Crc32c::of(&read(memory, checksum.from)?);
            memory.write(checksum.to, &value.to_le_bytes())?;
        }
        Packet::Signal(signal) => store(memory, signal.at, signal.wide, signal.value)?,
        Packet::Wait(wait) if !wait.holds(load(memory, wait.at, wait.wide)?) => return Ok(Ended::Waits),
        Packet::Wait(_) => {}
        Packet::Atomic(atomic) => change(atomic, memory)?,
        Packet::Timestamp(stamp) => {
            let now = memory.now();
            store(memory, stamp.at, true, now)?;
        }
        Packet::Spin(spin) if spin.behaviour == SpinBehaviour::Wedged => return Ok(Ended::Wedged),
        Packet::Spin(_) => {}
    }
    Ok(Ended::Done)
}

fn change(atomic: &Atomic, memory: &mut dyn Memory) -> Result<(), OutOfBounds> {
    let old = load(memory, atomic.at, atomic.wide)?;
    store(memory, atomic.at, atomic.wide, atomic.result(old))?;
    atomic.old.map_or(Ok(()), |at| store(memory, at, atomic.wide, old))
}

/// Reads a range at once. The verifier's limit bounds it, so a twin of a test has a small one.
fn read(memory: &mut dyn Memory, range: Range) -> Result<Vec<u8>, OutOfBounds> {
    let length = usize::try_from(range.length).map_err(|_| OutOfBounds { range })?;
    let mut bytes = vec![0; length];
    memory.read(range.at(), &mut bytes)?;
    Ok(bytes)
}

fn load(memory: &mut dyn Memory, at: At, wide: bool) -> Result<u64, OutOfBounds> {
    let mut bytes = [0; 8];
    let (low, high) = bytes.split_at_mut(4);
    memory.read(at, low)?;
    if wide {
        memory.read(at.plus(4), high)?;
    }
    Ok(u64::from_le_bytes(bytes))
}

fn store(memory: &mut dyn Memory, at: At, wide: bool, value: u64) -> Result<(), OutOfBounds> {
    let bytes = value.to_le_bytes();
    memory.write(at, bytes.get(..if wide { 8 } else { 4 }).unwrap_or_default())
}

/// Memory for tests: a buffer for each space, and a clock that ticks whenever it is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Buffers {
    buffers: BTreeMap<u32, Vec<u8>>,
    now: u64,
}

impl Buffers {
    /// No buffers yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `space` a buffer.
    #[must_use]
    pub fn with(mut self, space: u32, bytes: Vec<u8>) -> Self {
        self.buffers.insert(space, bytes);
        self
    }

    /// The buffer of `space`; empty if it has none.
    pub fn bytes(&self, space: u32) -> &[u8] {
        self.buffers.get(&space).map_or(&[], Vec::as_slice)
    }

    fn slice(&mut self, at: At, length: usize) -> Result<&mut [u8], OutOfBounds> {
        let range = at.range(length as u64);
        let buffer = self.buffers.get_mut(&at.space.raw()).ok_or(OutOfBounds { range })?;
        let first = usize::try_from(at.address).ok();
        let bytes = first.and_then(|first| buffer.get_mut(first..first.checked_add(length)?));
        bytes.ok_or(OutOfBounds { range })
    }
}

impl Memory for Buffers {
    fn read(&mut self, at: At, into: &mut [u8]) -> Result<(), OutOfBounds> {
        into.copy_from_slice(self.slice(at, into.len())?);
        Ok(())
    }

    fn write(&mut self, at: At, from: &[u8]) -> Result<(), OutOfBounds> {
        self.slice(at, from.len())?.copy_from_slice(from);
        Ok(())
    }

    fn now(&mut self) -> u64 {
        self.now = self.now.saturating_add(1);
        self.now
    }
}
