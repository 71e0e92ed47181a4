//! Random scripts against the naive twin: see [`crate::testing::mirror`].

use proptest::prelude::*;

use super::*;
use crate::addr::PAGE_SHIFT;
use crate::testing::mirror::{ALL_PAGES, Operation, play};

/// Pages where errors are likely: around the edges of blocks, of the low half, and of the space.
fn pages() -> impl Strategy<Value = u64> {
    let edges = prop::sample::select(vec![0, 512, 1024, 1 << 18, 1 << 27, 1 << 36, 1 << 45, 1 << 52]);
    (edges, -3_i64..4)
        .prop_map(|(edge, offset): (u64, i64)| edge.saturating_add_signed(offset).min(ALL_PAGES - 1))
}

fn lengths() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 1_u64..6, 2 => Just(512_u64), 2 => 500_u64..1600, 1 => Just(1 << 18), 1 => Just(1 << 28)]
}

fn operations() -> impl Strategy<Value = Operation> {
    let permissions =
        prop::sample::select(vec![Permissions::READ, Permissions::WRITE, Permissions::READ_WRITE]);
    let map = (pages(), lengths(), 0_u64..3, permissions).prop_map(|(first, pages, frame, permissions)| {
        Operation::Map { first, pages: pages.min(ALL_PAGES - first), frame, permissions }
    });
    let begin =
        (pages(), 0..PAGE, prop_oneof![3 => 1_u64..4 * PAGE, 1 => 1_u64..1 << 31, 1 => Just(u64::MAX)]);
    let begin = begin.prop_map(|(page, offset, len)| {
        let first = (page << PAGE_SHIFT) + offset;
        let last = first.saturating_add(len - 1);
        Operation::Begin { range: ByteRange::inclusive(Iova::new(first), Iova::new(last)).unwrap() }
    });
    prop_oneof![5 => map, 2 => begin, 2 => (0_usize..4).prop_map(|which| Operation::End { which })]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_mirror_says_what_a_list_of_all_that_happened_says(script in prop::collection::vec(operations(), 1..40)) {
        play(script);
    }
}
