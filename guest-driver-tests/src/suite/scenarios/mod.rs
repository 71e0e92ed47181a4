//! What the scenarios do: one file a group, one function a scenario. Their numbers, names and promises stand in
//! [`super::table`]. A function finds a stage with nothing on it, and leaves it so that it can be closed.

pub(crate) mod faults;
pub(crate) mod fences;
pub(crate) mod life_cycle;
pub(crate) mod meaning;
pub(crate) mod modes;
pub(crate) mod ranges;
pub(crate) mod timing;
