//! Why a session ended, as a value; the session itself is in `crate::session`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use device_model::session::Refusal;

use crate::threads::ThreadFailure;
use crate::vhost_user::peek::PeekError;

/// Time limit for the rest of a message, and for the first message of a connection.
pub(crate) const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// The front-end has closed its end.
    #[error("The front-end has closed the connection")]
    Closed,
    /// SIGTERM or SIGINT was received.
    #[error("A signal asked the process to end")]
    Signal,
    /// The bytes received are not a vhost-user message.
    #[error("The front-end does not speak vhost-user")]
    NoMessage(#[from] PeekError),
    /// A message did not arrive completely in time.
    #[error("The front-end left a message unfinished for {MESSAGE_DEADLINE:?}")]
    Unfinished,
    /// The `vhost` crate could not handle a message.
    #[error("Message {code} of the front-end cannot be handled")]
    Request {
        /// Its number.
        code: u32,
        /// Error of the crate.
        #[source]
        source: vhost::vhost_user::Error,
    },
    /// A request was refused, and the front-end did not ask for a reply.
    #[error("Message {code} of the front-end is refused")]
    Refused {
        /// Its number.
        code: u32,
        /// Reason of the refusal.
        #[source]
        why: Refusal,
    },
    /// A message that must carry exactly one descriptor does not.
    #[error("Message {code} came with {count} descriptors instead of one")]
    Descriptors {
        /// Its number.
        code: u32,
        /// Number of descriptors received.
        count: usize,
    },
    /// A socket or epoll failed.
    #[error("The session's sockets failed")]
    Io(#[from] io::Error),
    /// A file behind the guest's memory became shorter than the memory table says.
    #[error("The front-end's memory has lost pages that the memory table has: a file was truncated")]
    MemoryLost,
    /// An engine did not reach the end of its step in time: memory was revoked.
    #[error("An engine did not reach the end of a step: guest memory was revoked, and the session is over")]
    Revoked,
    /// A thread of the device has failed: requests to it would never be answered.
    #[error("A thread of the device has failed")]
    ThreadFailed(#[source] Arc<ThreadFailure>),
}
