//! The builder of streams, for guests and tests. It writes what it is told: that a stream makes sense, only the
//! verifier says, so a test can build nonsense too. Knows packets; knows nothing of submission.

use alloc::vec::Vec;

use crate::choice::{AtomicOperation, Compare, Mode, SpinBehaviour};
use crate::field::Payload;
use crate::operand::{At, Range};
use crate::packets::{
    Atomic, Barrier, Checksum, Context, Copy, Fill, Nop, Packet, Signal, Spin, Timestamp, Wait,
};

/// A stream that is being built. [`Self::push`] takes every packet; the other methods are short for the usual ones.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Stream {
    words: Vec<u32>,
}

impl Stream {
    /// An empty stream: a job that does nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a packet.
    pub fn push(mut self, packet: impl Into<Packet>) -> Self {
        packet.into().encode(&mut self.words);
        self
    }

    /// NOP of `payload` words behind its header.
    pub fn nop(self, payload: u16) -> Self {
        self.push(Nop { payload: Payload::of(payload) })
    }

    /// BARRIER.
    pub fn barrier(self) -> Self {
        self.push(Barrier {})
    }

    /// CONTEXT that asks for a mode, without user fence. It has to come first.
    pub fn mode(self, mode: Mode) -> Self {
        self.push(Context { mode: Some(mode), priority: None, fence: None, done: 0, failed: 0 })
    }

    /// FILL.
    pub fn fill(self, to: Range, pattern: u32) -> Self {
        self.push(Fill { to, pattern })
    }

    /// COPY.
    pub fn copy(self, from: Range, to: At) -> Self {
        self.push(Copy { from, to })
    }

    /// CHECKSUM.
    pub fn checksum(self, from: Range, to: At) -> Self {
        self.push(Checksum { from, to })
    }

    /// SIGNAL of 32 bits.
    pub fn signal(self, at: At, value: u32) -> Self {
        self.push(Signal { wide: false, at, value: u64::from(value) })
    }

    /// SIGNAL of 64 bits.
    pub fn signal64(self, at: At, value: u64) -> Self {
        self.push(Signal { wide: true, at, value })
    }

    /// WAIT on 32 bits; a timeout of 0 is the device's longest.
    pub fn wait(self, at: At, compare: Compare, value: u32, timeout_ns: u64) -> Self {
        let mask = u64::from(u32::MAX);
        self.push(Wait { wide: false, at, compare, value: u64::from(value), mask, timeout: timeout_ns })
    }

    /// WAIT on 64 bits; a timeout of 0 is the device's longest.
    pub fn wait64(self, at: At, compare: Compare, value: u64, timeout_ns: u64) -> Self {
        self.push(Wait { wide: true, at, compare, value, mask: u64::MAX, timeout: timeout_ns })
    }

    /// ATOMIC add of 32 bits.
    pub fn add(self, at: At, addend: u32, old: Option<At>) -> Self {
        let operand = u64::from(addend);
        self.push(Atomic { wide: false, operation: AtomicOperation::Add, at, operand, expected: 0, old })
    }

    /// ATOMIC add of 64 bits.
    pub fn add64(self, at: At, addend: u64, old: Option<At>) -> Self {
        self.push(Atomic {
            wide: true,
            operation: AtomicOperation::Add,
            at,
            operand: addend,
            expected: 0,
            old,
        })
    }

    /// ATOMIC compare-and-swap of 32 bits.
    pub fn cas(self, at: At, expected: u32, new: u32, old: Option<At>) -> Self {
        let (expected, operand) = (u64::from(expected), u64::from(new));
        self.push(Atomic {
            wide: false,
            operation: AtomicOperation::CompareAndSwap,
            at,
            operand,
            expected,
            old,
        })
    }

    /// ATOMIC compare-and-swap of 64 bits.
    pub fn cas64(self, at: At, expected: u64, new: u64, old: Option<At>) -> Self {
        let operation = AtomicOperation::CompareAndSwap;
        self.push(Atomic { wide: true, operation, at, operand: new, expected, old })
    }

    /// TIMESTAMP.
    pub fn timestamp(self, at: At) -> Self {
        self.push(Timestamp { at })
    }

    /// SPIN.
    pub fn spin(self, behaviour: SpinBehaviour, duration_ns: u64) -> Self {
        self.push(Spin { behaviour, duration: duration_ns })
    }

    /// The words of the stream.
    pub fn finish(self) -> Vec<u32> {
        self.words
    }

    /// The bytes of the stream, as SUBMIT_3D carries them.
    pub fn finish_bytes(self) -> Vec<u8> {
        self.words.into_iter().flat_map(u32::to_le_bytes).collect()
    }
}
