//! The engines: threads that step jobs. A job runs over a pin of all that it still has to touch (mode *fence*: an
//! invalidation waits for its end). A job that invalidations keep from being pinned runs over sections instead,
//! one step at a time, so that a guest that flushes its whole address space a hundred times a second (Linux in
//! lazy mode) cannot starve it. Knows nothing of rings or sockets.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use device_model::job::{Job, JobOutcome, Step};
use device_model::mmu::{JobMemory, Missing, PinError, Reader};
use device_model::stats::Stats;

use crate::miss_port::{MissPort, Waiter, pages_of};
use crate::scheduler::{Scheduler, Work};

/// Bytes that a step moves at the most: about 8 µs of copying, the longest that an idle drain waits.
const STEP_BYTES: usize = 64 << 10;

/// After how many pins that an invalidation spoiled a job goes on over sections.
const PIN_ATTEMPTS: u32 = 4;

/// A job that an engine is done with.
#[derive(Debug)]
pub struct FinishedJob {
    /// The job.
    pub job: Job,
    /// How it ended.
    pub outcome: JobOutcome,
}

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
    /// Stress for tests (`--inject step-delay=…`): how much longer every step takes.
    pub step_delay: Duration,
}

/// What becomes of a job that leaves the engine.
enum Leaves {
    Finished(JobOutcome),
    /// Taken off: goes on later, where it stopped.
    TakenOff,
    Missing(Vec<Missing>),
    /// An invalidation of what it wants to pin is under way.
    Invalidating {
        seen: u64,
    },
}

impl Engine {
    /// Starts the engine's thread; it ends when the scheduler closes.
    pub fn spawn(self, index: usize) -> io::Result<JoinHandle<()>> {
        thread::Builder::new().name(format!("engine-{index}")).spawn(move || self.run())
    }

    fn run(self) {
        while let Some(mut work) = self.scheduler.next() {
            let leaves = match work.failed {
                Some(error) => Leaves::Finished(JobOutcome::Failed(error)),
                None if work.pin_attempts < PIN_ATTEMPTS => self.run_pinned(&mut work),
                None => self.run_in_sections(&mut work.job),
            };
            self.dispose(work, leaves);
        }
    }

    /// Pins the rest of the job and steps it to its end, or until it is taken off.
    fn run_pinned(&self, work: &mut Work) -> Leaves {
        let seen = self.scheduler.invalidations_ended();
        let pin = match self.reader.pin(&work.job.working_set()) {
            Ok(pin) => pin,
            Err(PinError::Missing(missing)) => {
                work.pin_attempts = work.pin_attempts.saturating_add(1);
                return Leaves::Missing(missing);
            }
            Err(PinError::Invalidating) => return Leaves::Invalidating { seen },
            Err(PinError::TooLarge { .. }) => {
                // The mirror's tables cannot hold all of it at once; a page at a time they can.
                work.pin_attempts = PIN_ATTEMPTS;
                return self.run_in_sections(&mut work.job);
            }
        };
        loop {
            match self.step(&mut work.job, &pin) {
                Step::Done => return Leaves::Finished(JobOutcome::Done),
                Step::Error(error) => return Leaves::Finished(JobOutcome::Failed(error)),
                // Cannot come of a pin that holds the whole working set; if it does, the miss is real.
                Step::Missing(missing) => return Leaves::Missing(vec![missing]),
                Step::Yield if pin.evicted() => {
                    self.stats.ladder_evictions.add(1);
                    return Leaves::TakenOff;
                }
                Step::Yield if self.scheduler.must_leave() => return Leaves::TakenOff,
                Step::Yield => {}
            }
        }
    }

    /// Steps the job with a section a step: no invalidation waits longer than that.
    fn run_in_sections(&self, job: &mut Job) -> Leaves {
        loop {
            let step = {
                let section = self.reader.enter();
                self.step(job, &section)
            };
            match step {
                Step::Done => return Leaves::Finished(JobOutcome::Done),
                Step::Error(error) => return Leaves::Finished(JobOutcome::Failed(error)),
                Step::Missing(missing) => return Leaves::Missing(vec![missing]),
                Step::Yield if self.scheduler.must_leave() => return Leaves::TakenOff,
                Step::Yield => {}
            }
        }
    }

    fn step(&self, job: &mut Job, memory: &impl JobMemory) -> Step {
        self.stats.job_steps.add(1);
        let before = job.bytes_moved();
        let step = job.step(memory, STEP_BYTES);
        let moved = job.bytes_moved().saturating_sub(before);
        self.stats.bytes_moved.add(moved);
        if !self.step_delay.is_zero() {
            thread::sleep(self.step_delay);
        }
        step
    }

    /// Called with the pin released and the section left (I3, I4).
    fn dispose(&self, work: Work, leaves: Leaves) {
        match leaves {
            Leaves::Finished(outcome) => {
                self.scheduler.ended(work.job.id());
                (self.finished)(FinishedJob { job: work.job, outcome });
            }
            Leaves::TakenOff => self.scheduler.put_back(work),
            Leaves::Invalidating { seen } => self.scheduler.park_for_invalidation(work, seen),
            Leaves::Missing(missing) => {
                self.stats.job_parks.add(1);
                let waiter = Waiter::Job(work.job.id());
                self.scheduler.park_for_misses(work, pages_of(&missing));
                self.misses.request(waiter, missing);
            }
        }
    }
}
