//! A client of the control socket without the socket: a tool sends pieces of input, and receives as much output as it
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
    /// Number of bytes that the tool accepts before writes would block.
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

/// A connected client, and the code that serves it.
pub struct Conversation {
    hooks: Hooks,
    client: Client<Pipe>,
}

impl Conversation {
    /// The client's side of a new connection.
    pub fn new(hooks: Hooks) -> Self {
        Self { hooks, client: Client::new(Pipe::default()) }
    }

    /// The tool sends these bytes, and accepts up to `room` more bytes of output.
    pub fn say(&mut self, bytes: &[u8], room: usize) {
        let pipe = self.client.stream_mut();
        pipe.said.extend(bytes);
        pipe.room = pipe.room.saturating_add(room);
        self.serve();
    }

    /// The tool sends no more, and accepts all output.
    pub fn hang_up(&mut self) {
        let pipe = self.client.stream_mut();
        pipe.has_hung_up = true;
        pipe.room = usize::MAX;
        self.serve();
    }

    /// The output that the tool has received.
    pub fn heard(&self) -> &[u8] {
        &self.client.stream().heard
    }

    /// Whether the connection would be closed now.
    pub fn is_over(&self) -> bool {
        self.client.interest() == Interest::Over
    }

    /// Number of bytes that the device buffers for this client.
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
