//! A job: work on guest memory as a resumable value. Engines step it, a little at a time, inside a section or over a
//! pin; it owns all that it needs. Knows how far it has come; knows nothing of who waits for it.

use crate::mmu::{JobMemory, MemoryError, Missing, PinRange};
use crate::transfer::Transfer;

/// Which job: never the same twice in the life of a device, resets included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub(crate) u64);

impl JobId {
    /// The number of the job.
    pub fn raw(self) -> u64 {
        self.0
    }
}

/// What came of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The job is at its end.
    Done,
    /// The budget is used up, or somebody else has the image: more is to do.
    Yield,
    /// There is no mapping for what comes next. The job goes on from there once there is one.
    Missing(Missing),
    /// The job cannot go on.
    Error(JobError),
}

/// Why a job did not come to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// The front-end refused a mapping that the job needs.
    #[error("Range {0} was refused")]
    Refused(Missing),
    /// A mapping did not come in time.
    #[error("Range {0} was not answered in time")]
    TimedOut(Missing),
    /// The job was taken off its engine, for what it used is gone.
    #[error("The job was killed")]
    Killed,
    /// The job touched memory that it did not ask for: a bug of ours.
    #[error("The job touched memory that it did not ask for")]
    Memory(#[source] MemoryError),
    /// The job wanted to write past its image: a bug of ours.
    #[error("The job left its image")]
    OutsideImage,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobOutcome {
    /// Its last step said [`Step::Done`].
    Done,
    /// It cannot, or may not, go on.
    Failed(JobError),
}

/// A job. Whoever has it gives it back with [`Device::job_finished`](crate::device::Device::job_finished).
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct Job {
    id: JobId,
    work: Transfer,
}

impl Job {
    pub(crate) fn new(id: JobId, work: Transfer) -> Self {
        Self { id, work }
    }

    /// Which job this is.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// What it still has to touch: ranges in order, merged where no page lies between them. A pin of these covers
    /// every step to come.
    pub fn working_set(&self) -> Vec<PinRange> {
        self.work.working_set()
    }

    /// Goes on for about `budget` bytes: a step is bounded, never blocks and takes no lock that anybody waits under.
    pub fn step(&mut self, memory: &impl JobMemory, budget: usize) -> Step {
        self.work.step(memory, budget)
    }

    /// Bytes of guest memory copied so far.
    pub fn bytes_moved(&self) -> u64 {
        self.work.bytes_moved()
    }
}
