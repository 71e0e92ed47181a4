//! The session with the front-end, as far as it needs no socket.

pub mod drain;
pub mod miss_port;

#[cfg(all(test, loom))]
mod loom_models;
