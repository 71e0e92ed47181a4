//! The least that an exchange over a UNIX socket can cost: another process that waits in epoll, reads a message of an
//! INVALIDATE's size, writes a reply of an ack's size, and does nothing else.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use zerocopy::IntoBytes;

use crate::soft_guest::addr::{Iova, PAGE};
use crate::soft_guest::error::{Error, Result};
use crate::soft_guest::wire::{self, IotlbMessage, NEED_REPLY, REPLY, VERSION, request};

/// Set in the child that plays the echo.
const CHILD: &str = "MIRRORGPU_BENCH_ECHO";
const MESSAGE: usize = 12 + 32;

/// An echo in a process of its own.
#[derive(Debug)]
pub struct Echo {
    child: Child,
    stream: UnixStream,
}

impl Echo {
    /// Starts this program once more, as the echo: its `main` has to call [`serve_if_asked`] first.
    pub fn start() -> Result<Self> {
        let (stream, theirs) = UnixStream::pair().map_err(Error::io("make a socket pair"))?;
        let program = std::env::current_exe().map_err(Error::io("find this program"))?;
        let mut command = Command::new(program);
        command.env(CHILD, "1").stdin(Stdio::from(OwnedFd::from(theirs)));
        Ok(Self { child: command.spawn().map_err(Error::io("start the echo"))?, stream })
    }

    /// How long one exchange takes.
    pub fn exchange(&self) -> Result<Duration> {
        exchange(&self.stream)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // It ends when its socket is closed.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let _ = self.child.wait();
    }
}

/// How long an INVALIDATE of one page takes on this socket, from before its send until after its reply.
pub fn exchange(stream: &UnixStream) -> Result<Duration> {
    let start = Instant::now();
    let message = IotlbMessage::invalidate(Iova(0x1000), PAGE);
    wire::send(stream, request::IOTLB_MSG, VERSION | NEED_REPLY, message.as_bytes(), &[])
        .map_err(Error::io("send an INVALIDATE"))?;
    let reply = wire::receive(stream).map_err(Error::io("read an ack"))?;
    match reply.and_then(|reply| reply.number()) {
        Some(0) => Ok(start.elapsed()),
        other => Err(Error::Reply { message: "IOTLB INVALIDATE", got: format!("{other:?}") }),
    }
}

/// Plays the echo and ends the process, if this is the child; returns at once, if it is not.
pub fn serve_if_asked() {
    if std::env::var_os(CHILD).is_some() {
        let code = i32::from(serve().is_err());
        std::process::exit(code);
    }
}

fn serve() -> std::io::Result<()> {
    let mut socket = UnixStream::from(wire::duplicate(&std::io::stdin()).map(OwnedFd::from)?);
    let epoll = epoll::create(true)?;
    let event = epoll::Event::new(epoll::Events::EPOLLIN, 0);
    epoll::ctl(epoll, epoll::ControlOptions::EPOLL_CTL_ADD, socket.as_raw_fd(), event)?;
    let mut message = [0; MESSAGE];
    let reply = wire::encode(request::IOTLB_MSG, VERSION | REPLY, &0_u64.to_le_bytes());
    loop {
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0)];
        epoll::wait(epoll, -1, &mut events)?;
        socket.read_exact(&mut message)?;
        socket.write_all(&reply)?;
    }
}
