//! A guest without a VM.

pub mod addr;
pub mod display;
pub mod dma;
pub mod driver;
pub mod error;
pub mod frames;
pub mod front_end;
pub mod gpu;
pub mod iommu;
mod link;
pub mod memory;
pub mod misses;
pub mod oracle;
pub mod turn;
pub mod virtqueue;
pub mod wire;
