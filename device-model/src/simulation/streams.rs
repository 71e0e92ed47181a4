//! Random valid job streams over the buffers of their context. Knows what a driver knows of its buffers; knows nothing
//! of where they lie.
//!
//! The second half of the packets of a stream often signals what another stream waits for: SIGNAL and WAIT use a few
//! common words of the first buffer.

use std::time::Duration;

use job_stream::{
    At, Atomic, AtomicOperation, Compare, Context, Fill, Limits, Mode, Packet, Priority, Program, Range,
    Signal, Space, SpinBehaviour, Stream, Wait, verify,
};

use super::random::Random;
use crate::addr::PAGE_SIZE;
use crate::gpu::device::JobConfig;

/// The common words of SIGNAL and WAIT in the first buffer, 64 bytes apart.
const WORDS: u64 = 3;

/// The requirements on a stream.
#[derive(Debug)]
pub(super) struct Wanted<'a> {
    /// The number of its command. The stream contains it, so that its job can be recognised.
    pub(super) number: usize,
    pub(super) mode: Option<Mode>,
    /// The buffers that it may name, with their lengths.
    pub(super) buffers: &'a [(u32, u64)],
    /// Two of them share memory.
    pub(super) aliased: bool,
}

/// The job settings of the simulation's devices.
pub(super) fn config(default_mode: Mode) -> JobConfig {
    JobConfig {
        offered: true,
        default_mode,
        allow_incoherent: true,
        engines: super::world::ENGINES as u32,
        ..JobConfig::default()
    }
}

pub(super) fn limits() -> Limits {
    config(Mode::Fence).limits()
}

/// The number of the command that submitted this program.
pub(super) fn number_of(program: &Program) -> Option<usize> {
    program.packets().iter().take(2).find_map(|packet| match packet {
        Packet::Nop(nop) => Some(usize::from(nop.payload.len())),
        _ => None,
    })
}

/// A stream, and its program.
pub(super) fn stream(random: &mut Random, wanted: &Wanted<'_>) -> (Vec<u8>, Program) {
    let mut stream = Stream::new();
    let priority = random.weighted(&[
        (4, None),
        (1, Some(Priority::Low)),
        (1, Some(Priority::Normal)),
        (1, Some(Priority::High)),
    ]);
    let fence = if random.one_in(4) { value(random, wanted.buffers, true) } else { None };
    if wanted.mode.is_some() || priority.is_some() || fence.is_some() {
        let told = |base| fence.map_or(0, |_| base + wanted.number as u64);
        let (done, failed) = (told(0x1_0000), told(0x2_0000));
        stream = stream.push(Context { mode: wanted.mode, priority, fence, done, failed });
    }
    stream = stream.nop(wanted.number.min(usize::from(u16::MAX) - 1) as u16);
    for _ in 0..1 + random.below(6) {
        if let Some(packet) = packet(random, wanted) {
            stream = stream.push(packet);
        }
    }
    let words = stream.finish();
    let program = verify(&words, &limits()).unwrap_or_else(|error| panic!("The driver errs: {error}"));
    (words.into_iter().flat_map(u32::to_le_bytes).collect(), program)
}

fn packet(random: &mut Random, wanted: &Wanted<'_>) -> Option<Packet> {
    let buffers = wanted.buffers;
    match random.below(24) {
        0..6 => {
            let all = range(random, buffers)?;
            let (address, length) = (all.address & !3, all.length.next_multiple_of(4));
            let size = buffers.iter().find(|(id, _)| *id == all.space.raw())?.1;
            let length = length.min(size - address) & !3;
            let to = Range { address, length: length.max(4), ..all };
            Some(Fill { to, pattern: random.next() as u32 }.into())
        }
        6..11 => copy(random, wanted),
        11..13 => {
            let (from, to) = (range(random, buffers)?, value(random, buffers, false)?);
            let together = wanted.aliased && from.space != to.space || from.overlaps(to.value(false));
            (!together).then(|| job_stream::Checksum { from, to }.into())
        }
        13..16 => {
            let (at, wide) = agreed(random, buffers)?;
            Some(Signal { wide, at, value: random.below(4) }.into())
        }
        16..18 => {
            let ((at, wide), mask) = (agreed(random, buffers)?, u64::from(u32::MAX));
            let compare = random.weighted(&[
                (3, Compare::GreaterOrEqual),
                (2, Compare::Less),
                (1, Compare::Equal),
                (1, Compare::NotEqual),
            ]);
            let timeout = random.weighted(&[(2, 100_000), (2, 1_000_000), (1, 8_000_000)]);
            Some(Wait { wide, at, compare, value: random.below(4), mask, timeout }.into())
        }
        18..20 => atomic(random, buffers),
        20..22 => Some(spin(random)),
        22 => Some(job_stream::Timestamp { at: value(random, buffers, true)? }.into()),
        _ => Some(job_stream::Barrier {}.into()),
    }
}

fn copy(random: &mut Random, wanted: &Wanted<'_>) -> Option<Packet> {
    let (from, to) = (range(random, wanted.buffers)?, range(random, wanted.buffers)?);
    if wanted.aliased && from.space != to.space {
        return None;
    }
    let length = from.length.min(to.length);
    let (from, to) = (from.at().range(length), to.at());
    (!from.overlaps(to.range(length))).then(|| job_stream::Copy { from, to }.into())
}

fn atomic(random: &mut Random, buffers: &[(u32, u64)]) -> Option<Packet> {
    let wide = random.one_in(2);
    let (at, old) = (value(random, buffers, wide)?, value(random, buffers, wide)?);
    let old = (random.one_in(2) && at.space == old.space && at != old).then_some(old);
    let operand = random.below(1000);
    let (operation, expected) = match random.one_in(3) {
        true => (AtomicOperation::CompareAndSwap, random.below(4)),
        false => (AtomicOperation::Add, 0),
    };
    Some(Atomic { wide, operation, at, operand, expected, old }.into())
}

fn spin(random: &mut Random) -> Packet {
    let behaviour = random.weighted(&[
        (12, SpinBehaviour::Preemptible),
        (7, SpinBehaviour::Stubborn),
        (1, SpinBehaviour::Wedged),
    ]);
    let micros = random.weighted(&[(2, 30), (2, 200), (1, 3000)]);
    let duration = match behaviour {
        SpinBehaviour::Wedged => Duration::ZERO,
        SpinBehaviour::Preemptible | SpinBehaviour::Stubborn => Duration::from_micros(micros),
    };
    job_stream::Spin { behaviour, duration: duration.as_nanos() as u64 }.into()
}

/// A random range of a buffer.
fn range(random: &mut Random, buffers: &[(u32, u64)]) -> Option<Range> {
    let (id, size) = one_of(random, buffers)?;
    let most = random.weighted(&[(2, 64), (3, PAGE_SIZE), (2, 3 * PAGE_SIZE)]);
    let length = (1 + random.below(most)).min(size - 8);
    Some(Range::new(Space::resource(id), random.below(size - length - 3), length))
}

/// A random place for a value.
fn value(random: &mut Random, buffers: &[(u32, u64)], wide: bool) -> Option<At> {
    let (id, size) = one_of(random, buffers)?;
    let bytes = if wide { 8 } else { 4 };
    Some(At::new(Space::resource(id), random.below(size / bytes) * bytes))
}

/// A common place of SIGNAL and WAIT, and whether its value is a wide one.
fn agreed(random: &mut Random, buffers: &[(u32, u64)]) -> Option<(At, bool)> {
    let (id, _) = *buffers.first()?;
    Some((At::new(Space::resource(id), random.below(WORDS) * 64), random.one_in(4)))
}

fn one_of(random: &mut Random, buffers: &[(u32, u64)]) -> Option<(u32, u64)> {
    buffers.get(random.index(buffers.len().max(1))).copied()
}
