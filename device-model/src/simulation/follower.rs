//! The naive interpreter that follows a job: it sees every access that the engine makes for the job, and checks that it
//! is the next one of the stream: in order, at the right place, with the right value, once. Knows the program and where
//! its spaces lie; knows nothing of engines, modes, pins or misses.

use std::collections::BTreeMap;
use std::time::Duration;

use job_stream::{At, Atomic, Checksum, Context, Copy, Crc32c, Fill, Packet, Program, Range, Wait};

use crate::addr::Iova;
use crate::mmu::{AtomicOperation, Width};

/// The backing of each space: address and length of each entry.
pub(super) type Places = BTreeMap<u32, Vec<(u64, u32)>>;

/// The address at an offset of a backing, and how many bytes follow there.
pub(super) fn locate(backing: &[(u64, u32)], mut offset: u64) -> Option<(Iova, u64)> {
    for &(at, len) in backing {
        match offset.checked_sub(len.into()) {
            Some(rest) => offset = rest,
            None => return Some((Iova::new(at + offset), u64::from(len) - offset)),
        }
    }
    None
}

/// An access that an engine has made for a job.
#[derive(Clone, Copy, Debug)]
pub(super) enum JobEvent<'a> {
    Read {
        at: Iova,
        bytes: &'a [u8],
    },
    Write {
        at: Iova,
        bytes: &'a [u8],
    },
    Copy {
        from: Iova,
        to: Iova,
        len: u64,
    },
    Value {
        at: Iova,
        width: Width,
        operation: AtomicOperation,
        /// The previous value.
        old: u64,
    },
}

/// How far a job has come, judged by its accesses.
#[derive(Clone, Debug, Default)]
pub(super) struct Follower {
    packet: usize,
    done: u64,
    crc: Crc32c,
    old: Option<u64>,
    /// When the WAIT that it has reached first polled, as a running time of the device.
    first_look: Option<Duration>,
    /// What its user fence reported: success or failure.
    told: Option<bool>,
    /// The times that it has written.
    pub(super) times: Vec<u64>,
    /// The kinds of packets that it has completed.
    pub(super) seen: Seen,
}

/// Kinds of packets that were followed to completion.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) bulk: u64,
    pub(super) values: u64,
    pub(super) waits: u64,
}

type Followed = Result<(), String>;

impl Follower {
    /// Follows an access at a time and a running time; `Err`: the stream has something else here.
    pub(super) fn follow(
        &mut self,
        (program, places): (&Program, &Places),
        event: JobEvent<'_>,
        (now, ran): (Duration, Duration),
    ) -> Followed {
        let wrong = |packet: usize, wanted: &str| Err(format!("Packet {packet} {wanted}, but: {event:x?}"));
        if self.told.is_some() {
            return wrong(self.packet, "has told its user fence already");
        }
        if self.tells_failure((program, places), event) {
            self.told = Some(false);
            return Ok(());
        }
        self.skip(program);
        let Some(packet) = program.packets().get(self.packet) else {
            let told = user_fence(program)
                .is_some_and(|(at, context)| stores(places, event, (at, true), Some(context.done)));
            self.told = Some(true);
            return if told { Ok(()) } else { wrong(self.packet, "does not exist") };
        };
        let right = match packet {
            Packet::Fill(fill) => self.fill(places, fill, event),
            Packet::Copy(copy) => self.copy(places, copy, event),
            Packet::Checksum(sum) => self.checksum(places, sum, event),
            Packet::Signal(signal) => {
                stores(places, event, (signal.at, signal.wide), Some(signal.value)) && self.next_value()
            }
            Packet::Timestamp(stamp) => {
                let time = now.as_nanos() as u64;
                self.times.push(time);
                stores(places, event, (stamp.at, true), Some(time)) && self.next_value()
            }
            Packet::Atomic(atomic) => self.atomic(places, atomic, event),
            Packet::Wait(wait) => self.wait(places, wait, event, ran),
            Packet::Nop(_) | Packet::Barrier(_) | Packet::Context(_) | Packet::Spin(_) => false,
        };
        if right { Ok(()) } else { wrong(self.packet, &format!("is {packet}")) }
    }

    /// The job is reported as done: its whole stream must have been seen, and its user fence written.
    pub(super) fn is_done(&mut self, program: &Program) -> bool {
        self.skip(program);
        let told = if user_fence(program).is_some() { Some(true) } else { None };
        self.packet == program.packets().len() && self.told == told
    }

    /// Whether its user fence reported success.
    pub(super) fn has_told_success(&self) -> bool {
        self.told == Some(true)
    }

    pub(super) fn has_told_failure(&self) -> bool {
        self.told == Some(false)
    }

    /// Since when the WAIT with this number polls, if the job has reached it.
    pub(super) fn waits_since(&self, packet: usize) -> Option<Duration> {
        self.first_look.filter(|_| packet == self.packet)
    }

    /// Skips packets without accesses.
    fn skip(&mut self, program: &Program) {
        let silent = |packet: &Packet| {
            matches!(packet, Packet::Nop(_) | Packet::Barrier(_) | Packet::Context(_) | Packet::Spin(_))
        };
        while program.packets().get(self.packet).is_some_and(silent) {
            self.packet += 1;
        }
    }

    fn next(&mut self) -> bool {
        let Self { packet, told, seen, .. } = *self;
        let times = std::mem::take(&mut self.times);
        *self = Self { packet: packet + 1, told, times, seen, ..Self::default() };
        true
    }

    fn next_value(&mut self) -> bool {
        self.seen.values += 1;
        self.next()
    }

    fn tells_failure(&self, (program, places): (&Program, &Places), event: JobEvent<'_>) -> bool {
        user_fence(program)
            .is_some_and(|(at, context)| stores(places, event, (at, true), Some(context.failed)))
    }

    /// Counts bytes of a range that were processed.
    fn advance(&mut self, len: u64, total: u64) -> bool {
        self.done += len;
        if self.done == total {
            self.seen.bulk += 1;
            self.next();
        }
        len > 0 && self.done <= total
    }

    fn fill(&mut self, places: &Places, fill: &Fill, event: JobEvent<'_>) -> bool {
        let JobEvent::Write { at, bytes } = event else { return false };
        let pattern = fill.pattern.to_le_bytes();
        let from = self.done as usize % 4;
        let right = bytes.iter().zip(pattern.iter().cycle().skip(from)).all(|(is, wanted)| is == wanted);
        right && self.comes_to(places, fill.to, at) && self.advance(bytes.len() as u64, fill.to.length)
    }

    fn copy(&mut self, places: &Places, copy: &Copy, event: JobEvent<'_>) -> bool {
        let JobEvent::Copy { from, to, len } = event else { return false };
        let target = copy.to.range(copy.from.length);
        self.comes_to(places, copy.from, from)
            && self.comes_to(places, target, to)
            && self.advance(len, copy.from.length)
    }

    fn checksum(&mut self, places: &Places, sum: &Checksum, event: JobEvent<'_>) -> bool {
        if self.done == sum.from.length {
            self.seen.bulk += 1;
            return stores(places, event, (sum.to, false), Some(self.crc.value().into())) && self.next();
        }
        let JobEvent::Read { at, bytes } = event else { return false };
        let right = self.comes_to(places, sum.from, at);
        self.crc.update(bytes);
        self.done += bytes.len() as u64;
        right && self.done <= sum.from.length
    }

    fn atomic(&mut self, places: &Places, atomic: &Atomic, event: JobEvent<'_>) -> bool {
        if let (Some(old), Some(to)) = (self.old, atomic.old) {
            return stores(places, event, (to, atomic.wide), Some(old)) && self.next_value();
        }
        let JobEvent::Value { operation, old, .. } = event else { return false };
        let wanted = match atomic.operation {
            job_stream::AtomicOperation::Add => AtomicOperation::Add(atomic.operand),
            job_stream::AtomicOperation::CompareAndSwap => {
                AtomicOperation::CompareExchange { expected: atomic.expected, new: atomic.operand }
            }
        };
        self.old = Some(old);
        let right = operation == wanted && is_at(places, event, (atomic.at, atomic.wide));
        right && (atomic.old.is_some() || self.next_value())
    }

    fn wait(&mut self, places: &Places, wait: &Wait, event: JobEvent<'_>, ran: Duration) -> bool {
        let JobEvent::Value { operation: AtomicOperation::Load, old, .. } = event else { return false };
        let right = is_at(places, event, (wait.at, wait.wide));
        self.first_look.get_or_insert(ran);
        if wait.holds(old) {
            self.seen.waits += 1;
            self.next();
        }
        right
    }

    /// Whether the next byte of the range is at this address.
    fn comes_to(&self, places: &Places, range: Range, at: Iova) -> bool {
        place(places, range.at().plus(self.done)) == Some(at)
    }
}

pub(super) fn user_fence(program: &Program) -> Option<(At, &Context)> {
    match program.packets().first() {
        Some(Packet::Context(context)) => Some((context.fence?, context)),
        _ => None,
    }
}

fn place(places: &Places, at: At) -> Option<Iova> {
    locate(places.get(&at.space.raw())?, at.address).map(|(at, _)| at)
}

/// Whether this is an operation on the value at this place.
fn is_at(places: &Places, event: JobEvent<'_>, (at, wide): (At, bool)) -> bool {
    let wanted = if wide { Width::Wide } else { Width::Word };
    matches!(event, JobEvent::Value { at: there, width, .. } if place(places, at) == Some(there) && width == wanted)
}

/// Whether this writes a value to this place.
fn stores(places: &Places, event: JobEvent<'_>, (at, wide): (At, bool), value: Option<u64>) -> bool {
    let stored = match event {
        JobEvent::Value { operation: AtomicOperation::Store(stored), .. } => Some(stored),
        _ => None,
    };
    stored.is_some() && stored == value && is_at(places, event, (at, wide))
}
