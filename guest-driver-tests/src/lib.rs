//! The other side of MirrorGPU.

pub mod rig;
