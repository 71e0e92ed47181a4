//! What stands in guest memory, byte for byte. Wire types end here: everything else sees native values.

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

pub(crate) mod gpu;
pub(crate) mod payload;
