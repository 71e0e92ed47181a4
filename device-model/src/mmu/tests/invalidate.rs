//! Invalidations: the unusual ones that QEMU sends, what they wait for, and what wakes them.

use super::*;

#[test]
fn an_invalidation_to_the_end_of_the_space_takes_all_above_its_start_and_nothing_below() {
    let mut rig = rig();
    for at in [0xfedf_f000, 0xfef0_0000, 0xffff_f000, 1 << 32, 1 << 40, 1 << 63, u64::MAX - 0xfff] {
        rig.map(at, PAGE, FRAME, Permissions::READ);
    }
    // VT-d's global flush.
    rig.invalidate(range(0xfef0_0000, 0xffff_ffff_0110_0000));
    for at in [0xfef0_0000, 0xffff_f000, 1 << 32, 1 << 40, 1 << 63, u64::MAX - 0xfff] {
        assert_eq!(rig.read_at(at), None, "{at:#x}");
    }
    assert_eq!(rig.read_at(0xfedf_f000), Some(FRAME));
    rig.invalidate(range(0, 0xfee0_0000));
    assert_eq!(rig.read_at(0xfedf_f000), None);
    assert_eq!(rig.writer.table_bytes(), 0);
}

#[test]
fn an_invalidation_of_everything_empties_the_tables() {
    let mut rig = rig();
    rig.map(0, 4 * GIB, FRAME, Permissions::READ_WRITE);
    rig.map(0x7fff_ffff_f000, PAGE, FRAME, Permissions::READ);
    rig.map(u64::MAX - 0xffff, 0x1_0000, FRAME, Permissions::READ);
    rig.invalidate(ByteRange::everything());
    assert_eq!(rig.writer.table_bytes(), 0);
    let mut left = 0;
    rig.writer.mapped_ranges(DomainId::DEVICE, ByteRange::everything(), |_| left += 1);
    assert_eq!(left, 0);
}

#[test]
fn an_invalidation_of_one_byte_takes_its_page_and_no_other() {
    let mut rig = rig();
    rig.map(0x1000, 3 * PAGE, FRAME, Permissions::READ);
    rig.invalidate(range(0x2fff, 1));
    let found = [0x1fff, 0x2000, 0x2fff, 0x3000].map(|at| rig.read_at(at));
    assert_eq!(found, [Some(FRAME + 0xfff), None, None, Some(FRAME + 0x2000)]);
}

#[test]
fn an_unaligned_invalidation_takes_every_page_that_it_touches() {
    let mut rig = rig();
    rig.map(0, 5 * PAGE, FRAME, Permissions::READ);
    rig.invalidate(range(0x1800, 0x1001));
    let found = [0, PAGE, 2 * PAGE, 3 * PAGE].map(|at| rig.read_at(at).is_some());
    assert_eq!(found, [true, false, false, true]);
}

#[test]
fn a_part_of_a_large_leaf_takes_the_whole_leaf() {
    let mut rig = rig();
    rig.map(0, 4 * MIB, FRAME, Permissions::READ);
    rig.invalidate(range(MIB, PAGE));
    assert_eq!((rig.read_at(0), rig.read_at(2 * MIB)), (None, Some(FRAME + 2 * MIB)));
}

#[test]
fn nothing_in_flight_is_drained_at_once_and_wakes_nobody() {
    let mut rig = rig();
    rig.map(0, PAGE, FRAME, Permissions::READ);
    drop(rig.reader.enter());
    let invalidation = rig.writer.begin(SPACE, range(0, PAGE));
    assert!(invalidation.in_flight().is_none());
    let drained = invalidation.poll().unwrap();
    let _ = rig.writer.end(drained);
    drop(rig.reader.enter());
    assert_eq!(rig.woken(), 0);
}

#[test]
fn an_open_section_holds_every_invalidation_up_and_wakes_it_when_it_leaves() {
    let mut rig = rig();
    let section = rig.reader.enter();
    let invalidation = rig.writer.begin(SPACE, range(0x1_0000, PAGE));
    assert_eq!(invalidation.in_flight(), InFlight { sections: 1, pins: 0 });
    let parked = invalidation.poll().unwrap_err();
    assert_eq!(rig.woken(), 0);
    drop(section);
    assert_eq!(rig.woken(), 1);
    assert!(parked.in_flight().is_none());
    let drained = parked.poll().unwrap();
    let _ = rig.writer.end(drained);
}

#[test]
fn a_section_that_opens_after_the_beginning_holds_nothing_up() {
    let mut rig = rig();
    let old = rig.reader.enter();
    let parked = rig.writer.begin(SPACE, range(0, PAGE)).poll().unwrap_err();
    let _young = rig.other.enter();
    drop(old);
    assert!(parked.poll().is_ok());
}

#[test]
fn a_reader_that_left_and_came_back_holds_nothing_up() {
    let mut rig = rig();
    drop(rig.reader.enter());
    let section = rig.reader.enter();
    let parked = rig.writer.begin(SPACE, range(0, PAGE)).poll().unwrap_err();
    drop(section);
    let _again = rig.reader.enter();
    assert!(parked.poll().is_ok());
}

#[test]
fn only_the_outermost_section_leaves() {
    let mut rig = rig();
    let outer = rig.reader.enter();
    let inner = rig.reader.enter();
    let parked = rig.writer.begin(SPACE, range(0, PAGE)).poll().unwrap_err();
    drop(inner);
    let parked = parked.poll().unwrap_err();
    drop(outer);
    assert!(parked.poll().is_ok());
}

#[test]
fn a_parked_drain_is_woken_once_by_each_section_that_it_waits_for() {
    let mut rig = rig();
    rig.map(0, PAGE, FRAME, Permissions::READ);
    let pin = rig.other.pin(&[wanted(0, PAGE, Access::Read)]).unwrap();
    let section = rig.reader.enter();
    let parked = rig.writer.begin(SPACE, range(0, PAGE)).poll().unwrap_err();
    drop(section);
    for _ in 0..10 {
        drop(rig.reader.enter());
    }
    assert_eq!(rig.woken(), 1);
    let parked = parked.poll().unwrap_err();
    assert_eq!(parked.in_flight(), InFlight { sections: 0, pins: 1 });
    pin.release();
    assert_eq!(rig.woken(), 2);
    assert!(parked.poll().is_ok());
}

#[test]
fn a_pin_elsewhere_holds_nothing_up_and_wakes_nobody() {
    let mut rig = rig();
    rig.map(0, 2 * PAGE, FRAME, Permissions::READ);
    let pin = rig.reader.pin(&[wanted(0, PAGE, Access::Read)]).unwrap();
    let invalidation = rig.writer.begin(SPACE, range(PAGE, PAGE));
    assert!(invalidation.in_flight().is_none());
    drop(pin);
    assert_eq!(rig.woken(), 0);
    assert!(invalidation.poll().is_ok());
}

#[test]
fn a_pin_of_other_bytes_of_the_page_holds_the_page_up() {
    let mut rig = rig();
    rig.map(0, PAGE, FRAME, Permissions::READ);
    let _pin = rig.reader.pin(&[wanted(0x10, 0x10, Access::Read)]).unwrap();
    assert!(rig.writer.begin(SPACE, range(0xfff, 1)).poll().is_err());
}

#[test]
fn nothing_can_be_pinned_or_mapped_between_beginning_and_end() {
    let mut rig = rig();
    rig.map(0, 2 * PAGE, FRAME, Permissions::READ);
    let invalidation = rig.writer.begin(SPACE, range(0, PAGE));
    let pin = |rig: &Rig, start, len| rig.reader.pin(&[wanted(start, len, Access::Read)]).map(|_| ());
    assert_eq!(pin(&rig, 0, PAGE), Err(PinError::Invalidating));
    assert_eq!(pin(&rig, 0xfff, 2), Err(PinError::Invalidating));
    assert_eq!(pin(&rig, PAGE, PAGE), Ok(()));
    let again = rig.writer.map(SPACE, range(0, PAGE), HostRange::invented(FRAME, PAGE), Permissions::READ);
    assert_eq!(again, Err(MapError::Invalidating { range: range(0, PAGE) }));
    let _ = rig.writer.end(invalidation.poll().unwrap());
    let missing = Missing { space: SPACE, range: range(0, PAGE), access: Access::Read };
    assert_eq!(pin(&rig, 0, PAGE), Err(PinError::Missing(vec![missing])));
    rig.map(0, PAGE, FRAME, Permissions::READ);
    assert_eq!(pin(&rig, 0, PAGE), Ok(()));
}

#[test]
fn overlapping_invalidations_each_wait_for_their_own_and_end_in_any_order() {
    let mut rig = rig();
    rig.map(0, 2 * PAGE, FRAME, Permissions::READ);
    let pin = rig.reader.pin(&[wanted(PAGE, PAGE, Access::Read)]).unwrap();
    let wide = rig.writer.begin(SPACE, ByteRange::everything()).poll().unwrap_err();
    let low = rig.writer.begin(SPACE, range(0, PAGE)).poll().unwrap();
    let _ = rig.writer.end(low);
    assert_eq!(rig.reader.pin(&[wanted(0, PAGE, Access::Read)]).err(), Some(PinError::Invalidating));
    drop(pin);
    let _ = rig.writer.end(wide.poll().unwrap());
}

#[test]
fn the_ladder_tells_overlapping_pins_and_no_others() {
    let mut rig = rig();
    rig.map(0, 3 * PAGE, FRAME, Permissions::READ);
    let hit = rig.reader.pin(&[wanted(PAGE, PAGE, Access::Read)]).unwrap();
    let spared = rig.reader.pin(&[wanted(2 * PAGE, PAGE, Access::Read)]).unwrap();
    let invalidation = rig.writer.begin(SPACE, range(0, 2 * PAGE));
    assert!(!hit.evicted());
    assert_eq!(invalidation.evict(), 1);
    assert!(hit.evicted() && !spared.evicted());
    drop(hit);
    assert!(invalidation.poll().is_ok());
}

#[test]
fn a_lost_invalidation_keeps_its_range_from_being_pinned() {
    let mut rig = rig();
    rig.map(0, PAGE, FRAME, Permissions::READ);
    drop(rig.writer.begin(SPACE, range(0, PAGE)));
    assert_eq!(rig.reader.pin(&[wanted(0, PAGE, Access::Read)]).err(), Some(PinError::Invalidating));
}

#[test]
fn a_burst_of_28_power_of_two_blocks_empties_the_tables() {
    let mut rig = rig();
    rig.map(0, 64 * MIB, FRAME, Permissions::READ_WRITE);
    rig.map(1 << 38, 16 * PAGE, FRAME, Permissions::READ);
    let parked: Vec<Invalidation> =
        (12..40).map(|bit| rig.writer.begin(SPACE, range(1 << bit, 1 << bit))).collect();
    assert_eq!(parked.len(), 28);
    for invalidation in parked {
        let drained = invalidation.poll().unwrap();
        let _ = rig.writer.end(drained);
    }
    rig.invalidate(range(0, PAGE));
    assert_eq!(rig.writer.table_bytes(), 0);
}

#[test]
fn a_table_that_a_section_kept_goes_with_the_next_invalidation_however_empty() {
    let mut rig = rig();
    rig.map(0, PAGE, FRAME, Permissions::READ);
    let Rig { writer, other, .. } = &mut rig;
    let section = other.enter();
    let parked = writer.begin(SPACE, ByteRange::everything()).poll().unwrap_err();
    assert_ne!(writer.table_bytes(), 0, "the section may be in the middle of a walk");
    drop(section);
    drop(writer.end(parked.poll().unwrap()));
    rig.invalidate(ByteRange::everything());
    assert_eq!(rig.writer.table_bytes(), 0);
}
