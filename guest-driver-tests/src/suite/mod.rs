//! The suite: numbered scenarios that drivers and the device are put through, without a VM and in real guests, and what
//! came of them. Made of `results` (what a run of the suite has shown) and `report` (how it is told). Knows nothing of
//! QEMU or of the soft guest's parts.

pub mod report;
pub mod results;
