//! A script of what the session does to the mirror: map, begin an invalidation, end it. [`play`] plays it beside the
//! naive twin, a mirror that is the list of all operations, and is queried by replaying it for one page. The same
//! scripts come from proptest (`mmu::tests::twin`) and from the fuzz target `mirror_operations`. Uses the mirror from
//! outside, and never touches the memory that it maps.

use std::sync::Arc;

use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SHIFT, PAGE_SIZE};
use crate::mmu::{
    DrainWaker, Drained, HostRange, HostSpan, MirrorConfig, MirrorWriter, Permissions, Reader, mirror,
};

/// The pretended address of frames that no test touches.
const FRAME: u64 = 0x10_0000_0000;
/// Pages of the whole space.
pub const ALL_PAGES: u64 = 1 << 52;

/// One operation. Pages are numbers.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// A range of pages is mapped.
    Map {
        /// The first page.
        first: u64,
        /// The number of pages; they end within the space.
        pages: u64,
        /// The host memory. With frame 0, a page has the same host address in every mapping, and only then do
        /// permissions accumulate.
        frame: u64,
        /// The proved permissions.
        permissions: Permissions,
    },
    /// An invalidation begins.
    Begin {
        /// Its range.
        range: ByteRange<Iova>,
    },
    /// An open invalidation ends.
    End {
        /// Its index among the open ones.
        which: usize,
    },
}

/// The host address of a script's mapping.
fn host_of(first: u64, frame: u64) -> u64 {
    FRAME + frame * PAGE_SIZE + if frame == 0 { (first & 0xff_ffff) << PAGE_SHIFT } else { 0 }
}

/// What the twin knows of one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Known {
    host: u64,
    permissions: Permissions,
    /// Pages in the block in which it was mapped: a leaf of at most that size may be evicted as a whole.
    block: u64,
    /// A zap hit that block: the mirror may have less now.
    may_be_forgotten: bool,
}

/// All operations so far.
#[derive(Default)]
struct Twin(Vec<Operation>);

impl Twin {
    fn page(&self, page: u64) -> Option<Known> {
        self.0.iter().fold(None, |known, operation| match *operation {
            Operation::Map { first, pages, frame, permissions } if (first..first + pages).contains(&page) => {
                let host = host_of(first, frame) + ((page - first) << PAGE_SHIFT);
                Some(mapped(known, (first, pages), page, host, permissions))
            }
            Operation::Begin { range } => known.and_then(|known| zapped(known, page, range)),
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

/// The pages to check after an operation.
fn probes(operation: &Operation) -> Vec<u64> {
    let mut probes = vec![0, 511, 512, 513, 1 << 18, (1 << 27) - 1, 1 << 27, ALL_PAGES - 1];
    match *operation {
        Operation::Map { first, pages, .. } => {
            probes.extend([first.saturating_sub(1), first, first + pages / 2, first + pages - 1])
        }
        Operation::Begin { range } => {
            let (first, last) = (range.first().raw() >> PAGE_SHIFT, range.last().raw() >> PAGE_SHIFT);
            probes.extend([first.saturating_sub(1), first, last, last.saturating_add(1).min(ALL_PAGES - 1)]);
        }
        Operation::End { .. } => {}
    }
    probes
}

struct NoWaker;

impl DrainWaker for NoWaker {
    fn wake(&self) {}
}

/// A mirror with its twin.
struct Player {
    writer: MirrorWriter,
    reader: Reader,
    twin: Twin,
    open: Vec<(Drained, ByteRange<Iova>)>,
}

/// Plays a script, and checks some pages after each operation.
pub fn play(operations: impl IntoIterator<Item = Operation>) {
    let config = MirrorConfig { readers: 1, table_limit: 1 << 30 };
    let (writer, mut readers) = mirror(config, Arc::new(NoWaker));
    let reader = readers.pop().expect("The mirror was asked for a reader");
    let mut player = Player { writer, reader, twin: Twin::default(), open: Vec::new() };
    for operation in operations {
        if player.act(operation) {
            player.twin.0.push(operation);
            probes(&operation).into_iter().for_each(|page| player.check(page));
        }
    }
    player.begin(ByteRange::everything());
    assert_eq!(player.writer.table_bytes(), 0, "Tables outlive what they mapped");
}

impl Player {
    /// Executes an operation. `false`: it changed nothing.
    fn act(&mut self, operation: Operation) -> bool {
        match operation {
            Operation::Map { first, pages, frame, permissions } => {
                let len = pages << PAGE_SHIFT;
                let range = ByteRange::new(Iova::new(first << PAGE_SHIFT), len).expect("A script maps pages");
                let host = HostRange::invented(host_of(first, frame), len);
                let result = self.writer.map(DomainId::DEVICE, range, host, permissions);
                let blocked = self.open.iter().any(|(_, other)| other.page_aligned().overlaps(range));
                assert_eq!(result.is_err(), blocked, "{result:?}");
                return !blocked;
            }
            Operation::Begin { range } => self.begin(range),
            Operation::End { which } if which < self.open.len() => {
                let (drained, range) = self.open.swap_remove(which);
                assert_eq!(self.writer.end(drained).range(), range.page_aligned());
            }
            Operation::End { .. } => {}
        }
        true
    }

    /// No section is open, so there is nothing to wait for.
    fn begin(&mut self, range: ByteRange<Iova>) {
        let drained = self.writer.begin(DomainId::DEVICE, range).poll().expect("Nothing is in flight");
        self.open.push((drained, range));
    }

    fn check(&self, page: u64) {
        let known = self.twin.page(page);
        let at = page << PAGE_SHIFT | 0x123;
        let section = self.reader.enter();
        for access in [Access::Read, Access::Write] {
            let found =
                section.translate(DomainId::DEVICE, Iova::new(at), access).ok().map(HostSpan::address);
            match (found, known.filter(|known| known.permissions.allow(access))) {
                (Some(found), Some(expected)) => assert_eq!(found, expected.host + 0x123, "page {page:#x}"),
                (None, Some(expected)) => {
                    assert!(expected.may_be_forgotten, "page {page:#x} is lost for {access}");
                }
                (Some(found), None) => panic!("page {page:#x} leads to {found:#x}"),
                (None, None) => {}
            }
        }
    }
}
