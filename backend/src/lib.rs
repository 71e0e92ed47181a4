//! The parts of the MirrorGPU process: sockets, threads, timers, memory maps and the command line around
//! `device-model`, which is the device itself.

pub mod args;
pub mod capabilities;
pub mod control;
pub mod display;
pub mod inject;
pub mod limits;
pub mod listener;
pub mod signals;
