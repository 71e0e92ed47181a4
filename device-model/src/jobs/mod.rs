//! Work over guest memory, from submission to its end: a [`job`] is a resumable value, an [`engine`] steps it, the
//! [`schedule`] says which one is next and where the others wait, the [`scheduler`] shares that between threads.
//! [`program`] interprets a job stream, [`operands`] is the memory that a stream names, [`transfer`] is the 2D copy.
//! [`working_set`] says in a few numbers what a job may touch, as [`offsets`] of a [`backing`]. Knows nothing of commands,
//! of rings, or of the front-end.

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

pub(crate) mod backing;
pub mod engine;
pub mod job;
pub(crate) mod offsets;
pub(crate) mod operands;
pub(crate) mod program;
pub mod schedule;
pub mod scheduler;
#[cfg(test)]
pub(crate) mod testing;
pub(crate) mod transfer;
pub(crate) mod working_set;
