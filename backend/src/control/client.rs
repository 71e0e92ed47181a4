//! One client of the control socket: reads bytes, splits them into lines, sends answers. Memory is bounded: while
//! answers are unsent nothing is read. Knows nothing of commands, nor of the kind of its stream.

use std::fs::File;
use std::io::{self, Read, Write};

use super::commands;

/// Maximum length of a line, without its end.
const MAX_LINE: usize = 64 << 10;
/// Maximum number of unsent bytes to which an event is still added.
const MAX_UNASKED: usize = 256 << 10;
/// Maximum number of bytes per read.
const READ: usize = 4 << 10;

/// A connected client. Its socket is used as a file: read(2) and write(2) are in the sandbox, recv(2) is not.
pub(super) struct Client<S = File> {
    stream: S,
    /// Bytes received but not handled: less than a line, unless answers are unsent.
    input: Vec<u8>,
    /// Length of the part that is known to contain no end of a line.
    looked_through: usize,
    /// Bytes to send.
    output: Vec<u8>,
    state: ClientState,
}

/// State of the client's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClientState {
    /// Lines are read and answered.
    Reading,
    /// The rest of a line that was too long is discarded; the error was already sent.
    Skipping,
    /// The client sends no more; the remaining lines are still answered.
    Ended,
    /// The stream has failed: nothing is read or sent.
    Broken,
}

/// The events to watch the client's socket for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    /// Readable.
    Reading,
    /// Writable.
    Writing,
    /// None: close it.
    Over,
}

impl<S: Read + Write> Client<S> {
    /// A client on a nonblocking stream.
    pub(super) fn new(stream: S) -> Self {
        Self { stream, input: Vec::new(), looked_through: 0, output: Vec::new(), state: ClientState::Reading }
    }

    /// Its stream.
    pub(super) fn stream(&self) -> &S {
        &self.stream
    }

    /// Its stream, for tests that play the other side.
    #[cfg(any(test, feature = "test-utils"))]
    pub(super) fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Number of bytes that are buffered for it.
    #[cfg(any(test, feature = "test-utils"))]
    pub(super) fn kept(&self) -> usize {
        self.input.len().saturating_add(self.output.len())
    }

    /// Queues one line for the client.
    pub(super) fn say(&mut self, line: &str) {
        self.output.extend_from_slice(line.as_bytes());
        self.output.push(b'\n');
    }

    /// Queues a line that the client did not ask for; `false` if too much is unsent and the line is dropped.
    pub(super) fn offer(&mut self, line: &str) -> bool {
        let room = self.output.len().saturating_add(line.len()) <= MAX_UNASKED;
        if room {
            self.say(line);
        }
        room
    }

    /// The stream has failed.
    pub(super) fn give_up(&mut self) {
        self.state = ClientState::Broken;
    }

    /// Reads some input, without blocking.
    pub(super) fn receive(&mut self) {
        let mut bytes = [0; READ];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.state = ClientState::Ended,
            Ok(count) => self.input.extend(bytes.iter().take(count)),
            Err(error) if is_temporary(&error) => {}
            Err(_) => self.state = ClientState::Broken,
        }
    }

    /// Sends pending output, and answers lines one by one while the client accepts the answers.
    pub(super) fn work(&mut self, mut answer: impl FnMut(&[u8]) -> String) {
        self.flush();
        while self.output.is_empty() && self.state != ClientState::Broken {
            let Some(line) = self.next_line() else { return };
            if !line.trim_ascii().is_empty() {
                self.say(&answer(&line));
            }
            self.flush();
        }
    }

    /// What to watch the socket for now.
    pub(super) fn interest(&self) -> Interest {
        match self.state {
            ClientState::Broken => Interest::Over,
            _ if !self.output.is_empty() => Interest::Writing,
            ClientState::Ended => Interest::Over,
            ClientState::Reading | ClientState::Skipping => Interest::Reading,
        }
    }

    /// The next line, without its end. At the end of the input, the rest counts as a line.
    fn next_line(&mut self) -> Option<Vec<u8>> {
        loop {
            let mut unseen = self.input.iter().skip(self.looked_through);
            let Some(distance) = unseen.position(|byte| *byte == b'\n') else {
                let line = self.unfinished_line();
                self.looked_through = self.input.len();
                return line;
            };
            let end = self.looked_through.saturating_add(distance);
            self.looked_through = 0;
            let mut line: Vec<u8> = self.input.drain(..=end).collect();
            line.pop();
            if self.state != ClientState::Skipping {
                return Some(line);
            }
            self.state = ClientState::Reading;
        }
    }

    fn unfinished_line(&mut self) -> Option<Vec<u8>> {
        match self.state {
            ClientState::Reading if self.input.len() > MAX_LINE => {
                self.input = Vec::new();
                self.state = ClientState::Skipping;
                let bound = format!("A line has more than {MAX_LINE} bytes; it is ignored up to its end");
                self.say(&commands::error("GenericError", &bound));
                None
            }
            ClientState::Skipping => {
                self.input.clear();
                None
            }
            ClientState::Ended if !self.input.is_empty() => Some(std::mem::take(&mut self.input)),
            _ => None,
        }
    }

    fn flush(&mut self) {
        while !self.output.is_empty() {
            match self.stream.write(&self.output) {
                Ok(0) => return self.give_up(),
                Ok(count) => drop(self.output.drain(..count)),
                Err(error) if is_temporary(&error) => return,
                Err(_) => return self.give_up(),
            }
        }
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_line_that_comes_byte_by_byte_is_looked_through_once() {
        let (stream, mut peer) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut client = Client::new(stream);
        for (said, looked_through) in [("ab", 2), ("c", 3), ("\nde", 2), ("\n\nf", 1)] {
            peer.write_all(said.as_bytes()).unwrap();
            client.receive();
            client.work(|_| String::new());
            assert_eq!((client.looked_through, client.input.len()), (looked_through, looked_through));
        }
    }

    #[test]
    fn nothing_more_is_answered_nor_read_while_an_answer_is_unsent() {
        const LINES: usize = 2000;
        let (stream, mut peer) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut client = Client::new(stream);
        peer.write_all(&b"x\n".repeat(LINES)).unwrap();
        let long = "y".repeat(READ);
        let mut answered = 0;
        client.receive();
        client.work(|_| {
            answered += 1;
            long.clone()
        });
        assert!(answered < LINES, "the peer's socket has taken everything");
        assert!(client.output.len() <= long.len() + 1);
        assert_eq!(client.interest(), Interest::Writing);

        let mut received = vec![0; LINES * (long.len() + 1)];
        let mut so_far = 0;
        while so_far < received.len() {
            so_far += peer.read(&mut received[so_far..]).unwrap();
            client.work(|_| long.clone());
        }
        assert_eq!(client.interest(), Interest::Reading);
    }
}
