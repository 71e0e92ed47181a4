//! What tests of this crate and of its users share.

pub mod memory;
pub mod requests;
