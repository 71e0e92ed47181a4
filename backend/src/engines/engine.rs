//! The engines: threads that run jobs. [`device_model::jobs::engine`] steps a job; this module adds the thread and the
//! counters, and returns the job afterwards. Knows nothing of rings or sockets.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use device_model::jobs::engine::{EngineHost, Leaves, Left, Running, SPIN_STEP, STEP_BYTES};
use device_model::jobs::job::{Job, JobOutcome, Step, StepContext, TlbCounts};
use device_model::jobs::schedule::{JobReport, ScheduledJob};
use device_model::jobs::scheduler::Scheduler;
use device_model::mmu::{JobMemory, Reader};
use device_model::telemetry::record::{Event, LeftFor, StepEnd};
use device_model::telemetry::stats::Stats;

use crate::fault_injection::{Bug, Injection, steps};
use crate::telemetry::instruments::EventSink;
use crate::thread_kind::ThreadKind;
use crate::threads::starvation::ThreadName;
use crate::threads::{DeviceThread, ThreadFailures};
use crate::wake;
use device_model::session::miss_port::MissPort;

/// What an engine works with. All of it is shared except the reader.
pub struct Engine {
    /// The engine's reader of the mirror.
    pub reader: Reader,
    /// The source of jobs.
    pub scheduler: Arc<Scheduler>,
    /// Where misses are sent.
    pub misses: MissPort,
    /// Called with each job that has ended, or has raised a fault.
    pub report: Box<dyn Fn(JobReport) + Send>,
    /// Called when a flush of an address space may be over.
    pub flush_ended: Box<dyn Fn() + Send>,
    /// The counters.
    pub stats: Arc<Stats>,
    /// The injected faults.
    pub injection: Arc<Injection>,
    /// Where the engine's steps are recorded.
    pub sink: EventSink,
    /// Identifies the engine's thread.
    pub thread: ThreadName,
}

/// Carries out an engine's steps.
struct Host<'a> {
    scheduler: &'a Scheduler,
    stats: &'a Stats,
    injection: &'a Injection,
    sink: &'a EventSink,
    flush_ended: &'a dyn Fn(),
    /// The engine took the job: recorded with the time of its first step, because reading the clock is expensive.
    taken: Option<Event>,
    /// End of the last step.
    last: Option<Duration>,
    /// The last step accessed memory. If a spinning job could be preempted at each step, it would never finish: only
    /// its time on an engine counts.
    has_moved: bool,
    /// The job is spinning: the engine is idle until the next step.
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
        if job.is_translated() {
            let TlbCounts { hits, misses } = job.take_tlb_counts();
            self.stats.tlb_hits.add(hits);
            self.stats.tlb_misses.add(misses);
        }
        if let Some(delay) = self.injection.delay(Bug::StepDelay) {
            wake::sleep(delay);
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

    fn now(&self) -> Duration {
        self.last.unwrap_or_else(|| self.scheduler.now())
    }

    fn is_closing(&self) -> bool {
        self.scheduler.is_closing()
    }

    fn is_wanted(&self) -> bool {
        self.scheduler.is_wanted()
    }

    fn flush_ended(&mut self) {
        (self.flush_ended)();
    }
}

impl Engine {
    /// Starts the engine's thread; it ends when the scheduler is closed.
    pub fn spawn(self, name: &str, failures: &ThreadFailures) -> io::Result<DeviceThread> {
        let body = move || {
            self.run();
            Ok(())
        };
        DeviceThread::spawn((ThreadKind::Engine, name), failures, body)
    }

    fn run(self) {
        self.thread.is_this_thread();
        while let Some(work) = self.scheduler.next() {
            let left = self.run_until_it_leaves(work);
            self.dispose(left);
        }
    }

    /// Steps the job until it ends or is preempted.
    fn run_until_it_leaves(&self, work: ScheduledJob) -> Left {
        let (scheduler, stats) = (&*self.scheduler, &*self.stats);
        let (injection, sink) = (&*self.injection, &self.sink);
        let (taken, last) = (None, None);
        let flush_ended = &*self.flush_ended;
        let mut host = Host {
            scheduler,
            stats,
            injection,
            sink,
            flush_ended,
            taken,
            last,
            has_moved: false,
            spins: false,
        };
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
                    // Outside of any section, so no drain waits for this.
                    if std::mem::take(&mut host.spins) && running.is_continue() {
                        wake::sleep(SPIN_STEP);
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
            Leaves::Missing(_) | Leaves::Missed { .. } => self.stats.job_parks.add(1),
            Leaves::Finished(_)
            | Leaves::Preempted
            | Leaves::SliceOver
            | Leaves::Waiting { .. }
            | Leaves::RaisedFault(_)
            | Leaves::Invalidating => {}
        }
        if let Some(report) = self.misses.give_back(&self.scheduler, left) {
            (self.report)(report);
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
        Step::Fault(_) => StepEnd::Faults,
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
        Leaves::Missing(_) | Leaves::Missed { .. } => LeftFor::Miss,
        Leaves::Invalidating => LeftFor::Invalidation,
        Leaves::RaisedFault(_) => LeftFor::Fault,
    }
}
