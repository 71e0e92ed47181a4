//! The schedule of the jobs ([`schedule`](super::schedule)), shared between the session, the queue thread and the
//! engines.
//!
//! [`Scheduler::publish`] alone wakes engines, after each change of the schedule, and only as many as there is work
//! for. The schedule changes only through [`Scheduler::change`], or when an engine takes its next job.
//!
//! LOCKING: one mutex, held for a few instructions and never while memory is touched. The session takes it to deliver
//! answers, so a thread must not hold it while it waits for the session.

use std::sync::PoisonError;
use std::time::Duration;

use crate::addr::{ByteRange, DomainId, Iova};
use crate::jobs::engine::Left;
use crate::jobs::job::{Job, JobError, JobId};
use crate::jobs::schedule::{
    AtRest, Disposed, JobStatus, JobVerdict, JobWait, Revealed, Schedule, ScheduledJob, Turn,
};
use crate::jobs::verdict::InvalidationInfo;
use crate::mmu::MappedRange;
use crate::mmu::miss::MissRequest;
use crate::running_clock::RunningClock;
use crate::sync::{AtomicBool, AtomicU64, Condvar, Mutex, MutexGuard, Ordering, lock};

/// The device's time. It never goes back.
pub type Clock = std::sync::Arc<dyn Fn() -> Duration + Send + Sync>;

/// The queue of jobs for the engines.
pub struct Scheduler {
    shared: Mutex<Shared>,
    ready: Condvar,
    /// Mirrors [`Schedule::is_stopped`], so that each step can read it without the lock.
    stopped: AtomicBool,
    /// The session ends.
    closing: AtomicBool,
    /// Mirrors [`Schedule::generation`].
    generation: AtomicU64,
    /// Mirrors [`Schedule::has_ready`] in the same way.
    wanted: AtomicBool,
    /// Mirrors the clock of [`Schedule::running`].
    running: AtomicU64,
    /// The device's time.
    clock: Clock,
}

/// The schedule, and the engines that sleep for lack of work.
#[derive(Debug)]
struct Shared {
    schedule: Schedule,
    /// Engines that sleep, or were just woken.
    sleeping: usize,
    /// When the first of them wakes by itself for a WAIT's poll.
    alarm: Option<Duration>,
}

impl Shared {
    /// When an engine that goes to sleep has to wake by itself; `None`: no need, or another engine wakes in time.
    fn alarm_needed(&self) -> Option<Duration> {
        self.schedule.next_poll().filter(|poll| self.alarm.is_none_or(|alarm| *poll < alarm))
    }

    /// How many sleeping engines have something to do: one for each ready job, one to wake for the next poll of a WAIT
    /// if no other does, and all of them if the device closes.
    fn wanted(&self) -> usize {
        let ready = self.schedule.ready();
        if self.schedule.is_closing() || ready >= self.sleeping {
            return self.sleeping;
        }
        // Last, because it looks at all parked jobs.
        ready.saturating_add(usize::from(self.alarm_needed().is_some()))
    }
}

impl Scheduler {
    /// A scheduler without work, paused until the device starts.
    pub fn new(clock: Clock) -> Self {
        let schedule = Schedule::new();
        let running = AtomicU64::new(schedule.clock().word());
        let shared = Mutex::new(Shared { schedule, sleeping: 0, alarm: None });
        let (stopped, closing, wanted) =
            (AtomicBool::new(true), AtomicBool::new(false), AtomicBool::new(false));
        let generation = AtomicU64::new(0);
        Self { shared, ready: Condvar::new(), stopped, closing, generation, wanted, running, clock }
    }

    /// Adds a new job.
    pub fn submit(&self, job: Job) {
        self.change(|schedule| schedule.submit(job));
    }

    /// The device's time: the same for all engines, and it goes on while the device is stopped.
    pub fn now(&self) -> Duration {
        (self.clock)()
    }

    /// How long the device had been running at this time: that stands still while the device is stopped.
    pub fn running(&self, now: Duration) -> Duration {
        // ORDERING: Relaxed: a step that has memory ends before a stop that overlaps it is followed by a start, and a
        // step that spins counts the time between two readings.
        RunningClock::running_by(self.running.load(Ordering::Relaxed), now)
    }

    /// The next job for an engine; waits for it. `None`: the device closes.
    ///
    /// A waiting job is ready again when its poll is due, so one of the idle engines sleeps only until then: 50 µs at
    /// first, up to 1 ms. The others sleep until they are woken.
    pub fn next(&self) -> Option<ScheduledJob> {
        let mut shared = lock(&self.shared);
        loop {
            shared.schedule.set_time(self.now());
            match shared.schedule.turn() {
                Turn::Run(work) => {
                    // Time may have made more jobs ready, or this engine was the one to wake for the next poll.
                    self.publish(shared);
                    return Some(work);
                }
                Turn::Close => return None,
                Turn::Wait => shared = self.sleep(shared),
            }
        }
    }

    /// Sleeps, since nothing is ready.
    fn sleep<'a>(&self, mut shared: MutexGuard<'a, Shared>) -> MutexGuard<'a, Shared> {
        shared.sleeping = shared.sleeping.saturating_add(1);
        let mut shared = match shared.alarm_needed() {
            None => self.ready.wait(shared).unwrap_or_else(PoisonError::into_inner),
            Some(alarm) => {
                shared.alarm = Some(alarm);
                let pause = alarm.saturating_sub(self.now());
                let woken = self.ready.wait_timeout(shared, pause);
                let (mut shared, _) = woken.unwrap_or_else(PoisonError::into_inner);
                shared.alarm = shared.alarm.filter(|other| *other != alarm);
                shared
            }
        };
        shared.sleeping = shared.sleeping.saturating_sub(1);
        shared
    }

    /// Whether another job is ready for an engine.
    pub fn is_wanted(&self) -> bool {
        // ORDERING: Relaxed: seeing it one step later is soon enough.
        self.wanted.load(Ordering::Relaxed)
    }

    /// Whether an engine has to give this job back.
    pub fn must_leave(&self, work: &ScheduledJob) -> bool {
        // ORDERING: Acquire pairs with the Release in `publish`: an engine that sees a start sees the reset before it.
        // A stop that is not seen yet drains the section or the pin under which this is asked.
        self.stopped.load(Ordering::Acquire) || self.generation.load(Ordering::Relaxed) != work.generation()
    }

    /// Whether the session ends: no job has to be kept.
    pub fn is_closing(&self) -> bool {
        // ORDERING: Relaxed: seeing it one step later is soon enough.
        self.closing.load(Ordering::Relaxed)
    }

    /// Takes back a job that has left its engine. (See [`MissPort::give_back`](crate::session::miss_port::MissPort).)
    pub fn dispose(&self, left: Left) -> Disposed {
        self.change(|schedule| schedule.dispose(left))
    }

    /// Whether any job that has begun touches the range.
    pub fn touches(&self, space: DomainId, range: ByteRange<Iova>) -> bool {
        self.read(|schedule| schedule.touches(space, range))
    }

    /// What jobs that have begun touch of the range, as far as an invalidation of it will be judged.
    pub fn judged(&self, space: DomainId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        self.read(|schedule| schedule.judged(space, range))
    }

    /// An invalidation removes these mappings.
    pub fn suspect(&self, by: InvalidationInfo, mapped: &[MappedRange]) {
        self.change(|schedule| schedule.suspect(by, mapped));
    }

    /// The front-end has answered a MISS that these jobs wait for or will need soon.
    pub fn reveal(&self, revealed: &Revealed, asked: &[JobId]) -> Vec<JobVerdict> {
        self.change(|schedule| schedule.reveal(revealed, asked))
    }

    /// How much was too much to be judged since the last call.
    pub fn take_unjudged(&self) -> u64 {
        self.read(Schedule::take_unjudged)
    }

    /// Earlier mappings become meaningless.
    pub fn forget_suspects(&self) {
        self.change(Schedule::forget_suspects);
    }

    /// The first job that has begun and touches the range.
    pub fn first_in(&self, space: DomainId, range: ByteRange<Iova>) -> Option<JobId> {
        self.read(|schedule| schedule.first_in(space, range))
    }

    /// Details of a job that waits for the answer to this page.
    pub fn waiting_job(&self, wait: JobWait, page: MissRequest) -> Option<AtRest> {
        self.read(|schedule| schedule.waiting_job(wait, page))
    }

    /// All jobs, ordered by number.
    pub fn jobs(&self) -> Vec<JobStatus> {
        self.read(|schedule| schedule.jobs())
    }

    /// Whether requests of this wait are still valid.
    pub fn is_current(&self, wait: JobWait) -> bool {
        self.read(|schedule| schedule.is_current(wait))
    }

    /// One page that a parked job waits for is answered.
    pub fn miss_answered(&self, wait: JobWait, page: MissRequest, answer: Result<(), JobError>) {
        self.change(|schedule| schedule.miss_answered(wait, page, answer));
    }

    /// The driver has answered a fault.
    pub fn fault_answered(&self, wait: JobWait, answer: Result<(), JobError>) {
        self.change(|schedule| schedule.fault_answered(wait, answer));
    }

    /// An invalidation has ended: jobs that waited for that try again.
    pub fn invalidation_ended(&self) {
        self.change(Schedule::invalidation_ended);
    }

    /// Stops the engines at their next step; all jobs stay. Parked ones forget what they wait for.
    pub fn pause(&self) {
        let now = self.now();
        self.change(|schedule| schedule.pause(now));
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&self) {
        let now = self.now();
        self.change(|schedule| schedule.resume(now));
    }

    /// Discards every job, those on engines included.
    pub fn discard(&self) {
        self.change(Schedule::discard);
    }

    /// Ends the engines at their next step.
    pub fn close(&self) {
        self.change(Schedule::close);
    }

    /// Changes the schedule and notifies the engines. Only an engine that takes a job changes it in another way.
    fn change<T>(&self, change: impl FnOnce(&mut Schedule) -> T) -> T {
        let mut shared = lock(&self.shared);
        shared.schedule.set_time(self.now());
        let result = change(&mut shared.schedule);
        self.publish(shared);
        result
    }

    fn read<T>(&self, read: impl FnOnce(&mut Schedule) -> T) -> T {
        read(&mut lock(&self.shared).schedule)
    }

    /// Shows running engines what has changed, and wakes as many sleeping ones as have something to do.
    fn publish(&self, shared: MutexGuard<'_, Shared>) {
        let schedule = &shared.schedule;
        // ORDERING: Relaxed but for `stopped`: see `must_leave`, `is_wanted` and `running`.
        self.generation.store(schedule.generation(), Ordering::Relaxed);
        self.running.store(schedule.clock().word(), Ordering::Relaxed);
        self.stopped.store(schedule.is_stopped(), Ordering::Release);
        self.wanted.store(schedule.has_ready(), Ordering::Relaxed);
        self.closing.store(schedule.is_closing(), Ordering::Relaxed);
        let wanted = shared.wanted();
        drop(shared);
        for _ in 0..wanted {
            self.ready.notify_one();
        }
    }
}

#[cfg(test)]
mod tests;
