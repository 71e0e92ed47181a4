//! A job stream, from the command that carries it to its end on an engine, beside the naive interpreter of
//! `job-stream`: the same bytes are left in memory, the user fence says how it ended, and the memory that the job
//! touched is what its working set named. Pages go missing on the way, those of page tables too, and time passes only where
//! the job waits for it. A job that leaves what its address space maps fails there.
//!
//! The input: four bytes that say how it is played, then the stream, as it is or as values for the table of packets.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use arbitrary::Unstructured;
use device_model::addr::{ByteRange, Iova, PAGE_SIZE};
use device_model::gpu::device::{Device, DeviceConfig, Effect, JobConfig, Usage, features};
use device_model::jobs::job::{Job, JobError, JobOutcome, Step, StepContext};
use device_model::testing::memory::{Page, SparseMemory, pattern};
use device_model::testing::page_tables::PageTables;
use device_model::testing::requests as command;
use job_stream::address_space::pte;
use job_stream::twin::{self, Buffers, Memory as _, OutOfBounds, Outcome};
use job_stream::{At, Packet, Program, Space, verify_bytes};

use crate::input;

/// The resources that have memory and are attached: number, and the guest addresses and lengths behind it. They share
/// no page, for what an overlapping COPY leaves is not defined.
const RESOURCES: [(u32, &[(u64, u32)]); 3] = [
    (1, &[(0x1_0000, 0x1800), (0x2_0f00, 0x800)]),
    (2, &[(0x4_0ffd, 0x1003), (0x3_0000, 5), (0x5_0000, 0x2000)]),
    (3, &[(0x6_0ff8, 0x10)]),
];
/// The pages that the only address space maps, from address 0 on: its number as a space, and the IOVAs.
const MAPPED: (u32, &[(u64, u32)]) =
    (Space::address_space(1).raw(), &[(0x8_0000, 0x1000), (0xa_0000, 0x1000), (0x9_0000, 0x1000)]);
/// Its tables, from the root on.
const TABLES: u64 = 0x100_0000;
/// Attached, without memory.
const BARE: u32 = 4;
/// With memory, not attached.
const APART: u32 = 5;
const CONTEXT: u32 = 1;
/// Most packets of a stream that is built from values.
const PACKETS: usize = 64;
/// A job that takes more steps than this for each byte and packet is endless.
const STEPS_A_UNIT: u64 = 4;

/// How the stream is played.
struct Play {
    /// Of each step.
    budget: usize,
    /// Which of the pages that a step has touched is taken away behind it; 0: none.
    losses: u8,
    over_pin: bool,
}

/// Plays `bytes`.
pub fn run(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<4>() else { return };
    let [form, budget, losses, over_pin] = *head;
    let play = Play {
        budget: 1 << (budget % 18),
        losses,
        // Over a pin, nothing goes missing.
        over_pin: losses == 0 && over_pin & 1 == 1,
    };
    let stream = if form & 1 == 0 {
        rest.to_vec()
    } else {
        let words = input::stream(&mut Unstructured::new(rest), PACKETS).unwrap_or_default();
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    };
    submit(&stream, &play);
}

/// Submits the stream to a device of its own.
fn submit(stream: &[u8], play: &Play) {
    let jobs = JobConfig { allow_incoherent: true, ..JobConfig::default() };
    let limits = jobs.limits();
    let mut device = Device::new(DeviceConfig { jobs, ..DeviceConfig::default() });
    device.set_features(features());
    prepare(&mut device);
    let before = device.usage();
    let mut effects = Vec::new();
    let request = command::fenced(command::submit_3d(CONTEXT, stream), 7);
    device.control(&request, (), &mut effects);
    let program = verify_bytes(stream, &limits).ok().filter(lies_in_its_resources);
    match (program, effects.pop()) {
        (Some(program), Some(Effect::Run(job))) => {
            let outcome = Run::new(&program, play).run_to_end(job, &mut device);
            assert_eq!(outcome, JobOutcome::Done, "The device was told of another end");
        }
        (None, Some(Effect::Complete { response, .. })) => {
            assert!(response.is_error() && response.fence() == Some(7));
        }
        (program, effect) => panic!("{effect:?} came of {program:?}"),
    }
    assert!(effects.is_empty());
    // What it has read of page tables stays until the driver flushes it.
    let after = Usage { tlb_entries: before.tlb_entries, ..device.usage() };
    assert_eq!(after, before, "A job that is over has left something behind");
}

fn prepare(device: &mut Device<()>) {
    let mut effects = Vec::new();
    let size = |entries: &[(u64, u32)]| entries.iter().map(|(_, len)| len).sum();
    let mut send = |request: Vec<u8>| device.control(&request, (), &mut effects);
    send(command::ctx_create(CONTEXT));
    for (id, entries) in RESOURCES {
        send(command::create_buffer(id, size(entries)));
        send(command::attach_backing(id, entries));
        send(command::ctx_attach(CONTEXT, id));
    }
    send(command::as_create(CONTEXT, 1, TABLES));
    send(command::create_buffer(BARE, 0x1000));
    send(command::ctx_attach(CONTEXT, BARE));
    send(command::create_buffer(APART, 0x1000));
    send(command::attach_backing(APART, &[(0x7_0000, 0x1000)]));
    for effect in effects {
        let Effect::Complete { response, .. } = effect else { panic!("{effect:?}") };
        assert!(!response.is_error());
    }
}

/// A naive check of whether the operands overlap, byte by byte.
fn lies_in_its_resources(program: &Program) -> bool {
    program.operands().all(|(_, operand)| {
        let range = operand.range;
        if let Some(asid) = range.space.asid() {
            return asid == 1;
        }
        let Some(last) = range.last() else { return false };
        let (Some(first), Some(last)) =
            (locate(range.space.raw(), range.address), locate(range.space.raw(), last))
        else {
            return false;
        };
        !operand.is_value || (first % range.length == 0 && last - first == range.length - 1)
    })
}

/// Every space with memory, and where that is.
fn spaces() -> impl Iterator<Item = (u32, &'static [(u64, u32)])> {
    RESOURCES.into_iter().chain([MAPPED])
}

/// The guest address of a byte of a resource, or of the address space.
fn locate(id: u32, mut offset: u64) -> Option<u64> {
    let (_, entries) = spaces().find(|(known, _)| *known == id)?;
    for (at, len) in entries {
        if offset < u64::from(*len) {
            return Some(at + offset);
        }
        offset -= u64::from(*len);
    }
    None
}

/// The bytes of a resource before the job.
fn first_bytes(id: u32) -> Vec<u8> {
    (0..).map_while(|offset| locate(id, offset)).map(|at| pattern(Iova::new(at))).collect()
}

/// A job under way.
struct Run<'a> {
    program: &'a Program,
    play: &'a Play,
    memory: SparseMemory,
    /// Pages that were taken away.
    lost: BTreeMap<Iova, Box<Page>>,
    now: Duration,
    /// The time at which each packet was executed.
    times: Vec<Duration>,
}

impl<'a> Run<'a> {
    fn new(program: &'a Program, play: &'a Play) -> Self {
        let mut memory = SparseMemory::new();
        for (at, len) in spaces().flat_map(|(_, entries)| entries) {
            memory.fill(ByteRange::new(Iova::new(*at), u64::from(*len)).expect("An entry has bytes"));
        }
        let mut tables = PageTables::new(&mut memory, TABLES);
        for (page, (at, _)) in (0..).zip(MAPPED.1) {
            let all = pte::VALID | pte::READ | pte::WRITE | pte::ATOMIC;
            tables.map(&mut memory, page << 12, 0, at | all);
        }
        let (lost, now, times) = (BTreeMap::new(), Duration::from_millis(1), Vec::new());
        Self { program, play, memory, lost, now, times }
    }

    /// Steps the job to its end, compares what it left, and gives it back to the device.
    fn run_to_end(mut self, mut job: Job, device: &mut Device<()>) -> JobOutcome {
        if self.play.over_pin && !job.is_translated() {
            self.memory.pin(job.working_set());
        }
        let outcome = self.steps(&mut job);
        self.compare(outcome);
        let mut effects = Vec::new();
        assert!(device.job_finished(job, outcome, &mut effects));
        match effects.as_slice() {
            [Effect::Complete { response, .. }] => {
                assert_eq!((response.fence(), response.is_error()), (Some(7), outcome != JobOutcome::Done));
            }
            other => panic!("The end of a job was answered with {other:?}"),
        }
        JobOutcome::Done
    }

    fn steps(&mut self, job: &mut Job) -> JobOutcome {
        let bytes: u128 = self.program.operands().map(|(_, operand)| u128::from(operand.range.length)).sum();
        let work = u64::try_from(bytes).expect("Operands lie in small resources")
            + self.program.packets().len() as u64;
        let mut pause = Duration::from_millis(1);
        for turn in 0..(work + 64) * STEPS_A_UNIT {
            let before = job.packet().expect("A program has packets");
            let step = job.step(
                &self.memory,
                StepContext { now: self.now, running: self.now, budget: self.play.budget },
            );
            let after = job.packet().expect("A program has packets");
            self.times.extend((before..after).map(|_| self.now));
            match step {
                Step::Done => return JobOutcome::Done,
                Step::Error(error) => return JobOutcome::Failed(error),
                Step::Fault(fault) => return JobOutcome::Failed(JobError::Translation(fault)),
                Step::Yield => {}
                Step::Missing(missing) => self.bring_back(missing.range),
                Step::Spinning { .. } => {
                    self.now += pause;
                    pause *= 2;
                }
                // Nobody else writes: what does not hold now never will.
                Step::Waiting { until } => self.now = self.now.max(until),
            }
            self.lose_a_page(turn);
        }
        panic!(
            "The job does not end: it is at packet {:?} of {}",
            job.packet(),
            self.program.packets().len()
        );
    }

    fn bring_back(&mut self, range: ByteRange<Iova>) {
        assert!(range.len() <= u128::from(PAGE_SIZE), "More is missing than was touched");
        let page = self.lost.remove(&range.first()).expect("Only what was taken away is missing");
        self.memory.put_page(range.first(), page);
    }

    fn lose_a_page(&mut self, turn: u64) {
        let touched = self.memory.take_touched();
        if self.play.losses == 0 || !(turn ^ u64::from(self.play.losses)).is_multiple_of(3) {
            return;
        }
        let which = usize::from(self.play.losses) % touched.len().max(1);
        if let Some(at) = touched.into_iter().nth(which)
            && let Some(page) = self.memory.take_page(at)
        {
            self.lost.insert(at, page);
        }
    }

    /// What the job has left is what its twin leaves.
    fn compare(mut self, outcome: JobOutcome) {
        let mut twin = Twin::new(self.program, &self.times);
        let expected = twin::interpret(self.program, &mut twin);
        match (outcome, expected) {
            (JobOutcome::Done, Ok(Outcome::Done)) => {}
            (JobOutcome::Failed(JobError::Translation(fault)), Err(OutOfBounds { range })) => {
                assert_eq!(range.space.raw(), MAPPED.0);
                assert!(locate(MAPPED.0, fault.gva.raw()).is_none(), "{fault} although it is mapped");
                // How much of the packet was done before is not defined.
                return;
            }
            (JobOutcome::Failed(JobError::WaitTimedOut { packet: at }), Ok(Outcome::Waits { packet }))
            | (JobOutcome::Failed(JobError::Wedged { packet: at }), Ok(Outcome::Wedged { packet })) => {
                assert_eq!(at, packet);
                twin.fail();
            }
            (outcome, expected) => panic!("The job came to {outcome:?}, its twin to {expected:?}"),
        }
        for (at, page) in std::mem::take(&mut self.lost) {
            self.memory.put_page(at, page);
        }
        for (id, _) in spaces() {
            assert_eq!(
                self.bytes(id),
                twin.buffers.bytes(id),
                "Resource {id} differs after {:?}",
                self.program
            );
        }
    }

    fn bytes(&mut self, id: u32) -> Vec<u8> {
        let mut pages: BTreeMap<Iova, Box<Page>> = BTreeMap::new();
        let byte = |at: u64| {
            let (at, offset) = (Iova::new(at).page(), Iova::new(at).page_offset() as usize);
            if let Some(page) = self.memory.take_page(at) {
                pages.insert(at, page);
            }
            pages[&at][offset]
        };
        let bytes = (0..).map_while(|offset| locate(id, offset)).map(byte).collect();
        pages.into_iter().for_each(|(at, page)| self.memory.put_page(at, page));
        bytes
    }
}

/// The memory of the naive interpreter, with the times that the engine has had.
struct Twin<'a> {
    program: &'a Program,
    buffers: Buffers,
    stamps: VecDeque<Duration>,
}

impl<'a> Twin<'a> {
    fn new(program: &'a Program, times: &[Duration]) -> Self {
        let buffers = spaces().fold(Buffers::new(), |all, (id, _)| all.with(id, first_bytes(id)));
        let executed = program.packets().iter().zip(times);
        let stamps = executed.filter(|(packet, _)| matches!(packet, Packet::Timestamp(_)));
        Self { program, buffers, stamps: stamps.map(|(_, time)| *time).collect() }
    }

    /// Writes the user fence of a job that has failed.
    fn fail(&mut self) {
        let Some(Packet::Context(context)) = self.program.packets().first() else { return };
        if let Some(at) = context.fence {
            // In an address space it may lie where nothing is mapped.
            let _ = self.buffers.write(at, &context.failed.to_le_bytes());
        }
    }
}

impl twin::Memory for Twin<'_> {
    fn read(&mut self, at: At, into: &mut [u8]) -> Result<(), OutOfBounds> {
        self.buffers.read(at, into)
    }

    fn write(&mut self, at: At, from: &[u8]) -> Result<(), OutOfBounds> {
        self.buffers.write(at, from)
    }

    fn now(&mut self) -> u64 {
        self.stamps.pop_front().map_or(u64::MAX, |time| time.as_nanos() as u64)
    }
}

/// Streams to begin with, as they are submitted: a name, and the stream.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let play = |form: u8, budget: u8, losses: u8, over_pin: u8, rest: &[u8]| {
        [&[form, budget, losses, over_pin][..], rest].concat()
    };
    let mut seeds: Vec<_> = job_stream::PACKETS
        .iter()
        .map(|info| {
            let mut words = Vec::new();
            (info.example)().encode(&mut words);
            let bytes: Vec<u8> = words.into_iter().flat_map(u32::to_le_bytes).collect();
            (info.name.to_lowercase(), play(0, 16, 0, 0, &bytes))
        })
        .collect();
    let work = whole_job(Space::resource);
    let translated = whole_job(|id| if id == 1 { Space::address_space(1) } else { Space::resource(id) });
    seeds.push(("in-an-address-space".to_owned(), play(0, 16, 0, 0, &translated)));
    seeds.push(("in-an-address-space-with-losses".to_owned(), play(0, 3, 5, 0, &translated)));
    seeds.push(("whole-job".to_owned(), play(0, 16, 0, 1, &work)));
    seeds.push(("whole-job-in-small-steps".to_owned(), play(0, 3, 5, 0, &work)));
    let values: Vec<u8> = (0..600_u32).map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes()[3]).collect();
    seeds.push(("values".to_owned(), play(1, 12, 0, 1, &values)));
    seeds.push(("values-with-losses".to_owned(), play(1, 9, 4, 0, &values)));
    seeds
}

/// A job with something of everything, that comes to its end.
fn whole_job(space: impl Fn(u32) -> Space) -> Vec<u8> {
    let at = |id, address| At::new(space(id), address);
    let context =
        job_stream::Context { mode: None, priority: None, fence: Some(at(3, 0)), done: 1, failed: u64::MAX };
    job_stream::Stream::new()
        .push(context)
        .fill(at(1, 0x10).range(0x1ff0), 0xdead_beef)
        .copy(at(1, 0x7fd).range(0x1111), at(2, 3))
        .checksum(at(2, 0).range(0x2000), at(1, 0))
        .barrier()
        .add64(at(1, 8), 3, Some(at(1, 0x1000)))
        .cas(at(1, 0), 1, 2, None)
        .signal64(at(1, 0x1010), 5)
        .wait64(at(1, 0x1010), job_stream::Compare::Equal, 5, 0)
        .timestamp(at(1, 0x1018))
        .spin(job_stream::SpinBehaviour::Preemptible, 1_000_000)
        .timestamp(at(1, 0x1020))
        .nop(3)
        .finish_bytes()
}
