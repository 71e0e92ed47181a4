//! MirrorGPU's device as a state machine: bytes in, values out. No sockets, files, threads or clocks.
//!
//! # The mirror contract
//!
//! 1. A translation is cached for what its own MISS proved, and for nothing more (`mmu::miss`, `MirrorWriter::map`).
//! 2. Guest memory is touched only inside a [`mmu::Section`], for a bounded step, or under a [`mmu::Pin`].
//! 3. An invalidation is begun (nothing of it can be pinned or found any more), drained (the sections that were open
//!    have left, the pins that overlap it are dropped) and ended, in this order; each step is a value that only the
//!    step before yields, and an ack takes the last one.
//! 4. Once it is acked, no access goes through a translation of its range that was valid before it.
//! 5. A drain waits for sections and pins and for nothing else; it never blocks, and the last one out wakes it.
//! 6. So code that holds a section or a pin must not wait for anything that an ack may delay: no lock that is held
//!    across a step, no MISS, no message, no fence.
//! 7. Forgetting a translation needs no drain, and losing one costs a MISS; keeping one too long is never allowed.
//!
//! The locking order is in ARCHITECTURE.md, "Locking order".

pub mod addr;
pub mod gpu;
pub mod image;
pub mod jobs;
pub mod locking;
pub mod mmu;
mod running_clock;
pub mod session;
#[cfg(all(any(test, feature = "test-utils"), not(loom)))]
pub mod simulation;
mod sync;
pub mod telemetry;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
mod wire;
