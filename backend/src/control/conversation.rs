//! A client of the control socket without the socket: what a tool says, in pieces, and what it hears, as much as it
//! has room for. For tests and for the fuzz target `control_lines`.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use super::client::{Client, Interest};
use super::{Hooks, commands};

/// Both directions of the connection, in memory.
#[derive(Default)]
struct Pipe {
    said: VecDeque<u8>,
    has_hung_up: bool,
    heard: Vec<u8>,
    /// Bytes that the tool takes before it makes the device wait.
    room: usize,
}

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.said.is_empty() && !self.has_hung_up {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.said.read(into)
    }
}

impl Write for Pipe {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let taken = from.len().min(self.room);
        if taken == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.room -= taken;
        self.heard.extend_from_slice(&from[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A client that has connected, with what serves it.
pub struct Conversation {
    hooks: Hooks,
    client: Client<Pipe>,
}

impl Conversation {
    /// The client's side of a fresh connection.
    pub fn new(hooks: Hooks) -> Self {
        Self { hooks, client: Client::new(Pipe::default()) }
    }

    /// The tool says this, and takes up to `room` bytes more of what it is told.
    pub fn say(&mut self, bytes: &[u8], room: usize) {
        let pipe = self.client.stream_mut();
        pipe.said.extend(bytes);
        pipe.room = pipe.room.saturating_add(room);
        self.serve();
    }

    /// The tool says no more, and takes all that it is told.
    pub fn hang_up(&mut self) {
        let pipe = self.client.stream_mut();
        pipe.has_hung_up = true;
        pipe.room = usize::MAX;
        self.serve();
    }

    /// What the tool has heard.
    pub fn heard(&self) -> &[u8] {
        &self.client.stream().heard
    }

    /// Whether the connection would be closed.
    pub fn is_over(&self) -> bool {
        self.client.interest() == Interest::Over
    }

    /// Bytes that the device keeps for this client.
    pub fn kept(&self) -> usize {
        self.client.kept()
    }

    /// Serves the client as the control thread does, until it waits for the tool.
    fn serve(&mut self) {
        loop {
            self.client.work(|line| commands::answer(&self.hooks, line));
            let pipe = self.client.stream();
            match self.client.interest() {
                Interest::Reading if pipe.has_hung_up || !pipe.said.is_empty() => self.client.receive(),
                Interest::Writing if pipe.room > 0 => {}
                Interest::Reading | Interest::Writing | Interest::Over => return,
            }
        }
    }
}
