//! What a lookup costs: through the mirror with its section, through a bare radix walk, and through vm-memory's
//! `Iotlb` behind a lock; among 65,536 pages with scattered frames, at random, alone and beside a second reader.
//!
//! An iteration is a batch of lookups, and "thrpt" is what to read: lookups a second. The addresses are drawn
//! beforehand, and each depends on the result before it, so that it is latency which is measured and not how many
//! walks a processor can have in the air. On a machine that has other work, compare within one run.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::thread;

use criterion::{
    BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use device_model::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use device_model::mmu::{DrainWaker, HostRange, MirrorConfig, Permissions, Reader, mirror};
use vm_memory::iommu::Iotlb;
use vm_memory::{GuestAddress, Permissions as VmPermissions};

const ENTRIES: u64 = 65_536;
/// Lookups an iteration.
const BATCH: usize = 8192;
/// Where Linux puts the first DMA addresses of a device: below 4 GiB.
const BASE: u64 = 0xe000_0000;

struct Silent;

impl DrainWaker for Silent {
    fn wake(&self) {}
}

/// The frame of a page: no two neighbours are neighbours there.
fn frame(page: u64) -> u64 {
    0x7000_0000_0000 + (page.wrapping_mul(40_503) % ENTRIES) * PAGE_SIZE
}

/// Random addresses among the entries.
fn addresses() -> Vec<u64> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        BASE + (state % ENTRIES) * PAGE_SIZE + (state >> 32 & 0xff8)
    };
    (0..1 << 16).map(|_| next()).collect()
}

/// A node: what is below each entry, if anything.
type Node<T> = Box<[Option<T>]>;

/// A radix table without anything around it: what a lookup costs at the least.
struct Radix(Node<Node<Box<[AtomicU64]>>>);

impl Radix {
    fn new() -> Self {
        let mut root: Node<Node<Box<[AtomicU64]>>> = (0..512).map(|_| None).collect();
        for page in 0..ENTRIES {
            let number = BASE / PAGE_SIZE + page;
            let middle =
                root[(number >> 18) as usize].get_or_insert_with(|| (0..512).map(|_| None).collect());
            let leaves = middle[(number >> 9 & 511) as usize]
                .get_or_insert_with(|| (0..512).map(|_| AtomicU64::new(0)).collect());
            leaves[(number & 511) as usize].store(frame(page) | 1, Ordering::Relaxed);
        }
        Self(root)
    }

    fn lookup(&self, at: u64) -> Option<u64> {
        let number = at / PAGE_SIZE;
        let middle = self.0.get((number >> 18) as usize)?.as_ref()?;
        let leaves = middle.get((number >> 9 & 511) as usize)?.as_ref()?;
        let entry = leaves.get((number & 511) as usize)?.load(Ordering::Acquire);
        (entry & 1 == 1).then_some((entry & !0xfff) + at % PAGE_SIZE)
    }
}

fn filled_mirror() -> (device_model::mmu::MirrorWriter, Vec<Reader>) {
    let (mut writer, readers) = mirror(MirrorConfig { readers: 2, table_limit: 64 << 20 }, Arc::new(Silent));
    for page in 0..ENTRIES {
        let range = ByteRange::new(Iova::new(BASE + page * PAGE_SIZE), PAGE_SIZE).unwrap();
        // SAFETY: nobody follows these translations.
        let host = unsafe { HostRange::new(frame(page) as *mut u8, PAGE_SIZE as usize) };
        writer.map(DomainId::DEVICE, range, host, Permissions::READ).unwrap();
    }
    (writer, readers)
}

fn filled_iotlb() -> RwLock<Iotlb> {
    let mut iotlb = Iotlb::new();
    for page in 0..ENTRIES {
        let (from, to) = (GuestAddress(BASE + page * PAGE_SIZE), GuestAddress(frame(page)));
        iotlb.set_mapping(from, to, PAGE_SIZE as usize, VmPermissions::Read).unwrap();
    }
    RwLock::new(iotlb)
}

fn in_mirror(reader: &Reader, at: u64) -> u64 {
    let section = reader.enter();
    let span = section.translate(DomainId::DEVICE, Iova::new(at), Access::Read);
    span.map_or(0, |span| span.address())
}

fn in_iotlb(iotlb: &RwLock<Iotlb>, at: u64) -> u64 {
    let guard = iotlb.read().unwrap();
    let found = Iotlb::lookup(guard, GuestAddress(at), 8, VmPermissions::Read);
    found.ok().and_then(|mut pieces| pieces.next()).map_or(0, |piece| piece.base.0)
}

/// Measures `lookup` at random addresses.
fn measure(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, lookup: impl Fn(u64) -> u64) {
    let addresses = addresses();
    for &at in &addresses {
        assert_eq!(lookup(at) % PAGE_SIZE, at % PAGE_SIZE);
        assert_ne!(lookup(at), 0);
    }
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function(name, |bencher| {
        let mut last = 0;
        bencher.iter(|| {
            for &at in &addresses[..BATCH] {
                // Bit 63 is never set in a host address: the next lookup waits for this one all the same.
                last = lookup(at | black_box(last) >> 63);
            }
            last
        });
    });
}

/// Runs `measured` while another thread looks up all the time.
fn beside(other: impl Fn(u64) -> u64 + Send, measured: impl FnOnce()) {
    let stop = &AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(move || {
            let addresses = addresses();
            while !stop.load(Ordering::Relaxed) {
                for &at in &addresses {
                    black_box(other(at));
                }
            }
        });
        measured();
        stop.store(true, Ordering::Relaxed);
    });
}

fn lookups(criterion: &mut Criterion) {
    let (_writer, mut readers) = filled_mirror();
    let (second, first) = (readers.pop().unwrap(), readers.pop().unwrap());
    let (radix, iotlb) = (Radix::new(), filled_iotlb());

    let mut group = criterion.benchmark_group("lookup, 65,536 pages, random");
    measure(&mut group, "bare radix walk", |at| radix.lookup(at).unwrap_or(0));
    measure(&mut group, "mirror, a section each", |at| in_mirror(&first, at));
    let section = first.enter();
    measure(&mut group, "mirror, in an open section", |at| {
        section.translate(DomainId::DEVICE, Iova::new(at), Access::Read).map_or(0, |span| span.address())
    });
    drop(section);
    measure(&mut group, "vm-memory Iotlb in an RwLock", |at| in_iotlb(&iotlb, at));
    group.finish();

    let mut group = criterion.benchmark_group("lookup beside a second reader");
    beside(
        |at| radix.lookup(at).unwrap_or(0),
        || {
            measure(&mut group, "bare radix walk", |at| radix.lookup(at).unwrap_or(0));
        },
    );
    beside(
        move |at| in_mirror(&second, at),
        || {
            measure(&mut group, "mirror, a section each", |at| in_mirror(&first, at));
        },
    );
    beside(
        |at| in_iotlb(&iotlb, at),
        || {
            measure(&mut group, "vm-memory Iotlb in an RwLock", |at| in_iotlb(&iotlb, at));
        },
    );
    group.finish();
}

criterion_group!(benches, lookups);
criterion_main!(benches);
