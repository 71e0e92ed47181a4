//! The other side of MirrorGPU.

pub mod soft_guest;
