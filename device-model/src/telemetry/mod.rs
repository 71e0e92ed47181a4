//! What is observed of the device, for the people who debug a driver: the flight recorder ([`record`]), the names of
//! addresses ([`names`]), faults and violations ([`violation`]), counters ([`stats`]), and the [`audit`] of the mirror.
//! Observes; decides nothing that the device does.

// A guest's numbers neither make this code panic nor count past the end of a type. Exceptions name their reason.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::unwrap_used
    )
)]

pub mod audit;
pub mod names;
#[cfg_attr(
    not(test),
    expect(
        clippy::arithmetic_side_effects,
        clippy::indexing_slicing,
        reason = "a track has a power of two of slots, and its counters do not come round in a lifetime"
    )
)]
pub mod record;
#[cfg_attr(not(test), expect(clippy::expect_used, reason = "the bounds of a histogram are constants"))]
pub mod stats;
pub mod violation;
