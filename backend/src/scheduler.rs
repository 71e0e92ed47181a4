//! Which job an engine takes next, and where jobs wait. A parked job holds no section and no pin (I4): it is a
//! value in a map, until every page that it waits for is answered or the invalidation in its way has ended.
//!
//! LOCKING: one mutex, held for a few instructions and never while memory is touched. The session takes it to
//! deliver answers, so nobody may hold it while waiting for the session.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use device_model::addr::{ByteRange, Iova, SpaceId};
use device_model::job::{Job, JobError, JobId};
use device_model::mmu::PinRange;

/// A job on its way through the engines.
#[derive(Debug)]
pub struct Work {
    /// What is to be done.
    pub job: Job,
    /// How often an invalidation came between the answers to its misses and its pin.
    pub pin_attempts: u32,
    /// The answer to a miss of it was no: an engine ends the job with this.
    pub failed: Option<JobError>,
}

impl Work {
    /// A job that has not started.
    pub fn new(job: Job) -> Self {
        Self { job, pin_attempts: 0, failed: None }
    }
}

enum Parked {
    /// Waits for this many answers.
    Misses { work: Work, left: usize },
    /// Waits for the end of an invalidation.
    Invalidation(Work),
}

#[derive(Default)]
struct State {
    ready: VecDeque<Work>,
    parked: BTreeMap<JobId, Parked>,
    /// What each job touches from its submission to its end, wherever it waits or runs in between.
    in_flight: BTreeMap<JobId, Vec<PinRange>>,
    invalidations_ended: u64,
    paused: bool,
    closing: bool,
}

/// The queue of work before the engines.
#[derive(Default)]
pub struct Scheduler {
    state: Mutex<State>,
    ready: Condvar,
    /// Mirrors `paused || closing`, to be read after every step without the lock.
    leave: AtomicBool,
}

impl Scheduler {
    /// A scheduler without work, paused until the device starts.
    pub fn new() -> Self {
        let scheduler = Self::default();
        scheduler.pause();
        scheduler
    }

    /// Takes a new job.
    pub fn submit(&self, job: Job) {
        let touches = job.working_set();
        let mut state = self.lock();
        state.in_flight.insert(job.id(), touches);
        state.ready.push_back(Work::new(job));
        drop(state);
        self.ready.notify_one();
    }

    /// Work for an engine; waits for it. `None`: the device closes.
    pub fn next(&self) -> Option<Work> {
        let mut state = self.lock();
        loop {
            if state.closing {
                return None;
            }
            let work = if state.paused { None } else { state.ready.pop_front() };
            if work.is_some() {
                return work;
            }
            state = self.ready.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A job has ended: to be said before its answer can reach the guest, who may take its memory away then.
    pub fn ended(&self, id: JobId) {
        self.lock().in_flight.remove(&id);
    }

    /// Whether a job in flight touches any of the range. Unlike a pin, which a job loses and takes anew, and a section,
    /// which has no range, this says what the guest took away too early.
    pub fn touches(&self, space: SpaceId, range: ByteRange<Iova>) -> bool {
        let state = self.lock();
        let mut ranges = state.in_flight.values().flatten();
        ranges.any(|used| used.space == space && used.range.page_aligned().overlaps(range))
    }

    /// Whether an engine has to put its job back at the next step.
    pub fn must_leave(&self) -> bool {
        // ORDERING: Relaxed: a step later is soon enough; nothing else is read because of it.
        self.leave.load(Ordering::Relaxed)
    }

    /// Puts a job back that was taken off its engine: it is the next to go on.
    pub fn put_back(&self, work: Work) {
        self.lock().ready.push_front(work);
        self.ready.notify_one();
    }

    /// Parks a job until `pages` answers have come.
    pub fn park_for_misses(&self, work: Work, pages: usize) {
        let mut state = self.lock();
        // A pause answers nothing any more: whatever was asked for is forgotten, and asked again.
        if pages == 0 || state.paused {
            state.ready.push_front(work);
            self.ready.notify_one();
        } else {
            state.parked.insert(work.job.id(), Parked::Misses { work, left: pages });
        }
    }

    /// How many invalidations have ended: to be read before a pin is tried.
    pub fn invalidations_ended(&self) -> u64 {
        self.lock().invalidations_ended
    }

    /// Parks a job until an invalidation ends, if none has since [`Self::invalidations_ended`] said `seen`.
    pub fn park_for_invalidation(&self, work: Work, seen: u64) {
        let mut state = self.lock();
        if state.invalidations_ended == seen {
            state.parked.insert(work.job.id(), Parked::Invalidation(work));
        } else {
            state.ready.push_front(work);
            self.ready.notify_one();
        }
    }

    /// One page that a parked job waits for is answered.
    pub fn miss_answered(&self, id: JobId, answer: Result<(), JobError>) {
        let mut state = self.lock();
        let Some(Parked::Misses { work, left }) = state.parked.get_mut(&id) else { return };
        *left = left.saturating_sub(1);
        if let Err(error) = answer {
            work.failed.get_or_insert(error);
        }
        if *left == 0
            && let Some(Parked::Misses { work, .. }) = state.parked.remove(&id)
        {
            state.ready.push_front(work);
            self.ready.notify_one();
        }
    }

    /// An invalidation has ended: whoever waited for that tries again.
    pub fn invalidation_ended(&self) {
        let mut state = self.lock();
        state.invalidations_ended = state.invalidations_ended.wrapping_add(1);
        let waiting = |parked: &Parked| matches!(parked, Parked::Invalidation(_));
        state.unpark(waiting);
        self.ready.notify_all();
    }

    /// Stops the engines at their next step; all jobs stay. Parked ones forget what they wait for.
    pub fn pause(&self) {
        let mut state = self.lock();
        state.paused = true;
        state.unpark(|_| true);
        self.leave.store(true, Ordering::Relaxed);
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&self) {
        let mut state = self.lock();
        state.paused = false;
        self.leave.store(state.closing, Ordering::Relaxed);
        self.ready.notify_all();
    }

    /// Discards every job that no engine has. What an engine has comes back, and is recognised as stale.
    pub fn discard(&self) {
        let mut state = self.lock();
        state.ready.clear();
        state.parked.clear();
        state.in_flight.clear();
    }

    /// Ends the engines at their next step.
    pub fn close(&self) {
        self.lock().closing = true;
        self.leave.store(true, Ordering::Relaxed);
        self.ready.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
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
