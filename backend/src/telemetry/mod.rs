//! What the process reports about the device: [`instruments`] collects it, [`reports`] keeps the records of violations
//! and faults, [`trace`] writes the flight recorder for Perfetto.

pub mod instruments;
pub mod reports;
pub mod trace;
