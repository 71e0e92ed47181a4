//! The MirrorGPU back-end.

fn main() {}
