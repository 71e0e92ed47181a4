//! Messages of the other threads to the queue thread, in order. A message of the session about a ring must take effect
//! before anything that the ring then brings: the queue thread empties its mailbox before it reads a ring.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

use device_model::gpu::context::ContextInfo;
use device_model::gpu::scanout::DisplayAnswer;
use device_model::jobs::schedule::{FaultedJob, FinishedJob};
use device_model::locking::lock;

use crate::wake::Waker;
use device_model::session::miss_port::{MissAnswer, RingWait};

/// Which side of a ring waits for a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What the device reads: available ring, descriptors, requests.
    Input,
    /// What the device writes: responses, used ring.
    Output,
}

/// A message to the queue thread.
#[derive(Debug)]
pub enum QueueMessage {
    /// The ring was started or enabled and has to be polled.
    RingReady(usize),
    /// The front-end has replaced the call eventfd of a ring that runs.
    CallReplaced(usize),
    /// An engine has finished a job.
    JobFinished(FinishedJob),
    /// A job is parked until the driver has answered its fault.
    JobFaulted(FaultedJob),
    /// A step has ended that a flush of an address space may wait for.
    FlushEnded,
    /// The display has answered a query.
    DisplayAnswered {
        /// Identifies the query.
        ticket: u64,
        /// The answer.
        answer: DisplayAnswer,
    },
    /// One page that a ring waits for was settled.
    MissAnswered {
        /// The ring, and at which start it requested the page.
        wait: RingWait,
        /// The side of the ring that waits.
        side: Side,
        /// The answer.
        answer: MissAnswer,
    },
    /// The features that the driver chose.
    Features(u64),
    /// A query for the list of contexts.
    Describe(Sender<Vec<ContextInfo>>),
    /// The device is reset: everything before this message is void.
    Reset,
    /// The session ends.
    Close,
}

/// The handle of the queue thread's mailbox; cheap to clone.
#[derive(Clone)]
pub struct Mailbox {
    messages: Arc<Mutex<VecDeque<QueueMessage>>>,
    waker: Waker,
}

impl Mailbox {
    /// An empty mailbox, with an eventfd of its own.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self { messages: Arc::default(), waker: Waker::new()? })
    }

    /// Adds a message and wakes the thread.
    pub fn post(&self, message: QueueMessage) {
        lock(&self.messages).push_back(message);
        self.waker.wake();
    }

    /// Removes the oldest message.
    pub fn take(&self) -> Option<QueueMessage> {
        lock(&self.messages).pop_front()
    }

    /// Whether there is no message.
    pub fn is_empty(&self) -> bool {
        lock(&self.messages).is_empty()
    }

    /// Clears the wake-ups made so far; a later message wakes the thread again.
    pub fn clear_wake_up(&self) {
        self.waker.clear();
    }
}

impl AsRawFd for Mailbox {
    fn as_raw_fd(&self) -> RawFd {
        self.waker.as_raw_fd()
    }
}
