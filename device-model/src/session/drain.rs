//! A drain that takes time, and its ladder (I2): it waits for what is in flight; at the drain timeout the jobs are
//! taken off at their next step; [`STEP_END`] later an engine has not come back, which is a bug of ours, and memory
//! has to be revoked. Time is a parameter. Knows nothing of what follows the drain (`T`), nor of who wakes it.

use std::time::Duration;

use crate::mmu::{Drained, Invalidation};

/// How long an engine may take to reach the end of a step, once it has been told to leave.
pub const STEP_END: Duration = Duration::from_millis(50);

/// In how many looks [`STEP_END`] passes. Time in which nobody looks counts as one of them at the most: a process that
/// was stopped as a whole, or throttled, finds engines that had no chance to leave either.
const LOOKS: u32 = 5;

/// A drain that is not over.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this drain"]
pub struct Draining<T> {
    /// What has to be drained.
    pub invalidation: Invalidation,
    /// What follows.
    pub then: T,
    /// When it was begun, on the session's clock.
    since: Duration,
    /// When jobs are taken off; `None`: they have been.
    evict_at: Option<Duration>,
    /// Looks that are left once jobs were told to leave, and when the next one counts.
    looks: u32,
    look_at: Duration,
}

/// What is to be done about a drain.
#[derive(Debug)]
pub enum Progress<T> {
    /// Everything has left.
    Drained(Drained, T, Duration),
    /// It goes on.
    Draining(Draining<T>),
    /// An engine does not reach the end of its step.
    Stuck(Draining<T>),
}

impl<T> Draining<T> {
    /// A drain that begins now and takes jobs off after `patience`.
    pub fn new(invalidation: Invalidation, then: T, now: Duration, patience: Duration) -> Self {
        let evict_at = now.saturating_add(patience);
        let mut draining = Self {
            invalidation,
            then,
            since: now,
            evict_at: Some(evict_at),
            looks: LOOKS,
            look_at: evict_at,
        };
        draining.climb(now);
        draining
    }

    /// Takes the ladder's next rung if it is time.
    fn climb(&mut self, now: Duration) {
        if self.evict_at.is_some_and(|at| at <= now) {
            self.invalidation.evict();
            self.evict_at = None;
            self.look_at = now.saturating_add(STEP_END / LOOKS);
        } else if self.evict_at.is_none() && self.look_at <= now {
            self.looks = self.looks.saturating_sub(1);
            self.look_at = now.saturating_add(STEP_END / LOOKS);
        }
    }

    /// Looks how far it is.
    pub fn poll(mut self, now: Duration) -> Progress<T> {
        match self.invalidation.poll() {
            Ok(drained) => Progress::Drained(drained, self.then, self.since),
            Err(invalidation) => {
                self.invalidation = invalidation;
                self.climb(now);
                if self.looks == 0 {
                    return Progress::Stuck(self);
                }
                Progress::Draining(self)
            }
        }
    }

    /// Has the looks begin anew, for whoever knows that the engines had no chance to leave.
    pub fn bear(mut self, now: Duration) -> Self {
        self.looks = LOOKS;
        self.look_at = now.saturating_add(STEP_END / LOOKS);
        self
    }

    /// When to look again, if nobody wakes the session.
    pub fn deadline(&self) -> Duration {
        self.evict_at.unwrap_or(self.look_at)
    }

    /// When it was begun.
    pub fn since(&self) -> Duration {
        self.since
    }

    /// Whether jobs were told to leave.
    pub fn has_evicted(&self) -> bool {
        self.evict_at.is_none()
    }
}
