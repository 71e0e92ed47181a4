//! The operations of a schedule. A seed generates a list, and the list alone is played. After operations are removed,
//! the rest can still be played: an operation says only *which* object it is for, and one that makes no sense at its
//! turn does nothing.

use super::random::Random;
use super::world::{CONTEXTS, DEVICES, ENGINES, PAGES, PICTURES, RESOURCES};

/// The range of an INVALIDATE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// The page.
    Exact,
    /// Two to the power of this many pages, aligned, as VT-d rounds.
    Rounded(u32),
    /// The whole address space.
    Domain,
    /// From within the page to the last byte of the address space.
    ToTheEnd,
    /// From the first byte of the address space to within the page.
    FromTheStart,
    /// No INVALIDATE now: the next flush covers it.
    Later,
}

/// How the front-end serves a MISS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Serve {
    /// According to the guest's page table.
    Honest,
    /// According to the guest's page table, with all contiguous neighbours.
    Large,
    /// A refusal, whatever the page table says.
    Refuse,
    /// No answer.
    Lose,
    /// An UPDATE of half of the page.
    Half,
    /// An UPDATE of another page.
    OtherPage(u8),
    /// Without the permission that was requested.
    OtherPermission,
}

/// Used as the number of a page: the one that the device touched last.
pub(super) const TOUCHED: u8 = u8::MAX;

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// The guest maps a page, with permissions 1 (read), 2 (write) or 3.
    Map { page: u8, permissions: u8 },
    /// The guest unmaps a page.
    Unmap { page: u8, shape: Shape },
    /// The guest remaps a page to another frame at once, and perhaps back to the first.
    Remap { page: u8, back: bool, shape: Shape },
    /// The guest flushes what it has unmapped, or nothing.
    Flush { page: u8, shape: Shape },
    /// The guest writes to one of its pages.
    Write { page: u8 },
    /// RESOURCE_CREATE_2D with this many pages.
    Create { device: u8, resource: u8, pages: u8 },
    /// RESOURCE_ATTACH_BACKING: pages in an order that follows from `order`.
    Attach { device: u8, resource: u8, order: u16 },
    /// TRANSFER_TO_HOST_2D of the whole image, or of a part.
    Transfer { device: u8, resource: u8, part: u8, fenced: bool },
    /// RESOURCE_FLUSH.
    FlushImage { device: u8, resource: u8, fenced: bool },
    /// SET_SCANOUT.
    Show { device: u8, resource: u8 },
    /// RESOURCE_UNREF.
    Unref { device: u8, resource: u8, fenced: bool },
    /// RESOURCE_DETACH_BACKING.
    Detach { device: u8, resource: u8, fenced: bool },
    /// CTX_CREATE, for jobs in this mode: 0 for the device's default. `init`: with the device's capability set.
    Context { device: u8, context: u8, mode: u8, init: bool },
    /// CTX_DESTROY.
    Destroy { device: u8, context: u8, fenced: bool },
    /// RESOURCE_CREATE_3D of a buffer of this many pages, and its backing; or both at once as a blob.
    Buffer { device: u8, resource: u8, pages: u8, order: u16, blob: bool },
    /// CTX_ATTACH_RESOURCE.
    Share { device: u8, context: u8, resource: u8 },
    /// CTX_DETACH_RESOURCE.
    Unshare { device: u8, context: u8, resource: u8, fenced: bool },
    /// TRANSFER_TO_HOST_3D or TRANSFER_FROM_HOST_3D.
    Move { device: u8, context: u8, resource: u8, to_host: bool, fenced: bool },
    /// SUBMIT_3D of the job stream that `seed` generates; `ring`: 0 for none, otherwise its number plus one.
    Submit { device: u8, context: u8, ring: u8, seed: u32, fenced: bool },
    /// Bytes that are no command, or a nonsensical one.
    Garbage { device: u8, seed: u16 },
    /// An engine takes a job, or makes a step of this many bytes.
    Step { engine: u8, budget: u16 },
    /// Like `Step`, but the next `take` operations happen within it, at its access number `access`.
    StepAround { engine: u8, budget: u16, access: u8, take: u8 },
    /// An engine hangs in its step.
    Wedge { engine: u8 },
    /// The queue thread runs.
    Queue,
    /// The session runs, if something woke it.
    Session,
    /// The front-end sends the next message, or serves the next MISS in this way.
    FrontEnd { serve: Serve },
    /// Front-end and session take turns: misses are sent and answered.
    Exchange { turns: u8 },
    /// The front-end sends an UPDATE that answers no MISS.
    Unasked { page: u8 },
    /// The front-end answers a MISS that was not sent.
    Unexpected,
    /// The front-end replaces the device's channel.
    NewChannel,
    /// Time passes; the engines go on, or make very small steps.
    Wait { millis: u8, slowly: bool },
    /// QMP stop.
    Stop,
    /// QMP cont.
    Cont,
    /// The guest resets the device.
    Reset,
    /// The memory table changes.
    ChangeMemory,
}

impl Op {
    /// The device and the resource that a command is for.
    pub(super) fn target(self) -> Option<(u8, u8)> {
        match self {
            Self::Create { device, resource, .. }
            | Self::Attach { device, resource, .. }
            | Self::Transfer { device, resource, .. }
            | Self::FlushImage { device, resource, .. }
            | Self::Show { device, resource }
            | Self::Unref { device, resource, .. }
            | Self::Detach { device, resource, .. } => Some((device, resource)),
            Self::Garbage { device, .. } => Some((device, 0)),
            _ => None,
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Map,
    Unmap,
    Remap,
    Flush,
    Write,
    Create,
    Attach,
    Transfer,
    FlushImage,
    Show,
    Unref,
    Detach,
    Context,
    Destroy,
    Buffer,
    Reattach,
    Share,
    Unshare,
    Move,
    Submit,
    Garbage,
    Step,
    StepAround,
    Wedge,
    Queue,
    Session,
    FrontEnd,
    Exchange,
    Unasked,
    Unexpected,
    NewChannel,
    Wait,
    Stop,
    Cont,
    Reset,
    ChangeMemory,
}

/// The relative frequency of each kind.
const WEIGHTS: [(u64, Kind); 36] = [
    (40, Kind::Map),
    (6, Kind::Unmap),
    (14, Kind::Remap),
    (20, Kind::Flush),
    (8, Kind::Write),
    (4, Kind::Create),
    (4, Kind::Attach),
    (60, Kind::Transfer),
    (6, Kind::FlushImage),
    (3, Kind::Show),
    (3, Kind::Unref),
    (3, Kind::Detach),
    (8, Kind::Context),
    (3, Kind::Destroy),
    (6, Kind::Buffer),
    (4, Kind::Reattach),
    (14, Kind::Share),
    (2, Kind::Unshare),
    (4, Kind::Move),
    (60, Kind::Submit),
    (1, Kind::Garbage),
    (120, Kind::Step),
    (60, Kind::StepAround),
    (1, Kind::Wedge),
    (70, Kind::Queue),
    (110, Kind::Session),
    (130, Kind::FrontEnd),
    (40, Kind::Exchange),
    (2, Kind::Unasked),
    (1, Kind::Unexpected),
    (1, Kind::NewChannel),
    (12, Kind::Wait),
    (3, Kind::Stop),
    (16, Kind::Cont),
    (1, Kind::Reset),
    (3, Kind::ChangeMemory),
];

/// The operations of a schedule: first a start that gets jobs going, then anything; contexts only if `streams` is set.
pub(super) fn generate(random: &mut Random, len: usize, streams: bool) -> Vec<Op> {
    let mut ops = start(random, streams);
    while ops.len() < len {
        more(random, &mut ops);
    }
    if !streams {
        ops.retain(|op| !matches!(op, Op::Context { .. }));
    }
    ops
}

fn start(random: &mut Random, streams: bool) -> Vec<Op> {
    let pages = (0..PAGES as u8).filter(|_| !random.one_in(40)).collect::<Vec<_>>();
    let mut ops: Vec<Op> =
        pages.into_iter().map(|page| Op::Map { page, permissions: permissions(random) }).collect();
    for device in 0..DEVICES as u8 {
        if streams {
            start_jobs(random, device, &mut ops);
        }
        let resource = random.index(PICTURES) as u8;
        ops.push(Op::Create { device, resource, pages: random.below(7) as u8 });
        ops.push(Op::Attach { device, resource, order: random.next() as u16 });
        ops.push(Op::Transfer { device, resource, part: 0, fenced: true });
    }
    ops.extend([Op::Queue; 4]);
    for engine in 0..ENGINES as u8 {
        ops.extend([Op::Step { engine, budget: 1 }, Op::Step { engine, budget: 1 }]);
    }
    ops.push(Op::Exchange { turns: random.below(40) as u8 });
    ops
}

/// One or two contexts, each with buffers and a job.
fn start_jobs(random: &mut Random, device: u8, ops: &mut Vec<Op>) {
    for context in 0..1 + random.index(CONTEXTS) as u8 {
        let resource = buffer(random);
        let (order, blob) = (random.next() as u16, random.one_in(4));
        ops.push(Op::Context { device, context, mode: mode(random), init: random.one_in(2) });
        ops.push(Op::Buffer { device, resource, pages: random.below(3) as u8, order, blob });
        ops.push(Op::Share { device, context, resource });
        ops.push(submit(random, device, context));
    }
}

fn submit(random: &mut Random, device: u8, context: u8) -> Op {
    let (ring, seed) = (random.weighted(&[(3, 0), (1, 1), (2, 2)]), random.next() as u32);
    Op::Submit { device, context, ring, seed, fenced: !random.one_in(3) }
}

/// A random buffer.
fn buffer(random: &mut Random) -> u8 {
    (PICTURES + random.index(RESOURCES - PICTURES)) as u8
}

/// A random mode by its number, or 0 for the device's default.
fn mode(random: &mut Random) -> u8 {
    random.below(6) as u8
}

/// Mostly both, so that jobs succeed.
fn permissions(random: &mut Random) -> u8 {
    random.weighted(&[(20, 3), (6, 1), (1, 2)])
}

fn shape(random: &mut Random) -> Shape {
    let rounded = Shape::Rounded(1 + random.below(3) as u32);
    random.weighted(&[
        (6, Shape::Exact),
        (3, rounded),
        (3, Shape::Domain),
        (1, Shape::ToTheEnd),
        (1, Shape::FromTheStart),
        (3, Shape::Later),
    ])
}

fn serve(random: &mut Random) -> Serve {
    let other = Serve::OtherPage(random.index(PAGES) as u8);
    random.weighted(&[
        (60, Serve::Honest),
        (12, Serve::Large),
        (1, Serve::Refuse),
        (1, Serve::Lose),
        (1, Serve::Half),
        (1, other),
        (1, Serve::OtherPermission),
    ])
}

/// One operation, or a few that belong together: what happens within a step, and what detects a wedged engine.
fn more(random: &mut Random, ops: &mut Vec<Op>) {
    let op = one(random);
    ops.push(op);
    match op {
        Op::StepAround { take, .. } => {
            // An invalidation on its way through all threads: the ends of the step see every stage of it.
            if random.one_in(2) {
                let page = page(random, 2);
                ops.push(match random.below(3) {
                    0 => Op::Unmap { page, shape: shape(random) },
                    1 => Op::Remap { page, back: random.one_in(3), shape: shape(random) },
                    _ => Op::Flush { page, shape: shape(random) },
                });
            }
            let inner = [(3, Op::FrontEnd { serve: Serve::Honest }), (3, Op::Session), (1, one(random))];
            ops.extend((1..take).map(|_| random.weighted(&inner)));
        }
        Op::Wedge { .. } => {
            let (page, serve) = (0, Serve::Honest);
            ops.extend([Op::Flush { page, shape: Shape::Domain }, Op::FrontEnd { serve }, Op::Session]);
            ops.extend([Op::FrontEnd { serve }, Op::Session, Op::Wait { millis: 250, slowly: false }]);
        }
        _ => {}
    }
}

/// A random page; with a chance of one in `touched`, the one that was touched last.
fn page(random: &mut Random, touched: u64) -> u8 {
    if random.one_in(touched) { TOUCHED } else { random.index(PAGES) as u8 }
}

fn one(random: &mut Random) -> Op {
    let page = page(random, 6);
    let device = random.index(DEVICES) as u8;
    let context = random.index(CONTEXTS) as u8;
    let resource = random.index(PICTURES) as u8;
    let any = random.index(RESOURCES) as u8;
    let engine = random.index(ENGINES) as u8;
    let fenced = !random.one_in(3);
    let budget = random.weighted(&[(2, 1), (2, 0x300), (2, 0x1000), (1, 0x1800), (1, 0x4000)]);
    match random.weighted(&WEIGHTS) {
        Kind::Map => Op::Map { page, permissions: permissions(random) },
        Kind::Unmap => Op::Unmap { page, shape: shape(random) },
        Kind::Remap => Op::Remap { page, back: random.one_in(3), shape: shape(random) },
        Kind::Flush => Op::Flush { page, shape: shape(random) },
        Kind::Write => Op::Write { page },
        Kind::Create => Op::Create { device, resource, pages: random.below(7) as u8 },
        Kind::Attach => Op::Attach { device, resource, order: random.next() as u16 },
        Kind::Transfer => {
            let part = if random.one_in(2) { 0 } else { random.next() as u8 };
            Op::Transfer { device, resource, part, fenced }
        }
        Kind::FlushImage => Op::FlushImage { device, resource, fenced },
        Kind::Show => Op::Show { device, resource },
        Kind::Unref => Op::Unref { device, resource: any, fenced },
        Kind::Detach => Op::Detach { device, resource: any, fenced },
        kind @ (Kind::Context
        | Kind::Destroy
        | Kind::Buffer
        | Kind::Reattach
        | Kind::Share
        | Kind::Unshare
        | Kind::Move
        | Kind::Submit) => of_contexts(random, kind, (device, context), fenced),
        Kind::Garbage => Op::Garbage { device, seed: random.next() as u16 },
        Kind::Step => Op::Step { engine, budget },
        Kind::StepAround => {
            let (access, take) = (random.below(3) as u8, 1 + random.below(6) as u8);
            Op::StepAround { engine, budget, access, take }
        }
        Kind::Wedge => Op::Wedge { engine },
        Kind::Queue => Op::Queue,
        Kind::Session => Op::Session,
        Kind::FrontEnd => Op::FrontEnd { serve: serve(random) },
        Kind::Exchange => Op::Exchange { turns: 2 + random.below(20) as u8 },
        Kind::Unasked => Op::Unasked { page },
        Kind::Unexpected => Op::Unexpected,
        Kind::NewChannel => Op::NewChannel,
        Kind::Wait => {
            let millis = random.weighted(&[(6, 1), (3, 10), (2, 60), (2, 250)]);
            Op::Wait { millis, slowly: !random.one_in(3) }
        }
        Kind::Stop => Op::Stop,
        Kind::Cont => Op::Cont,
        Kind::Reset => Op::Reset,
        Kind::ChangeMemory => Op::ChangeMemory,
    }
}

/// An operation on contexts, their buffers, or job streams.
fn of_contexts(random: &mut Random, kind: Kind, (device, context): (u8, u8), fenced: bool) -> Op {
    match kind {
        Kind::Context => Op::Context { device, context, mode: mode(random), init: random.one_in(2) },
        Kind::Destroy => Op::Destroy { device, context, fenced },
        Kind::Buffer => {
            let (resource, order) = (buffer(random), random.next() as u16);
            Op::Buffer { device, resource, pages: random.below(3) as u8, order, blob: random.one_in(4) }
        }
        Kind::Reattach => Op::Attach { device, resource: buffer(random), order: random.next() as u16 },
        Kind::Share => Op::Share { device, context, resource: buffer(random) },
        Kind::Unshare => Op::Unshare { device, context, resource: buffer(random), fenced },
        Kind::Move => {
            let (resource, to_host) = (buffer(random), random.one_in(2));
            Op::Move { device, context, resource, to_host, fenced }
        }
        _ => submit(random, device, context),
    }
}
