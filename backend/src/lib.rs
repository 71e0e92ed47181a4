//! The parts of the MirrorGPU process: sockets, threads, timers, memory maps and the command line around
//! `device-model`, which is the device itself.

pub mod display;
