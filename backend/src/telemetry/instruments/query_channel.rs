//! The control thread's queries to the threads of the device. It leaves a query and waits a bounded time for the
//! answer; the device answers in bounded pieces, between its other work, and never waits for the client.

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
use crate::wake::Waker;
use device_model::session::miss_port::Waiter;

/// Time limit for an answer. The threads read their queries within microseconds, but a drain at the end of a session
/// may take longer.
const PATIENCE: Duration = Duration::from_secs(2);

/// A query to the session.
#[derive(Debug)]
pub enum Question {
    /// List the mirror's ranges, up to this number.
    Iotlb(usize, Sender<IotlbList>),
    /// List the outstanding misses with their waiters, up to this number.
    Misses(usize, Sender<Vec<(MissRequest, Vec<Waiter>)>>),
    /// Start an audit, unless one is in progress.
    Audit(Sender<()>),
}

/// The ranges of the mirror.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IotlbList {
    /// The ranges in order of address.
    pub ranges: Vec<MappedRange>,
    /// The mirror has more ranges than these.
    pub truncated: bool,
}

/// Why a query got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAnswer {
    /// No front-end is connected.
    #[error("No front-end is connected")]
    NoFrontEnd,
    /// The device did not answer in time.
    #[error("The device did not answer within {PATIENCE:?}")]
    Late,
}

/// The threads of a connection that accept queries.
#[derive(Clone)]
pub struct Connection {
    /// Queries to the session.
    pub session: Sender<Question>,
    /// Wakes the session.
    pub waker: Waker,
    /// Asks the queue thread for the contexts of the device.
    pub contexts: Arc<dyn Fn(Sender<Vec<ContextInfo>>) + Send + Sync>,
    /// The schedule of the jobs.
    pub scheduler: Arc<Scheduler>,
}

/// Makes a connection's threads available to queries until it is dropped, also if their session never starts.
#[derive(Debug)]
pub struct Connected(Arc<Instruments>);

impl Instruments {
    /// A front-end has connected: the control thread sends its queries to these threads from now on.
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

/// The state of audits, as the control socket reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditNews {
    /// An audit is in progress.
    pub running: bool,
    /// Progress or result of the last audit; `None` if there was none.
    pub report: Option<AuditReport>,
}

/// The current connection and the audits, for the control thread.
#[derive(Default)]
pub struct QueryChannel {
    connection: Mutex<Option<Connection>>,
    audit: Mutex<AuditNews>,
}

impl QueryChannel {
    fn set(&self, connection: Option<Connection>) {
        *lock(&self.connection) = connection;
    }

    /// The front-end is gone: queries get no answer from now on.
    pub fn disconnect(&self) {
        self.set(None);
    }

    /// The threads that accept queries now.
    pub fn connection(&self) -> Result<Connection, NoAnswer> {
        let connection = lock(&self.connection);
        connection.clone().ok_or(NoAnswer::NoFrontEnd)
    }

    /// Sends a query to the session and waits for the answer.
    pub fn ask<T>(&self, question: impl FnOnce(Sender<T>) -> Question) -> Result<T, NoAnswer> {
        let connection = self.connection()?;
        let (sender, answer) = channel();
        // If the session is ending, waiting for the answer fails below.
        let _ = connection.session.send(question(sender));
        connection.waker.wake();
        wait(&answer)
    }

    /// Asks the queue thread for the contexts of the device.
    pub fn contexts(&self) -> Result<Vec<ContextInfo>, NoAnswer> {
        let (sender, answer) = channel();
        (self.connection()?.contexts)(sender);
        wait(&answer)
    }

    /// The state of audits, for reading or changing.
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
