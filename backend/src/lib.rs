//! The MirrorGPU process: sockets, threads, timers, memory maps and the command line around `device-model`, which is
//! the device itself.

pub mod allocator;
pub mod args;
pub mod capabilities;
pub mod control;
pub mod display;
pub mod engines;
pub mod error;
pub mod faults;
pub mod front_end_check;
pub mod limits;
pub mod listener;
pub mod queues;
pub mod sandbox;
pub mod server;
pub mod signals;
pub mod telemetry;
pub mod threads;
pub mod vhost_user;
pub mod wake;
