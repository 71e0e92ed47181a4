//! The state of jobs for observers of the device, and which job is in the way of an invalidation.

use std::time::Duration;

use job_stream::{Mode, Priority};

use super::{JobWait, Parked, Schedule, ScheduledJob};
use crate::addr::{ByteRange, DomainId, Iova};
use crate::jobs::job::JobId;
use crate::mmu::miss::MissRequest;

/// Where a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// It is in a ready queue, without a section or a pin, until an engine takes it.
    Ready,
    /// It is on an engine, and may hold a section or a pin.
    Running,
    /// It is parked, without a section or a pin, until this many misses are answered.
    Misses(usize),
    /// It is done, and waits for this many answers that say whether its memory was unmapped under it.
    Checks(usize),
    /// It is parked, without a section or a pin, until an invalidation ends.
    Invalidation,
    /// It is parked, without a section or a pin, until the driver has answered its fault.
    Fault,
    /// It is parked, without a section or a pin, until it polls a value again at this running time.
    Value(Duration),
}

/// A job of the schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobStatus {
    /// Its number.
    pub id: JobId,
    /// Where it is.
    pub state: JobState,
    /// Its details, while it is not on an engine.
    pub at_rest: Option<AtRest>,
}

/// A job that is not on an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AtRest {
    /// Its context; a 2D transfer has none.
    pub context: Option<u32>,
    /// What an invalidation means to it.
    pub mode: Mode,
    /// Its priority.
    pub priority: Priority,
    /// The packet that it has reached.
    pub packet: Option<usize>,
    /// Bytes that it has moved.
    pub bytes: u64,
    /// Whether it uses an address space.
    pub translated: bool,
}

impl Schedule {
    /// All jobs, ordered by number.
    pub fn jobs(&self) -> Vec<JobStatus> {
        let ready = self.ready.iter().map(|work| at_rest(work, JobState::Ready));
        let parked = self.parked.values().map(|parked| match parked {
            Parked::Misses { work, unanswered } if work.checked => {
                at_rest(work, JobState::Checks(unanswered.pages()))
            }
            Parked::Misses { work, unanswered } => at_rest(work, JobState::Misses(unanswered.pages())),
            Parked::Invalidation(work) => at_rest(work, JobState::Invalidation),
            Parked::Fault { work, .. } => at_rest(work, JobState::Fault),
            Parked::Wait { work, poll } => at_rest(work, JobState::Value(*poll)),
        });
        let mut jobs: Vec<_> = ready.chain(parked).collect();
        jobs.sort_unstable_by_key(|job| job.id);
        let is_at_rest = |id: &JobId| jobs.binary_search_by_key(id, |job| job.id).is_ok();
        let running = |id| JobStatus { id, state: JobState::Running, at_rest: None };
        let running: Vec<_> = self.footprints.ids().filter(|id| !is_at_rest(id)).map(running).collect();
        // Both lists are sorted, so this takes linear time.
        jobs.extend(running);
        jobs.sort_by_key(|job| job.id);
        jobs
    }

    /// Details of a job that waits for the answer to this page.
    pub fn waiting_job(&self, wait: JobWait, page: MissRequest) -> Option<AtRest> {
        match self.parked.get(&wait.job)? {
            Parked::Misses { work, unanswered } if unanswered.contains(wait, page) => {
                at_rest(work, JobState::Ready).at_rest
            }
            _ => None,
        }
    }

    /// A job that has begun and not ended and touches the range: the first user of the first memory that is found.
    pub fn first_in(&mut self, space: DomainId, range: ByteRange<Iova>) -> Option<JobId> {
        self.footprints.first_in(space, range)
    }
}

fn at_rest(work: &ScheduledJob, state: JobState) -> JobStatus {
    let job = &work.job;
    let at_rest = AtRest {
        context: job.context(),
        mode: job.mode(),
        priority: job.priority(),
        packet: job.packet(),
        bytes: job.bytes_moved(),
        translated: job.is_translated(),
    };
    JobStatus { id: job.id(), state, at_rest: Some(at_rest) }
}
