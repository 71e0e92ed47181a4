//! What a job holds while it runs, by its mode, and what preempts it. Steps are scripted, since engines do not depend
//! on what a job does in them.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use job_stream::{At, Compare, Context, Space, SpinBehaviour, Stream};

use super::*;
use crate::addr::{Access, ByteRange, DomainId, Iova};
use crate::jobs::job::{JobError, StepContext};
use crate::jobs::testing::{AT, ROOT, execution, execution_over, job, place, translated};
use crate::mmu::{
    AtomicOperation, DrainWaker, HostRange, Invalidation, MemoryError, MirrorConfig, MirrorWriter,
    Permissions, Width, mirror,
};

struct NoWaker;

impl DrainWaker for NoWaker {
    fn wake(&self) {}
}

struct Rig {
    writer: MirrorWriter,
    reader: Reader,
}

/// A mirror in which the page of the job is mapped.
fn rig() -> Rig {
    let config = MirrorConfig { readers: 1, table_limit: 1 << 20 };
    let (writer, mut readers) = mirror(config, Arc::new(NoWaker));
    let mut rig = Rig { writer, reader: readers.pop().unwrap() };
    rig.map();
    rig
}

fn page() -> ByteRange<Iova> {
    ByteRange::new(Iova::new(AT), 0x1000).unwrap()
}

impl Rig {
    fn map(&mut self) {
        let host = HostRange::invented(0x10_0000, 0x1000);
        let both = Permissions { read: true, write: true };
        self.writer.map(DomainId::DEVICE, page(), host, both).unwrap();
    }

    fn invalidate(&mut self) -> Invalidation {
        self.writer.begin(DomainId::DEVICE, page())
    }

    /// Begins an invalidation of the page and ends it at once; nothing is in flight.
    fn take_away(&mut self) {
        let drained = self.invalidate().poll().unwrap();
        drop(self.writer.end(drained));
    }

    fn start(&self, mode: Mode) -> ControlFlow<Left, Running> {
        Running::start(&self.reader, work(mode, Stream::new().signal(place(), 1)))
    }

    fn running(&self, mode: Mode) -> Running {
        self.start(mode).continue_value().unwrap()
    }
}

fn work(mode: Mode, stream: Stream) -> ScheduledJob {
    ScheduledJob::new(job(0, mode, execution(stream)))
}

/// Returns the script's answers, and then repeats the last one.
struct Script {
    steps: VecDeque<Step>,
    stopped: bool,
    wanted: bool,
    closing: bool,
    now: Duration,
}

fn script(steps: impl IntoIterator<Item = Step>) -> Script {
    Script {
        steps: steps.into_iter().collect(),
        stopped: false,
        wanted: false,
        closing: false,
        now: Duration::ZERO,
    }
}

impl EngineHost for Script {
    fn step(&mut self, _: &mut Job, _: &impl JobMemory) -> Step {
        self.now += Duration::from_millis(1);
        if self.steps.len() > 1 { self.steps.pop_front().unwrap() } else { self.steps[0] }
    }

    fn flush_ended(&mut self) {}

    fn must_leave(&self, _: &ScheduledJob) -> bool {
        self.stopped
    }

    fn now(&self) -> Duration {
        self.now
    }

    fn is_closing(&self) -> bool {
        self.closing
    }

    fn is_wanted(&self) -> bool {
        self.wanted
    }
}

/// Steps a job until it leaves, at most `most` times; returns the number of steps, and why it left.
fn run(rig: &Rig, mut running: Running, host: &mut Script, most: u32) -> (u32, Option<Leaves>) {
    for count in 1..=most {
        running = match running.step(&rig.reader, host) {
            ControlFlow::Continue(running) => running,
            ControlFlow::Break(left) => return (count, Some(left.leaves)),
        };
    }
    (most, None)
}

#[test]
fn an_invalidation_finds_what_the_mode_holds_between_steps() {
    for (mode, pinned, pins, evicted) in [
        (Mode::Strict, false, 0, false),
        (Mode::Fault, false, 0, false),
        (Mode::Fence, true, 1, false),
        (Mode::Preempt, true, 1, true),
        (Mode::RegistrationCache, true, 0, false),
    ] {
        let mut rig = rig();
        let running = rig.running(mode);
        assert_eq!(running.is_pinned(), pinned, "{mode}");
        let invalidation = rig.invalidate();
        assert_eq!(invalidation.in_flight().pins, pins, "{mode}");
        let (_, left) = run(&rig, running, &mut script([Step::Yield]), 3);
        assert_eq!(left, evicted.then_some(Leaves::Evicted), "{mode}");
        assert!(invalidation.poll().is_ok(), "{mode}: what has left its engine holds nothing");
    }
}

#[test]
fn a_fence_mode_job_that_is_evicted_leaves_at_its_next_step_and_holds_nothing() {
    let mut rig = rig();
    let running = rig.running(Mode::Fence);
    let invalidation = rig.invalidate().poll().unwrap_err();
    assert_eq!(invalidation.evict(), 1);
    assert_eq!(run(&rig, running, &mut script([Step::Yield]), 9), (1, Some(Leaves::Evicted)));
    assert!(invalidation.poll().is_ok());
}

#[test]
fn every_way_off_the_engine_gives_the_pin_back() {
    let missing = Missing { space: DomainId::DEVICE, range: page(), access: Access::Read };
    let until = Duration::from_secs(1);
    for (step, leaves) in [
        (Step::Done, Leaves::Finished(JobOutcome::Done)),
        (Step::Error(JobError::Killed), Leaves::Finished(JobOutcome::Failed(JobError::Killed))),
        (Step::Missing(missing), Leaves::Faulted { missing, ahead: vec![] }),
        (Step::Waiting { until }, Leaves::Waiting { until }),
    ] {
        let mut rig = rig();
        let running = rig.running(Mode::Fence);
        assert_eq!(run(&rig, running, &mut script([step]), 9), (1, Some(leaves)));
        assert!(rig.invalidate().in_flight().is_none());
    }
}

#[test]
fn a_job_has_its_least_slice_before_another_gets_the_engine() {
    let rig = rig();
    let mut host = Script { wanted: true, ..script([Step::Yield]) };
    let slice = (SLICE_STEPS, Some(Leaves::SliceOver));
    assert_eq!(run(&rig, rig.running(Mode::Fault), &mut host, 1000), slice);
    host.wanted = false;
    assert_eq!(run(&rig, rig.running(Mode::Fault), &mut host, 1000), (1000, None), "nobody wants it");
}

#[test]
fn an_engine_that_has_to_stop_puts_its_job_back_at_the_next_step() {
    let rig = rig();
    for mode in Mode::ALL {
        for step in [Step::Yield, Step::Spinning { stubborn: false }] {
            let mut host = Script { stopped: true, ..script([step]) };
            assert_eq!(run(&rig, rig.running(*mode), &mut host, 9), (1, Some(Leaves::Preempted)), "{mode}");
        }
    }
}

#[test]
fn what_is_missing_is_asked_for_and_what_is_being_invalidated_is_waited_for() {
    let mut rig = rig();
    let invalidation = rig.invalidate();
    let left = |start: ControlFlow<Left, Running>| start.break_value().unwrap().leaves;
    assert_eq!(left(rig.start(Mode::Fence)), Leaves::Invalidating);
    drop(rig.writer.end(invalidation.poll().unwrap()));
    let missing = Missing { space: DomainId::DEVICE, range: page(), access: Access::Write };
    assert_eq!(left(rig.start(Mode::Fence)), Leaves::Missing(vec![missing]));
    assert!(rig.start(Mode::Fault).is_continue(), "a section asks when it comes to it");
}

#[test]
fn a_job_that_invalidations_keep_from_being_pinned_runs_over_sections() {
    let mut rig = rig();
    rig.take_away();
    let mut work = work(Mode::Fence, Stream::new().signal(place(), 1));
    for attempt in 0..=PIN_ATTEMPTS {
        let Left { work: back, leaves } = Running::start(&rig.reader, work).break_value().unwrap();
        assert!(matches!(leaves, Leaves::Missing(_)), "attempt {attempt}: {leaves:?}");
        work = back;
    }
    let running = Running::start(&rig.reader, work).continue_value().unwrap();
    assert!(!running.is_pinned());
}

#[test]
fn a_job_whose_miss_was_refused_ends_with_that() {
    let rig = rig();
    let mut failed = work(Mode::Fence, Stream::new().signal(place(), 1));
    failed.failed = Some(JobError::Killed);
    let left = Running::start(&rig.reader, failed).break_value().unwrap();
    assert_eq!(left.leaves, Leaves::Finished(JobOutcome::Failed(JobError::Killed)));
}

/// A job that touches no memory keeps no memory from being invalidated.
#[test]
fn a_stubborn_spin_gives_its_pin_back_and_keeps_its_engine() {
    let mut rig = rig();
    let spin = Stream::new().spin(SpinBehaviour::Stubborn, 1_000_000).signal(place(), 1);
    let mut running = Running::start(&rig.reader, work(Mode::Preempt, spin)).continue_value().unwrap();
    assert!(running.is_pinned());
    let mut host = Script { wanted: true, ..script([Step::Spinning { stubborn: true }]) };
    let invalidation = rig.invalidate();
    for _ in 0..100 {
        running = running.step(&rig.reader, &mut host).continue_value().unwrap();
    }
    assert!(!running.is_pinned() && invalidation.poll().is_ok());
}

#[test]
fn a_stop_waits_for_a_stubborn_spin_for_a_time_and_the_end_of_a_session_does_not() {
    // A step takes a millisecond. The time counts from the end of the first step.
    for (closing, steps) in [(false, 101), (true, 1)] {
        let rig = rig();
        let mut host = Script { stopped: true, closing, ..script([Step::Spinning { stubborn: true }]) };
        let spin = Stream::new().spin(SpinBehaviour::Stubborn, 1_000_000);
        let running = Running::start(&rig.reader, work(Mode::Fault, spin)).continue_value().unwrap();
        assert_eq!(run(&rig, running, &mut host, 1000), (steps, Some(Leaves::Preempted)));
    }
}

/// Really steps the job, over memory that only counts accesses.
struct Touches {
    count: Cell<u32>,
    now: Duration,
    stopped: bool,
}

struct Counted<'a>(&'a Cell<u32>);

impl Counted<'_> {
    fn touch(&self) -> Result<(), MemoryError> {
        self.0.set(self.0.get() + 1);
        Ok(())
    }
}

impl JobMemory for Counted<'_> {
    fn read(&self, _: DomainId, _: Iova, _: &mut [u8]) -> Result<(), MemoryError> {
        self.touch()
    }

    fn write(&self, _: DomainId, _: Iova, _: &[u8]) -> Result<(), MemoryError> {
        self.touch()
    }

    fn copy(&self, _: DomainId, _: Iova, _: Iova, _: usize) -> Result<(), MemoryError> {
        self.touch()
    }

    fn atomic(&self, _: DomainId, _: Iova, _: Width, _: AtomicOperation) -> Result<u64, MemoryError> {
        self.touch().map(|()| 0)
    }

    fn host_page(&self, _: DomainId, _: Iova, _: Access) -> Option<HostPage> {
        None
    }
}

impl EngineHost for Touches {
    fn now(&self) -> Duration {
        self.now
    }

    fn step(&mut self, job: &mut Job, _: &impl JobMemory) -> Step {
        self.now += SPIN_STEP;
        let context = StepContext { now: self.now, running: self.now, budget: STEP_BYTES };
        job.step(&Counted(&self.count), context)
    }

    fn flush_ended(&mut self) {}

    fn must_leave(&self, _: &ScheduledJob) -> bool {
        self.stopped
    }
}

/// The job's memory may belong to another driver when its SPIN ends: a stop does not wait for a SPIN.
#[test]
fn however_a_spin_ends_a_job_that_has_to_leave_touches_no_memory_after_it() {
    let duration = |behaviour| if behaviour == SpinBehaviour::Wedged { 0 } else { 10_000_000 };
    for (mode, behaviour, is_cancelled) in Mode::ALL.iter().flat_map(|mode| {
        let all = [SpinBehaviour::Preemptible, SpinBehaviour::Stubborn, SpinBehaviour::Wedged];
        all.into_iter().flat_map(move |behaviour| [(*mode, behaviour, true), (*mode, behaviour, false)])
    }) {
        let what = format!("{mode}, {behaviour:?}, cancelled: {is_cancelled}");
        let rig = rig();
        let fence = Context { mode: None, priority: None, fence: Some(place()), done: 1, failed: 2 };
        let stream = Stream::new().push(fence).spin(behaviour, duration(behaviour)).signal(place(), 3);
        let execution = execution(stream);
        let cancelled = execution.cancellation();
        let work = ScheduledJob::new(job(0, mode, execution));
        let mut running = Running::start(&rig.reader, work).continue_value().unwrap();
        let mut host = Touches { count: Cell::new(0), now: Duration::ZERO, stopped: false };
        for _ in 0..2 {
            running = running.step(&rig.reader, &mut host).continue_value().unwrap();
        }
        assert!(running.job().is_spinning(), "{what}");
        host.stopped = true;
        if behaviour != SpinBehaviour::Preemptible {
            running = running.step(&rig.reader, &mut host).continue_value().unwrap();
        }
        cancelled.store(is_cancelled, Ordering::Relaxed);
        let left = loop {
            match running.step(&rig.reader, &mut host) {
                ControlFlow::Continue(on) => running = on,
                ControlFlow::Break(left) => break left,
            }
        };
        assert_eq!(left.leaves, Leaves::Preempted, "{what}");
        assert_eq!(host.count.get(), 0, "{what}");
    }
}

/// What the job's steps can reach, by the error of an access.
struct Reach(Vec<Result<(), MemoryError>>);

impl EngineHost for Reach {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn step(&mut self, job: &mut Job, memory: &impl JobMemory) -> Step {
        let at = Iova::new(AT);
        let store = memory.atomic(DomainId::DEVICE, at, Width::Wide, AtomicOperation::Store(0));
        self.0.extend([
            memory.read(DomainId::DEVICE, at, &mut [0; 8]),
            memory.copy(DomainId::DEVICE, at, at, 8),
            memory.write(DomainId::DEVICE, at, &[0; 8]),
            store.map(drop),
        ]);
        job.step(memory, STEP_BYTES)
    }

    fn flush_ended(&mut self) {}

    fn must_leave(&self, _: &ScheduledJob) -> bool {
        false
    }
}

#[test]
fn a_step_that_spins_has_no_memory() {
    for mode in Mode::ALL {
        let rig = rig();
        let spin = Stream::new().spin(SpinBehaviour::Preemptible, 1_000_000);
        let running = Running::start(&rig.reader, work(*mode, spin)).continue_value().unwrap();
        let mut host = Reach(Vec::new());
        drop(running.step(&rig.reader, &mut host));
        let range = ByteRange::new(Iova::new(AT), 8).unwrap();
        let refused =
            |access| Err(MemoryError::NotPinned(Missing { space: DomainId::DEVICE, range, access }));
        let wanted = [Access::Read, Access::Read, Access::Write, Access::Write].map(refused);
        assert_eq!(host.0, wanted, "{mode}");
    }
}

/// Runs real steps at a fixed time.
struct Real;

impl EngineHost for Real {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn step(&mut self, job: &mut Job, memory: &impl JobMemory) -> Step {
        job.step(memory, STEP_BYTES)
    }

    fn flush_ended(&mut self) {}

    fn must_leave(&self, _: &ScheduledJob) -> bool {
        false
    }
}

/// A page of memory that a mirror may point at.
#[repr(align(4096))]
struct Frame([u64; 512]);

/// Two pages behind a job; the first is mapped, to a frame that begins with this value.
fn waiting(mode: Mode, value: u64) -> (Rig, ScheduledJob, Box<Frame>) {
    let mut frame = Box::new(Frame([0; 512]));
    frame.0[0] = value;
    let mut rig = rig();
    rig.take_away();
    // SAFETY: the frame is handed to the caller, which keeps it for as long as the rig; nothing else refers into it.
    let host = unsafe { HostRange::new(frame.0.as_mut_ptr().cast(), 0x1000) };
    rig.writer.map(DomainId::DEVICE, page(), host, Permissions { read: true, write: true }).unwrap();
    let wait = Stream::new().nop(0).wait(place(), Compare::Equal, 1, 0);
    let stream = wait.fill(At::new(Space::resource(1), 0x1000).range(0x1000), 7);
    (rig, ScheduledJob::new(job(0, mode, execution_over(2, stream))), frame)
}

const PINNED_MODES: [Mode; 3] = [Mode::Fence, Mode::Preempt, Mode::RegistrationCache];

/// Nothing after the WAIT is looked up, requested or held.
#[test]
fn a_look_of_a_wait_needs_one_word_and_an_invalidation_waits_for_nothing_of_it() {
    for mode in PINNED_MODES {
        let (mut rig, work, frame) = waiting(mode, 0);
        let running = Running::start(&rig.reader, work).continue_value().unwrap();
        assert!(!running.is_pinned(), "{mode}");
        assert!(rig.invalidate().in_flight().is_none(), "{mode}");
        let left = running.step(&rig.reader, &mut Real).break_value().unwrap();
        assert_eq!(left.leaves, Leaves::Faulted { missing: word(), ahead: vec![] }, "{mode}");
        drop(frame);
        let (rig, work, _frame) = waiting(mode, 0);
        let running = Running::start(&rig.reader, work).continue_value().unwrap();
        let left = running.step(&rig.reader, &mut Real).break_value().unwrap();
        assert_eq!(left.leaves, Leaves::Waiting { until: Duration::from_secs(1) }, "{mode}");
    }
}

fn word() -> Missing {
    Missing { space: DomainId::DEVICE, range: page(), access: Access::Read }
}

#[test]
fn what_is_behind_a_wait_is_done_over_a_pin_again() {
    for mode in PINNED_MODES {
        let (mut rig, work, _frame) = waiting(mode, 1);
        let behind = ByteRange::new(Iova::new(AT + 0x1000), 0x1000).unwrap();
        let running = Running::start(&rig.reader, work).continue_value().unwrap();
        let running = running.step(&rig.reader, &mut Real).continue_value().unwrap();
        let left = running.step(&rig.reader, &mut Real).break_value().unwrap();
        let missing = Missing { space: DomainId::DEVICE, range: behind, access: Access::Write };
        assert_eq!(left.leaves, Leaves::Missing(vec![missing]), "{mode}: all that is left, and nothing else");
        let both = Permissions { read: true, write: true };
        rig.writer.map(DomainId::DEVICE, behind, HostRange::invented(0x10_0000, 0x1000), both).unwrap();
        assert!(Running::start(&rig.reader, left.work).continue_value().unwrap().is_pinned(), "{mode}");
    }
}

/// A word of address space 1.
fn in_address_space() -> Stream {
    Stream::new().signal(At::new(Space::address_space(1), 0x1000), 1)
}

#[test]
fn a_job_that_uses_an_address_space_holds_no_pin_in_any_mode() {
    for mode in Mode::ALL {
        let mut rig = rig();
        let work = ScheduledJob::new(job(0, *mode, translated(in_address_space())));
        let running = Running::start(&rig.reader, work).continue_value().unwrap();
        assert!(!running.is_pinned(), "{mode}");
        let invalidation = rig.invalidate();
        assert_eq!(invalidation.in_flight().pins, 0, "{mode}");
        assert!(invalidation.poll().is_ok(), "{mode}: between two steps it delays nothing");
        drop(running);
    }
}

#[test]
fn a_refused_page_fails_a_job_only_if_walk_after_walk_comes_to_it() {
    let rig = rig();
    let missing = Missing { space: DomainId::DEVICE, range: page(), access: Access::Read };
    let other = Missing { access: Access::Write, ..missing };
    let refused = |times| RefusedPage { page: missing.range.first(), access: missing.access, times };
    let left = |step, times| {
        let mut work = ScheduledJob::new(job(0, Mode::Fault, translated(in_address_space())));
        work.refused = Some(refused(times));
        let running = Running::start(&rig.reader, work).continue_value().unwrap();
        match running.step(&rig.reader, &mut script([step])) {
            ControlFlow::Break(Left { work, leaves }) => (leaves, work.refused),
            ControlFlow::Continue(_) => panic!("It goes on"),
        }
    };
    let fails = Leaves::Finished(JobOutcome::Failed(JobError::Refused(missing)));
    assert_eq!(left(Step::Missing(missing), REFUSALS), (fails, Some(refused(REFUSALS))));
    let root = Missing { range: Iova::new(ROOT).page_range(), ..missing };
    // The guest may have unmapped the page and given its address to the memory that this walk needs.
    let (leaves, kept) = left(Step::Missing(missing), REFUSALS - 1);
    assert!(matches!(leaves, Leaves::Faulted { missing: again, .. } if again == missing));
    assert_eq!(kept, Some(refused(REFUSALS - 1)));
    let faulted = Leaves::Faulted { missing: other, ahead: vec![root] };
    assert_eq!(left(Step::Missing(other), REFUSALS), (faulted, None), "what it needs next is the root table");
    assert_eq!(left(Step::Done, REFUSALS), (Leaves::Finished(JobOutcome::Done), None));
}
