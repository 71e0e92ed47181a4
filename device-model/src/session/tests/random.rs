//! Random operations in random order: see [`crate::testing::session`].

use proptest::prelude::*;

use crate::testing::session::play;

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn replies_drains_and_translations_keep_their_promises(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        play(&bytes);
    }
}
