//! How an engine runs a job, by its mode. In *fence* mode it runs over a pin of all that it still has to touch, and an
//! invalidation waits until it leaves the engine. In *preempt* mode too, but an invalidation preempts it at its next
//! step. With a *registration cache*, invalidations do not wait for its pin. In *strict* and *fault* mode it runs over
//! sections, one for each step. So does a job that uses an address space, in every mode: what it needs is known only when
//! it has read the page tables.
//!
//! If invalidations keep a job from being pinned, it runs over sections too, so that a guest that flushes its whole
//! address space a hundred times a second (Linux in lazy mode) cannot starve it. Whenever a job leaves its engine (it
//! has ended, it is preempted, its WAIT does not hold, or it has a miss), its pin is released.
//!
//! A job on an engine is a value, and a call does one step: the caller decides what happens between two steps, and,
//! since it carries the step out ([`EngineHost`]), within one. Knows nothing of threads, rings or sockets.

use std::ops::ControlFlow;
use std::time::Duration;

use job_stream::Mode;

use crate::addr::{Access, ByteRange, DomainId, Iova};
use crate::jobs::address_space::TranslationFault;
use crate::jobs::job::{Job, JobOutcome, Step};
use crate::jobs::schedule::{RefusedPage, ScheduledJob};
use crate::mmu::{
    AtomicOperation, HostPage, JobMemory, MemoryError, Missing, Pin, PinError, PinMode, Reader, Width,
};

/// The most bytes that a step moves: about 8 µs of copying, the longest that an idle drain waits.
pub const STEP_BYTES: usize = 64 << 10;

/// After this many pins that an invalidation prevented, a job runs over sections.
pub const PIN_ATTEMPTS: u32 = 4;

/// Steps that a job runs before other jobs get a turn: the shortest time slice.
pub const SLICE_STEPS: u32 = 32;

/// How soon a SPIN is polled again.
pub const SPIN_STEP: Duration = Duration::from_micros(50);

/// A job that uses an address space fails when a page is refused this often in turn, with no flush in between. Once is no
/// proof: between the answer and the next walk, the guest may have given its address to other memory.
pub(super) const REFUSALS: u8 = 2;

/// How long a stubborn SPIN may stay on an engine that has to stop.
const STUBBORN: Duration = Duration::from_millis(100);

/// The surroundings of an engine.
pub trait EngineHost {
    /// Runs one step of the job: [`Job::step`], and what has to be counted. A section may be open. A job that spins has
    /// no memory: each access of it fails.
    fn step(&mut self, job: &mut Job, memory: &impl JobMemory) -> Step;

    /// Whether the engine has to give this job back now: the device stops, or was reset since the job was taken.
    fn must_leave(&self, work: &ScheduledJob) -> bool;

    /// The device's time at the end of the last step, or later.
    fn now(&self) -> Duration;

    /// Whether the session ends: then even a stubborn job gives its engine back at once.
    fn is_closing(&self) -> bool {
        false
    }

    /// Whether another job wants the engine.
    fn is_wanted(&self) -> bool {
        false
    }

    /// A flush of an address space may be over: [`Device::flush_ended`](crate::gpu::device::Device::flush_ended).
    fn flush_ended(&mut self);
}

/// Why a job leaves its engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leaves {
    /// It has ended.
    Finished(JobOutcome),
    /// The engine has to stop: the job goes on later from where it stopped.
    Preempted,
    /// Its time slice is over, and another job wants the engine.
    SliceOver,
    /// A value in memory is not yet what it waits for: it polls again later, and times out.
    Waiting {
        /// When it times out, as a running time of the device.
        until: Duration,
    },
    /// A drain has waited too long for its pin: the job goes on later from where it stopped.
    Evicted,
    /// These translations are missing: it goes on when all of them have been answered.
    Missing(Vec<Missing>),
    /// A step has reached a missing translation.
    Missed {
        /// The job goes on when this is answered.
        missing: Missing,
        /// The job needs these next: they are requested with it (prefetch), and not waited for.
        ahead: Vec<Missing>,
    },
    /// The driver has to answer this fault: the job goes on then.
    RaisedFault(TranslationFault),
    /// An invalidation of what it has to pin is under way.
    Invalidating,
}

/// A job that is off its engine: no section and no pin is held for it any more (I3, I4).
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct Left {
    /// The job.
    pub work: ScheduledJob,
    /// Why.
    pub leaves: Leaves,
}

/// What a job on an engine holds between its steps.
#[derive(Debug)]
enum Hold {
    /// All that it still has to touch: no step can miss, and an invalidation of it waits for this pin or evicts it.
    Pin(Pin),
    /// Nothing: each step opens a section of its own. Invalidations wait for one step only.
    Sections,
    /// Nothing: its pin was needed back while it spins, and it is not pinned again on this engine.
    Spin,
    /// Nothing: a section per step polls what it WAITs for. It is pinned when its WAIT is over.
    Poll,
}

/// A job on an engine.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct Running {
    work: ScheduledJob,
    hold: Hold,
    steps: u32,
    /// Since when a stubborn job has kept the engine, although it has to leave.
    overstays: Option<Duration>,
}

impl Running {
    /// Puts a job on the engine with this reader, or says why that is not possible.
    pub fn start(reader: &Reader, mut work: ScheduledJob) -> ControlFlow<Left, Self> {
        if work.checked {
            return leave(work, Leaves::Finished(JobOutcome::Done));
        }
        if let Some(error) = work.failed.take()
            && let Err(error) = work.job.fail(error)
        {
            return leave(work, Leaves::Finished(JobOutcome::Failed(error)));
        }
        let mode = match work.job.mode() {
            Mode::Strict | Mode::Fault => return Self::on(work, Hold::Sections),
            Mode::Fence => PinMode::Fence,
            Mode::Preempt => PinMode::Preempt,
            Mode::RegistrationCache => PinMode::RegistrationCache,
        };
        // What it needs is known only when it gets there.
        if work.pin_attempts >= PIN_ATTEMPTS || work.job.is_translated() {
            return Self::on(work, Hold::Sections);
        }
        // Polling needs one word. What comes after the WAIT may be large, and is looked up when the WAIT is over.
        if work.job.is_waiting() {
            return Self::on(work, Hold::Poll);
        }
        match reader.pin_as(mode, &work.job.working_set()) {
            Ok(pin) => Self::on(work, Hold::Pin(pin)),
            Err(PinError::Missing(missing)) => {
                // Large working sets are requested in pieces: only a page that is missing again counts.
                let first = missing.first().map(|missing| missing.range.first());
                if first.is_some() && first <= work.missed {
                    work.pin_attempts = work.pin_attempts.saturating_add(1);
                }
                work.missed = first;
                leave(work, Leaves::Missing(missing))
            }
            Err(PinError::Invalidating) => leave(work, Leaves::Invalidating),
            Err(PinError::TooLarge { .. }) => {
                // The mirror's tables cannot hold the whole set at once; one page at a time fits.
                work.pin_attempts = PIN_ATTEMPTS;
                Self::on(work, Hold::Sections)
            }
        }
    }

    fn on(work: ScheduledJob, hold: Hold) -> ControlFlow<Left, Self> {
        ControlFlow::Continue(Self { work, hold, steps: 0, overstays: None })
    }

    /// Runs one step. `reader` is the one that the job was started with.
    ///
    /// Whether the job has to leave is checked under its pin or section: a stop or a reset of the device drains both,
    /// so a job that stays may stay for this whole step. Between two steps nothing delays a stop, a reset and the next
    /// start.
    ///
    /// INVARIANT: a step has memory only if this check was made. It is not made for a job that spins, which decides
    /// itself when it leaves: it may outlast a stop and a reset, and its step has no memory to touch, however its SPIN
    /// ends.
    pub fn step(mut self, reader: &Reader, host: &mut impl EngineHost) -> ControlFlow<Left, Self> {
        let spins = self.work.job.is_spinning();
        if matches!(self.hold, Hold::Poll) && !self.work.job.is_waiting() {
            return Self::start(reader, self.work);
        }
        let step = match &self.hold {
            _ if spins => Some(host.step(&mut self.work.job, &NoMemory)),
            Hold::Pin(pin) => step_or_leave(host, &mut self.work, pin),
            // An invalidation waits for this one step at most.
            Hold::Sections | Hold::Poll => step_or_leave(host, &mut self.work, &reader.enter()),
            // What comes after the SPIN needs the pin that it gave back.
            Hold::Spin => None,
        };
        let Some(step) = step else { return self.leave(Leaves::Preempted) };
        if self.work.job.take_flush_ended() {
            host.flush_ended();
        }
        self.steps = self.steps.saturating_add(1);
        self.work.stepped = true;
        let refused = self.work.refused.take();
        match step {
            Step::Done => self.leave(Leaves::Finished(JobOutcome::Done)),
            Step::Error(error) => self.leave(Leaves::Finished(JobOutcome::Failed(error))),
            Step::Missing(missing) => self.missing(missing, refused, (reader, host)),
            Step::Fault(fault) => self.leave(Leaves::RaisedFault(fault)),
            Step::Waiting { until } => self.leave(Leaves::Waiting { until }),
            Step::Spinning { stubborn: true } => self.overstay(host),
            Step::Yield | Step::Spinning { stubborn: false } => self.go_on(host),
        }
    }

    fn go_on(self, host: &impl EngineHost) -> ControlFlow<Left, Self> {
        match self.interrupted(host) {
            Some(leaves) => self.leave(leaves),
            None => ControlFlow::Continue(self),
        }
    }

    /// A page is missing: impossible under a pin of the whole working set; if it happens, the miss is real. A page that was
    /// refused before is requested again, for the guest may have unmapped it, and mapped it for this walk.
    fn missing(
        mut self,
        missing: Missing,
        refused: Option<RefusedPage>,
        (reader, host): (&Reader, &mut impl EngineHost),
    ) -> ControlFlow<Left, Self> {
        let page = (missing.range.first(), missing.access);
        // After a flush the driver may have unmapped the page rightly, and mapped it again: that was no refusal of this.
        let flushes = self.work.job.flushes_before(missing);
        let is_same =
            |refused: &RefusedPage| (refused.page, refused.access) == page && refused.flushes == flushes;
        self.work.refused = refused.filter(is_same);
        self.work.flushes = flushes;
        if self.work.refused.is_some_and(|refused| refused.times >= REFUSALS) {
            return self.refuse(missing, host);
        }
        let ahead = self.ahead(reader, host, missing);
        if self.work.job.take_flush_ended() {
            host.flush_ended();
        }
        self.leave(Leaves::Missed { missing, ahead })
    }

    /// Walk after walk has come to a page that was refused: the job fails.
    fn refuse(mut self, missing: Missing, host: &impl EngineHost) -> ControlFlow<Left, Self> {
        let error = self.work.job.refusal(missing);
        match self.work.job.fail(error) {
            Ok(()) => self.go_on(host),
            Err(error) => self.leave(Leaves::Finished(JobOutcome::Failed(error))),
        }
    }

    /// What the packet needs beyond what it misses now.
    fn ahead(&self, reader: &Reader, host: &impl EngineHost, missing: Missing) -> Vec<Missing> {
        let mut ahead = reader.missing_ahead(&self.work.job.comes_next(), missing);
        if self.work.job.is_translated() {
            let section = reader.enter();
            // As for a step: page tables are read only if the job may stay for that long.
            if !host.must_leave(&self.work) {
                let probe = |at, access| section.translate(DomainId::DEVICE, at, access).err();
                ahead.extend(self.work.job.look_ahead(&section, probe, missing));
            }
        }
        ahead
    }

    /// What preempts the job at the end of a step.
    fn interrupted(&self, host: &impl EngineHost) -> Option<Leaves> {
        if self.is_evicted() {
            return Some(Leaves::Evicted);
        }
        if host.must_leave(&self.work) {
            return Some(Leaves::Preempted);
        }
        (self.steps >= SLICE_STEPS && host.is_wanted()).then_some(Leaves::SliceOver)
    }

    /// The job keeps its engine although it has to leave. It gives its pin back, for it touches no memory.
    fn overstay(mut self, host: &impl EngineHost) -> ControlFlow<Left, Self> {
        if self.is_evicted() || host.must_leave(&self.work) {
            self.hold = Hold::Spin;
        }
        if !host.must_leave(&self.work) {
            self.overstays = None;
            return ControlFlow::Continue(self);
        }
        let now = host.now();
        let since = *self.overstays.get_or_insert(now);
        if host.is_closing() || now.saturating_sub(since) >= STUBBORN {
            return self.leave(Leaves::Preempted);
        }
        ControlFlow::Continue(self)
    }

    fn is_evicted(&self) -> bool {
        matches!(&self.hold, Hold::Pin(pin) if pin.evicted())
    }

    /// Releases the pin before anything learns that the job has left.
    fn leave(self, leaves: Leaves) -> ControlFlow<Left, Self> {
        drop(self.hold);
        leave(self.work, leaves)
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

/// A step of the job, over memory that is held. `None`: the job has to leave.
fn step_or_leave(
    host: &mut impl EngineHost,
    work: &mut ScheduledJob,
    memory: &impl JobMemory,
) -> Option<Step> {
    if host.must_leave(work) { None } else { Some(host.step(&mut work.job, memory)) }
}

fn leave(mut work: ScheduledJob, leaves: Leaves) -> ControlFlow<Left, Running> {
    work.job.left_engine();
    ControlFlow::Break(Left { work, leaves })
}

/// The memory of a step that has none: every access is a bug of MirrorGPU, and fails.
struct NoMemory;

impl NoMemory {
    fn refuse<T>(space: DomainId, at: Iova, len: usize, access: Access) -> Result<T, MemoryError> {
        let range = ByteRange::new(at, len as u64).map_err(MemoryError::Wraps)?;
        Err(MemoryError::NotPinned(Missing { space, range, access }))
    }
}

impl JobMemory for NoMemory {
    fn read(&self, space: DomainId, at: Iova, into: &mut [u8]) -> Result<(), MemoryError> {
        Self::refuse(space, at, into.len(), Access::Read)
    }

    fn write(&self, space: DomainId, at: Iova, from: &[u8]) -> Result<(), MemoryError> {
        Self::refuse(space, at, from.len(), Access::Write)
    }

    fn copy(&self, space: DomainId, from: Iova, _: Iova, len: usize) -> Result<(), MemoryError> {
        Self::refuse(space, from, len, Access::Read)
    }

    fn atomic(
        &self,
        space: DomainId,
        at: Iova,
        width: Width,
        _: AtomicOperation,
    ) -> Result<u64, MemoryError> {
        Self::refuse(space, at, width.bytes() as usize, Access::Write)
    }

    fn host_page(&self, _: DomainId, _: Iova, _: Access) -> Option<HostPage> {
        None
    }
}

#[cfg(test)]
mod tests;
