//! The process around the sessions: serves one front-end after another, each from a clean state. Ends after the first
//! (`--once`, a connected `--fd`) or when a signal comes.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use device_model::telemetry::stats::Stats;
use epoll::Events;
use log::{info, warn};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::allocator;
use crate::listener::{Inherited, ListenError, PathListener};
use crate::session::Session;
use crate::session::start::{DeviceSettings, start};
use crate::signals::StopSignals;
use crate::telemetry::instruments::Instruments;
use crate::vhost_user::session_end::SessionEnd;
use crate::wake::{Poller, Waker};

const LISTENER: u64 = 0;
const SIGNAL: u64 = 1;
/// How long to wait after a failed accept.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The source of front-ends.
pub enum Source {
    /// A socket with a path.
    Path(PathListener),
    /// An inherited listening socket.
    Listening(UnixListener),
    /// An inherited connection, which is the only front-end.
    Connected(UnixStream),
}

impl Source {
    /// Listens on `path`.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        PathListener::bind(path).map(Self::Path)
    }

    fn listener(&self) -> Option<&UnixListener> {
        match self {
            Self::Path(listener) => Some(listener.listener()),
            Self::Listening(listener) => Some(listener),
            Self::Connected(_) => None,
        }
    }

    /// Its name in the log.
    fn name(&self) -> String {
        match self {
            Self::Path(listener) => listener.path().display().to_string(),
            Self::Listening(listener) => format!("file descriptor {}", listener.as_raw_fd()),
            Self::Connected(stream) => format!("file descriptor {}", stream.as_raw_fd()),
        }
    }
}

impl From<Inherited> for Source {
    fn from(inherited: Inherited) -> Self {
        match inherited {
            Inherited::Listening(listener) => Self::Listening(listener),
            Inherited::Connected(stream) => Self::Connected(stream),
        }
    }
}

/// Serves the front-ends.
pub struct Server {
    /// The configuration of each device.
    pub device: DeviceSettings,
    /// The counters, for all connections.
    pub stats: Arc<Stats>,
    /// The instruments, for all connections.
    pub instruments: Arc<Instruments>,
    /// Signals that end the process.
    pub signals: StopSignals,
    /// Whether to end after the first front-end.
    pub once: bool,
    /// Whether front-ends are checked.
    pub check_front_end: bool,
}

impl Server {
    /// Serves front-ends until there are no more.
    pub fn run(&self, source: Source) -> io::Result<()> {
        let name = source.name();
        let Some(listener) = source.listener() else {
            let Source::Connected(stream) = source else { unreachable!("Only a connection has no listener") };
            info!("Serving {name}");
            self.serve(stream)?;
            return Ok(());
        };
        listener.set_nonblocking(true)?;
        let poller = Poller::new()?;
        poller.add(listener.as_raw_fd(), LISTENER, Events::EPOLLIN)?;
        poller.add(self.signals.as_raw_fd(), SIGNAL, Events::EPOLLIN)?;
        // Launchers wait for this line, so it does not depend on the log level.
        eprintln!("mirrorgpu: listening on {name}");
        while let Some(stream) = self.accept(listener, &poller)? {
            match self.serve(stream) {
                Ok(SessionEnd::Signal) => break,
                Ok(_) => {}
                // A temporary lack of threads or descriptors: only this front-end is disconnected.
                Err(e) => warn!("A front-end cannot be served: {e}"),
            }
            allocator::trim();
            if self.once {
                break;
            }
        }
        Ok(())
    }

    /// The next front-end; `None` if a signal came instead.
    fn accept(&self, listener: &UnixListener, poller: &Poller) -> io::Result<Option<UnixStream>> {
        let mut tokens = Vec::new();
        loop {
            poller.wait(-1, &mut tokens)?;
            if tokens.contains(&SIGNAL) {
                return Ok(None);
            }
            match listener.accept() {
                Ok((stream, _)) => {
                    // Linux does not inherit the listener's flag; explicit, as the session needs a blocking socket.
                    stream.set_nonblocking(false)?;
                    return Ok(Some(stream));
                }
                Err(e) if is_passing(&e) => {}
                Err(e) => {
                    warn!("No front-end can be taken just now: {e}");
                    // The client is still pending, so another accept would fail immediately.
                    self.pause(ACCEPT_PAUSE)?;
                }
            }
        }
    }

    /// Waits this long, or until a signal comes. Opens no descriptor: there may be none left.
    fn pause(&self, time: Timespec) -> io::Result<()> {
        match rustix::event::poll(&mut [PollFd::new(&self.signals, PollFlags::IN)], Some(&time)) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn serve(&self, stream: UnixStream) -> io::Result<SessionEnd> {
        self.stats.connections.add(1);
        let waker = Waker::new()?;
        let mut state = start(&self.device, &self.stats, &self.instruments, &waker)?;
        if self.check_front_end {
            state.check_front_end(self.device.miss_timeout);
        }
        let session = Session::new(stream, state, waker, &self.signals)?;
        info!("A front-end has connected");
        let end = session.run();
        match &end {
            SessionEnd::Closed | SessionEnd::Signal => info!("{end}"),
            _ => warn!("Session ended: {}", crate::error::chain(&end)),
        }
        Ok(end)
    }
}

/// Whether accept may be tried again: the client has gone, or another process accepted it.
fn is_passing(error: &io::Error) -> bool {
    let passing = [Errno::AGAIN, Errno::CONNABORTED, Errno::INTR, Errno::PROTO];
    Errno::from_io_error(error).is_some_and(|code| passing.contains(&code))
}
