//! The back-end that is measured: ours, or any vhost-user GPU that is started by a command line.

use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::soft_guest::error::{Error, Result};
use crate::soft_guest::{Backend, GuestConfig, SoftGuest};

/// What stands for the socket's path in a command line.
const SOCKET: &str = "SOCKET";
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// A running back-end.
#[derive(Debug)]
pub enum Subject {
    /// MirrorGPU.
    Ours(Box<Backend>),
    /// Another one.
    Peer(Peer),
}

/// A back-end that is only known by its command line.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    directory: tempfile::TempDir,
}

impl Subject {
    /// MirrorGPU with these arguments.
    pub fn ours(args: &[&str]) -> Result<Self> {
        let all: Vec<&str> = args.iter().chain(&["--log-level", "error"]).copied().collect();
        Ok(Self::Ours(Box::new(Backend::start(&all)?)))
    }

    /// The back-end of a command line in which `SOCKET` stands for the path at which it is to listen.
    pub fn peer(command_line: &str) -> Result<Self> {
        let directory = tempfile::tempdir().map_err(Error::io("make a temporary directory"))?;
        let socket = directory.path().join("gpu.sock").to_string_lossy().into_owned();
        let mut words = command_line.split_whitespace().map(|word| word.replace(SOCKET, &socket));
        let program = words.next().unwrap_or_default();
        let mut command = Command::new(&program);
        command.args(words).stdin(Stdio::null());
        let child = command.spawn().map_err(Error::io(format!("start {program}")))?;
        Ok(Self::Peer(Peer { child, directory }))
    }

    /// Boots a guest on it. A peer that listens late is waited for.
    pub fn boot(&self, config: GuestConfig) -> Result<SoftGuest> {
        match self {
            Self::Ours(backend) => SoftGuest::boot(backend, config),
            Self::Peer(peer) => SoftGuest::boot_on(peer.connect()?, config),
        }
    }

    /// Ours, for what only ours has.
    pub fn backend(&self) -> Option<&Backend> {
        match self {
            Self::Ours(backend) => Some(backend),
            Self::Peer(_) => None,
        }
    }
}

impl Peer {
    fn connect(&self) -> Result<UnixStream> {
        let socket = self.directory.path().join("gpu.sock");
        let end = Instant::now() + START_TIMEOUT;
        loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() > end => {
                    return Err(Error::io(format!("connect to {}", socket.display()))(error));
                }
                // It has not bound its socket yet, and nothing tells when it has.
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
