//! The engines: threads that run jobs. How a job is run is [`device_model::engine`]; here are the thread, what is
//! counted, and where a job goes afterwards. Knows nothing of rings or sockets.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use device_model::engine::{EngineHost, Leaves, Left, Running, SPIN_STEP, STEP_BYTES};
use device_model::job::{Job, Step, StepContext};
use device_model::mmu::{JobMemory, Reader};
use device_model::schedule::Disposed;
pub use device_model::schedule::FinishedJob;
use device_model::stats::Stats;

use crate::inject::{Bug, Injection, steps};
use crate::miss_port::{MissPort, Waiter};
use crate::scheduler::{Scheduler, Work};

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
}

/// What carries out an engine's steps.
struct Host<'a> {
    scheduler: &'a Scheduler,
    stats: &'a Stats,
    injection: &'a Injection,
    /// The last step was one over memory. A job that spins comes to no end if it is taken off at each step: only time on
    /// its engine counts.
    has_moved: bool,
    /// The job spins: the engine has nothing to do until the next step.
    spins: bool,
}

impl EngineHost for Host<'_> {
    fn step(&mut self, job: &mut Job, memory: &impl JobMemory) -> Step {
        self.stats.job_steps.add(1);
        let before = job.bytes_moved();
        let context = StepContext { now: self.scheduler.now(), budget: STEP_BYTES };
        let step =
            steps::instead_of_step(self.injection, job, memory).unwrap_or_else(|| job.step(memory, context));
        self.spins = matches!(step, Step::Spinning { .. });
        self.has_moved = !self.spins;
        let moved = job.bytes_moved().saturating_sub(before);
        self.stats.bytes_moved.add(moved);
        if let Some(delay) = self.injection.delay(Bug::StepDelay) {
            thread::sleep(delay);
        }
        step
    }

    fn must_leave(&self, work: &Work) -> bool {
        self.scheduler.must_leave(work) || self.has_moved && self.injection.strikes(Bug::ForcePreempt)
    }

    fn is_wanted(&self) -> bool {
        self.scheduler.is_wanted()
    }
}

impl Engine {
    /// Starts the engine's thread; it ends when the scheduler closes.
    pub fn spawn(self, index: usize) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name(format!("engine-{index}")).spawn(move || self.run())
    }

    fn run(self) {
        while let Some(work) = self.scheduler.next() {
            let left = self.run_until_it_leaves(work);
            self.dispose(left);
        }
    }

    /// Steps the job to its end, or until something takes it off.
    fn run_until_it_leaves(&self, work: Work) -> Left {
        let (scheduler, stats) = (&*self.scheduler, &*self.stats);
        let mut host = Host { scheduler, stats, injection: &self.injection, has_moved: false, spins: false };
        let mut running = Running::start(&self.reader, work);
        loop {
            match running {
                ControlFlow::Continue(job) => {
                    running = job.step(&self.reader, &mut host);
                    // Outside of any section: nobody waits for this.
                    if std::mem::take(&mut host.spins) && running.is_continue() {
                        thread::sleep(SPIN_STEP);
                    }
                }
                ControlFlow::Break(left) => return left,
            }
        }
    }

    fn dispose(&self, left: Left) {
        match left.leaves {
            Leaves::Evicted => self.stats.ladder_evictions.add(1),
            Leaves::Missing(_) | Leaves::Faulted { .. } => self.stats.job_parks.add(1),
            Leaves::Finished(_)
            | Leaves::TakenOff
            | Leaves::SliceOver
            | Leaves::Waiting { .. }
            | Leaves::Invalidating => {}
        }
        match self.scheduler.dispose(left) {
            Disposed::Finished(finished) => (self.finished)(finished),
            Disposed::Missing { job, missing, ahead } => {
                self.misses.request(Waiter::Job(job), missing);
                self.misses.request(Waiter::Ahead(job), ahead);
            }
            Disposed::Waits | Disposed::Stale => {}
        }
    }
}
