//! The serial port to the rig: one JSON object a line, both ways. Knows the words' form, not their meaning.

use crate::error::{AgentError, Doing};
use guest_agent::protocol::{Command, Event};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

/// The port, in raw mode.
pub(crate) struct Port {
    file: File,
    unread: Vec<u8>,
}

impl Port {
    /// Opens the port; without raw mode the terminal layer would echo each command back to the rig.
    pub(crate) fn open(path: &str) -> Result<Self, AgentError> {
        let file = File::options().read(true).write(true).open(path).doing(format!("open {path}"))?;
        make_raw(&file).doing(format!("make {path} raw"))?;
        Ok(Self { file, unread: Vec::new() })
    }

    /// Sends one event.
    pub(crate) fn send(&mut self, event: &Event) -> Result<(), AgentError> {
        let mut line = serde_json::to_vec(event).map_err(io::Error::from).doing("write an event down")?;
        line.push(b'\n');
        self.file.write_all(&line).doing("write to the rig")
    }

    /// The next command; waits for it.
    pub(crate) fn receive(&mut self) -> Result<Command, AgentError> {
        loop {
            if let Some(command) = self.take_line() {
                return command;
            }
            self.fill()?;
        }
    }

    /// The next command if it is there by now.
    pub(crate) fn try_receive(&mut self) -> Result<Option<Command>, AgentError> {
        while wait_readable(self.file.as_fd(), Duration::ZERO).doing("look for a command")? {
            self.fill()?;
        }
        self.take_line().transpose()
    }

    fn fill(&mut self) -> Result<(), AgentError> {
        let mut bytes = [0; 256];
        let count = self.file.read(&mut bytes).doing("read from the rig")?;
        if count == 0 {
            return Err(AgentError::PortClosed);
        }
        self.unread.extend_from_slice(bytes.get(..count).unwrap_or_default());
        Ok(())
    }

    fn take_line(&mut self) -> Option<Result<Command, AgentError>> {
        let end = self.unread.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.unread.drain(..=end).collect();
        let parsed = serde_json::from_slice(&line);
        Some(parsed.map_err(|source| {
            let line = String::from_utf8_lossy(&line).trim().to_owned();
            AgentError::BadCommand { line, source }
        }))
    }
}

fn make_raw(file: &File) -> io::Result<()> {
    // SAFETY: termios consists of integers only, for which zero is a value.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, and `settings` is a termios to write to.
    check(unsafe { libc::tcgetattr(file.as_raw_fd(), &mut settings) })?;
    // SAFETY: `settings` is a termios that tcgetattr has filled.
    unsafe { libc::cfmakeraw(&mut settings) };
    // SAFETY: the descriptor is open, and `settings` is a whole termios.
    check(unsafe { libc::tcsetattr(file.as_raw_fd(), libc::TCSANOW, &settings) })
}

/// Whether `file` can be read within `limit`.
pub(crate) fn wait_readable(file: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let milliseconds = libc::c_int::try_from(limit.as_millis()).unwrap_or(libc::c_int::MAX);
    // SAFETY: one pollfd is passed, and it outlives the call.
    check(unsafe { libc::poll(&mut poll, 1, milliseconds) })?;
    Ok(poll.revents != 0)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
