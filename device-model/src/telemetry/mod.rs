//! What is observed of the device, for the people who debug a driver: the flight recorder ([`record`]), the names of
//! addresses ([`names`]), faults and violations ([`violation`]), counters ([`stats`]), and the [`audit`] of the mirror.
//! Observes; decides nothing that the device does.

pub mod audit;
pub mod names;
pub mod record;
pub mod stats;
pub mod violation;
