//! Mapping: permissions, granularity, limits, and reclaim.

use super::*;
use crate::mmu::page_table::NODE_BYTES;

fn permissions_at(rig: &Rig, at: u64) -> Permissions {
    let section = rig.reader.enter();
    let allows = |access| section.translate(SPACE, Iova::new(at), access).is_ok();
    Permissions { read: allows(Access::Read), write: allows(Access::Write) }
}

#[test]
fn permissions_of_the_same_frame_add_up_and_those_of_another_do_not() {
    let mut rig = rig();
    assert_eq!(rig.map(0, PAGE, FRAME, Permissions::READ).replaced, 0);
    assert_eq!(permissions_at(&rig, 0), Permissions::READ);
    assert_eq!(rig.map(0, PAGE, FRAME, Permissions::WRITE).replaced, 0);
    assert_eq!(permissions_at(&rig, 0), Permissions::READ_WRITE);
    assert_eq!(rig.map(0, PAGE, FRAME + PAGE, Permissions::WRITE).replaced, 1);
    assert_eq!(permissions_at(&rig, 0), Permissions::WRITE);
    rig.map(4 * PAGE, 2 * PAGE, FRAME, Permissions::READ);
    assert_eq!(rig.map(3 * PAGE, 4 * PAGE, FRAME, Permissions::READ).replaced, 2);
}

#[test]
fn a_page_in_a_large_leaf_gets_its_own_permission_and_the_others_keep_theirs() {
    let mut rig = rig();
    rig.map(0, 2 * MIB, FRAME, Permissions::READ);
    assert_eq!(rig.map(5 * PAGE, PAGE, FRAME + 5 * PAGE, Permissions::WRITE).replaced, 0);
    assert_eq!(permissions_at(&rig, 5 * PAGE), Permissions::READ_WRITE);
    assert_eq!(permissions_at(&rig, 4 * PAGE), Permissions::READ);
    assert_eq!(rig.read_at(6 * PAGE), Some(FRAME + 6 * PAGE));
    // The rest gets the same permissions: it is one leaf again, and its tables are gone.
    rig.map(0, 2 * MIB, FRAME, Permissions::WRITE);
    assert_eq!(permissions_at(&rig, 4 * PAGE), Permissions::READ_WRITE);
    assert_eq!(rig.writer.table_bytes(), NODE_BYTES);
}

#[test]
fn a_large_range_costs_few_tables_even_if_the_frames_are_not_aligned() {
    let mut rig = rig();
    rig.map(0, 4 * GIB, FRAME + PAGE, Permissions::READ_WRITE);
    assert_eq!(rig.writer.table_bytes(), 0, "four leaves in the root");
    rig.map(5 * GIB + PAGE, GIB, FRAME + PAGE, Permissions::READ_WRITE);
    assert_eq!(rig.writer.table_bytes(), 4 * NODE_BYTES, "one path for each end");
    assert_eq!(rig.read_at(5 * GIB + PAGE + 0x12_3456), Some(FRAME + PAGE + 0x12_3456));
    assert_eq!(rig.read_at(3 * GIB + 7), Some(FRAME + PAGE + 3 * GIB + 7));
}

#[test]
fn a_range_may_cross_from_low_to_high_addresses_and_reach_the_end() {
    let mut rig = rig();
    let low_end = 1 << 39;
    rig.map(low_end - 2 * PAGE, 4 * PAGE, FRAME, Permissions::READ);
    for page in 0..4 {
        assert_eq!(rig.read_at(low_end - 2 * PAGE + page * PAGE), Some(FRAME + page * PAGE));
    }
    rig.map(u64::MAX - 0x1fff, 0x2000, FRAME, Permissions::READ);
    assert_eq!(rig.read_at(u64::MAX), Some(FRAME + 0x1fff));
    let section = rig.reader.enter();
    let span = section.translate(SPACE, Iova::new(u64::MAX), Access::Read).unwrap();
    assert_eq!(span.len(), 1);
}

#[test]
fn only_whole_pages_are_cached() {
    let mut rig = rig();
    rig.map(0x800, 0x2000, FRAME + 0x800, Permissions::READ);
    assert_eq!([0x800, 0x1000, 0x2000].map(|at| rig.read_at(at)), [None, Some(FRAME + 0x1000), None]);
}

#[test]
fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let mut rig = rig();
    let mut map = |range, host, permissions| rig.writer.map(SPACE, range, host, permissions);
    let page = range(0, PAGE);
    let host = HostRange::invented(FRAME, PAGE);
    let long = HostRange::invented(FRAME, 2 * PAGE);
    assert_eq!(map(page, long, Permissions::READ), Err(MapError::Lengths { range: page, host: 2 * PAGE }));
    assert_eq!(map(page, host, Permissions::default()), Err(MapError::NoPermission { range: page }));
    let askew = HostRange::invented(FRAME + 8, PAGE);
    assert_eq!(map(page, askew, Permissions::READ), Err(MapError::Misaligned { range: page }));
    let part = range(8, 16);
    let host = HostRange::invented(FRAME + 8, 16);
    assert_eq!(map(part, host, Permissions::READ), Err(MapError::NoWholePage { range: part }));
    assert_eq!(rig.writer.table_bytes(), 0);
}

#[test]
fn the_limit_is_kept_by_forgetting_others_and_the_newest_is_always_there() {
    let limit = 16 * NODE_BYTES;
    let mut rig = rig_with(limit);
    for number in 0..200 {
        let at = number * 2 * MIB;
        rig.map(at, PAGE, FRAME + number * PAGE, Permissions::READ);
        assert!(rig.writer.table_bytes() <= limit);
        assert_eq!(rig.read_at(at), Some(FRAME + number * PAGE));
    }
    let left = (0..200).filter(|number| rig.read_at(number * 2 * MIB) == Some(FRAME + number * PAGE)).count();
    assert!(left >= 8, "{left} are left");
}

#[test]
fn the_limit_holds_for_high_addresses_and_for_both_halves_at_once() {
    let limit = 24 * NODE_BYTES;
    let mut rig = rig_with(limit);
    for number in 1..100 {
        rig.map(number << 50, PAGE, FRAME, Permissions::READ);
        rig.map(number << 21, PAGE, FRAME, Permissions::READ);
        assert!(rig.writer.table_bytes() <= limit);
    }
    rig.invalidate(ByteRange::everything());
    assert_eq!(rig.writer.table_bytes(), 0);
}

#[test]
fn a_limit_below_one_mapping_is_an_error() {
    let mut rig = rig_with(2 * NODE_BYTES);
    let page = range(0, PAGE);
    let error = rig.writer.map(SPACE, page, HostRange::invented(FRAME, PAGE), Permissions::READ);
    assert_eq!(error, Err(MapError::TooLarge { range: page, needed: 4 * NODE_BYTES }));
}

#[test]
fn a_section_that_does_not_end_bounds_what_waits_for_it() {
    let limit = 16 * NODE_BYTES;
    let mut rig = rig_with(limit);
    let section = rig.reader.enter();
    let mut refused = None;
    for number in 0..1000 {
        let at = range(number * 2 * MIB, PAGE);
        match rig.writer.map(SPACE, at, HostRange::invented(FRAME, PAGE), Permissions::READ) {
            Ok(_) => assert!(rig.writer.table_bytes() <= 2 * limit),
            Err(error) => {
                assert_eq!(error, MapError::Busy { range: at });
                refused = Some(at);
                break;
            }
        }
    }
    drop(section);
    let at = refused.unwrap();
    assert!(rig.writer.map(SPACE, at, HostRange::invented(FRAME, PAGE), Permissions::READ).is_ok());
    assert!(rig.writer.table_bytes() <= limit);
}

#[test]
fn a_dense_mirror_costs_less_than_sixteen_bytes_a_page() {
    let mut rig = rig();
    // Scattered frames, so that no two pages make a larger leaf.
    for page in 0..65_536 {
        rig.map(page * PAGE, PAGE, FRAME + (page ^ 1) * PAGE, Permissions::READ);
    }
    assert!(rig.writer.table_bytes() < 16 * 65_536);
}

#[test]
fn the_ranges_are_listed_in_order_and_merged() {
    let mut rig = rig();
    rig.map(0x3000, PAGE, FRAME, Permissions::READ);
    rig.map(0x4000, PAGE, FRAME + PAGE, Permissions::READ);
    rig.map(0x5000, PAGE, FRAME + 2 * PAGE, Permissions::WRITE);
    rig.map(1 << 60, PAGE, FRAME, Permissions::READ);
    rig.map(2 * MIB, 4 * MIB, FRAME, Permissions::READ);
    let mut listed = Vec::new();
    let everything = ByteRange::everything();
    rig.writer.mapped_ranges(DomainId::DEVICE, everything, |found| {
        listed.push((found.range, found.host, found.permissions))
    });
    let expected = [
        (range(0x3000, 2 * PAGE), FRAME, Permissions::READ),
        (range(0x5000, PAGE), FRAME + 2 * PAGE, Permissions::WRITE),
        (range(2 * MIB, 4 * MIB), FRAME, Permissions::READ),
        (range(1 << 60, PAGE), FRAME, Permissions::READ),
    ];
    assert_eq!(listed, expected);
}

#[test]
fn a_list_in_pieces_has_the_same_pages_as_the_whole() {
    let mut rig = rig();
    for page in [0, 1, 2, 511, 512, 700] {
        rig.map(page * PAGE, PAGE, FRAME + page * PAGE, Permissions::READ);
    }
    rig.map(4 * MIB, 4 * MIB, FRAME, Permissions::READ);
    rig.map(1 << 60, PAGE, FRAME, Permissions::WRITE);
    let pages = |found: MappedRange| {
        let host = move |page: Iova| found.host + (page.raw() - found.range.first().raw());
        found.range.pages().map(move |page| (page, host(page), found.permissions))
    };
    let mut whole = Vec::new();
    rig.writer.mapped_ranges(DomainId::DEVICE, ByteRange::everything(), |found| whole.extend(pages(found)));
    let (mut pieces, mut from, mut turns) = (Vec::new(), Some(Iova::new(0)), 0);
    while let Some(start) = from {
        from = rig.writer.mapped_some(DomainId::DEVICE, start, 100, |found| pieces.extend(pages(found)));
        turns += 1;
    }
    assert_eq!(pieces, whole);
    assert_eq!(whole.len(), 7 + 1024);
    assert!(turns > 10, "{turns}");
    // From the middle of a large leaf on.
    let mut rest = Vec::new();
    let middle = Iova::new(4 * MIB + 5 * PAGE);
    rig.writer.mapped_some(DomainId::DEVICE, middle, usize::MAX, |found| rest.extend(pages(found)));
    assert_eq!(rest, whole[whole.len() - rest.len()..]);
    assert_eq!(rest[0].0, middle);
}

#[test]
fn tables_that_a_section_may_see_are_kept_until_it_leaves() {
    let mut rig = rig();
    rig.map(0, PAGE, FRAME, Permissions::READ);
    let section = rig.reader.enter();
    let parked = rig.writer.begin(SPACE, range(0, PAGE)).poll().unwrap_err();
    assert_eq!(rig.writer.table_bytes(), 2 * NODE_BYTES);
    drop(section);
    let _ = rig.writer.end(parked.poll().unwrap());
    rig.map(8 * GIB, GIB, FRAME, Permissions::READ);
    assert_eq!(rig.writer.table_bytes(), 0);
}

#[test]
fn readers_may_outlive_the_writer_and_its_limbo() {
    let mut rig = rig();
    rig.map(0, PAGE, FRAME, Permissions::READ);
    rig.map(GIB, PAGE, FRAME, Permissions::READ);
    let section = rig.reader.enter();
    drop(rig.writer.begin(SPACE, range(0, PAGE)));
    drop(rig.writer);
    assert!(section.translate(SPACE, Iova::new(GIB), Access::Read).is_ok());
    assert!(section.translate(SPACE, Iova::new(0), Access::Read).is_err());
}

#[test]
fn a_large_leaf_is_one_piece_to_its_end() {
    let mut rig = rig();
    rig.map(0, 4 * MIB, FRAME, Permissions::READ);
    let section = rig.reader.enter();
    let span = section.translate(SPACE, Iova::new(MIB + 5), Access::Read).unwrap();
    assert_eq!((span.address(), span.len()), (FRAME + MIB + 5, MIB - 5));
}

#[test]
fn a_part_of_a_large_leaf_is_listed_as_that_part() {
    let mut rig = rig();
    rig.map(2 * MIB, 2 * MIB, FRAME, Permissions::READ);
    let mut listed = Vec::new();
    let part = range(2 * MIB + 3 * PAGE + 5, PAGE);
    rig.writer.mapped_ranges(DomainId::DEVICE, part, |found| listed.push((found.range, found.host)));
    assert_eq!(listed, [(range(2 * MIB + 3 * PAGE, 2 * PAGE), FRAME + 3 * PAGE)]);
}

#[test]
fn what_is_missing_ahead_of_a_miss_is_of_its_access_behind_it_and_of_few_pages() {
    let mut rig = rig();
    let wanted = |first, pages, access| PinRange {
        space: DomainId::DEVICE,
        range: range(first * PAGE, pages * PAGE),
        access,
    };
    let wanted = [
        wanted(0x10, 4, Access::Read),
        wanted(0x20, 8, Access::Write),
        wanted(0x30, 2, Access::Read),
        wanted(0x40, 1000, Access::Read),
    ];
    rig.map(0x12 * PAGE, PAGE, FRAME, Permissions::READ);
    let missing = |first, pages| Missing {
        space: DomainId::DEVICE,
        range: range(first * PAGE, pages * PAGE),
        access: Access::Read,
    };
    let ahead = rig.reader.missing_ahead(&wanted, missing(0x11, 1));
    assert_eq!(ahead, [missing(0x13, 1), missing(0x30, 2), missing(0x40, 59)]);
    assert_eq!(rig.reader.missing_ahead(&wanted, missing(0x40 + 999, 1)), []);
}
