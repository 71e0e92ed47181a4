//! The virtio-gpu device: commands and their replies, resources, contexts, scanouts, fences. [`device`] is the state
//! machine that a queue thread drives; the other files are its parts, one noun each. Knows nothing of sockets, threads or
//! the session with the front-end; what touches guest memory is a job of [`crate::jobs`].

pub mod context;
mod decode;
pub mod device;
mod edid;
pub mod error;
mod fence;
pub mod quota;
mod rect;
pub mod reply;
pub(crate) mod request;
pub(crate) mod resource;
mod ring;
pub mod scanout;

pub use decode::command_name;
