//! The threads of a device. Each has an owner, which tells it to end and then waits until it has ended: also when a
//! session cannot start because a later thread or descriptor is not to be had. Knows nothing of what the threads do.

use std::io;
use std::thread::{self, JoinHandle};

/// A running thread of a device. Dropping it waits until the thread has ended: its owner has told it to.
#[derive(Debug)]
pub struct DeviceThread {
    /// Empty only while it is dropped.
    handle: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts a thread.
    pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let handle = thread::Builder::new().name(name.to_owned()).spawn(body)?;
        Ok(Self { handle: Some(handle) })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        // A thread that drops the last handle of what it serves cannot wait for itself: it is about to end.
        if let Some(handle) =
            self.handle.take().filter(|handle| handle.thread().id() != thread::current().id())
        {
            // A panic was reported by the panic hook.
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_dropped_thread_has_ended() {
        let ended = Arc::new(AtomicBool::new(false));
        let theirs = Arc::clone(&ended);
        let thread = DeviceThread::spawn("test", move || {
            thread::sleep(Duration::from_millis(20));
            theirs.store(true, Ordering::Release);
        });
        drop(thread.unwrap());
        assert!(ended.load(Ordering::Acquire));
    }
}
