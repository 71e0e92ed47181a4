//! The queue of events from the device's threads to the clients of the control socket. It is bounded, and senders never
//! wait: events that do not fit are counted and dropped.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use device_model::locking::lock;
use device_model::telemetry::stats::Stats;
use serde_json::{Value, json};

use crate::wake::Waker;

/// Maximum number of events that wait for the control thread.
const WAITING: usize = 256;

/// The events that wait for the control thread.
pub struct Outbox {
    events: Mutex<VecDeque<String>>,
    waker: Waker,
    /// Whether a control thread exists.
    open: AtomicBool,
    stats: Arc<Stats>,
}

impl Outbox {
    /// An empty outbox without a reader.
    pub(super) fn new(stats: Arc<Stats>) -> io::Result<Self> {
        Ok(Self { events: Mutex::default(), waker: Waker::new()?, open: AtomicBool::new(false), stats })
    }

    /// The control thread reads the outbox from now on.
    pub fn open(&self) {
        // ORDERING: Relaxed: it does not matter whether the first events are kept.
        self.open.store(true, Ordering::Relaxed);
    }

    /// Sends an event in QMP's format, with the time of day.
    pub fn send(&self, name: &str, data: Value) {
        if !self.open.load(Ordering::Relaxed) {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = json!({"seconds": now.as_secs(), "microseconds": now.subsec_micros()});
        let event = json!({"event": name, "data": data, "timestamp": timestamp}).to_string();
        let mut events = self.lock();
        if events.len() >= WAITING {
            self.dropped(1);
            return;
        }
        events.push_back(event);
        drop(events);
        self.waker.wake();
    }

    /// The events since the last call.
    pub fn take(&self) -> VecDeque<String> {
        self.waker.clear();
        std::mem::take(&mut *self.lock())
    }

    /// A client has missed this many events.
    pub fn dropped(&self, count: u64) {
        self.stats.events_dropped.add(count);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<String>> {
        lock(&self.events)
    }
}

impl std::fmt::Debug for Outbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbox").field("waiting", &self.lock().len()).finish()
    }
}

impl AsRawFd for Outbox {
    fn as_raw_fd(&self) -> RawFd {
        self.waker.as_raw_fd()
    }
}
