//! The test jobs: a case for each kind of packet, a long one for storms, and a twin that knows what they leave behind
//! in three buffers of poison. Knows packets and bytes; knows nothing of how a job is submitted or where a buffer
//! lies.

use job_stream::twin::{Buffers, Outcome, interpret};
use job_stream::{At, Compare, Context, Limits, Mode, Packet, Program, Space, SpinBehaviour, Stream, verify};

/// How many buffers the jobs work on.
pub const BUFFERS: usize = 3;
/// Bytes of each: 64 pages, so that the IOMMU can tell of one without touching its neighbours.
pub const BUFFER_BYTES: usize = 64 * 4096;

const BYTES: u64 = BUFFER_BYTES as u64;
/// Where in the last buffer the user fence of each job goes.
const FENCE: u64 = 0x2000;
/// Where in the last buffer two times go, which the twin cannot know.
const TIMES: u64 = 0x3000;
const SPIN_NS: u64 = 1_000_000;
/// How long a job of a storm holds its engine: a guest can make a buffer come and go beside it.
const STORM_SPIN_NS: u64 = 4_000_000;
/// How long an invalidation that waits for the job of [`LONG`] would have to.
const LONG_SPIN_NS: u64 = 600_000_000;
/// Longer than the drain timeout: the device has to take the job off.
const OVERTAKEN_SPIN_NS: u64 = 250_000_000;
/// Where in the last buffer jobs say how far they are.
pub const COUNTER: usize = 0x80;
/// What [`overtaken`] writes there when it has come to its spin.
pub const BEGUN: u32 = 0xb0;
/// What [`PUBLISHED`] writes there.
pub const PUBLICATION: u32 = 0xb1;
const TIMESTAMP: &str = "TIMESTAMP";
const FAILED: u64 = u64::MAX;

/// The numbers of the buffers as spaces: their resource ids.
pub type Ids = [u32; BUFFERS];

/// A job: its name, and its packets behind the context packet.
#[derive(Clone, Copy)]
pub struct Case {
    /// What it tries.
    pub name: &'static str,
    packets: fn(Stream, [At; BUFFERS]) -> Stream,
}

impl Case {
    /// Whether it leaves two times behind, for [`time_between`].
    pub fn measures_time(&self) -> bool {
        self.name == TIMESTAMP
    }
}

/// All cases but the storm.
pub const CASES: [Case; 11] = [
    Case { name: "nothing", packets: |stream, _| stream },
    Case { name: "NOP", packets: |stream, _| stream.nop(0).nop(7) },
    Case { name: "FILL", packets: |stream, [a, ..]| stream.fill(a.plus(0x0ff4).range(0x2010), 0xdead_beef) },
    Case {
        name: "COPY",
        packets: |stream, [a, b, _]| stream.copy(a.plus(0x0f01).range(0x2_1234), b.plus(0x0803)),
    },
    Case {
        name: "BARRIER",
        packets: |stream, [a, b, _]| {
            stream.fill(a.range(0x1000), 1).barrier().copy(a.range(0x1000), b.plus(5))
        },
    },
    Case {
        name: "CHECKSUM",
        packets: |stream, [_, b, c]| stream.checksum(b.plus(3).range(BYTES - 0x1003), c.plus(0x40)),
    },
    Case {
        name: "SIGNAL",
        packets: |stream, [.., c]| stream.signal(c.plus(0x48), 7).signal64(c.plus(0x50), 1 << 40),
    },
    Case {
        name: "WAIT",
        packets: |stream, [.., c]| {
            let narrow = stream.wait(c.plus(0x48), Compare::Equal, 7, 0);
            narrow.wait64(c.plus(0x50), Compare::Greater, 1, 0).signal(c.plus(0x70), 1)
        },
    },
    Case {
        name: "ATOMIC",
        packets: |stream, [.., c]| {
            let added = stream.add(c.plus(0x48), u32::MAX, Some(c.plus(0x4c)));
            let added = added.add64(c.plus(0x50), 5, Some(c.plus(0x58)));
            let swapped = added.cas(c.plus(0x48), 6, 99, Some(c.plus(0x60)));
            swapped.cas64(c.plus(0x50), 0, 99, Some(c.plus(0x68)))
        },
    },
    Case {
        name: TIMESTAMP,
        packets: |stream, [.., c]| {
            let begun = stream.timestamp(c.plus(TIMES)).spin(SpinBehaviour::Preemptible, SPIN_NS);
            begun.timestamp(c.plus(TIMES + 8))
        },
    },
    Case {
        name: "SPIN",
        packets: |stream, _| {
            stream.spin(SpinBehaviour::Preemptible, SPIN_NS).spin(SpinBehaviour::Stubborn, SPIN_NS / 10)
        },
    },
];

/// A job that moves all that there is, and is in flight for some milliseconds.
pub const STORM: Case = Case {
    name: "storm",
    packets: |stream, [a, b, c]| {
        let counted = stream.add(c.plus(COUNTER as u64), 1, Some(a)).copy(a.range(BYTES), b);
        counted.spin(SpinBehaviour::Preemptible, STORM_SPIN_NS).checksum(b.range(BYTES), c.plus(0x84))
    },
};

/// A job that writes much and then says so: who sees that sees all of it.
pub const PUBLISHED: Case = Case {
    name: "SIGNAL after FILL",
    packets: |stream, [a, _, c]| {
        stream.fill(a.range(BYTES), 0x0f0f_1e1e).signal(c.plus(COUNTER as u64), PUBLICATION)
    },
};

/// As a job of a storm, but in flight for so long that what waits for it by mistake is told from what does not.
pub const LONG: Case = Case {
    name: "long",
    packets: |stream, [a, b, c]| {
        let counted = stream.add(c.plus(COUNTER as u64), 1, None).copy(a.range(BYTES), b);
        counted.spin(SpinBehaviour::Preemptible, LONG_SPIN_NS).fill(b.range(BYTES), 3)
    },
};

/// A job from under which the first buffer is taken while it spins: the words of it. Its user fence is 1, or all ones
/// if it failed.
pub fn overtaken(ids: Ids, mode: Mode) -> Vec<u32> {
    let [a, _, c] = ids.map(|id| At::new(Space::resource(id), 0));
    let fence = Some(c.plus(FENCE));
    let context = Context { mode: Some(mode), priority: None, fence, done: 1, failed: FAILED };
    let begun = Stream::new().push(context).fill(a.range(BYTES), 1).signal(c.plus(COUNTER as u64), BEGUN);
    begun.spin(SpinBehaviour::Preemptible, OVERTAKEN_SPIN_NS).fill(a.range(BYTES), 2).finish()
}

/// Nanoseconds for which [`overtaken`] spins.
pub fn overtaken_time() -> u64 {
    OVERTAKEN_SPIN_NS
}

/// The user fence of the last job.
pub fn user_fence(last_buffer: &[u8]) -> u64 {
    let at = FENCE as usize;
    let bytes = last_buffer.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u64::from_le_bytes)
}

/// A byte of a buffer that is not what the twin says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which buffer, from 0.
    pub buffer: usize,
    /// Which byte of it.
    pub at: usize,
    /// What is there.
    pub found: u8,
    /// What has to be there.
    pub wanted: u8,
}

/// What the buffers must hold after the jobs so far, and what those have moved.
pub struct Twin {
    ids: Ids,
    mode: Mode,
    memory: Buffers,
    jobs: u64,
    bytes_moved: u64,
}

impl Twin {
    /// Buffers of poison, for jobs of a context of `mode`.
    pub fn new(ids: Ids, mode: Mode) -> Self {
        let memory = (0..).zip(ids).fold(Buffers::new(), |all, (index, id)| all.with(id, poison(index)));
        Self { ids, mode, memory, jobs: 0, bytes_moved: 0 }
    }

    /// The words of the next job, which the twin has run when this returns. Each has a user fence with a value of its
    /// own.
    pub fn job(&mut self, case: &Case) -> Vec<u32> {
        self.jobs += 1;
        let places = self.ids.map(|id| At::new(Space::resource(id), 0));
        let [.., last] = places;
        let context = Context {
            mode: Some(self.mode),
            priority: None,
            fence: Some(last.plus(FENCE)),
            done: self.jobs,
            failed: FAILED,
        };
        let words = (case.packets)(Stream::new().push(context), places).finish();
        // PANIC: the cases are constants, and a test runs each: they are verified, stay in their buffers, and end.
        let limits = Limits { modes: Limits::default().modes.with(self.mode), ..Limits::default() };
        let program = verify(&words, &limits).expect("a case is a stream");
        let outcome = interpret(&program, &mut self.memory);
        assert_eq!(outcome, Ok(Outcome::Done), "the case {}", case.name);
        self.bytes_moved += bytes_moved(&program);
        words
    }

    /// How many jobs there were.
    pub fn jobs(&self) -> u64 {
        self.jobs
    }

    /// Bytes that they have moved.
    pub fn bytes_moved(&self) -> u64 {
        self.bytes_moved
    }

    /// The first byte of the buffer with this index that is not as it must be.
    pub fn difference(&self, buffer: usize, bytes: &[u8]) -> Option<Difference> {
        let id = self.ids.get(buffer)?;
        let times = if buffer == BUFFERS - 1 { TIMES as usize..TIMES as usize + 16 } else { 0..0 };
        let pairs = bytes.iter().zip(self.memory.bytes(*id)).enumerate();
        let wrong = |(at, (found, wanted)): &(usize, (&u8, &u8))| found != wanted && !times.contains(at);
        let (at, (&found, &wanted)) = pairs.into_iter().find(wrong)?;
        Some(Difference { buffer, at, found, wanted })
    }
}

/// What the buffer with this index holds before the first job: nothing that any packet writes by chance.
pub fn poison(buffer: usize) -> Vec<u8> {
    let seed = (buffer as u32 + 1).wrapping_mul(0x9e37_79b1) | 1;
    (0..BUFFER_BYTES as u32).map(|at| (at.wrapping_mul(seed) >> 24) as u8).collect()
}

/// What the device counts for a program: each byte that FILL, COPY and CHECKSUM handle, once.
fn bytes_moved(program: &Program) -> u64 {
    let length = |packet: &Packet| match packet {
        Packet::Fill(fill) => fill.to.length,
        Packet::Copy(copy) => copy.from.length,
        Packet::Checksum(checksum) => checksum.from.length,
        _ => 0,
    };
    program.packets().iter().map(length).sum()
}

/// The nanoseconds between the two times in the last buffer: a spin of [`least_time`] lies between them.
pub fn time_between(last_buffer: &[u8]) -> Option<u64> {
    let time = |at: u64| {
        let at = at as usize;
        last_buffer.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
    };
    time(TIMES + 8)?.checked_sub(time(TIMES)?)
}

/// Nanoseconds for which [`LONG`] is in flight.
pub fn long_time() -> u64 {
    LONG_SPIN_NS
}

/// What [`time_between`] is at the least.
pub fn least_time() -> u64 {
    SPIN_NS
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const IDS: Ids = [5, 6, 7];

    #[test]
    fn the_cases_have_every_packet_and_none_leaves_the_buffers() {
        let mut twin = Twin::new(IDS, Mode::RegistrationCache);
        let limits = Limits::default();
        let limits = Limits { modes: limits.modes.with(Mode::RegistrationCache), ..limits };
        let mut found = BTreeSet::new();
        for case in CASES.iter().chain([&STORM, &LONG, &PUBLISHED]) {
            let program = verify(&twin.job(case), &limits).unwrap();
            found.extend(program.packets().iter().map(|packet| packet.opcode().name()));
        }
        let all: BTreeSet<_> = job_stream::PACKETS.iter().map(|row| row.name).collect();
        assert_eq!(found, all);
        assert_eq!(twin.jobs(), CASES.len() as u64 + 3);
        let moved = 0x2010 + 0x2_1234 + 2 * 0x1000 + (BYTES - 0x1003) + 5 * BYTES;
        assert_eq!(twin.bytes_moved(), moved);
    }

    #[test]
    fn one_wrong_byte_is_found_and_times_are_not_compared() {
        let mut twin = Twin::new(IDS, Mode::Fence);
        let mut bytes = poison(2);
        assert_eq!(twin.difference(2, &bytes), None);
        bytes[TIMES as usize + 3] ^= 1;
        assert_eq!(twin.difference(2, &bytes), None);
        bytes[0x40] ^= 0xff;
        let (found, wanted) = (bytes[0x40], !bytes[0x40]);
        assert_eq!(twin.difference(2, &bytes), Some(Difference { buffer: 2, at: 0x40, found, wanted }));
        twin.job(&CASES[0]);
        let fence = twin.difference(2, &poison(2)).unwrap();
        assert_eq!((fence.at, fence.wanted), (FENCE as usize, 1));
    }

    #[test]
    fn a_time_that_goes_back_is_no_time() {
        let mut bytes = vec![0; BUFFER_BYTES];
        bytes[TIMES as usize + 8] = 9;
        assert_eq!(time_between(&bytes), Some(9));
        bytes[TIMES as usize] = 10;
        assert_eq!(time_between(&bytes), None);
    }
}
