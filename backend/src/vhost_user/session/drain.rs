//! What a session owes its front-end: a reply that waits for a drain. While anything is owed, nothing more is
//! read from the main socket, for replies go out in order. The session never blocks on it: it looks here whenever
//! it wakes up, and at the deadlines. The drain itself, with its ladder, is [`device_model::session::drain`].

pub use device_model::session::drain::STEP_END;

use std::time::Duration;

use device_model::mmu::Drained;

use crate::vhost_user::{Ack, Header};

/// What the drain is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum For {
    /// An INVALIDATE that was taken off the socket: it is acked after the drain.
    Invalidate(Header),
    /// A message that is still unread: it is handled after the drain.
    Message(Header),
}

/// A drain that is not over.
pub type Draining = device_model::session::drain::Draining<For>;

/// What is to be done about a drain.
pub type Progress = device_model::session::drain::Progress<For>;

/// What is owed on the main socket.
#[derive(Debug, Default)]
pub enum Owed {
    /// Nothing: the next message may be read.
    #[default]
    Nothing,
    /// A drain, and what follows it.
    Drain(Draining),
    /// An ack that is held back (`--inject delay-ack`), until then.
    Late(Header, Drained, Duration, Duration),
    /// A reply that did not fit the socket.
    Unsent(Ack),
}
