//! The contents of guest memory, byte for byte. Knows layouts and numbers; `gpu::payload` makes native values of them,
//! and everything else sees only those.

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

pub(crate) mod gpu;
