//! The walk beside its naive twin: the rules of the manual, one after the other, over a map of all entries.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::addr::Access;
use crate::mmu::Missing;
use crate::testing::memory::SparseMemory;
use crate::testing::page_tables::{PageTables, size_of_entry};

const RW: u64 = pte::VALID | pte::READ | pte::WRITE;

/// Entries by level and by which of the entries of that level, over the whole address space, it is.
type Entries = BTreeMap<(u32, u64), u64>;

fn bit(entry: u64, number: u32) -> bool {
    entry >> number & 1 == 1
}

/// What the manual says of a Gva, in the order in which it says it.
fn twin(entries: &Entries, gva: u64, access: GvaAccess) -> Result<Option<u64>, (FaultKind, u32)> {
    for level in [3, 2, 1, 0] {
        let entry = entries.get(&(level, gva / size_of_entry(level))).copied().unwrap_or(0);
        if !bit(entry, 0) {
            return Err((FaultKind::NotPresent, level));
        }
        let leaf = level == 0 || bit(entry, 6);
        let iova = entry % (1 << 52) / 0x1000 * 0x1000;
        let unknown = [4, 7, 8, 9, 10, 11, 59, 60, 61, 62, 63].iter().any(|number| bit(entry, *number));
        let large_at_the_wrong_level = bit(entry, 6) && (level == 0 || level == 3);
        let leaf_bits_of_a_table = !leaf && [1, 2, 3, 5].iter().any(|number| bit(entry, *number));
        let misaligned = leaf && iova % size_of_entry(level) != 0;
        let null_with_address = bit(entry, 5) && iova != 0;
        if unknown || large_at_the_wrong_level || leaf_bits_of_a_table || misaligned || null_with_address {
            return Err((FaultKind::ReservedBits, level));
        }
        if leaf {
            let denied = match access {
                GvaAccess::Read if !bit(entry, 1) => Some(FaultKind::ReadDenied),
                GvaAccess::Write if !bit(entry, 2) => Some(FaultKind::WriteDenied),
                GvaAccess::Atomic if !(bit(entry, 1) && bit(entry, 2) && bit(entry, 3)) => {
                    Some(FaultKind::AtomicDenied)
                }
                _ => None,
            };
            let place = (!bit(entry, 5)).then_some(iova + gva % size_of_entry(level));
            return denied.map_or(Ok(place), |kind| Err((kind, level)));
        }
    }
    unreachable!("An entry of level 0 is a leaf")
}

fn find(
    memory: &SparseMemory,
    tables: &PageTables,
    gva: u64,
    access: GvaAccess,
) -> Result<Option<u64>, (FaultKind, u32)> {
    let gva = Gva::new(gva);
    let leaf =
        walk(memory, (ROOT_LEVEL, Iova::new(tables.root())), gva, |_, _| {}).map_err(
            |ended| match ended {
                Ended::At { kind, level, .. } => (kind, level),
                Ended::Unread { .. } => panic!("{ended:?}"),
            },
        )?;
    leaf.check(access).map_err(|kind| (kind, leaf.level))?;
    let (place, rest) = leaf.place(gva);
    assert_eq!(rest, size_of_entry(leaf.level) - gva.raw() % size_of_entry(leaf.level));
    Ok(match place {
        Place::Iova(at) => Some(at.raw()),
        Place::Null => None,
    })
}

/// Addresses that share tables at every level.
fn gva() -> impl Strategy<Value = u64> {
    let index = || prop_oneof![Just(0_u64), Just(1), Just(511)];
    (index(), index(), index(), index(), 0..PAGE)
        .prop_map(|(a, b, c, d, offset)| a << 39 | b << 30 | c << 21 | d << 12 | offset)
}

const PAGE: u64 = 0x1000;

/// An entry: most often one that is right for its level.
fn entry() -> impl Strategy<Value = (u32, u64)> {
    let bits = prop_oneof![
        6 => (0_u64..16).prop_map(|bits| bits | pte::VALID),
        1 => 0_u64..64,
        1 => any::<u64>(),
    ];
    let address = prop_oneof![4 => Just(0_u64), 4 => (0_u64..8).prop_map(|n| n << 30), 1 => (0_u64..64).prop_map(|n| n << 12)];
    let odd = prop_oneof![8 => Just(0_u64), 1 => (0_u32..64).prop_map(|bit| 1 << bit)];
    (0_u32..4, bits, address, odd, any::<bool>()).prop_map(|(level, bits, address, odd, large)| {
        let leaf = if (level == 1 || level == 2) && large || level == 3 && odd != 0 { pte::LEAF } else { 0 };
        (level, bits | address | odd | leaf)
    })
}

proptest! {
    #[test]
    fn a_walk_finds_what_the_rules_of_the_manual_say(
        mappings in prop::collection::vec((gva(), entry()), 1..16),
        asked in prop::collection::vec(gva(), 8),
    ) {
        let mut memory = SparseMemory::new();
        let mut tables = PageTables::new(&mut memory, 0x100_0000);
        let mut entries = Entries::new();
        for (gva, (level, entry)) in &mappings {
            for above in level + 1..4 {
                entries.insert((above, gva / size_of_entry(above)), pte::VALID);
            }
            // An entry that points to a table of garbage tells nothing: only tables that are there are pointed at.
            let is_table = *level > 0 && entry & (pte::VALID | pte::LEAF) == pte::VALID;
            let entry = if is_table { entry & !pte::VALID } else { *entry };
            entries.insert((*level, gva / size_of_entry(*level)), entry);
            tables.map(&mut memory, *gva, *level, entry);
        }
        for gva in asked.iter().chain(mappings.iter().map(|(gva, _)| gva)) {
            for access in [GvaAccess::Read, GvaAccess::Write, GvaAccess::Atomic] {
                prop_assert_eq!(find(&memory, &tables, *gva, access), twin(&entries, *gva, access), "{:#x}", gva);
            }
        }
    }
}

#[test]
fn leaves_of_three_sizes_map_what_they_say() {
    let mut memory = SparseMemory::new();
    let mut tables = PageTables::new(&mut memory, 0x100_0000);
    let gva = 0x7fff_ffff_f000;
    tables.map(&mut memory, gva, 0, 0x5000 | RW);
    tables.map(&mut memory, 0x4000_0000, 2, 0x8_4000_0000 | RW | pte::LEAF);
    tables.map(&mut memory, 0x20_0000, 1, 0x60_0000 | RW | pte::LEAF | pte::SOFTWARE);
    for (gva, iova) in
        [(gva + 0xfff, 0x5fff), (0x7fff_ffff, 0x8_7fff_ffff), (0x20_0000, 0x60_0000), (0x3f_ffff, 0x7f_ffff)]
    {
        assert_eq!(find(&memory, &tables, gva, GvaAccess::Write), Ok(Some(iova)), "{gva:#x}");
    }
    assert_eq!(find(&memory, &tables, 0x40_0000, GvaAccess::Read), Err((FaultKind::NotPresent, 1)));
    assert_eq!(find(&memory, &tables, 0x8000_0000, GvaAccess::Read), Err((FaultKind::NotPresent, 2)));
}

#[test]
fn a_table_pointer_with_bits_of_a_leaf_or_at_the_top_a_leaf_is_refused() {
    let mut memory = SparseMemory::new();
    let mut tables = PageTables::new(&mut memory, 0x100_0000);
    for (level, entry) in [
        (3, pte::VALID | pte::LEAF | pte::READ),
        (2, pte::VALID | pte::READ | 0x5000),
        (1, pte::VALID | pte::WRITE | 0x5000),
        (1, RW | pte::LEAF | 0x1000),
        (0, RW | pte::LEAF),
        (0, RW | pte::NULL | 0x1000),
        (0, RW | 1 << 63),
        (0, RW | 1 << 8),
    ] {
        tables.map(&mut memory, 0, level, entry);
        let reserved = Err((FaultKind::ReservedBits, level));
        assert_eq!(find(&memory, &tables, 0, GvaAccess::Read), reserved, "{level} {entry:#x}");
    }
}

#[test]
fn a_table_that_the_mirror_lacks_is_named_with_its_level() {
    let mut memory = SparseMemory::new();
    let mut tables = PageTables::new(&mut memory, 0x100_0000);
    tables.map(&mut memory, 0x1234_5000, 0, 0x5000 | RW);
    let root = Iova::new(tables.root());
    for (level, page) in tables.clone().pages().collect::<Vec<_>>().into_iter().enumerate() {
        // Level 3 is the root; those below are listed from level 0 up.
        let level = if level == 0 { 3 } else { level as u32 - 1 };
        let taken = memory.take_page(page).unwrap();
        let missing = Missing { space: DomainId::DEVICE, range: page.page_range(), access: Access::Read };
        match walk(&memory, (ROOT_LEVEL, root), Gva::new(0x1234_5000), |_, _| {}) {
            Err(Ended::Unread { entry, level: at, error }) => {
                assert_eq!((entry.page(), at, error), (page, level, MemoryError::Missing(missing)));
            }
            other => panic!("{other:?}"),
        }
        memory.put_page(page, taken);
    }
    assert!(walk(&memory, (ROOT_LEVEL, root), Gva::new(0x1234_5000), |_, _| {}).is_ok());
}
