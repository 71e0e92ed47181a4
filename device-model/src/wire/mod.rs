//! What stands in guest memory, byte for byte. Wire types end here: everything else sees native values.

pub(crate) mod gpu;
pub(crate) mod payload;
