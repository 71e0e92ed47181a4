//! Which job an engine takes next, and where jobs wait. A parked job holds no section and no pin (I4): it is a
//! value in a map, until every page that it waits for is answered or the invalidation in its way has ended.
//!
//! A state machine of values: whoever shares it between threads puts a lock around it and wakes the engines. Knows
//! nothing of threads, of the mirror, or of how a miss is asked for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::engine::{Leaves, Left};
use crate::job::{Job, JobError, JobId, JobOutcome};
use crate::mmu::Missing;

/// A job on its way through the engines.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct Work {
    /// What is to be done.
    pub job: Job,
    /// How often an invalidation came between the answers to its misses and its pin.
    pub pin_attempts: u32,
    /// The answer to a miss of it was no: an engine ends the job with this.
    pub failed: Option<JobError>,
    /// How many invalidations had ended when an engine took it: before any pin of it was tried.
    seen: u64,
}

impl Work {
    /// A job that has not started.
    pub fn new(job: Job) -> Self {
        Self { job, pin_attempts: 0, failed: None, seen: 0 }
    }
}

/// A job that an engine is done with.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct FinishedJob {
    /// The job.
    pub job: Job,
    /// How it ended.
    pub outcome: JobOutcome,
}

/// What an engine is to do next.
#[derive(Debug)]
pub enum Turn {
    /// This.
    Run(Work),
    /// Wait until something changes: nothing is ready, or the device is paused.
    Wait,
    /// End: the device closes.
    Close,
}

/// What is to be done about a job that has left an engine.
#[derive(Debug)]
pub enum Disposed {
    /// It is at its end: the device is to be told.
    Finished(FinishedJob),
    /// It waits for these: they are to be asked for. It is parked already, so that the answers find it.
    Missing(JobId, Vec<Missing>),
    /// It waits for its turn, or for the end of an invalidation.
    Waits,
}

#[derive(Debug)]
enum Parked {
    /// Waits for this many answers.
    Misses { work: Work, left: usize },
    /// Waits for the end of an invalidation.
    Invalidation(Work),
}

/// The queue of work before the engines.
#[derive(Debug, Default)]
pub struct Schedule {
    ready: VecDeque<Work>,
    parked: BTreeMap<JobId, Parked>,
    invalidations_ended: u64,
    paused: bool,
    closing: bool,
}

impl Schedule {
    /// A schedule without work, paused until the device starts.
    pub fn new() -> Self {
        Self { paused: true, ..Self::default() }
    }

    /// Takes a new job.
    pub fn submit(&mut self, job: Job) {
        self.ready.push_back(Work::new(job));
    }

    /// What an engine does next.
    pub fn turn(&mut self) -> Turn {
        if self.closing {
            return Turn::Close;
        }
        let work = if self.paused { None } else { self.ready.pop_front() };
        match work {
            Some(work) => Turn::Run(Work { seen: self.invalidations_ended, ..work }),
            None => Turn::Wait,
        }
    }

    /// Whether an engine has to put its job back at the next step.
    pub fn must_leave(&self) -> bool {
        self.paused || self.closing
    }

    /// Whether an engine would find work.
    pub fn has_ready(&self) -> bool {
        !self.paused && !self.ready.is_empty()
    }

    /// Jobs that wait for an answer or for the end of an invalidation.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Jobs that no engine has.
    pub fn waiting(&self) -> usize {
        self.ready.len().saturating_add(self.parked.len())
    }

    /// Takes a job back that has left its engine.
    pub fn dispose(&mut self, left: Left) -> Disposed {
        let Left { work, leaves } = left;
        match leaves {
            Leaves::Finished(outcome) => return Disposed::Finished(FinishedJob { job: work.job, outcome }),
            Leaves::TakenOff | Leaves::Evicted => self.put_back(work),
            Leaves::Invalidating => self.park_for_invalidation(work),
            Leaves::Missing(missing) => {
                let id = work.job.id();
                self.park_for_misses(work, pages_of(&missing));
                return Disposed::Missing(id, missing);
            }
        }
        Disposed::Waits
    }

    /// Puts a job back that was taken off its engine: it is the next to go on.
    fn put_back(&mut self, work: Work) {
        self.ready.push_front(work);
    }

    /// Parks a job until `pages` answers have come.
    fn park_for_misses(&mut self, work: Work, pages: usize) {
        // A pause answers nothing any more: whatever was asked for is forgotten, and asked again.
        if pages == 0 || self.paused {
            self.put_back(work);
        } else {
            self.parked.insert(work.job.id(), Parked::Misses { work, left: pages });
        }
    }

    /// Parks a job until an invalidation ends, if none has since an engine took the job.
    fn park_for_invalidation(&mut self, work: Work) {
        if self.invalidations_ended == work.seen {
            self.parked.insert(work.job.id(), Parked::Invalidation(work));
        } else {
            self.put_back(work);
        }
    }

    /// One page that a parked job waits for is answered.
    pub fn miss_answered(&mut self, id: JobId, answer: Result<(), JobError>) {
        let Some(Parked::Misses { work, left }) = self.parked.get_mut(&id) else { return };
        *left = left.saturating_sub(1);
        if let Err(error) = answer {
            work.failed.get_or_insert(error);
        }
        if *left == 0
            && let Some(Parked::Misses { work, .. }) = self.parked.remove(&id)
        {
            self.put_back(work);
        }
    }

    /// An invalidation has ended: whoever waited for that tries again.
    pub fn invalidation_ended(&mut self) {
        self.invalidations_ended = self.invalidations_ended.wrapping_add(1);
        self.unpark(|parked| matches!(parked, Parked::Invalidation(_)));
    }

    /// Stops the engines at their next step; all jobs stay. Parked ones forget what they wait for.
    pub fn pause(&mut self) {
        self.paused = true;
        self.unpark(|_| true);
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&mut self) {
        self.paused = false;
    }

    /// Discards every job that no engine has. What an engine has comes back, and is recognised as stale.
    pub fn discard(&mut self) {
        self.ready.clear();
        self.parked.clear();
    }

    /// Ends the engines at their next step.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Makes the parked jobs that `which` chooses ready, oldest first.
    fn unpark(&mut self, which: impl Fn(&Parked) -> bool) {
        for (id, parked) in std::mem::take(&mut self.parked) {
            if which(&parked) {
                let (Parked::Misses { work, .. } | Parked::Invalidation(work)) = parked;
                self.ready.push_back(work);
            } else {
                self.parked.insert(id, parked);
            }
        }
    }
}

/// How many answers a request for all of `missing` brings: one for every page and access, however often it is named.
pub fn pages_of(missing: &[Missing]) -> usize {
    let pages =
        missing.iter().flat_map(|missing| missing.pages().map(|page| (missing.space, missing.access, page)));
    pages.collect::<BTreeSet<_>>().len()
}
