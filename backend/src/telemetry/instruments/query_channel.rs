//! How the control thread asks the threads of the device. It leaves a question and waits for the answer for a bounded
//! time; the device answers when it comes by, in bounded pieces, and never waits for whoever asked.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use device_model::gpu::context::ContextInfo;
use device_model::jobs::scheduler::Scheduler;
use device_model::locking::lock;
use device_model::mmu::MappedRange;
use device_model::mmu::miss::MissRequest;
use device_model::telemetry::audit::AuditReport;

use super::Instruments;
use crate::queues::mailbox::{Mail, Mailbox};
use crate::wake::Waker;
use device_model::session::miss_port::Waiter;

/// How long an answer may take. The threads look at their mail within microseconds; a drain to the end of a session may
/// take longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// A question for the session.
#[derive(Debug)]
pub enum Question {
    /// What the mirror knows: at most so many ranges.
    Iotlb(usize, Sender<IotlbList>),
    /// Which misses are not answered, and who waits for them: at most so many.
    Misses(usize, Sender<Vec<(MissRequest, Vec<Waiter>)>>),
    /// Begin an audit, unless one is under way.
    Audit(Sender<()>),
}

/// What the mirror knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IotlbList {
    /// Ranges in order of addresses.
    pub ranges: Vec<MappedRange>,
    /// There are more.
    pub truncated: bool,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// Nobody is there to be asked.
    #[error("No front-end is connected")]
    NoFrontEnd,
    /// The device did not come by.
    #[error("The device did not answer within {PATIENCE:?}")]
    Late,
}

/// The threads of a connection, as far as they can be asked.
#[derive(Clone)]
pub struct Connection {
    /// The session's mail.
    pub session: Sender<Question>,
    /// Wakes the session.
    pub waker: Waker,
    /// The queue thread's mail.
    pub queue: Mailbox,
    /// The jobs.
    pub scheduler: Arc<Scheduler>,
}

/// The threads of a connection can be asked until this is dropped, also if their session never begins.
#[derive(Debug)]
pub struct Connected(Arc<Instruments>);

impl Instruments {
    /// A front-end has connected: the control thread asks its threads from now on.
    pub fn connect(self: &Arc<Self>, connection: Connection) -> Connected {
        self.query_channel.set(Some(connection));
        Connected(Arc::clone(self))
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        self.0.query_channel.disconnect();
    }
}

/// An audit, for whoever asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditNews {
    /// One is under way.
    pub running: bool,
    /// How far it is, or how the last one ended; `None`: there was none.
    pub report: Option<AuditReport>,
}

/// Where questions are left.
#[derive(Default)]
pub struct QueryChannel {
    connection: Mutex<Option<Connection>>,
    audit: Mutex<AuditNews>,
}

impl QueryChannel {
    fn set(&self, connection: Option<Connection>) {
        *lock(&self.connection) = connection;
    }

    /// The front-end is gone.
    pub fn disconnect(&self) {
        self.set(None);
    }

    /// The threads that can be asked.
    pub fn connection(&self) -> Result<Connection, NoAnswer> {
        let connection = lock(&self.connection);
        connection.clone().ok_or(NoAnswer::NoFrontEnd)
    }

    /// Asks the session.
    pub fn ask<T>(&self, question: impl FnOnce(Sender<T>) -> Question) -> Result<T, NoAnswer> {
        let connection = self.connection()?;
        let (sender, answer) = channel();
        // The session is at its end: the answer will say so.
        let _ = connection.session.send(question(sender));
        connection.waker.wake();
        wait(&answer)
    }

    /// Asks the queue thread for the contexts of the device.
    pub fn contexts(&self) -> Result<Vec<ContextInfo>, NoAnswer> {
        let (sender, answer) = channel();
        self.connection()?.queue.post(Mail::Describe(sender));
        wait(&answer)
    }

    /// The state of audits.
    pub fn audit(&self) -> MutexGuard<'_, AuditNews> {
        lock(&self.audit)
    }
}

impl std::fmt::Debug for QueryChannel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueryChannel").field("connected", &self.connection().is_ok()).finish()
    }
}

fn wait<T>(answer: &Receiver<T>) -> Result<T, NoAnswer> {
    answer.recv_timeout(PATIENCE).map_err(|error| match error {
        RecvTimeoutError::Timeout => NoAnswer::Late,
        RecvTimeoutError::Disconnected => NoAnswer::NoFrontEnd,
    })
}
