//! A guest without a VM.

pub mod addr;
pub mod backend;
pub mod control;
pub mod display;
pub mod dma;
pub mod dma_api;
pub mod driver;
pub mod error;
pub mod frames;
pub mod front_end;
pub mod gpu;
pub mod guest;
mod handshake;
pub mod iommu;
mod link;
pub mod memory;
pub mod misses;
pub mod oracle;
pub mod turn;
pub mod virtqueue;
pub mod wire;
