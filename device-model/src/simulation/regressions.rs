//! Schedules that once failed, or that random ones rarely generate, as lists of operations.

use job_stream::{Mode, Packet, SpinBehaviour};

use super::ops::{Op, Serve, Shape};
use super::random::Random;
use super::streams::{Wanted, stream};
use super::world::{Flavor, PICTURES};
use super::{Schedule, TABLE};
use crate::addr::PAGE_SIZE;

const DEVICE: u8 = 0;
const BUFFER: u8 = PICTURES as u8;

/// The first seed whose stream fulfils `wanted`, over a buffer of one page, for the command with this number.
fn seed_of(number: usize, wanted: impl Fn(&[Packet]) -> bool) -> u32 {
    let buffers = [(u32::from(BUFFER) + 1, PAGE_SIZE)];
    let stream_of = |seed: &u32| {
        let asked = Wanted { number, mode: Some(Mode::Strict), buffers: &buffers, aliased: false };
        wanted(stream(&mut Random::new((*seed).into()), &asked).1.packets())
    };
    (0..100_000).find(stream_of).expect("A stream like that is not rare")
}

/// A context in this mode with a buffer of one page.
fn context(mode: u8) -> [Op; 4] {
    [
        Op::Map { page: 0, permissions: 3 },
        Op::Context { device: DEVICE, context: 0, mode, init: false },
        Op::Buffer { device: DEVICE, resource: BUFFER, pages: 0, order: 0, blob: true },
        Op::Share { device: DEVICE, context: 0, resource: BUFFER },
    ]
}

fn submit(seed: u32) -> [Op; 3] {
    [Op::Submit { device: DEVICE, context: 0, ring: 0, seed, fenced: false }, Op::Queue, Op::Queue]
}

fn schedule(ops: Vec<Op>) -> Schedule {
    let flavor = Flavor {
        table_limit: 256 * TABLE,
        pipelined: false,
        overclaims: false,
        faulty: false,
        careful: false,
        default_mode: Mode::Fence,
    };
    Schedule { seed: 0, flavor, ops }
}

/// Schedules that must pass, and why each is kept.
pub fn regressions() -> Vec<(&'static str, Schedule)> {
    let mut all = vec![
        ("what is behind a stubborn SPIN does not happen after a reset", spin_over_reset()),
        ("a job that is cancelled in a SPIN does not write its fence after a reset", cancelled_over_reset()),
    ];
    all.extend((1..6).map(|mode| ("a page is remapped under a job, in each mode", remap_under_job(mode))));
    all
}

/// A stream that consists of one FILL of about a page.
fn fills(packets: &[Packet]) -> bool {
    matches!(packets, [Packet::Context(_), Packet::Nop(_), Packet::Fill(fill)] if fill.to.length > 2000)
}

/// A stubborn SPIN outlasts a stop, a reset and the next start. What follows it in its stream would be written into the
/// new driver's pages.
fn spin_over_reset() -> Schedule {
    let stubborn = |packet: &Packet| match packet {
        Packet::Spin(spin) => spin.behaviour == SpinBehaviour::Stubborn && spin.duration == 3_000_000,
        _ => false,
    };
    let spins = |packets: &[Packet]| matches!(packets, [Packet::Context(_), Packet::Nop(_), spin, Packet::Fill(_), ..] if stubborn(spin));
    let mut ops = over_reset(seed_of(3, spins), &[], 7);
    ops.extend([Op::Wait { millis: 10, slowly: false }, step(0), step(0)]);
    schedule(ops)
}

/// The context of a spinning job is destroyed, and its engine notices that only after a reset and the next start. The
/// job's user fence would be written into a page of the new driver.
fn cancelled_over_reset() -> Schedule {
    let tells = |packet: &Packet| matches!(packet, Packet::Context(context) if context.fence.is_some());
    let spins =
        |packets: &[Packet]| matches!(packets, [first, Packet::Nop(_), Packet::Spin(_), ..] if tells(first));
    let destroy = Op::Destroy { device: DEVICE, context: 0, fenced: false };
    let mut ops = over_reset(seed_of(3, spins), &[destroy, Op::Queue, Op::Queue], 8);
    ops.extend([step(0), step(0)]);
    schedule(ops)
}

fn step(engine: u8) -> Op {
    Op::Step { engine, budget: 0x4000 }
}

/// An engine runs a job with this stream, and a reset follows these operations. A job of the new driver, from the
/// command with this number, brings its page into the mirror, on another engine.
fn over_reset(seed: u32, before: &[Op], next: usize) -> Vec<Op> {
    let mut ops = Vec::from(context(1));
    ops.extend(submit(seed));
    ops.extend([step(0), step(0)]);
    ops.extend(before);
    ops.extend([Op::Reset, Op::Exchange { turns: 30 }, Op::Queue]);
    ops.extend(context(1));
    ops.extend(submit(seed_of(next, fills)));
    ops.extend([step(1), step(1), step(1), Op::Exchange { turns: 30 }, step(1), step(1)]);
    ops
}

/// An INVALIDATE in the middle of a job: the ack comes when the mode permits it, and no access after it is stale.
fn remap_under_job(mode: u8) -> Schedule {
    let mut ops = Vec::from(context(mode));
    ops.extend(submit(seed_of(3, fills)));
    let step = Op::Step { engine: 0, budget: 600 };
    ops.extend([step, step, Op::Exchange { turns: 20 }, step, step]);
    ops.push(Op::Remap { page: 0, back: false, shape: Shape::Exact });
    ops.extend([Op::FrontEnd { serve: Serve::Honest }, Op::Session, step, Op::Exchange { turns: 20 }]);
    schedule(ops)
}
