//! What is observed of the device, for people who debug a driver: the flight recorder ([`record`]), the names of
//! addresses ([`names`]), faults and violations ([`violation`]), counters ([`stats`]), and the [`audit`] of the mirror.
//! Observes; decides nothing that the device does.

// Guest-controlled numbers must not make this code panic or overflow. Exceptions state their reason.
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
