//! The control socket (`--control-socket`): tools ask, one JSON object a line, in the manner of QEMU's QMP.
//!
//! One thread serves all clients with one epoll. The device never waits for it, nor for a client: what a client may
//! make us keep is bounded, and one that does not read its answers is not read from. Bad input gets an error object,
//! never a disconnect. Commands are rows of one table ([`commands`]); lines are cut in [`client`].

mod client;
mod commands;
#[cfg(any(test, feature = "test-utils"))]
pub mod conversation;
#[cfg(test)]
mod tests;
mod views;

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use device_model::telemetry::stats::Stats;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::faults::Injection;
use crate::listener::PathListener;
use crate::telemetry::instruments::Instruments;
use client::{Client, Interest};

/// Most clients at once; a further one is told so and let go.
const MAX_CLIENTS: usize = 8;
/// After a failed accept (no descriptors left), clients are not accepted for this long.
const ACCEPT_PAUSE_MS: i32 = 1000;

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
const OUTBOX: u64 = 2;
/// Tokens from here on are indices of clients.
const CLIENTS: u64 = 3;

/// What commands may do to the process.
pub struct Hooks {
    /// What is counted.
    pub stats: Arc<Stats>,
    /// What watches the device.
    pub instruments: Arc<Instruments>,
    /// What misbehaves.
    pub injection: Arc<Injection>,
    /// Asks the process to end, and returns at once.
    pub stop: Box<dyn Fn() + Send>,
}

/// The running control socket. Its end closes the clients and removes the socket.
pub struct ControlServer {
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Serves clients of `listener` on a thread of its own.
    pub fn start(listener: PathListener, hooks: Hooks) -> io::Result<Self> {
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let mut server = Server::new(listener, hooks, wake.try_clone()?)?;
        let body = move || {
            if let Err(error) = server.run() {
                log::error!("The control socket is out of service: {error}");
            }
        };
        let thread = thread::Builder::new().name("control".to_owned()).spawn(body)?;
        Ok(Self { wake, thread: Some(thread) })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        // The counter of an eventfd that nobody else writes to cannot overflow.
        let woken = self.wake.write(1).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken)
            && thread.join().is_err()
        {
            log::error!("The control thread has panicked");
        }
    }
}

/// The control thread's own things.
struct Server {
    epoll: Epoll,
    listener: PathListener,
    wake: EventFd,
    hooks: Hooks,
    clients: [Option<Client>; MAX_CLIENTS],
    /// False while accepting pauses.
    accepting: bool,
}

impl Server {
    fn new(listener: PathListener, hooks: Hooks, wake: EventFd) -> io::Result<Self> {
        listener.listener().set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        hooks.instruments.outbox.open();
        let server = Self { epoll, listener, wake, hooks, clients: Default::default(), accepting: true };
        server.watch(ControlOperation::Add, server.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        server.watch(ControlOperation::Add, server.listener.as_raw_fd(), EventSet::IN, LISTENER)?;
        server.watch(
            ControlOperation::Add,
            server.hooks.instruments.outbox.as_raw_fd(),
            EventSet::IN,
            OUTBOX,
        )?;
        Ok(server)
    }

    fn watch(&self, operation: ControlOperation, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.epoll.ctl(operation, fd, EpollEvent::new(events, token))
    }

    /// Serves until it is woken by its handle.
    fn run(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); MAX_CLIENTS + 3];
        loop {
            let timeout = if self.accepting { -1 } else { ACCEPT_PAUSE_MS };
            let count = match self.epoll.wait(timeout, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if count == 0 {
                self.accept_again(true)?;
            }
            for event in events.iter().take(count) {
                match event.data() {
                    WAKE => return Ok(()),
                    LISTENER => self.accept()?,
                    OUTBOX => self.publish()?,
                    client => self.serve(client.saturating_sub(CLIENTS) as usize, event.event_set())?,
                }
            }
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        match self.listener.listener().accept() {
            Ok((stream, _)) => {
                // A client that cannot be set up is dropped, which closes it; the others do not suffer.
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

    /// Level-triggered, the listener would wake us without end while no descriptor is left: so it pauses.
    fn accept_again(&mut self, accepting: bool) -> io::Result<()> {
        self.accepting = accepting;
        let events = if accepting { EventSet::IN } else { EventSet::empty() };
        self.watch(ControlOperation::Modify, self.listener.as_raw_fd(), events, LISTENER)
    }

    fn admit(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let Some(index) = self.clients.iter().position(Option::is_none) else {
            let refusal =
                commands::error("GenericError", &format!("{MAX_CLIENTS} clients are connected already"));
            return (&stream).write_all(format!("{refusal}\n").as_bytes());
        };
        let fd = stream.as_raw_fd();
        self.watch(ControlOperation::Add, fd, EventSet::empty(), CLIENTS + index as u64)?;
        let mut client = Client::new(stream);
        client.say(&commands::greeting());
        if let Some(slot) = self.clients.get_mut(index) {
            *slot = Some(client);
        }
        self.settle(index)
    }

    /// Gives what has happened to all clients. One that does not read misses it.
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

    fn serve(&mut self, index: usize, events: EventSet) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        if events.contains(EventSet::IN) {
            client.receive();
        }
        if events.intersects(EventSet::ERROR | EventSet::HANG_UP) && !events.contains(EventSet::IN) {
            client.give_up();
        }
        self.settle(index)
    }

    /// Answers what can be answered, and watches for what is awaited next.
    fn settle(&mut self, index: usize) -> io::Result<()> {
        let Some(client) = self.clients.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        client.work(|line| commands::answer(&self.hooks, line));
        let (fd, interest) = (client.stream().as_raw_fd(), client.interest());
        let events = match interest {
            Interest::Reading => EventSet::IN,
            Interest::Writing => EventSet::OUT,
            Interest::Over => {
                // Closing the descriptor takes it out of the epoll too: it has no duplicate.
                self.clients.get_mut(index).map(Option::take);
                return Ok(());
            }
        };
        self.watch(ControlOperation::Modify, fd, events, CLIENTS + index as u64)
    }
}
