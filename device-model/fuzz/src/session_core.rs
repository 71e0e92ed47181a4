//! A front-end, threads and the clock, at work on a session: `device_model::testing::session` plays the bytes.

use device_model::testing::noise::noise;
use device_model::testing::session::play;

/// Plays `bytes`.
pub fn run(bytes: &[u8]) {
    play(bytes);
}

/// Scripts to begin with.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    noise(4, 600)
}
