//! What the agent in the guest and the rig on the host have in common: the test picture, pixel for pixel; the test
//! jobs, word for word, with what they leave behind; and the words that the two exchange, those of scenarios with the stock driver apart. Knows nothing of DRM, of
//! VFIO, of QEMU, or of how either side moves its bytes.

mod font;
pub mod jobs;
pub mod picture;
pub mod protocol;
pub mod remote;
pub mod stock_words;
