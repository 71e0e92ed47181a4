//! The other side of MirrorGPU.

pub mod rig;
pub mod soft_guest;
