//! MirrorGPU's device as a state machine: bytes in, values out. No sockets, files, threads or clocks.

pub mod addr;
mod backing;
mod decode;
pub mod device;
mod edid;
pub mod error;
mod fence;
pub mod job;
pub mod mmu;
pub mod quota;
mod rect;
pub mod reply;
mod request;
mod resource;
mod ring;
pub mod scanout;
pub mod stats;
mod sync;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
mod transfer;
mod wire;

pub use decode::command_name;
