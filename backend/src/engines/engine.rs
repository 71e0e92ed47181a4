//! The engines: threads that run jobs. How a job is run is [`device_model::jobs::engine`]; here are the thread, what is
//! counted, and where a job goes afterwards. Knows nothing of rings or sockets.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use device_model::jobs::engine::{EngineHost, Leaves, Left, Running, SPIN_STEP, STEP_BYTES};
use device_model::jobs::job::{Job, JobOutcome, Step, StepContext};
pub use device_model::jobs::schedule::FinishedJob;
use device_model::jobs::schedule::ScheduledJob;
use device_model::jobs::scheduler::Scheduler;
use device_model::mmu::{JobMemory, Reader};
use device_model::telemetry::record::{Event, LeftFor, StepEnd};
use device_model::telemetry::stats::Stats;

use crate::engines::starvation::ThreadName;
use crate::faults::{Bug, Injection, steps};
use crate::telemetry::instruments::EventSink;
use crate::threads::{DeviceThread, ThreadFailures};
use device_model::session::miss_port::MissPort;

/// What an engine works with; everything is shared but its reader.
pub struct Engine {
    /// Its slot in the mirror.
    pub reader: Reader,
    /// Where work comes from.
    pub scheduler: Arc<Scheduler>,
    /// Where misses go.
    pub misses: MissPort,
    /// Where finished jobs go.
    pub finished: Box<dyn Fn(FinishedJob) + Send>,
    /// What is counted.
    pub stats: Arc<Stats>,
    /// What misbehaves.
    pub injection: Arc<Injection>,
    /// Where its steps are recorded.
    pub sink: EventSink,
    /// Its thread.
    pub thread: ThreadName,
}

/// What carries out an engine's steps.
struct Host<'a> {
    scheduler: &'a Scheduler,
    stats: &'a Stats,
    injection: &'a Injection,
    sink: &'a EventSink,
    /// That it has the job is to be recorded, with the time of its first step: the clock is what costs most of a record.
    taken: Option<Event>,
    /// When the last step ended.
    last: Option<Duration>,
    /// The last step was one over memory. A job that spins comes to no end if it is taken off at each step: only time on
    /// its engine counts.
    has_moved: bool,
    /// The job spins: the engine has nothing to do until the next step.
    spins: bool,
}

impl EngineHost for Host<'_> {
    fn step(&mut self, job: &mut Job, memory: &impl JobMemory) -> Step {
        self.stats.job_steps.add(1);
        let (before, packet, now) = (job.bytes_moved(), job.packet(), self.scheduler.now());
        let context = StepContext { now, running: self.scheduler.running(now), budget: STEP_BYTES };
        let step =
            steps::instead_of_step(self.injection, job, memory).unwrap_or_else(|| job.step(memory, context));
        self.spins = matches!(step, Step::Spinning { .. });
        self.has_moved = !self.spins;
        let moved = job.bytes_moved().saturating_sub(before);
        self.stats.bytes_moved.add(moved);
        if let Some(delay) = self.injection.delay(Bug::StepDelay) {
            thread::sleep(delay);
        }
        let end = self.scheduler.now();
        self.last = Some(end);
        if let Some(taken) = self.taken.take() {
            self.sink.record_at(now, taken);
        }
        let took = end.saturating_sub(now).into();
        let bytes = u32::try_from(moved).unwrap_or(u32::MAX);
        self.sink.record_at(now, Event::Step { job: job.id(), packet, bytes, took, end: end_of(&step) });
        self.sink.at_work(Some(job));
        step
    }

    fn must_leave(&self, work: &ScheduledJob) -> bool {
        self.scheduler.must_leave(work) || self.has_moved && self.injection.fires(Bug::ForcePreempt)
    }

    fn is_wanted(&self) -> bool {
        self.scheduler.is_wanted()
    }
}

impl Engine {
    /// Starts the engine's thread; it ends when the scheduler closes.
    pub fn spawn(self, name: &str, failures: &ThreadFailures) -> io::Result<DeviceThread> {
        let body = move || {
            self.run();
            Ok(())
        };
        DeviceThread::spawn(name, failures, body)
    }

    fn run(self) {
        self.thread.is_this_thread();
        while let Some(work) = self.scheduler.next() {
            let left = self.run_until_it_leaves(work);
            self.dispose(left);
        }
    }

    /// Steps the job to its end, or until something takes it off.
    fn run_until_it_leaves(&self, work: ScheduledJob) -> Left {
        let (scheduler, stats) = (&*self.scheduler, &*self.stats);
        let (injection, sink) = (&*self.injection, &self.sink);
        let (taken, last) = (None, None);
        let mut host =
            Host { scheduler, stats, injection, sink, taken, last, has_moved: false, spins: false };
        let (job, packet) = (work.job.id(), work.job.packet());
        sink.at_work(Some(&work.job));
        let mut running = Running::start(&self.reader, work);
        if let ControlFlow::Continue(running) = &running {
            host.taken = Some(Event::Taken { job, packet, pinned: running.is_pinned() });
        }
        loop {
            match running {
                ControlFlow::Continue(job) => {
                    running = job.step(&self.reader, &mut host);
                    // Outside of any section: nobody waits for this.
                    if std::mem::take(&mut host.spins) && running.is_continue() {
                        thread::sleep(SPIN_STEP);
                    }
                }
                ControlFlow::Break(left) => {
                    let at = host.last.unwrap_or_else(|| scheduler.now());
                    sink.record_at(at, Event::Left { job, why: reason_of(&left.leaves) });
                    return left;
                }
            }
        }
    }

    fn dispose(&self, left: Left) {
        self.sink.at_work(None);
        match left.leaves {
            Leaves::Evicted => self.stats.ladder_evictions.add(1),
            Leaves::Missing(_) | Leaves::Faulted { .. } => self.stats.job_parks.add(1),
            Leaves::Finished(_)
            | Leaves::Preempted
            | Leaves::SliceOver
            | Leaves::Waiting { .. }
            | Leaves::Invalidating => {}
        }
        if let Some(finished) = self.misses.give_back(&self.scheduler, left) {
            (self.finished)(finished);
        }
    }
}

fn end_of(step: &Step) -> StepEnd {
    match step {
        Step::Done => StepEnd::Done,
        Step::Yield => StepEnd::More,
        Step::Spinning { .. } => StepEnd::Spins,
        Step::Waiting { .. } => StepEnd::Waits,
        Step::Missing(_) => StepEnd::Misses,
        Step::Error(_) => StepEnd::Fails,
    }
}

fn reason_of(leaves: &Leaves) -> LeftFor {
    match leaves {
        Leaves::Finished(JobOutcome::Done) => LeftFor::Done,
        Leaves::Finished(JobOutcome::Failed(_)) => LeftFor::Failed,
        Leaves::Preempted => LeftFor::Stop,
        Leaves::SliceOver => LeftFor::Others,
        Leaves::Waiting { .. } => LeftFor::Wait,
        Leaves::Evicted => LeftFor::Eviction,
        Leaves::Missing(_) | Leaves::Faulted { .. } => LeftFor::Miss,
        Leaves::Invalidating => LeftFor::Invalidation,
    }
}
