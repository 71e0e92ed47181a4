//! The control socket (`--control-socket`): tools send commands, one JSON object per line, in the style of QEMU's QMP.
//!
//! One thread serves all clients with one epoll. The device never waits for it, nor for a client: the memory used for a
//! client is bounded, and a client that does not read its answers is not read from. Bad input gets an error object,
//! never a disconnect. Commands are rows of one table ([`commands`]); lines are split in [`client`].

mod client;
mod commands;
#[cfg(any(test, feature = "test-utils"))]
pub mod conversation;
#[cfg(test)]
mod tests;
mod views;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;

use device_model::telemetry::stats::Stats;
use epoll::Events;

use crate::fault_injection::Injection;
use crate::listener::PathListener;
use crate::telemetry::instruments::Instruments;
use crate::thread_kind::ThreadKind;
use crate::threads::pool::spawn_confined;
use crate::wake::{Poller, Waker};
use client::{Client, Interest};

/// Maximum number of clients; a further one gets an error and is disconnected.
const MAX_CLIENTS: usize = 8;
/// After a failed accept (no descriptors left), no client is accepted for this long.
const ACCEPT_PAUSE_MS: i32 = 1000;

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const OUTBOX: u64 = 2;
/// Epoll token of the first client; the others follow.
const CLIENTS: u64 = 3;

/// What commands have access to.
pub struct Hooks {
    /// The counters.
    pub stats: Arc<Stats>,
    /// The device's instruments.
    pub instruments: Arc<Instruments>,
    /// The injected faults.
    pub injection: Arc<Injection>,
    /// Asks the process to end, and returns at once.
    pub stop: Box<dyn Fn() + Send>,
}

/// The running control socket. Dropping it disconnects the clients and removes the socket.
pub struct ControlServer {
    wake: Waker,
    thread: Option<JoinHandle<()>>,
    /// Removed by the owner: the control thread may remove no file.
    _listener: Arc<PathListener>,
}

impl ControlServer {
    /// Serves clients of `listener` on its own thread.
    pub fn start(listener: PathListener, hooks: Hooks) -> io::Result<Self> {
        let wake = Waker::new()?;
        let listener = Arc::new(listener);
        let mut server = Server::new(Arc::clone(&listener), hooks, wake.clone())?;
        let body = move || {
            if let Err(error) = server.run() {
                log::error!("The control socket is out of service: {error}");
            }
        };
        let thread = spawn_confined(ThreadKind::Control, ThreadKind::Control.name(), body)?;
        Ok(Self { wake, thread: Some(thread), _listener: listener })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.wake.wake();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("The control thread has panicked");
        }
    }
}

/// The control thread's state.
struct Server {
    poller: Poller,
    listener: Arc<PathListener>,
    /// Watched by the poller, so it has to stay open as long as that.
    _wake: Waker,
    hooks: Hooks,
    clients: [Option<Client>; MAX_CLIENTS],
    /// False while accepting is paused.
    accepting: bool,
}

impl Server {
    fn new(listener: Arc<PathListener>, hooks: Hooks, wake: Waker) -> io::Result<Self> {
        listener.listener().set_nonblocking(true)?;
        let poller = Poller::new()?;
        hooks.instruments.outbox.open();
        poller.add(wake.as_raw_fd(), WAKE, Events::EPOLLIN)?;
        poller.add(listener.as_raw_fd(), LISTENER, Events::EPOLLIN)?;
        poller.add(hooks.instruments.outbox.as_raw_fd(), OUTBOX, Events::EPOLLIN)?;
        Ok(Self { poller, listener, _wake: wake, hooks, clients: Default::default(), accepting: true })
    }

    /// Serves clients until the handle wakes the thread.
    fn run(&mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        loop {
            let timeout = if self.accepting { -1 } else { ACCEPT_PAUSE_MS };
            self.poller.wait_for_events(timeout, &mut ready)?;
            if ready.is_empty() {
                self.accept_again(true)?;
            }
            for &(token, events) in &ready {
                match token {
                    WAKE => return Ok(()),
                    LISTENER => self.accept()?,
                    OUTBOX => self.publish()?,
                    client => self.serve(client.saturating_sub(CLIENTS) as usize, events)?,
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        match self.listener.listener().accept() {
            Ok((stream, _)) => {
                // A client that cannot be set up is dropped, which disconnects it; the others are not affected.
                if let Err(error) = self.admit(stream) {
                    log::debug!("A client of the control socket was turned away: {error}");
                }
                Ok(())
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {
                    Ok(())
                }
                _ => self.accept_again(false),
            },
        }
    }

    /// The listener is level-triggered: it would wake the thread in a loop while no descriptor is left, so it pauses.
    fn accept_again(&mut self, accepting: bool) -> io::Result<()> {
        self.accepting = accepting;
        let events = if accepting { Events::EPOLLIN } else { Events::empty() };
        self.poller.modify(self.listener.as_raw_fd(), LISTENER, events)
    }

    fn admit(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let mut stream = File::from(OwnedFd::from(stream));
        let Some(index) = self.clients.iter().position(Option::is_none) else {
            let refusal =
                commands::error("GenericError", &format!("{MAX_CLIENTS} clients are connected already"));
            return stream.write_all(format!("{refusal}\n").as_bytes());
        };
        let fd = stream.as_raw_fd();
        self.poller.add(fd, CLIENTS + index as u64, Events::empty())?;
        let mut client = Client::new(stream);
        client.say(&commands::greeting());
        if let Some(slot) = self.clients.get_mut(index) {
            *slot = Some(client);
        }
        self.settle(index)
    }

    /// Sends the pending events to all clients. A client that does not read misses them.
    fn publish(&mut self) -> io::Result<()> {
        let events = self.hooks.instruments.outbox.take();
        let mut missed = 0;
        for index in 0..MAX_CLIENTS {
            let Some(client) = self.clients.get_mut(index).and_then(Option::as_mut) else { continue };
            missed += events.iter().filter(|event| !client.offer(event)).count();
            self.settle(index)?;
        }
        if missed > 0 {
            self.hooks.instruments.outbox.dropped(missed as u64);
        }
        Ok(())
    }

    fn serve(&mut self, index: usize, events: Events) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        if events.contains(Events::EPOLLIN) {
            client.receive();
        }
        if events.intersects(Events::EPOLLERR | Events::EPOLLHUP) && !events.contains(Events::EPOLLIN) {
            client.give_up();
        }
        self.settle(index)
    }

    /// Answers what can be answered, and watches the socket for what is needed next.
    fn settle(&mut self, index: usize) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        client.work(|line| commands::answer(&self.hooks, line));
        let (fd, interest) = (client.stream().as_raw_fd(), client.interest());
        let events = match interest {
            Interest::Reading => Events::EPOLLIN,
            Interest::Writing => Events::EPOLLOUT,
            Interest::Over => {
                // Closing the descriptor also removes it from the epoll, as it has no duplicate.
                self.clients.get_mut(index).map(Option::take);
                return Ok(());
            }
        };
        self.poller.modify(fd, CLIENTS + index as u64, events)
    }
}
