//! What the scenarios do: one file per group, one function per scenario. Their numbers, names and promises are in
//! [`super::table`]. A function gets an empty stage, and leaves it so that it can be closed.

pub(crate) mod faults;
pub(crate) mod fences;
pub(crate) mod life_cycle;
pub(crate) mod meaning;
pub(crate) mod modes;
pub(crate) mod ranges;
pub(crate) mod timing;
