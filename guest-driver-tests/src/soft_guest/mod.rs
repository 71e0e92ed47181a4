//! A guest without a VM: a front-end, an IOMMU with scattered frames, a virtio-gpu driver, a display and the
//! late-touch oracle, all in one process, against a back-end in another. It does what QEMU and Linux were observed to
//! do, in the same order, and odder things on request.
//!
//! ```text
//!  driver ─ virtqueue ─ dma ─┐                        ┌─ display socket ─ display
//!  dma_api ── oracle         ├─ memory, frames        │
//!     │         iommu ───────┘                   back-end process ─ control socket
//!  front_end ─ link ─ main socket ────────────────────┤
//!  misses ─── back-end channel ───────────────────────┘
//! ```
//!
//! The big lock is the one around the main socket ([`front_end::FrontEnd::freeze`]): a thread that waits for a reply
//! holds it, and the miss service needs it, so no miss is served while an INVALIDATE waits for its ack.
//!
//! Knows only the protocols of the back-end: none of its code is used here.

pub mod addr;
pub mod backend;
pub mod control;
pub mod demo;
pub mod display;
pub mod dma;
pub mod dma_api;
pub mod driver;
pub mod error;
pub mod frames;
pub mod front_end;
pub mod frozen;
pub mod gpu;
pub mod guest;
mod handshake;
pub mod iommu;
pub mod jobs;
mod link;
pub mod memory;
pub mod misses;
pub mod oracle;
pub mod page_tables;
pub mod turn;
pub mod turns;
pub mod virtqueue;
pub mod wire;

pub use addr::{Gpa, Iova, PAGE, Permission, UserAddr};
pub use backend::{Backend, use_program};
pub use control::Stats;
pub use display::Manner;
pub use driver::Queue;
pub use error::{Error, Result};
pub use gpu::{Command, Format, Rect, kind};
pub use guest::{GuestConfig, SoftGuest, Surface, picture};
pub use jobs::JobGuest;
pub use link::Ack;
pub use misses::Answer;
pub use page_tables::PageTables;
