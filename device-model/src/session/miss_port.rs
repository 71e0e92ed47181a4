//! How the threads that touch guest memory ask the session for translations. They hand over what is missing and who
//! waits for it, and do not block; the session sends the MISSes and tells the waiter how each page was answered.

use crate::jobs::engine::Left;
use crate::jobs::job::{JobError, JobId};
use crate::jobs::schedule::{Disposed, JobReport};
pub use crate::jobs::schedule::{JobWait, pages_of};
use crate::jobs::scheduler::Scheduler;
use crate::mmu::{self, Missing};
use crate::sync::{Arc, Mutex, lock};
use std::collections::VecDeque;

/// Wakes the session thread; other threads call it, and it is cheap.
pub trait SessionWaker: Send + Sync {
    /// Makes the session check its inputs.
    fn wake(&self);
}

/// What waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Waiter {
    /// The queue thread, for what a ring reads: its available side, descriptors and requests.
    RingInput(RingWait),
    /// The queue thread, for what a ring writes: responses and its used side.
    RingOutput(RingWait),
    /// A parked job.
    Job(JobWait),
    /// A job that does not wait for the page yet, but will need it soon (prefetch).
    Ahead(JobWait),
    /// An audit, with the number of its question.
    Audit(u32),
}

impl Waiter {
    /// The job that needs the page, now or soon.
    pub fn job(self) -> Option<JobId> {
        self.wait().map(|wait| wait.job)
    }

    /// The wait of a job in which this was requested.
    pub fn wait(self) -> Option<JobWait> {
        match self {
            Self::Job(wait) | Self::Ahead(wait) => Some(wait),
            Self::RingInput(_) | Self::RingOutput(_) | Self::Audit(_) => None,
        }
    }
}

/// The wait of a ring. Answers to requests from before its last start are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RingWait {
    /// The ring.
    pub queue: usize,
    /// How often it had been started.
    pub start: u32,
}

/// How one page of what was missing was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MissAnswer {
    /// It was mapped (and may be gone again when the waiter looks).
    Mapped,
    /// The front-end refused: the guest has not mapped it for this access.
    Refused,
    /// The front-end did not answer in time.
    TimedOut,
    /// There is no back-end channel to send a MISS on.
    NoChannel,
}

impl MissAnswer {
    /// What it means for a job that needs the page.
    pub fn for_job(self, page: mmu::miss::MissRequest) -> Result<(), JobError> {
        match self {
            Self::Mapped => Ok(()),
            Self::Refused => Err(JobError::Refused(page.missing())),
            Self::TimedOut => Err(JobError::TimedOut(page.missing())),
            Self::NoChannel => Err(JobError::NoChannel(page.missing())),
        }
    }
}

/// A request for translations: every page of `missing` is answered once.
#[derive(Debug)]
pub struct MissRequest {
    /// What is missing.
    pub missing: Missing,
    /// Who receives the answers.
    pub waiter: Waiter,
}

/// The way to the session; cheap to clone.
#[derive(Clone)]
pub struct MissPort {
    requests: Arc<Mutex<VecDeque<MissRequest>>>,
    session: std::sync::Arc<dyn SessionWaker>,
}

impl MissPort {
    /// A port that wakes `session`.
    pub fn new(session: std::sync::Arc<dyn SessionWaker>) -> Self {
        Self { requests: Arc::new(Mutex::new(VecDeque::new())), session }
    }

    /// Gives back a job that has left its engine, and requests the translations that it waits for. The job is parked
    /// first, so that an answer finds it. `Some`: the device has to be told.
    pub fn give_back(&self, scheduler: &Scheduler, left: Left) -> Option<JobReport> {
        match scheduler.dispose(left) {
            Disposed::Finished(finished) => return Some(JobReport::Finished(finished)),
            Disposed::Faulted(faulted) => return Some(JobReport::Faulted(faulted)),
            Disposed::Missing { wait, missing, ahead } => {
                self.request(Waiter::Job(wait), missing);
                self.request(Waiter::Ahead(wait), ahead);
            }
            Disposed::Waits | Disposed::Stale => {}
        }
        None
    }

    /// Requests all of `missing`. The waiter has to be registered before this call, so that the answers find it.
    pub fn request(&self, waiter: Waiter, missing: Vec<Missing>) {
        if missing.is_empty() {
            return;
        }
        let mut requests = lock(&self.requests);
        requests.extend(missing.into_iter().map(|missing| MissRequest { missing, waiter }));
        drop(requests);
        self.session.wake();
    }

    /// The oldest request.
    pub fn take(&self) -> Option<MissRequest> {
        lock(&self.requests).pop_front()
    }

    /// Whether there is no request.
    pub fn is_empty(&self) -> bool {
        lock(&self.requests).is_empty()
    }

    /// Forgets all requests that the session has not taken.
    pub fn clear(&self) {
        lock(&self.requests).clear();
    }
}
