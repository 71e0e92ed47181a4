//! The main socket of a front-end: one message at a time, and every reply has a time limit. Knows when to give up,
//! not what the messages mean.

use std::net::Shutdown;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost::vhost_user::Frontend;
use vhost::vhost_user::message::VhostUserHeaderFlag;

use super::error::{Error, Result};
use super::turn::held;
use super::wire::{self, Message, NEED_REPLY, REPLY, VERSION};

/// The main socket. Holding it is holding QEMU's big lock.
pub(super) struct Link {
    frontend: Frontend,
    stream: UnixStream,
    watchdog: Watchdog,
    reply_timeout: Duration,
}

/// The answer to a message that asked for one, and how long it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// 0: done.
    pub status: u64,
    /// From before the send until after the reply: the VM stands still meanwhile.
    pub latency: Duration,
}

impl Link {
    pub(super) fn new(stream: UnixStream, queues: u64, reply_timeout: Duration) -> Result<Self> {
        let copy = || stream.try_clone().map_err(Error::io("duplicate the main socket"));
        let frontend = Frontend::from_stream(copy()?, queues);
        let watchdog = Watchdog::new(copy()?)?;
        Ok(Self { frontend, stream, watchdog, reply_timeout })
    }

    /// A call of the crate's front-end, as QEMU makes it: without a reply, except for messages that have one.
    pub(super) fn tell<T>(
        &mut self,
        message: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.call(message, VhostUserHeaderFlag::empty(), call)
    }

    /// A call of the crate's front-end that asks for an acknowledgement.
    pub(super) fn ask<T>(
        &mut self,
        message: &'static str,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.call(message, VhostUserHeaderFlag::NEED_REPLY, call)
    }

    fn call<T>(
        &mut self,
        message: &'static str,
        flags: VhostUserHeaderFlag,
        call: impl FnOnce(&mut Frontend) -> vhost::Result<T>,
    ) -> Result<T> {
        self.frontend.set_hdr_flags(flags);
        self.watchdog.arm(self.reply_timeout);
        let result = call(&mut self.frontend);
        self.disarm(message)?;
        result.map_err(Error::message(message))
    }

    fn disarm(&self, message: &'static str) -> Result<()> {
        if self.watchdog.disarm() {
            return Ok(());
        }
        Err(Error::Timeout { what: format!("Reply to {message}"), after: self.reply_timeout })
    }

    /// Sends a message that the crate does not know, or invalid bytes. Does not wait.
    pub(super) fn send(&mut self, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> Result<()> {
        wire::send(&self.stream, request, flags, body, fds).map_err(Error::io("send on the main socket"))
    }

    /// Sends a message that the crate does not know, and takes the message that answers it.
    pub(super) fn exchange(
        &mut self,
        message: &'static str,
        request: u32,
        flags: u32,
        body: &[u8],
        fds: &[RawFd],
    ) -> Result<Message> {
        self.watchdog.arm(self.reply_timeout);
        let sent = wire::send(&self.stream, request, flags, body, fds);
        let received = sent.and_then(|()| wire::receive(&self.stream));
        self.disarm(message)?;
        let reply = received.map_err(Error::io(format!("exchange {message}")))?;
        let reply = reply.ok_or(Error::Closed { what: "a reply was waited for" })?;
        if reply.request != request || reply.flags & (VERSION | REPLY) != VERSION | REPLY {
            return Err(Error::Reply { message, got: format!("{reply:?}") });
        }
        Ok(reply)
    }

    /// Sends a message that asks for an acknowledgement, and waits for it.
    pub(super) fn acked(&mut self, message: &'static str, request: u32, body: &[u8]) -> Result<Ack> {
        let start = Instant::now();
        let reply = self.exchange(message, request, VERSION | NEED_REPLY, body, &[])?;
        let latency = start.elapsed();
        let status = reply.number().ok_or_else(|| Error::Reply { message, got: format!("{reply:?}") })?;
        Ok(Ack { status, latency })
    }
}

/// Cuts the connection when a reply does not come: QEMU would wait for ever, but a test must not.
struct Watchdog {
    shared: Arc<(Mutex<Watch>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Watch {
    deadline: Option<Instant>,
    barked: bool,
    stop: bool,
}

impl Watchdog {
    // Polling now and then costs the measured path nothing, unlike a wake-up for each message.
    const LOOKS_EVERY: Duration = Duration::from_millis(200);

    fn new(stream: UnixStream) -> Result<Self> {
        let shared = Arc::new((Mutex::<Watch>::default(), Condvar::new()));
        let watched = shared.clone();
        let body = move || {
            let (watch, changed) = &*watched;
            let mut watch = held(watch);
            while !watch.stop {
                if watch.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                    watch.barked = true;
                    watch.deadline = None;
                    // The peer may have closed it already: then the reader has been woken as well.
                    let _ = stream.shutdown(Shutdown::Both);
                }
                watch =
                    changed.wait_timeout(watch, Self::LOOKS_EVERY).unwrap_or_else(PoisonError::into_inner).0;
            }
        };
        let thread = thread::Builder::new().name("watchdog".into()).spawn(body);
        let thread = thread.map_err(Error::io("start a thread"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    fn arm(&self, timeout: Duration) {
        held(&self.shared.0).deadline = Some(Instant::now() + timeout);
    }

    fn disarm(&self) -> bool {
        let mut watch = held(&self.shared.0);
        watch.deadline = None;
        !watch.barked
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        held(&self.shared.0).stop = true;
        self.shared.1.notify_all();
        if let Some(thread) = self.thread.take() {
            // It cannot panic, and a panic here would hide the one that ended the test.
            let _ = thread.join();
        }
    }
}
