//! A job: work on guest memory as a resumable value. Engines step it, a little at a time, inside a section or over a
//! pin; it owns all that it needs. Knows how far it has come; knows nothing of who waits for it.

use std::sync::Arc;
use std::time::Duration;

use job_stream::{Mode, Priority};
use serde::Serialize;

use crate::addr::{Access, Iova};
pub use crate::jobs::address_space::translation::TlbCounts;
use crate::jobs::address_space::{AddressSpace, TranslationFault};
use crate::jobs::name::JobName;
use crate::jobs::program::Execution;
use crate::jobs::transfer::Transfer;
use crate::jobs::working_set::WorkingSet;
use crate::mmu::{JobMemory, MemoryError, Missing, PinRange, SeededBug};

/// A job's number: unique in the life of a device, across resets too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct JobId(pub(crate) u64);

impl JobId {
    /// The job with this number.
    pub const fn new(raw: u64) -> Self {
        Self(raw)
    }

    /// The number of the job.
    pub fn raw(self) -> u64 {
        self.0
    }
}

/// The inputs of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepContext {
    /// The device's time: the same for all engines, and it never goes back.
    pub now: Duration,
    /// How long the device has been running. WAITs and SPINs are measured in it; it stands still while the device is
    /// stopped.
    pub running: Duration,
    /// About how many bytes the step may move.
    pub budget: usize,
}

/// A step that does not use the time.
impl From<usize> for StepContext {
    fn from(budget: usize) -> Self {
        Self { now: Duration::ZERO, running: Duration::ZERO, budget }
    }
}

/// The result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The job has ended.
    Done,
    /// The budget is used up, or another thread has the image: there is more to do.
    Yield,
    /// It keeps the engine without touching memory until its time is over: poll again soon.
    Spinning {
        /// It leaves only when the engine itself has to stop, not for other jobs.
        stubborn: bool,
    },
    /// A value in memory is not yet what it waits for: another job may have the engine.
    Waiting {
        /// When it times out, as a running time of the device.
        until: Duration,
    },
    /// The next bytes are not mapped. The job goes on from there once they are.
    Missing(Missing),
    /// The page tables do not permit an access, and the driver answers faults. The job goes on from there once it has.
    Fault(TranslationFault),
    /// The job cannot go on.
    Error(JobError),
}

/// Why a job failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JobError {
    /// The front-end refused a mapping that the job needs.
    #[error("Range {0} was refused")]
    Refused(Missing),
    /// A mapping did not come in time.
    #[error("Range {0} was not answered in time")]
    TimedOut(Missing),
    /// There is no back-end channel to request a mapping on.
    #[error(
        "Range {0} cannot be asked for: the front-end has closed the back-end channel, or never sent one"
    )]
    NoChannel(Missing),
    /// What it used was mapped to other memory before its end.
    #[error("Range {0} was mapped to other memory while the job used it")]
    Moved(Missing),
    /// The job was killed because its resource or context is gone.
    #[error("The job was killed")]
    Killed,
    /// Its context was lost or destroyed before its turn.
    #[error("The context of the job is lost")]
    ContextLost,
    /// A WAIT timed out.
    #[error("Packet {packet} (WAIT) has waited in vain")]
    WaitTimedOut {
        /// The packet, counted from 0.
        packet: usize,
    },
    /// A SPIN did not leave its engine.
    #[error("Packet {packet} (SPIN) was taken off its engine by force")]
    Wedged {
        /// The packet, counted from 0.
        packet: usize,
    },
    /// The page tables of an address space do not permit an access.
    #[error("{0}")]
    Translation(TranslationFault),
    /// The job touched memory that it did not declare: a bug of MirrorGPU.
    #[error("The job touched memory that it did not ask for")]
    Memory(#[source] MemoryError),
    /// The job tried to write past its image: a bug of MirrorGPU.
    #[error("The job left its image")]
    OutsideImage,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobOutcome {
    /// Its last step returned [`Step::Done`].
    Done,
    /// It could not go on, or was not allowed to.
    Failed(JobError),
}

/// How a job is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Treatment {
    /// Its context; a transfer has none.
    pub(crate) context: Option<u32>,
    /// How invalidations treat it.
    pub(crate) mode: Mode,
    /// Its scheduling priority.
    pub(crate) priority: Priority,
}

/// What a job does.
#[derive(Debug)]
enum JobKind {
    /// TRANSFER_TO_HOST_2D.
    Transfer(Transfer),
    /// SUBMIT_3D.
    Program(Box<Execution>),
}

/// A job. Its owner gives it back with [`Device::job_finished`](crate::gpu::device::Device::job_finished).
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct Job {
    id: JobId,
    treatment: Treatment,
    work: JobKind,
}

impl Job {
    /// A transfer: pinned while it runs.
    pub(crate) fn transfer(id: JobId, transfer: Transfer) -> Self {
        let treatment = Treatment { context: None, mode: Mode::Fence, priority: Priority::Normal };
        Self { id, treatment, work: JobKind::Transfer(transfer) }
    }

    /// A program.
    pub(crate) fn program(id: JobId, treatment: Treatment, program: Execution) -> Self {
        Self { id, treatment, work: JobKind::Program(Box::new(program)) }
    }

    /// Its number.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// Its context; a transfer has none.
    pub fn context(&self) -> Option<u32> {
        self.treatment.context
    }

    /// How invalidations treat it.
    pub fn mode(&self) -> Mode {
        self.treatment.mode
    }

    /// Its scheduling priority.
    pub fn priority(&self) -> Priority {
        self.treatment.priority
    }

    /// The packet that it has reached, counted from 0; a transfer has none.
    pub fn packet(&self) -> Option<usize> {
        match &self.work {
            JobKind::Transfer(_) => None,
            JobKind::Program(program) => Some(program.packet()),
        }
    }

    /// The job, and what its packets name, for records.
    pub fn name(&self) -> JobName {
        let operands = match &self.work {
            JobKind::Transfer(_) => Vec::new(),
            JobKind::Program(program) => program.operand_names(),
        };
        let (context, mode, priority) = (self.context(), self.mode(), self.priority());
        JobName { id: self.id, context, mode, priority, operands }
    }

    /// What it still has to touch: ranges in order, merged where no page lies between them. A pin of these covers all
    /// later steps.
    pub fn working_set(&self) -> Vec<PinRange> {
        match &self.work {
            JobKind::Transfer(transfer) => transfer.working_set(),
            JobKind::Program(program) => program.working_set(),
        }
    }

    /// What it touches from its first step to its end, in compact form. Called before the first step.
    pub(crate) fn touches(&self) -> Arc<WorkingSet> {
        match &self.work {
            JobKind::Transfer(transfer) => Arc::new(transfer.touches()),
            JobKind::Program(program) => program.touches(),
        }
    }

    /// Whether it uses an address space. What it needs is then known only when it gets there: such a job runs over
    /// sections, never over a pin.
    pub fn is_translated(&self) -> bool {
        matches!(&self.work, JobKind::Program(program) if program.is_translated())
    }

    /// The error of a job for which `missing` was refused.
    pub(crate) fn refusal(&self, missing: Missing) -> JobError {
        match &self.work {
            JobKind::Program(program) => program.refusal(missing),
            JobKind::Transfer(_) => JobError::Refused(missing),
        }
    }

    /// What its current packet needs of address spaces beyond `missing`, as far as the page tables can be read now.
    /// `probe` says whether the mirror lacks the page of an address for an access.
    pub(crate) fn look_ahead(
        &self,
        memory: &impl JobMemory,
        probe: impl Fn(Iova, Access) -> Option<Missing>,
        missing: Missing,
    ) -> Vec<Missing> {
        match &self.work {
            JobKind::Program(program) => program.look_ahead(memory, probe, missing),
            JobKind::Transfer(_) => Vec::new(),
        }
    }

    /// The address space that a fault of it is about.
    pub(crate) fn space_of(&self, fault: &TranslationFault) -> Option<&Arc<AddressSpace>> {
        match &self.work {
            JobKind::Program(program) => program.space_of(fault),
            JobKind::Transfer(_) => None,
        }
    }

    /// Whether a flush of an address space may be over because a step of this job has ended, since the last call.
    pub(crate) fn take_flush_ended(&self) -> bool {
        matches!(&self.work, JobKind::Program(program) if program.take_flush_ended())
    }

    /// How often it has asked TLBs since the last call.
    pub fn take_tlb_counts(&self) -> TlbCounts {
        match &self.work {
            JobKind::Program(program) => program.take_tlb_counts(),
            JobKind::Transfer(_) => TlbCounts::default(),
        }
    }

    /// A TLB entry that it has used, and that the driver most likely forgot to flush.
    pub(crate) fn take_overdue(&self) -> Option<TranslationFault> {
        match &self.work {
            JobKind::Program(program) => program.take_overdue(),
            JobKind::Transfer(_) => None,
        }
    }

    /// What its current packet touches; for a transfer, all that is left.
    pub fn comes_next(&self) -> Vec<PinRange> {
        match &self.work {
            JobKind::Transfer(transfer) => transfer.working_set(),
            JobKind::Program(program) => program.comes_next(),
        }
    }

    /// Whether others can observe its progress in memory before its end: by a SIGNAL, an ATOMIC, or a user fence.
    pub(crate) fn tells_by_memory(&self) -> bool {
        matches!(&self.work, JobKind::Program(program) if program.tells_by_memory())
    }

    /// Whether its next packet keeps the engine without touching memory.
    pub fn is_spinning(&self) -> bool {
        matches!(&self.work, JobKind::Program(program) if program.is_spinning())
    }

    /// Whether it has reached a WAIT, and so needs only one word of memory until that holds.
    pub fn is_waiting(&self) -> bool {
        matches!(&self.work, JobKind::Program(program) if program.is_waiting())
    }

    /// Whether it has to fail at its next step.
    pub fn is_cancelled(&self) -> bool {
        matches!(&self.work, JobKind::Program(program) if program.is_cancelled())
    }

    /// Goes on for about `budget` bytes. A step is bounded, never blocks, and takes no lock under which a thread waits.
    pub fn step(&mut self, memory: &impl JobMemory, context: impl Into<StepContext>) -> Step {
        let context = context.into();
        match &mut self.work {
            JobKind::Transfer(transfer) => transfer.step(memory, context.budget),
            JobKind::Program(program) => program.step(memory, context),
        }
    }

    /// Applies the seeded bug "signal before write": writes the values that signal its progress before that is made.
    pub fn signal_early(&self, memory: &impl JobMemory, why: SeededBug) {
        if let JobKind::Program(program) = &self.work {
            program.signal_early(memory, why);
        }
    }

    /// It cannot go on. `Ok`: it still has to be stepped, to write its user fence. `Err`: it has ended.
    pub(crate) fn fail(&mut self, error: JobError) -> Result<(), JobError> {
        match &mut self.work {
            JobKind::Transfer(_) => Err(error),
            JobKind::Program(program) => program.fail(error),
        }
    }

    /// It has left its engine.
    pub(crate) fn left_engine(&mut self) {
        if let JobKind::Program(program) = &mut self.work {
            program.left_engine();
        }
    }

    /// The program that it executes, for an oracle that compares it with the submitted one.
    #[cfg(any(test, feature = "test-utils"))]
    pub(crate) fn program_of(&self) -> Option<&job_stream::Program> {
        match &self.work {
            JobKind::Transfer(_) => None,
            JobKind::Program(program) => Some(program.program()),
        }
    }

    /// Applies the seeded bug "skip a kill": the job forgets that it was cancelled.
    #[cfg(any(test, feature = "test-utils"))]
    pub(crate) fn skip_kill(&self, _why: SeededBug) {
        if let JobKind::Program(program) = &self.work {
            program.cancellation().store(false, std::sync::atomic::Ordering::Relaxed);
        }
    }

    /// Bytes of guest memory copied so far.
    pub fn bytes_moved(&self) -> u64 {
        match &self.work {
            JobKind::Transfer(transfer) => transfer.bytes_moved(),
            JobKind::Program(program) => program.bytes_moved(),
        }
    }
}
