//! The suite: numbered scenarios that drivers and the device are put through, without a VM and in real guests, and what
//! came of them. Made of, from the outside in:
//!
//! - `table`: all scenarios, with what shows each where;
//! - `driver_bugs`: what a driver does wrong, made on purpose;
//! - `scenarios`: what they do, one file a group; on a `stage`, which stands on a `machine`;
//! - `score`: who catches which seeded bug;
//! - `results`: what a run of the suite has shown; `failure`: why a scenario did not hold; `report`: how it is told.
//!
//! Scenarios are written once for both levels: what differs between a guest without a VM and a real one is a machine.

pub mod driver_bugs;
mod excerpt;
pub mod failure;
pub mod machine;
pub mod real;
pub mod report;
pub mod results;
pub mod retry;
pub mod runner;
mod scenarios;
pub mod score;
pub mod soft;
pub mod stage;
pub mod table;
