//! The threads of a device. Each has an owner that tells it to end and waits until it has done its work, also when a
//! session cannot start because a descriptor is not available. If a thread fails or panics, half of the device would be
//! left in service: the failure is reported, and the session ends. Knows nothing of what the threads do.

mod interrupt;
pub mod pool;
pub(crate) mod starvation;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::Duration;

use crate::thread_kind::ThreadKind;
use crate::wake::Waker;
use pool::Worker;

/// Why a thread of the device ended too early.
#[derive(Debug, thiserror::Error)]
pub enum ThreadFailure {
    /// An operation that it needs failed.
    #[error("Thread {name} cannot go on")]
    Failed {
        /// Which thread.
        name: String,
        /// Error of the operation.
        #[source]
        source: io::Error,
    },
    /// It panicked: a bug of MirrorGPU.
    #[error("Thread {name} has panicked: {message}")]
    Panicked {
        /// Which thread.
        name: String,
        /// Message of the panic.
        message: String,
    },
}

/// Where the threads of a device report failures. Clones share the same state.
#[derive(Clone)]
pub struct ThreadFailures {
    first: Arc<OnceLock<Arc<ThreadFailure>>>,
    session: Waker,
}

impl ThreadFailures {
    /// No failure yet; `session` wakes the session when one is reported.
    pub fn new(session: Waker) -> Self {
        Self { first: Arc::default(), session }
    }

    /// The first failure that was reported.
    pub fn first(&self) -> Option<Arc<ThreadFailure>> {
        self.first.get().cloned()
    }

    fn report(&self, failure: ThreadFailure) {
        // The first failure ends the session; later ones may be its consequences.
        let _ = self.first.set(Arc::new(failure));
        self.session.wake();
    }
}

/// How long a thread that was told to end may take before a system call that keeps it is interrupted.
const BLOCKED: Duration = Duration::from_millis(20);

/// A thread that works for a device. Dropping it waits for the end of that work: its owner must have told it to end. A
/// front-end can make a write to its own descriptors block, whatever is checked before: such a system call is interrupted.
#[derive(Debug)]
pub struct DeviceThread {
    /// `None` only while it is being dropped.
    worker: Option<Worker>,
    /// Disconnected at the end of the work. The lock makes it shareable; only the drop uses it.
    ended: Mutex<Receiver<()>>,
}

impl DeviceThread {
    /// Has a thread do this. If `body` fails or panics, that is reported to `failures` after everything that `body`
    /// owned was dropped.
    pub fn spawn(
        (kind, name): (ThreadKind, &str),
        failures: &ThreadFailures,
        body: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (failures, own_name) = (failures.clone(), name.to_owned());
        let (running, ended) = channel::<()>();
        let run = move || {
            let _running = running;
            // Unwinding closes the thread's sections and drops its pins. State shared with other threads is behind
            // locks that ignore poison, and the session ends.
            match catch_unwind(AssertUnwindSafe(body)) {
                Ok(Ok(())) => {}
                Ok(Err(source)) => failures.report(ThreadFailure::Failed { name: own_name, source }),
                Err(panic) => {
                    let message = message_of(&*panic).to_owned();
                    failures.report(ThreadFailure::Panicked { name: own_name, message });
                }
            }
        };
        let worker = pool::take(kind, name)?;
        worker.run(Box::new(run))?;
        Ok(Self { worker: Some(worker), ended: Mutex::new(ended) })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        let Some(worker) = self.worker.take() else { return };
        // A thread that drops the last handle of its own service cannot wait for itself: its work is about to end.
        if worker.handle().thread().id() != thread::current().id() {
            let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
            while ended.recv_timeout(BLOCKED) == Err(RecvTimeoutError::Timeout) {
                interrupt::interrupt(worker.handle());
            }
        }
        pool::give_back(worker);
    }
}

/// The message of a panic.
fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it did not say why")
}
