//! The threads of a device. Each has an owner, which tells it to end and then waits until it has ended: also when a
//! session cannot start because a later thread or descriptor is not to be had. A thread that fails or panics would leave
//! half a device in service: it says so, and the session ends. Knows nothing of what the threads do.

#[cfg(test)]
mod tests;

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};

use crate::wake::Waker;

/// Why a thread of the device has ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum ThreadFailure {
    /// What it needs failed.
    #[error("Thread {name} cannot go on")]
    Failed {
        /// Which thread.
        name: String,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// It has panicked: a bug of MirrorGPU.
    #[error("Thread {name} has panicked: {message}")]
    Panicked {
        /// Which thread.
        name: String,
        /// What the panic said.
        message: String,
    },
}

/// Where the threads of a device report that they have failed. Clones are the same place.
#[derive(Clone)]
pub struct ThreadFailures {
    first: Arc<OnceLock<Arc<ThreadFailure>>>,
    session: Waker,
}

impl ThreadFailures {
    /// Nothing has failed yet; `session` wakes the session when something does.
    pub fn new(session: Waker) -> Self {
        Self { first: Arc::default(), session }
    }

    /// The first failure that was reported.
    pub fn first(&self) -> Option<Arc<ThreadFailure>> {
        self.first.get().cloned()
    }

    fn report(&self, failure: ThreadFailure) {
        // The first failure ends the session; what fails after it may follow from it.
        let _ = self.first.set(Arc::new(failure));
        self.session.wake();
    }
}

/// A running thread of a device. Dropping it waits until the thread has ended: its owner has told it to.
#[derive(Debug)]
pub struct DeviceThread {
    /// Empty only while it is dropped.
    handle: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts a thread. If `body` fails or panics, that is reported to `failures` after everything that it owned was
    /// dropped.
    pub fn spawn(
        name: &str,
        failures: &ThreadFailures,
        body: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let (failures, own_name) = (failures.clone(), name.to_owned());
        let run = move || {
            // Unwinding closes the sections and drops the pins of the thread. What it shares with others is behind locks that
            // bear with poison, and the session ends.
            match catch_unwind(AssertUnwindSafe(body)) {
                Ok(Ok(())) => {}
                Ok(Err(source)) => failures.report(ThreadFailure::Failed { name: own_name, source }),
                Err(panic) => {
                    let message = message_of(&*panic).to_owned();
                    failures.report(ThreadFailure::Panicked { name: own_name, message });
                }
            }
        };
        let handle = thread::Builder::new().name(name.to_owned()).spawn(run)?;
        Ok(Self { handle: Some(handle) })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        // A thread that drops the last handle of what it serves cannot wait for itself: it is about to end.
        if let Some(handle) =
            self.handle.take().filter(|handle| handle.thread().id() != thread::current().id())
        {
            // A panic was reported already.
            let _ = handle.join();
        }
    }
}

/// What a panic said.
fn message_of(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("it did not say why")
}
