//! The other side of MirrorGPU.
