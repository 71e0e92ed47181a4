//! A guest without a VM.

pub mod addr;
pub mod error;
pub mod frames;
pub mod iommu;
pub mod memory;
pub mod oracle;
pub mod turn;
pub mod wire;
