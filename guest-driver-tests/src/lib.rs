//! The other side of MirrorGPU.

pub mod bench;
pub mod rig;
pub mod soft_guest;

pub mod suite;
