//! What can go wrong on this side of the socket. Tests match on it; people read it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::addr::{Gpa, Iova};

/// Result of everything in the soft guest.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of the soft guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("Could not {what}")]
    Io {
        /// What was attempted.
        what: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The `vhost` crate's front-end reports a failure: a broken socket, a malformed or a non-zero reply.
    #[error("Message {message} failed: {source}")]
    Message {
        /// Name of the message.
        message: &'static str,
        /// What the crate said.
        #[source]
        source: vhost::Error,
    },
    /// The back-end answered, but not with the expected message.
    #[error("Message {message} was answered with {got}")]
    Reply {
        /// Name of the message.
        message: &'static str,
        /// What came instead.
        got: String,
    },
    /// The back-end closed the connection.
    #[error("The back-end closed the connection while {what}")]
    Closed {
        /// What was being done.
        what: &'static str,
    },
    /// The back-end did not do something in time.
    #[error("{what} took longer than {after:?}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
    },
    /// The used ring advanced, but the call eventfd was not signalled.
    #[error("The used ring holds {waiting} completions that no interrupt announced within {after:?}")]
    LostInterrupt {
        /// Completions found by looking.
        waiting: u16,
        /// How long the interrupt was waited for.
        after: Duration,
    },
    /// The used ring names a head that is not in flight: completed twice, or never submitted.
    #[error("Used entry {index} names head {head}, which is not in flight")]
    NotInFlight {
        /// Index of the used entry.
        index: u16,
        /// The head it names.
        head: u32,
    },
    /// The ring has no room for this request.
    #[error("Ring is full: {needed} descriptors are needed, {free} are free")]
    RingFull {
        /// Descriptors that the request takes.
        needed: usize,
        /// Descriptors that are free.
        free: usize,
    },
    /// A command was answered with an error.
    #[error("Command {command:#x} was answered with {response:#x}")]
    Command {
        /// Type of the command.
        command: u32,
        /// Type of the response.
        response: u32,
    },
    /// Guest memory has no more free frames.
    #[error("Guest memory has no {wanted} free frames left")]
    OutOfFrames {
        /// Frames asked for.
        wanted: usize,
    },
    /// An address is no guest memory.
    #[error("Guest-physical range {at}+{len:#x} is not guest memory")]
    NotMemory {
        /// First address.
        at: Gpa,
        /// Length in bytes.
        len: u64,
    },
    /// An IOVA is not mapped.
    #[error("IOVA {0} is not mapped")]
    NotMapped(Iova),
    /// Pages were touched after their invalidation had been acknowledged: the back-end broke its promise (I1).
    #[error("{} frame(s) were touched after the ack, the first at guest-physical {}", .0.len(), .0[0])]
    LateTouch(Vec<Gpa>),
    /// The back-end program could not be built or started, or stopped by itself.
    #[error("The back-end {program} {what}{}", tail(.stderr))]
    Backend {
        /// The program.
        program: PathBuf,
        /// What happened.
        what: String,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
    /// The control socket gave an error object, or no JSON.
    #[error("Control command {command} was answered with {got}")]
    Control {
        /// The command.
        command: String,
        /// The line that came.
        got: String,
    },
    /// A counter is missing in the statistics.
    #[error("Statistics have no counter {0}")]
    NoCounter(String),
    /// The picture on the display is not the one that was drawn.
    #[error("Pixel ({x}, {y}) is {got:#08x}, not {wanted:#08x}")]
    Picture {
        /// Column.
        x: u32,
        /// Row.
        y: u32,
        /// What is shown.
        got: u32,
        /// What was drawn.
        wanted: u32,
    },
}

fn tail(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!("; it wrote: {stderr}") }
}

impl Error {
    /// For `map_err` on a system call.
    pub fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// For `map_err` on a call of the `vhost` crate.
    pub fn message(message: &'static str) -> impl FnOnce(vhost::Error) -> Self {
        move |source| Self::Message { message, source }
    }
}
