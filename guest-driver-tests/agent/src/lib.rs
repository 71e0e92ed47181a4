//! What the agent in the guest and the rig on the host have in common: the test picture, pixel for pixel, and the
//! words that they exchange. Knows nothing of DRM, of QEMU, or of how either side moves its bytes.

mod font;
pub mod picture;
pub mod protocol;
