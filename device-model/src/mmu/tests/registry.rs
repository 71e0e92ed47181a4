//! What the registry says to a pin that is being built while invalidations begin.

use super::super::registry::{Place, Places, Registry};
use super::*;
use std::sync::atomic::AtomicBool;

/// Begins whose ranges the registry remembers.
const REMEMBERED: u64 = 64;

fn place(page: u64, count: u64) -> Place {
    Place { space: SPACE, range: range(page * PAGE, count * PAGE) }
}

fn places(pages: &[(u64, u64)]) -> Places {
    Places::new(pages.iter().map(|&(page, count)| place(page, count)))
}

/// Begins and ends an invalidation of a page.
fn invalidate(registry: &mut Registry, page: u64) {
    let id = registry.begin(place(page, 1));
    registry.end(id);
}

fn register(registry: &mut Registry, sequence: u64, page: u64) -> Option<u64> {
    let evicted = Arc::new(AtomicBool::new(false));
    registry.register(sequence, places(&[(page, 1)]), (PinMode::Fence, evicted)).ok()
}

#[test]
fn a_pin_is_built_again_if_an_invalidation_of_it_came_and_went_meanwhile() {
    let mut registry = Registry::default();
    let sequence = registry.read_begin(&places(&[(4, 1)])).unwrap();
    invalidate(&mut registry, 5);
    assert!(register(&mut registry, sequence, 4).is_some(), "that was beside it");
    invalidate(&mut registry, 4);
    invalidate(&mut registry, 5);
    assert_eq!(register(&mut registry, sequence, 4), None);
    let sequence = registry.read_begin(&places(&[(4, 1)])).unwrap();
    assert!(register(&mut registry, sequence, 4).is_some(), "that was before it");
}

#[test]
fn a_pin_is_built_again_if_more_invalidations_came_than_are_remembered() {
    // The first of them may be the one of its page, however many follow.
    for (first, others, stands) in [
        (4, REMEMBERED - 1, false),
        (4, REMEMBERED, false),
        (5, REMEMBERED - 1, true),
        (5, REMEMBERED, false),
    ] {
        let mut registry = Registry::default();
        // What was forgotten before does not count.
        (0..2 * REMEMBERED).for_each(|_| invalidate(&mut registry, 4));
        let sequence = registry.read_begin(&places(&[(4, 1)])).unwrap();
        invalidate(&mut registry, first);
        (0..others).for_each(|_| invalidate(&mut registry, 6));
        assert_eq!(register(&mut registry, sequence, 4).is_some(), stands, "{first} and {others} more");
    }
}

#[test]
fn no_pin_is_begun_while_an_invalidation_of_a_part_of_it_is_under_way() {
    let mut registry = Registry::default();
    let (id, other) = (registry.begin(place(4, 2)), registry.begin(place(8, 1)));
    for (pages, free) in
        [((3, 1), true), ((3, 2), false), ((5, 1), false), ((5, 4), false), ((6, 2), true), ((9, 1), true)]
    {
        assert_eq!(registry.read_begin(&places(&[pages])).is_some(), free, "{pages:?}");
        assert_eq!(registry.is_invalidating(place(pages.0, pages.1)), !free, "{pages:?}");
    }
    registry.end(id);
    assert!(registry.read_begin(&places(&[(5, 1)])).is_some());
    assert!(registry.read_begin(&places(&[(8, 1)])).is_none(), "that one is still under way");
    registry.end(other);
    assert!(registry.read_begin(&places(&[(8, 1)])).is_some());
}

#[test]
fn a_pin_that_an_invalidation_waits_for_says_so_when_it_is_released_and_once() {
    let mut registry = Registry::default();
    let (here, beside) = (register(&mut registry, 0, 4).unwrap(), register(&mut registry, 0, 5).unwrap());
    let id = registry.begin(place(4, 1));
    assert!(!registry.release(beside) && registry.release(here));
    assert!(!registry.release(here), "it is gone");
    registry.end(id);
    assert_eq!(registry.overlapping(SPACE, range(0, 16 * PAGE)).count(), 0);
}

#[test]
fn places_are_merged_where_they_touch_and_found_wherever_they_overlap() {
    let last = u64::MAX / PAGE;
    let all = places(&[(8, 1), (2, 2), (4, 1), (3, 1), (8, 1), (last, 1)]);
    let pages = |place: Place| (place.range.first().raw() / PAGE, place.range.pages().count());
    let found: Vec<_> = all.iter().map(pages).collect();
    assert_eq!(found, [(2, 3), (8, 1), (last, 1)]);
    // A long one that comes first is not cut short by one within it.
    let nested = places(&[(2, 6), (3, 1)]);
    assert_eq!(nested.iter().map(|place| place.range.pages().count()).collect::<Vec<_>>(), [6]);
}
