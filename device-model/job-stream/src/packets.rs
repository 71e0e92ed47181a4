//! The packets of the job stream: one row each, of which all that is known about a packet comes. A new packet is a
//! row here and an executor in the device. Knows what packets say; knows nothing of how they are executed.
//!
//! The words of the rows are those of the manual and of the C header.

use alloc::vec::Vec;

use crate::choice::{AtomicOperation, Compare, Mode, Priority, SpinBehaviour};
use crate::field::{Field, Payload, Words};
use crate::operand::{Access, At, Operand, Range, Space};
use crate::table::{
    Fault, FieldInfo, FlagInfo, HEADER_WORDS, MAX_OPERANDS, OperandInfo, Operands, PacketInfo, Place,
    RuleInfo, Unit, header, packets,
};

/// Opcodes that are kept for packets about address spaces.
pub(crate) const RESERVED_OPCODES: core::ops::RangeInclusive<u8> = 0x80..=0xbf;

/// Whether a value fits where `wide` says how much room there is.
const fn fits(wide: bool, value: u64) -> bool {
    wide || value <= u32::MAX as u64
}

packets! {
    /// Does nothing, and takes as many words as its header says.
    /// The words behind the header mean nothing: a packet can be taken out of a stream by overwriting its header with
    /// a NOP of the same length, and notes for the reader of a dump have room here.
    0x01 NOP Nop |packet, place| {
        flags {}
        fields {
            payload: Payload, "Words that are skipped, 0 to 65534 of them.";
        }
        operands {}
        rules {}
        example { payload: Payload::of(2), }
    }

    /// Makes everything before it visible before anything behind it begins.
    /// Packets of a job see the effects of earlier packets of the same job without it. It is for others, who look at
    /// memory without being told by a SIGNAL: when a packet behind the barrier begins, the effects of all packets
    /// before it can be seen by the guest's processors and by other jobs.
    0x02 BARRIER Barrier |packet, place| {
        flags {}
        fields {}
        operands {}
        rules {}
        example {}
    }

    /// Says how the context treats its jobs, and how the end of this job is told.
    /// Mode and priority stay with the context. The mode is settled by the first job of a context, and cannot be
    /// changed later; a job that asks for another one is refused. `fence` is the user fence of this job alone: a
    /// 64-bit value in memory that the device writes once, when the job has ended: `done` after the effects of all
    /// packets are visible, or `failed` if the job ended in any other way and the memory can still be written.
    0x03 CONTEXT Context |packet, place| {
        flags {}
        fields {
            mode: Option<Mode>, "What an invalidation means to the jobs of the context; 0: what is settled already, or the device's default.";
            priority: Option<Priority>, "Whose turn it is among contexts, from this job on; 0: as before, at first normal.";
            fence: Option<At>, "Where the end of this job is written; space 0: nowhere.";
            done: u64, "What is written when all packets have been executed.";
            failed: u64, "What is written when they have not.";
        }
        operands {
            fence Writes Value64 => packet.fence.map(|at| at.value(true));
        }
        rules {
            header "must stand in the first packet of the stream" => place.index == 0;
            mode "must be one that the device offers" => packet.mode.is_none_or(|mode| place.limits.modes.contains(mode));
            done "must be 0 if there is no fence" => packet.fence.is_some() || packet.done == 0;
            failed "must be 0 if there is no fence" => packet.fence.is_some() || packet.failed == 0;
        }
        example {
            mode: Some(Mode::Fault),
            priority: None,
            fence: Some(At::new(Space::resource(3), 0x40)),
            done: 1,
            failed: u64::MAX,
        }
    }

    /// Fills a range with a 32-bit pattern.
    0x10 FILL Fill |packet, place| {
        flags {}
        fields {
            to: Range, "What is filled.";
            pattern: u32, "The word that is written again and again, the first one at the first address.";
        }
        operands {
            to Writes Words => packet.to;
        }
        rules {}
        example { to: Range::new(Space::resource(7), 0x1000, 0x200), pattern: 0xdead_beef, }
    }

    /// Copies a range to another place.
    /// Neither end needs any alignment. The two must not share a byte: a copy that is resumed after a fault could not
    /// be told apart from a wrong one. Two resources that have pages in common are not noticed; then the bytes that
    /// are written are undefined, but no others are written.
    0x11 COPY Copy |packet, place| {
        flags {}
        fields {
            from: Range, "What is copied.";
            to: At, "Where its first byte goes.";
        }
        operands {
            from Reads Bytes => packet.from;
            to Writes Bytes => packet.to.range(packet.from.length);
        }
        rules {}
        example {
            from: Range::new(Space::resource(7), 0x1003, 0x1_0000_0000),
            to: At::new(Space::resource(8), 0),
        }
    }

    /// Writes the CRC-32C of a range.
    /// That is the CRC with the Castagnoli polynomial 0x1edc6f41, reflected (0x82f63b78), initial value and final
    /// exclusive or 0xffffffff, as in iSCSI, ext4 and the instruction `crc32` of SSE 4.2. The CRC of the nine bytes
    /// `123456789` is 0xe3069283. The result is written once, after the last byte has been read.
    0x12 CHECKSUM Checksum |packet, place| {
        flags {}
        fields {
            from: Range, "What is read.";
            to: At, "Where the 32-bit result goes.";
        }
        operands {
            from Reads Bytes => packet.from;
            to Writes Value32 => packet.to.value(false);
        }
        rules {}
        example {
            from: Range::new(Space::resource(7), 0, 4097),
            to: At::new(Space::resource(3), 0x44),
        }
    }

    /// Writes a value, after everything before it is visible (release).
    /// Whoever reads the value with acquire ordering, a WAIT of another job or a processor of the guest, sees the
    /// effects of all earlier packets of this job too. The value is written in one piece.
    0x20 SIGNAL Signal |packet, place| {
        flags {
            wide = 0, "The value has 64 bits, not 32.";
        }
        fields {
            at: At, "Where the value goes.";
            value: u64, "The value.";
        }
        operands {
            at Writes Value(packet.wide) => packet.at.value(packet.wide);
        }
        rules {
            value "must fit in 32 bits without the flag `wide`" => fits(packet.wide, packet.value);
        }
        example { wide: false, at: At::new(Space::resource(3), 0x48), value: 1, }
    }

    /// Waits until a value in memory compares (acquire).
    /// The value in memory is read in one piece, masked, and compared with `value`; all numbers are unsigned. When the
    /// comparison holds, packets behind this one see everything that was visible to whoever wrote the value. While it
    /// does not hold, the job leaves the engine to others and looks again later: a value that compares for a short
    /// time only may be missed. If the time runs out, the job fails.
    0x21 WAIT Wait |packet, place| {
        flags {
            wide = 0, "The value has 64 bits, not 32.";
        }
        fields {
            at: At, "Where the value is.";
            compare: Compare, "How it is compared.";
            value: u64, "What it is compared with.";
            mask: u64, "The bits of the value in memory that count.";
            timeout: u64, "For how many nanoseconds at the most, from the first look on; 0: as long as the device allows.";
        }
        operands {
            at Reads Value(packet.wide) => packet.at.value(packet.wide);
        }
        rules {
            value "must fit in 32 bits without the flag `wide`" => fits(packet.wide, packet.value);
            mask "must fit in 32 bits without the flag `wide`" => fits(packet.wide, packet.mask);
            mask "must not be 0" => packet.mask != 0;
            timeout "must not be longer than the device allows" => packet.timeout <= place.limits.wait_ns;
        }
        example {
            wide: true,
            at: At::new(Space::resource(3), 0x50),
            compare: Compare::GreaterOrEqual,
            value: 42,
            mask: u64::MAX,
            timeout: 1_000_000,
        }
    }

    /// Changes a value in one piece (acquire and release).
    /// With `add`, the operand is added to the value in memory. With `cas`, the operand replaces the value in memory if
    /// that is equal to `expected`. Nobody, no processor of the guest either, can come in between. If there is a place
    /// for it, the old value is written there afterwards, also by a `cas` that changed nothing. Each of the two
    /// happens once, even if the packet faults in between and is resumed.
    0x22 ATOMIC Atomic |packet, place| {
        flags {
            wide = 0, "All values have 64 bits, not 32.";
        }
        fields {
            operation: AtomicOperation, "What is done.";
            at: At, "Where the value is.";
            operand: u64, "What is added, or what the new value is.";
            expected: u64, "With `cas`, what the value in memory has to be.";
            old: Option<At>, "Where the old value goes; space 0: nowhere.";
        }
        operands {
            at Updates Value(packet.wide) => packet.at.value(packet.wide);
            old Writes Value(packet.wide) => packet.old.map(|at| at.value(packet.wide));
        }
        rules {
            operand "must fit in 32 bits without the flag `wide`" => fits(packet.wide, packet.operand);
            expected "must fit in 32 bits without the flag `wide`" => fits(packet.wide, packet.expected);
            expected "must be 0 unless the operation is `cas`" => packet.expected == 0 || packet.operation == AtomicOperation::CompareAndSwap;
        }
        example {
            wide: true,
            operation: AtomicOperation::CompareAndSwap,
            at: At::new(Space::resource(3), 0x58),
            operand: 2,
            expected: 1,
            old: Some(At::new(Space::resource(3), 0x60)),
        }
    }

    /// Writes the device's time.
    /// The time is a 64-bit number of nanoseconds since a moment of the device's choice. It never goes back, it is the
    /// same for all engines, and it goes on while the device is stopped. It is read after the packets before this one
    /// are done.
    0x23 TIMESTAMP Timestamp |packet, place| {
        flags {}
        fields {
            at: At, "Where the time goes, in 64 bits.";
        }
        operands {
            at Writes Value64 => packet.at.value(true);
        }
        rules {}
        example { at: At::new(Space::resource(3), 0x68), }
    }

    /// Holds the engine for a time, without touching memory.
    /// Only time on the engine counts. It is how a test gets a job of a known length, or one that will not go away.
    0x30 SPIN Spin |packet, place| {
        flags {}
        fields {
            behaviour: SpinBehaviour, "What it does when the engine is wanted for something else.";
            duration: u64, "For how many nanoseconds.";
        }
        operands {}
        rules {
            duration "must not be longer than the device allows" => packet.duration <= place.limits.spin_ns;
            duration "must be 0 for `wedged`, which has no end" => packet.duration == 0 || packet.behaviour != SpinBehaviour::Wedged;
        }
        example { behaviour: SpinBehaviour::Stubborn, duration: 5_000_000, }
    }
}

impl Opcode {
    /// The number of the packet.
    pub const fn raw(self) -> u8 {
        self as u8
    }
}

impl core::fmt::Display for Opcode {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name())
    }
}

impl Atomic {
    /// What becomes of the value `old` in memory.
    pub const fn result(&self, old: u64) -> u64 {
        let new = match self.operation {
            AtomicOperation::Add => old.wrapping_add(self.operand),
            AtomicOperation::CompareAndSwap if old == self.expected => self.operand,
            AtomicOperation::CompareAndSwap => old,
        };
        if self.wide { new } else { new & u32::MAX as u64 }
    }
}

impl Wait {
    /// Whether the wait is over if `value` is in memory.
    pub const fn holds(&self, value: u64) -> bool {
        self.compare.holds(value & self.mask, self.value)
    }
}

impl core::fmt::Display for Packet {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.opcode())?;
        self.operands().try_for_each(|operand| write!(f, " {}={}", operand.field, operand.range))
    }
}
