//! The eventfd with which one thread wakes another's epoll, and the epoll calls around it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use device_model::session::miss_port::SessionWaker;
use epoll::{ControlOptions, Event, Events};
use rustix::event::Timespec;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// A wake-up; several before the other thread runs count as one.
#[derive(Clone)]
pub struct Waker(Arc<EventFd>);

impl Waker {
    /// A new eventfd.
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?)))
    }

    /// Wakes the thread that polls it.
    pub fn wake(&self) {
        // A full counter means that a wake-up is already pending.
        let _ = self.0.write(1);
    }

    /// Clears all wake-ups that were made so far.
    pub fn clear(&self) {
        let _ = self.0.read();
    }
}

impl SessionWaker for Waker {
    fn wake(&self) {
        Self::wake(self);
    }
}

impl AsRawFd for Waker {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The eventfds of a session, one for the session's thread and one for the queue thread. They last for all sessions, as the
/// sandbox lets no more be made.
#[derive(Clone)]
pub struct Wakers {
    /// Wakes the session's thread.
    pub session: Waker,
    /// Wakes the queue thread.
    pub queue: Waker,
}

impl Wakers {
    /// Two new eventfds.
    pub fn new() -> io::Result<Self> {
        Ok(Self { session: Waker::new()?, queue: Waker::new()? })
    }

    /// Clears what is left of the session before.
    pub fn clear(&self) {
        self.session.clear();
        self.queue.clear();
    }
}

/// Sleeps for this long. By the system call that polls, as the sandbox has no other.
pub fn sleep(time: Duration) {
    let begin = Instant::now();
    while let Some(left) = time.checked_sub(begin.elapsed()).filter(|left| !left.is_zero()) {
        let Ok(left) = Timespec::try_from(left) else { return };
        // A signal ends it early; there is no other error.
        let _ = rustix::event::poll(&mut [], Some(&left));
    }
}

/// An epoll instance, closed when dropped.
pub struct Poller {
    fd: RawFd,
}

impl Poller {
    /// A new instance.
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: epoll::create(true)? })
    }

    /// Watches `fd`; its events carry `token`.
    pub fn add(&self, fd: RawFd, token: u64, events: Events) -> io::Result<()> {
        epoll::ctl(self.fd, ControlOptions::EPOLL_CTL_ADD, fd, Event::new(events, token))
    }

    /// Changes the events for which `fd` is watched.
    pub fn modify(&self, fd: RawFd, token: u64, events: Events) -> io::Result<()> {
        epoll::ctl(self.fd, ControlOptions::EPOLL_CTL_MOD, fd, Event::new(events, token))
    }

    /// Stops watching `fd`.
    pub fn remove(&self, fd: RawFd) -> io::Result<()> {
        epoll::ctl(self.fd, ControlOptions::EPOLL_CTL_DEL, fd, Event::new(Events::empty(), 0))
    }

    /// Like [`Self::add`], until the [`Watch`] is dropped.
    pub fn watch(self: &Arc<Self>, fd: RawFd, token: u64, events: Events) -> io::Result<Watch> {
        self.add(fd, token, events)?;
        Ok(Watch { poller: Arc::clone(self), fd })
    }

    /// Waits for events, at most `timeout` milliseconds (-1: without limit), and returns their tokens.
    pub fn wait(&self, timeout: i32, tokens: &mut Vec<u64>) -> io::Result<()> {
        tokens.clear();
        self.wait_for(timeout, |token, _| tokens.push(token))
    }

    /// Like [`Self::wait`], and returns with each token the events that occurred.
    pub fn wait_for_events(&self, timeout: i32, ready: &mut Vec<(u64, Events)>) -> io::Result<()> {
        ready.clear();
        self.wait_for(timeout, |token, events| ready.push((token, events)))
    }

    fn wait_for(&self, timeout: i32, mut ready: impl FnMut(u64, Events)) -> io::Result<()> {
        let mut events = [Event::new(Events::empty(), 0); 16];
        match epoll::wait(self.fd, timeout, &mut events) {
            Ok(count) => {
                let events = events.iter().take(count);
                events.for_each(|event| ready(event.data, Events::from_bits_truncate(event.events)));
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }
}

impl AsRawFd for Poller {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

/// A file that is watched, and has to stay open as long. An epoll instance forgets a file only when its last descriptor is
/// closed (epoll(7)): the other side of a socket may have more of them, and this number comes back for another file.
pub struct Watch {
    poller: Arc<Poller>,
    fd: RawFd,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.poller.remove(self.fd);
    }
}

impl Drop for Poller {
    fn drop(&mut self) {
        let _ = epoll::close(self.fd);
    }
}
