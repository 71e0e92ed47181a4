//! The parts of the MirrorGPU process: sockets, threads, timers, memory maps and the command line around
//! `device-model`, which is the device itself.

pub mod args;
pub mod capabilities;
pub mod control;
pub mod display;
pub mod engine;
pub mod error;
pub mod front_end_check;
pub mod inject;
pub mod instruments;
pub mod limits;
pub mod listener;
pub mod memory;
pub mod miss_port;
pub mod queue;
pub mod reports;
pub mod scheduler;
pub mod server;
pub mod session;
pub mod signals;
pub mod trace;
pub mod vhost_user;
pub mod wake;
