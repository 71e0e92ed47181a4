//! Work on guest memory, from submission to completion. A [`job`] is a resumable value, an [`engine`] steps it, the
//! [`schedule`] decides which one is next and where the others wait, the [`scheduler`] shares the schedule between
//! threads. [`program`] interprets a job stream, [`operands`] is the memory that a stream names, [`transfer`] is the 2D
//! copy. An [`address_space`] is memory behind page tables of the guest. A [`working_set`] describes compactly what a job
//! may touch, as [`offsets`] of a [`backing`]. [`verdict`] and [`name`] are values about jobs. Knows nothing of
//! commands, of rings, or of the front-end.

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

pub mod address_space;
pub(crate) mod backing;
pub mod engine;
pub mod error;
pub mod job;
pub mod name;
pub(crate) mod offsets;
pub(crate) mod operands;
pub(crate) mod program;
pub mod schedule;
pub mod scheduler;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod transfer;
pub mod verdict;
pub(crate) mod working_set;
