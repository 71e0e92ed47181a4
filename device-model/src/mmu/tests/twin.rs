//! The stupid twin: a mirror that is the list of all that ever happened, asked by replaying it for one page.

use proptest::prelude::*;

use super::*;
use crate::addr::PAGE_SHIFT;

#[derive(Clone, Debug)]
enum Op {
    Map { first: u64, pages: u64, host: u64, permissions: Permissions },
    Begin { range: ByteRange<Iova> },
    End { which: usize },
}

/// What the twin knows of one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Known {
    host: u64,
    permissions: Permissions,
    /// Pages in the block in which it was mapped: a leaf of at most that size may be dropped as a whole.
    block: u64,
    /// A zap hit that block: the mirror may know less now.
    may_be_forgotten: bool,
}

#[derive(Default)]
struct Twin(Vec<Op>);

impl Twin {
    fn page(&self, page: u64) -> Option<Known> {
        self.0.iter().fold(None, |known, op| match *op {
            Op::Map { first, pages, host, permissions } if (first..first + pages).contains(&page) => {
                Some(mapped(known, (first, pages), page, host + ((page - first) << PAGE_SHIFT), permissions))
            }
            Op::Begin { range } => known.and_then(|known| zapped(known, page, range)),
            _ => known,
        })
    }
}

fn mapped(old: Option<Known>, (first, pages): (u64, u64), page: u64, host: u64, new: Permissions) -> Known {
    let fits = |shift: &u32| {
        let start = page >> shift << shift;
        start >= first && start + (1 << shift) <= first + pages
    };
    let shift = (0..52).take_while(fits).last().unwrap_or(0);
    let same = old.filter(|old| old.host == host);
    let permissions = same.map_or(new, |old| Permissions {
        read: old.permissions.read || new.read,
        write: old.permissions.write || new.write,
    });
    let block = same.map_or(1 << shift, |old| old.block.max(1 << shift));
    Known { host, permissions, block, may_be_forgotten: same.is_some_and(|old| old.may_be_forgotten) }
}

fn zapped(known: Known, page: u64, range: ByteRange<Iova>) -> Option<Known> {
    let (first, last) = (range.first().raw() >> PAGE_SHIFT, range.last().raw() >> PAGE_SHIFT);
    if (first..=last).contains(&page) {
        return None;
    }
    let start = page / known.block * known.block;
    let hit = start <= last && first <= start + (known.block - 1);
    Some(Known { may_be_forgotten: known.may_be_forgotten || hit, ..known })
}

/// Pages at which something may go wrong: around the edges of blocks, of the low half, and of the space.
fn pages() -> impl Strategy<Value = u64> {
    let edges = prop::sample::select(vec![0, 512, 1024, 1 << 18, 1 << 27, 1 << 36, 1 << 45, 1 << 52]);
    (edges, -3_i64..4)
        .prop_map(|(edge, offset): (u64, i64)| edge.saturating_add_signed(offset).min((1 << 52) - 1))
}

fn lengths() -> impl Strategy<Value = u64> {
    prop_oneof![4 => 1_u64..6, 2 => Just(512_u64), 2 => 500_u64..1600, 1 => Just(1 << 18), 1 => Just(1 << 28)]
}

fn ops() -> impl Strategy<Value = Op> {
    let permissions =
        prop::sample::select(vec![Permissions::READ, Permissions::WRITE, Permissions::READ_WRITE]);
    let map = (pages(), lengths(), 0_u64..3, permissions).prop_map(|(first, pages, frame, permissions)| {
        let pages = pages.min((1 << 52) - first);
        // Frame 0 is the same for a page whatever mapping it comes in: only so do permissions add up.
        let host = FRAME + frame * PAGE + if frame == 0 { (first & 0xff_ffff) << PAGE_SHIFT } else { 0 };
        Op::Map { first, pages, host, permissions }
    });
    let begin =
        (pages(), 0..PAGE, prop_oneof![3 => 1_u64..4 * PAGE, 1 => 1_u64..1 << 31, 1 => Just(u64::MAX)]);
    let begin = begin.prop_map(|(page, offset, len)| {
        let first = (page << PAGE_SHIFT) + offset;
        let last = first.saturating_add(len - 1);
        Op::Begin { range: ByteRange::inclusive(Iova::new(first), Iova::new(last)).unwrap() }
    });
    prop_oneof![5 => map, 2 => begin, 2 => (0_usize..4).prop_map(|which| Op::End { which })]
}

/// The pages worth a look after `op`.
fn probes(op: &Op) -> Vec<u64> {
    let mut probes = vec![0, 511, 512, 513, 1 << 18, (1 << 27) - 1, 1 << 27, (1 << 52) - 1];
    match *op {
        Op::Map { first, pages, .. } => {
            probes.extend([first.saturating_sub(1), first, first + pages / 2, first + pages - 1])
        }
        Op::Begin { range } => {
            let (first, last) = (range.first().raw() >> PAGE_SHIFT, range.last().raw() >> PAGE_SHIFT);
            probes.extend([first.saturating_sub(1), first, last, last.saturating_add(1).min((1 << 52) - 1)]);
        }
        Op::End { .. } => {}
    }
    probes
}

fn check(rig: &Rig, twin: &Twin, page: u64) -> Result<(), TestCaseError> {
    let known = twin.page(page);
    let at = page << PAGE_SHIFT | 0x123;
    let section = rig.reader.enter();
    for access in [Access::Read, Access::Write] {
        let found = section.translate(SPACE, Iova::new(at), access).ok();
        let expected = known.filter(|known| known.permissions.allow(access));
        match (found, expected) {
            (Some(found), Some(expected)) => prop_assert_eq!(found.address(), expected.host + 0x123),
            (None, Some(expected)) => {
                prop_assert!(expected.may_be_forgotten, "page {:#x} is lost for {}", page, access)
            }
            (Some(found), None) => prop_assert!(false, "page {:#x} leads to {:#x}", page, found.address()),
            (None, None) => {}
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_mirror_says_what_a_list_of_all_that_happened_says(ops in prop::collection::vec(ops(), 1..40)) {
        let mut rig = rig();
        let mut twin = Twin::default();
        let mut open: Vec<(Drained, ByteRange<Iova>)> = Vec::new();
        for op in ops {
            match op.clone() {
                Op::Map { first, pages, host, permissions } => {
                    let range = range(first << PAGE_SHIFT, pages << PAGE_SHIFT);
                    let mapped = rig.writer.map(SPACE, range, HostRange::invented(host, pages << PAGE_SHIFT), permissions);
                    let blocked = open.iter().any(|(_, other)| other.page_aligned().overlaps(range));
                    prop_assert_eq!(mapped.is_err(), blocked);
                    if blocked {
                        continue;
                    }
                }
                Op::Begin { range } => open.push((rig.writer.begin(SPACE, range).poll().unwrap(), range)),
                Op::End { which } if which < open.len() => drop(rig.writer.end(open.swap_remove(which).0)),
                Op::End { .. } => {}
            }
            let probes = probes(&op);
            twin.0.push(op);
            for page in probes {
                check(&rig, &twin, page)?;
            }
        }
        rig.invalidate(ByteRange::everything());
        prop_assert_eq!(rig.writer.table_bytes(), 0);
    }
}
