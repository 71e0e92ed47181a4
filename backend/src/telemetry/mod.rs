//! How the process reports on the device: [`instruments`] collects, [`reports`] writes findings for people, [`trace`] writes
//! the flight recorder for Perfetto.

pub mod instruments;
pub mod reports;
pub mod trace;
