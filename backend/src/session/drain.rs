//! What a session owes its front-end: a reply that waits for a drain. While anything is owed, nothing more is
//! read from the main socket, for replies go out in order. The session never blocks on it: it looks here whenever
//! it wakes up, and at the deadlines.
//!
//! The ladder (I2): a drain waits for what is in flight; at the drain timeout the jobs are taken off at their next
//! step; [`STEP_END`] later an engine has not come back, which is a bug of ours, and memory is revoked.

use std::time::Duration;

use device_model::mmu::{Drained, Invalidation};

use crate::vhost_user::{Ack, Header};

/// How long an engine may take to reach the end of a step, once it has been told to leave.
pub const STEP_END: Duration = Duration::from_millis(50);

/// What the drain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// An INVALIDATE that was taken off the socket: it is acked after the drain.
    Invalidate(Header),
    /// A message that is still unread: it is handled after the drain.
    Message(Header),
}

/// A drain that is not over.
#[derive(Debug)]
pub struct Draining {
    /// What has to be drained.
    pub invalidation: Invalidation,
    /// What follows.
    pub then: For,
    /// When it was begun, on the session's clock.
    since: Duration,
    /// When jobs are taken off; `None`: they have been.
    evict_at: Option<Duration>,
    revoke_at: Duration,
}

/// What is to be done about a drain.
#[derive(Debug)]
pub enum Progress {
    /// Everything has left.
    Drained(Drained, For, Duration),
    /// It goes on.
    Draining(Draining),
    /// An engine does not reach the end of its step.
    Stuck(Draining),
}

impl Draining {
    /// A drain that begins now and takes jobs off after `patience`.
    pub fn new(invalidation: Invalidation, then: For, now: Duration, patience: Duration) -> Self {
        let evict_at = now.saturating_add(patience);
        let mut draining = Self {
            invalidation,
            then,
            since: now,
            evict_at: Some(evict_at),
            revoke_at: evict_at.saturating_add(STEP_END),
        };
        draining.evict_if_due(now);
        draining
    }

    fn evict_if_due(&mut self, now: Duration) {
        if self.evict_at.is_some_and(|at| at <= now) {
            self.invalidation.evict();
            self.evict_at = None;
            self.revoke_at = now.saturating_add(STEP_END);
        }
    }

    /// Looks how far it is.
    pub fn poll(mut self, now: Duration) -> Progress {
        match self.invalidation.poll() {
            Ok(drained) => Progress::Drained(drained, self.then, self.since),
            Err(invalidation) => {
                self.invalidation = invalidation;
                self.evict_if_due(now);
                if self.evict_at.is_none() && self.revoke_at <= now {
                    return Progress::Stuck(self);
                }
                Progress::Draining(self)
            }
        }
    }

    /// When to look again, if nobody wakes the session.
    pub fn deadline(&self) -> Duration {
        self.evict_at.unwrap_or(self.revoke_at)
    }

    /// When it was begun.
    pub fn since(&self) -> Duration {
        self.since
    }
}

/// What is owed on the main socket.
#[derive(Debug, Default)]
pub enum Owed {
    /// Nothing: the next message may be read.
    #[default]
    Nothing,
    /// A drain, and what follows it.
    Drain(Draining),
    /// A reply that did not fit the socket.
    Unsent(Ack),
}
