//! The parts of the MirrorGPU process: sockets, threads, timers, memory maps and the command line around
//! `device-model`, which is the device itself.

pub mod display;
pub mod engine;
pub mod error;
pub mod memory;
pub mod miss_port;
pub mod queue;
pub mod scheduler;
pub mod session;
pub mod vhost_user;
pub mod wake;
