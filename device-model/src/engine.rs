//! How an engine runs a job. It runs over a pin of all that it still has to touch (mode *fence*: an invalidation
//! waits for its end). A job that invalidations keep from being pinned runs over sections instead, one step at a
//! time, so that a guest that flushes its whole address space a hundred times a second (Linux in lazy mode) cannot
//! starve it.
//!
//! A job on an engine is a value, and a call does one step: whoever drives it decides what happens between two
//! steps, and, as the one who carries the step out ([`EngineHost`]), within one. Knows nothing of threads, rings or
//! sockets.

use std::ops::ControlFlow;

use crate::job::{Job, JobOutcome, Step};
use crate::mmu::{JobMemory, Missing, Pin, PinError, Reader};
use crate::schedule::Work;

/// Bytes that a step moves at the most: about 8 µs of copying, the longest that an idle drain waits.
pub const STEP_BYTES: usize = 64 << 10;

/// After how many pins that an invalidation spoiled a job goes on over sections.
pub const PIN_ATTEMPTS: u32 = 4;

/// What stands around an engine.
pub trait EngineHost {
    /// Has the job do one step: [`Job::step`], and what is to be counted of it. A section may be open.
    fn step(&mut self, job: &mut Job, memory: &impl JobMemory) -> Step;

    /// Whether the engine has to give this job back now: the device stops, or was reset since the job was taken.
    fn must_leave(&self, work: &Work) -> bool;
}

/// Why a job leaves its engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// It is at its end.
    Finished(JobOutcome),
    /// The engine is to stop: it goes on later, where it stopped.
    TakenOff,
    /// A drain has waited too long for its pin: it goes on later, where it stopped.
    Evicted,
    /// These translations are missing.
    Missing(Vec<Missing>),
    /// An invalidation of what it wants to pin is under way.
    Invalidating,
}

/// A job that is off its engine: no section and no pin is held for it any more (I3, I4).
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct Left {
    /// The job.
    pub work: Work,
    /// Why.
    pub leaves: Leaves,
}

/// What a running job holds between its steps.
#[derive(Debug)]
enum Hold {
    /// All that it still has to touch.
    Pin(Pin),
    /// Nothing: each step has a section of its own.
    Sections,
}

/// A job on an engine.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct Running {
    work: Work,
    hold: Hold,
}

impl Running {
    /// Puts a job on the engine with this reader, or says why that cannot be.
    pub fn start(reader: &Reader, mut work: Work) -> ControlFlow<Left, Self> {
        if let Some(error) = work.failed {
            return leave(work, Leaves::Finished(JobOutcome::Failed(error)));
        }
        if work.pin_attempts >= PIN_ATTEMPTS {
            return ControlFlow::Continue(Self { work, hold: Hold::Sections });
        }
        match reader.pin(&work.job.working_set()) {
            Ok(pin) => ControlFlow::Continue(Self { work, hold: Hold::Pin(pin) }),
            Err(PinError::Missing(missing)) => {
                // Large working sets are asked for in pieces: only what was found before and is missing again counts.
                let first = missing.first().map(|missing| missing.range.first());
                if first.is_some() && first <= work.missed {
                    work.pin_attempts = work.pin_attempts.saturating_add(1);
                }
                work.missed = first;
                leave(work, Leaves::Missing(missing))
            }
            Err(PinError::Invalidating) => leave(work, Leaves::Invalidating),
            Err(PinError::TooLarge { .. }) => {
                // The mirror's tables cannot hold all of it at once; a page at a time they can.
                work.pin_attempts = PIN_ATTEMPTS;
                ControlFlow::Continue(Self { work, hold: Hold::Sections })
            }
        }
    }

    /// One step. `reader` is the one that the job was started with.
    ///
    /// Whether the job has to leave is asked under its pin or section: what stops or resets the device drains both, so
    /// a job that stays does so for this whole step. Between two steps nothing holds up a stop, a reset and the next
    /// start.
    pub fn step(mut self, reader: &Reader, host: &mut impl EngineHost) -> ControlFlow<Left, Self> {
        let (step, evicted) = match &self.hold {
            Hold::Pin(pin) => (step_or_leave(host, &mut self.work, pin), pin.evicted()),
            Hold::Sections => {
                // No invalidation waits longer than for this one step.
                let section = reader.enter();
                (step_or_leave(host, &mut self.work, &section), false)
            }
        };
        let Some(step) = step else { return self.leave(Leaves::TakenOff) };
        match step {
            Step::Done => self.leave(Leaves::Finished(JobOutcome::Done)),
            Step::Error(error) => self.leave(Leaves::Finished(JobOutcome::Failed(error))),
            // Cannot come of a pin that holds the whole working set; if it does, the miss is real.
            Step::Missing(missing) => self.leave(Leaves::Missing(vec![missing])),
            Step::Yield if evicted => self.leave(Leaves::Evicted),
            Step::Yield => ControlFlow::Continue(self),
        }
    }

    /// Takes the job off. Its pin goes before anybody hears of it.
    fn leave(self, leaves: Leaves) -> ControlFlow<Left, Self> {
        let Self { work, hold } = self;
        drop(hold);
        leave(work, leaves)
    }

    /// The job.
    pub fn job(&self) -> &Job {
        &self.work.job
    }

    /// Whether it holds a pin between its steps.
    pub fn is_pinned(&self) -> bool {
        matches!(self.hold, Hold::Pin(_))
    }
}

/// A step of the job, over memory that is held. `None`: it has to leave.
fn step_or_leave(host: &mut impl EngineHost, work: &mut Work, memory: &impl JobMemory) -> Option<Step> {
    if host.must_leave(work) { None } else { Some(host.step(&mut work.job, memory)) }
}

fn leave(work: Work, leaves: Leaves) -> ControlFlow<Left, Running> {
    ControlFlow::Break(Left { work, leaves })
}
