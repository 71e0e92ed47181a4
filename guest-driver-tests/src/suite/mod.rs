//! The suite: numbered scenarios for drivers and the device, without a VM and in real guests, and their results. Made
//! of, from the outside in:
//!
//! - `table`: all scenarios, and which parts run where;
//! - `driver_bugs`: deliberate bugs of a driver;
//! - `scenarios`: what they do, one file per group; on a `stage`, which uses a `machine`;
//! - `hmm`: the kernel's own tests, in the words of `kselftest`;
//! - `score`: which scenarios catch which seeded bug;
//! - `results`: what a run of the suite has shown; `failure`: why a scenario failed; `report`: how results are
//!   presented.
//!
//! Scenarios are written once for both levels: what differs between a guest without a VM and a real one is a machine.

pub mod driver_bugs;
mod excerpt;
pub mod failure;
pub mod hmm;
pub mod kselftest;
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
