//! Code shared by the tests of this crate and of its users.

pub mod folders;
#[cfg(not(loom))]
pub mod frames;
pub mod memory;
#[cfg(not(loom))]
pub mod mirror;
pub mod noise;
pub mod page_tables;
pub mod requests;
#[cfg(not(loom))]
pub mod script;
#[cfg(not(loom))]
pub mod session;
