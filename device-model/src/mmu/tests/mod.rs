//! Tests of the mirror as a whole, on one thread or with plain threads; `super::loom_models` has the interleavings.

mod invalidate;
mod map;
mod memory;
mod registry;
mod twin;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::addr::{Access, ByteRange, Iova};

const SPACE: DomainId = DomainId::DEVICE;
const PAGE: u64 = 0x1000;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// The pretended address of frames that no test touches.
const FRAME: u64 = 0x10_0000_0000;

/// Counts how often a drain was woken.
#[derive(Default)]
struct Wakes(AtomicUsize);

impl DrainWaker for Wakes {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A mirror with two readers.
struct Rig {
    writer: MirrorWriter,
    reader: Reader,
    other: Reader,
    wakes: Arc<Wakes>,
}

fn rig() -> Rig {
    rig_with(1 << 30)
}

fn rig_with(table_limit: usize) -> Rig {
    let wakes = Arc::new(Wakes::default());
    let (writer, mut readers) = mirror(MirrorConfig { readers: 2, table_limit }, wakes.clone());
    let (other, reader) = (readers.pop().unwrap(), readers.pop().unwrap());
    Rig { writer, reader, other, wakes }
}

fn range(start: u64, len: u64) -> ByteRange<Iova> {
    ByteRange::new(Iova::new(start), len).unwrap()
}

impl Rig {
    fn map(&mut self, start: u64, len: u64, host: u64, permissions: Permissions) -> Mapped {
        self.writer.map(SPACE, range(start, len), HostRange::invented(host, len), permissions).unwrap()
    }

    /// The host address of a byte, if it can be read.
    fn read_at(&self, at: u64) -> Option<u64> {
        self.reader.enter().translate(SPACE, Iova::new(at), Access::Read).ok().map(HostSpan::address)
    }

    /// Invalidates while nothing is in flight.
    fn invalidate(&mut self, range: ByteRange<Iova>) {
        let drained = self.writer.begin(SPACE, range).poll().unwrap();
        assert_eq!(self.writer.end(drained).range(), range.page_aligned());
    }

    fn woken(&self) -> usize {
        self.wakes.0.load(Ordering::SeqCst)
    }
}

fn wanted(start: u64, len: u64, access: Access) -> PinRange {
    PinRange { space: SPACE, range: range(start, len), access }
}

#[test]
fn what_threads_hand_on_can_be_handed_on() {
    fn shared<T: Send + Sync + Clone + 'static>() {}
    fn sent<T: Send + 'static>() {}
    shared::<RingMemory>();
    sent::<Reader>();
    sent::<Pin>();
    sent::<Invalidation>();
    sent::<MirrorWriter>();
}
