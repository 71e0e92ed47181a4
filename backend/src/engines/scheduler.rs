//! The schedule of the jobs ([`device_model::jobs::schedule`]), shared between the session, the queue thread and the
//! engines.
//!
//! LOCKING: one mutex, held for a few instructions and never while memory is touched. The session takes it to
//! deliver answers, so nobody may hold it while waiting for the session.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use device_model::addr::{ByteRange, Iova, SpaceId};
use device_model::jobs::engine::Left;
use device_model::jobs::job::{Job, JobError, JobId};
pub use device_model::jobs::schedule::ScheduledJob;
use device_model::jobs::schedule::{AtRest, Disposed, JobStatus, Judgement, Revealed, Schedule, Turn};
use device_model::locking::lock;
use device_model::mmu::MappedRange;
use device_model::telemetry::violation::InvalidationInfo;

use crate::telemetry::instruments::Clock;

/// The queue of work before the engines.
pub struct Scheduler {
    schedule: Mutex<Schedule>,
    ready: Condvar,
    /// Mirrors [`Schedule::is_stopped`], to be read at every step without the lock.
    stopped: AtomicBool,
    /// Mirrors [`Schedule::generation`].
    generation: AtomicU64,
    /// Mirrors [`Schedule::has_ready`] in the same way.
    wanted: AtomicBool,
    /// The device's time.
    clock: Clock,
}

impl Scheduler {
    /// A scheduler without work, paused until the device starts.
    pub fn new(clock: Clock) -> Self {
        let schedule = Mutex::new(Schedule::new());
        let (stopped, wanted) = (AtomicBool::new(true), AtomicBool::new(false));
        let generation = AtomicU64::new(0);
        Self { schedule, ready: Condvar::new(), stopped, generation, wanted, clock }
    }

    /// Takes a new job.
    pub fn submit(&self, job: Job) {
        self.change(|schedule| schedule.submit(job));
    }

    /// The device's time: the same for all engines, and it goes on while the device is stopped.
    pub fn now(&self) -> Duration {
        self.clock.now()
    }

    /// ScheduledJob for an engine; waits for it. `None`: the device closes.
    ///
    /// A job that WAITs is work again when it is time to look, so an engine without other work sleeps until then:
    /// 50 µs at first, up to 1 ms. Without such a job it sleeps until somebody wakes it.
    pub fn next(&self) -> Option<ScheduledJob> {
        let mut schedule = self.lock();
        loop {
            schedule.set_time(self.now());
            let turn = schedule.turn();
            // ORDERING: Relaxed, as for `leave`.
            self.wanted.store(schedule.has_ready(), Ordering::Relaxed);
            match turn {
                Turn::Run(work) => return Some(work),
                Turn::Close => return None,
                Turn::Wait => schedule = self.wait(schedule),
            }
        }
    }

    fn wait<'a>(&self, schedule: MutexGuard<'a, Schedule>) -> MutexGuard<'a, Schedule> {
        match schedule.next_look() {
            None => self.ready.wait(schedule).unwrap_or_else(PoisonError::into_inner),
            Some(look) => {
                let pause = look.saturating_sub(self.now());
                self.ready.wait_timeout(schedule, pause).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Whether another job is ready for an engine.
    pub fn is_wanted(&self) -> bool {
        // ORDERING: Relaxed: a step later is soon enough.
        self.wanted.load(Ordering::Relaxed)
    }

    /// Whether an engine has to give this job back.
    pub fn must_leave(&self, work: &ScheduledJob) -> bool {
        // ORDERING: Acquire pairs with the Release in `change`: who sees a start sees the reset before it. A stop that is
        // not seen yet drains the section or the pin under which this is asked.
        self.stopped.load(Ordering::Acquire) || self.generation.load(Ordering::Relaxed) != work.generation()
    }

    /// Takes a job back that has left its engine.
    pub fn dispose(&self, left: Left) -> Disposed {
        self.change(|schedule| schedule.dispose(left))
    }

    /// Whether a job that has begun touches any of the range.
    pub fn touches(&self, space: SpaceId, range: ByteRange<Iova>) -> bool {
        self.lock().touches(space, range)
    }

    /// What jobs that have begun touch of the range, if it is to be found out what an invalidation of it means.
    pub fn judged(&self, space: SpaceId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        self.lock().judged(space, range)
    }

    /// An invalidation takes away what was mapped like this.
    pub fn suspect(&self, by: InvalidationInfo, mapped: &[MappedRange]) {
        self.lock().suspect(by, mapped);
    }

    /// The front-end has answered a MISS that these jobs wait for, or come to soon.
    pub fn reveal(&self, revealed: &Revealed, asked: &[JobId]) -> Vec<Judgement> {
        self.lock().reveal(revealed, asked)
    }

    /// What was mapped where means nothing any more.
    pub fn forget_suspects(&self) {
        self.lock().forget_suspects();
    }

    /// The first job that has begun and touches any of the range.
    pub fn first_in(&self, space: SpaceId, range: ByteRange<Iova>) -> Option<JobId> {
        self.lock().first_in(space, range)
    }

    /// What there is to know of a job that is parked.
    pub fn parked_job(&self, id: JobId) -> Option<AtRest> {
        self.lock().parked_job(id)
    }

    /// All jobs, in the order of their numbers.
    pub fn jobs(&self) -> Vec<JobStatus> {
        self.lock().jobs()
    }

    /// One page that a parked job waits for is answered.
    pub fn miss_answered(&self, id: JobId, answer: Result<(), JobError>) {
        self.change(|schedule| schedule.miss_answered(id, answer));
    }

    /// An invalidation has ended: whoever waited for that tries again.
    pub fn invalidation_ended(&self) {
        self.change(Schedule::invalidation_ended);
        self.ready.notify_all();
    }

    /// Stops the engines at their next step; all jobs stay. Parked ones forget what they wait for.
    pub fn pause(&self) {
        self.change(Schedule::pause);
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&self) {
        self.change(Schedule::resume);
        self.ready.notify_all();
    }

    /// Discards every job, also what an engine has.
    pub fn discard(&self) {
        self.change(Schedule::discard);
    }

    /// Ends the engines at their next step.
    pub fn close(&self) {
        self.change(Schedule::close);
        self.ready.notify_all();
    }

    /// Changes the schedule; makes at most one job ready, or its caller wakes all engines.
    fn change<T>(&self, change: impl FnOnce(&mut Schedule) -> T) -> T {
        let mut schedule = self.lock();
        let result = change(&mut schedule);
        schedule.set_time(self.now());
        self.generation.store(schedule.generation(), Ordering::Relaxed);
        self.stopped.store(schedule.is_stopped(), Ordering::Release);
        let ready = schedule.has_ready();
        self.wanted.store(ready, Ordering::Relaxed);
        drop(schedule);
        if ready {
            self.ready.notify_one();
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Schedule> {
        lock(&self.schedule)
    }
}
