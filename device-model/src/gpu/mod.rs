//! The virtio-gpu device: commands and their replies, resources, contexts, scanouts, fences. [`device`] is the state
//! machine that a queue thread drives; the other files are its parts, one noun each. Knows nothing of sockets, threads
//! or the session with the front-end; what touches guest memory is a job of [`crate::jobs`].

// Guest-controlled numbers must not make this code panic or overflow. Exceptions state their reason.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::unwrap_used
    )
)]

pub(crate) mod address_spaces;
pub mod context;
mod decode;
pub mod device;
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        reason = "the block has a constant size, and sizes of a picture are clamped before they are packed"
    )
)]
mod edid;
pub mod error;
mod faults;
mod fence;
pub(crate) mod payload;
pub mod quota;
pub mod reply;
pub(crate) mod request;
pub(crate) mod resource;
mod ring;
pub mod scanout;

pub use decode::command_name;
