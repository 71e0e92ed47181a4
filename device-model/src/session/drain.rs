//! A drain that takes time, and its ladder (I2). First it waits for what is in flight. At the drain timeout the jobs
//! are preempted at their next step. If an engine has not left [`STEP_END`] later, that is a bug of MirrorGPU, and
//! memory has to be revoked. Time is a parameter. Knows nothing of what follows the drain (`T`), nor of what wakes it.

use std::time::Duration;

use crate::mmu::{Drained, Invalidation};

/// How long an engine may take to reach the end of its step after it was told to leave.
pub const STEP_END: Duration = Duration::from_millis(50);

/// The grace period is divided into this many polls. Time in which the session does not run counts as one poll: when
/// the whole process was stopped or throttled, the engines had no chance to leave either.
const POLLS: u32 = 5;

/// A drain that is under way.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this drain"]
pub struct Draining<T> {
    /// What is drained.
    pub invalidation: Invalidation,
    /// What follows the drain.
    pub then: T,
    /// When the message arrived that needs the drain, on the session's clock.
    since: Duration,
    /// When jobs will be preempted; `None`: they have been.
    evict_at: Option<Duration>,
    /// Jobs were given time before they were preempted.
    was_patient: bool,
    /// How long an engine may take to leave after it was told to.
    grace: Duration,
    /// Polls left of the grace period, and when the next one counts.
    polls: u32,
    poll_at: Duration,
}

/// How far a drain has come.
#[derive(Debug)]
pub enum Progress<T> {
    /// Everything has left. Carries the proof, what follows, and a summary.
    Drained(Drained, T, Summary),
    /// Something is still in flight; poll again.
    Draining(Draining<T>),
    /// An engine did not leave within the grace period; it may still access memory.
    Stuck(Draining<T>),
}

/// How a drain went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// When the message arrived that needed the drain.
    pub since: Duration,
    /// Jobs held the drain up until its timeout, and were preempted.
    pub was_late: bool,
}

impl<T> Draining<T> {
    /// A drain for a message that arrived at `now`; jobs are preempted after `patience`.
    pub fn new(invalidation: Invalidation, then: T, now: Duration, patience: Duration) -> Self {
        let evict_at = now.saturating_add(patience);
        let mut draining = Self {
            invalidation,
            then,
            since: now,
            evict_at: Some(evict_at),
            was_patient: !patience.is_zero(),
            grace: STEP_END,
            polls: POLLS,
            poll_at: evict_at,
        };
        draining.climb(now);
        draining
    }

    /// Moves to the ladder's next rung when its time has come.
    fn climb(&mut self, now: Duration) {
        if self.evict_at.is_some_and(|at| at <= now) {
            self.invalidation.evict();
            self.evict_at = None;
            self.poll_at = now.saturating_add(self.interval());
        } else if self.evict_at.is_none() && self.poll_at <= now {
            self.polls = self.polls.saturating_sub(1);
            self.poll_at = now.saturating_add(self.interval());
        }
    }

    fn interval(&self) -> Duration {
        self.grace / POLLS
    }

    /// Checks whether the drain is over.
    pub fn poll(mut self, now: Duration) -> Progress<T> {
        let summary = self.summary();
        match self.invalidation.poll() {
            Ok(drained) => Progress::Drained(drained, self.then, summary),
            Err(invalidation) => {
                self.invalidation = invalidation;
                self.climb(now);
                if self.polls == 0 {
                    return Progress::Stuck(self);
                }
                Progress::Draining(self)
            }
        }
    }

    /// Restarts the grace period, for a caller that knows that the engines were not scheduled.
    pub fn restart_grace_period(mut self, now: Duration) -> Self {
        self.polls = POLLS;
        self.poll_at = now.saturating_add(self.interval());
        self
    }

    /// Restarts the grace period with another length, for a caller that has just revoked memory.
    pub fn give_grace(mut self, now: Duration, grace: Duration) -> Self {
        self.grace = grace;
        self.restart_grace_period(now)
    }

    /// Preempts no job, however long that takes: for a test that has acked already.
    pub fn without_ladder(mut self) -> Self {
        self.evict_at = self.evict_at.map(|_| Duration::MAX);
        self
    }

    /// When to poll again if nothing wakes the session earlier.
    pub fn deadline(&self) -> Duration {
        self.evict_at.unwrap_or(self.poll_at)
    }

    /// A summary of the drain so far.
    pub fn summary(&self) -> Summary {
        Summary { since: self.since, was_late: self.was_patient && self.evict_at.is_none() }
    }

    /// Whether jobs were told to leave.
    pub fn has_evicted(&self) -> bool {
        self.evict_at.is_none()
    }
}
