//! What the other threads tell the queue thread, in order. The session's word about a ring comes before anything
//! that the ring then brings: the queue thread empties its mailbox before it looks at a ring.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use device_model::gpu::context::ContextInfo;
use device_model::gpu::scanout::DisplayAnswer;
use device_model::locking::lock;

use crate::engines::engine::FinishedJob;
use crate::wake::Waker;
use device_model::session::miss_port::{MissAnswer, RingWait};

/// Which side of a ring waits for a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What the driver offers: available ring, descriptors, requests.
    Input,
    /// What the device writes: responses, used ring.
    Output,
}

/// News for the queue thread.
#[derive(Debug)]
pub enum Mail {
    /// The ring was started or enabled: look at it.
    RingReady(usize),
    /// An engine is done with a job.
    JobFinished(FinishedJob),
    /// The display answers.
    DisplayAnswered {
        /// The question.
        ticket: u64,
        /// The answer.
        answer: DisplayAnswer,
    },
    /// One page that a ring waits for was answered.
    MissAnswered {
        /// The ring, and when it asked.
        wait: RingWait,
        /// Which side of it.
        side: Side,
        /// How.
        answer: MissAnswer,
    },
    /// The features that the driver chose.
    Features(u64),
    /// Somebody wants to know what contexts there are.
    Describe(Sender<Vec<ContextInfo>>),
    /// The device is reset: nothing that came before exists any more.
    Reset,
    /// The session ends.
    Close,
}

/// The way to the queue thread; cheap to clone.
#[derive(Clone)]
pub struct Mailbox {
    mail: Arc<Mutex<VecDeque<Mail>>>,
    waker: Waker,
}

impl Mailbox {
    /// An empty mailbox, with an eventfd of its own.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { mail: Arc::default(), waker: Waker::new()? })
    }

    /// Puts mail in and wakes the thread.
    pub fn post(&self, mail: Mail) {
        lock(&self.mail).push_back(mail);
        self.waker.wake();
    }

    /// The oldest mail.
    pub fn take(&self) -> Option<Mail> {
        lock(&self.mail).pop_front()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        lock(&self.mail).is_empty()
    }

    /// Takes the wake-ups made so far; mail that comes later wakes again.
    pub fn clear_wake_up(&self) {
        self.waker.clear();
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.waker.as_raw_fd()
    }
}
