//! MirrorGPU's device as a state machine: bytes in, values out. No sockets, files, threads or clocks.

pub mod addr;
pub mod scanout;
pub mod stats;
