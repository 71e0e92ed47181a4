//! One track: a ring of one producer's newest events. The producer stores without waiting; a reader copies concurrently
//! and skips what was being written. Every word is an atomic, so a torn read is a stale value and never undefined
//! behaviour, and each slot's sequence number tells which event its words belong to.

use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::event::Event;
use super::pack::WORDS;
use crate::sync::{AtomicBool, AtomicU64, Ordering, fence};

/// Events whose memory is allocated together when the first of them comes.
#[cfg(not(loom))]
const CHUNK: u64 = 256;
/// A track of one event; otherwise its model does not terminate.
#[cfg(loom)]
const CHUNK: u64 = 1;

/// The slot of an event.
///
/// The sequence is twice the number of the event, plus 1 while it is written and plus 2 afterwards; 0 before the first.
#[derive(Debug, Default)]
struct EventSlot {
    sequence: AtomicU64,
    at: AtomicU64,
    words: [AtomicU64; WORDS],
}

type Chunk = Box<[EventSlot]>;

/// A ring of events.
pub(super) struct Track {
    name: String,
    chunks: Box<[OnceLock<Chunk>]>,
    /// Events recorded here so far.
    recorded: AtomicU64,
    /// A producer has the writer.
    taken: AtomicBool,
}

impl Track {
    /// A ring of at least `capacity` events.
    pub(super) fn new(name: String, capacity: u64) -> Self {
        let chunks = (0..capacity.div_ceil(CHUNK).max(1)).map(|_| OnceLock::new()).collect();
        Self { name, chunks, recorded: AtomicU64::new(0), taken: AtomicBool::new(false) }
    }

    pub(super) fn capacity(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK
    }

    /// Allocated chunks.
    #[cfg(test)]
    pub(super) fn chunks(&self) -> usize {
        self.chunks.iter().filter(|chunk| chunk.get().is_some()).count()
    }

    fn chunk(&self, number: u64) -> Option<&OnceLock<Chunk>> {
        self.chunks.get((number / CHUNK) as usize % self.chunks.len())
    }

    /// Only the one writer calls this.
    #[inline]
    fn store(&self, number: u64, at: Duration, event: Event) {
        let Some(chunk) = self.chunk(number) else { return };
        let chunk = chunk.get_or_init(|| (0..CHUNK).map(|_| EventSlot::default()).collect());
        let Some(slot) = chunk.get((number % CHUNK) as usize) else { return };
        let words = event.pack();
        // ORDERING: a seqlock. The fence keeps the stores below after the odd sequence: a reader that sees one of them
        // sees, after its own fence, that the sequence has changed.
        slot.sequence.store(2 * number + 1, Ordering::Relaxed);
        fence(Ordering::Release);
        slot.at.store(u64::try_from(at.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        for (to, from) in slot.words.iter().zip(words) {
            to.store(from, Ordering::Relaxed);
        }
        // ORDERING: Release pairs with the Acquire of `read`: a reader that sees the even sequence sees the words.
        slot.sequence.store(2 * number + 2, Ordering::Release);
        // ORDERING: only where a snapshot starts; each slot says itself what it holds.
        self.recorded.store(number + 1, Ordering::Relaxed);
    }

    fn read(&self, number: u64) -> Option<Recorded> {
        let slot = self.chunk(number)?.get()?.get((number % CHUNK) as usize)?;
        let whole = 2 * number + 2;
        // ORDERING: Acquire pairs with the last store of `store`.
        if slot.sequence.load(Ordering::Acquire) != whole {
            return None;
        }
        let at = slot.at.load(Ordering::Relaxed);
        let words = std::array::from_fn(|word| slot.words[word].load(Ordering::Relaxed));
        // ORDERING: pairs with the fence of `store`: if a word above were of a later event, the sequence would show it.
        fence(Ordering::Acquire);
        if slot.sequence.load(Ordering::Relaxed) != whole {
            return None;
        }
        Some(Recorded { number, at: Duration::from_nanos(at), event: Event::unpack(words)? })
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        // ORDERING: see `store`.
        let end = self.recorded.load(Ordering::Relaxed);
        let begin = end.saturating_sub(self.capacity());
        let events = (begin..end).filter_map(|number| self.read(number)).collect();
        Snapshot { track: self.name.clone(), events, forgotten: begin }
    }
}

impl fmt::Debug for Track {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Track").field("name", &self.name).field("capacity", &self.capacity()).finish()
    }
}

/// An event with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Its number in its track, counted from 0.
    pub number: u64,
    /// Its time, on the device's clock.
    pub at: Duration,
    /// The event.
    pub event: Event,
}

/// The contents of a track.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The name of the producer.
    pub track: String,
    /// Its events, oldest first.
    pub events: Vec<Recorded>,
    /// How many older events were overwritten.
    pub forgotten: u64,
}

/// The right to write a track, for one producer. Dropping it returns the right.
#[derive(Debug)]
pub struct TrackWriter {
    track: Arc<Track>,
    next: Cell<u64>,
}

impl TrackWriter {
    pub(super) fn take(track: &Arc<Track>) -> Option<Self> {
        // ORDERING: Acquire pairs with the Release of `drop`: the next writer sees how far the last one got.
        if track.taken.swap(true, Ordering::Acquire) {
            return None;
        }
        let next = Cell::new(track.recorded.load(Ordering::Relaxed));
        Some(Self { track: Arc::clone(track), next })
    }

    /// Records an event: a few stores, no lock, no wait. The first event of each 256 allocates their memory.
    #[inline]
    pub fn record(&self, at: Duration, event: Event) {
        let number = self.next.get();
        self.next.set(number + 1);
        self.track.store(number, at, event);
    }
}

impl Drop for TrackWriter {
    fn drop(&mut self) {
        // ORDERING: see `take`.
        self.track.taken.store(false, Ordering::Release);
    }
}

#[cfg(all(test, loom))]
mod loom_models {
    use loom::thread;

    use super::*;
    use crate::addr::{Access, ByteRange, Iova, PAGE_SIZE};

    /// An event of which two words, and its time, differ from those of the next.
    fn event(number: u64) -> Event {
        let page = ByteRange::new(Iova::new(number * PAGE_SIZE), PAGE_SIZE).unwrap();
        Event::Miss { range: page, access: Access::Read }
    }

    #[test]
    fn loom_a_snapshot_beside_a_writer_has_no_torn_event() {
        loom::model(|| {
            let track = Arc::new(Track::new(String::new(), 1));
            let writer = TrackWriter::take(&track).unwrap();
            writer.record(Duration::from_nanos(0), event(0));
            let theirs = Arc::clone(&track);
            let producer = thread::spawn(move || writer.record(Duration::from_nanos(1), event(1)));
            for Recorded { number, at, event: found } in track.snapshot().events {
                assert_eq!((at, found), (Duration::from_nanos(number), event(number)));
            }
            producer.join().unwrap();
            drop(theirs);
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::thread;

    use super::*;
    use crate::addr::{Access, ByteRange, Iova};

    fn track(capacity: u64) -> (Arc<Track>, TrackWriter) {
        let track = Arc::new(Track::new("test".to_owned(), capacity));
        let writer = TrackWriter::take(&track).unwrap();
        (track, writer)
    }

    /// An event whose words are all equal.
    fn uniform(number: u64) -> Event {
        let page = ByteRange::new(Iova::new((number & 0xffff_ffff) << 12), 4096).unwrap();
        Event::Miss { range: page, access: Access::Read }
    }

    #[test]
    fn the_newest_events_are_kept_in_order_and_the_others_counted() {
        let (track, writer) = track(512);
        for number in 0..1300 {
            writer.record(Duration::from_nanos(number), uniform(number));
        }
        let snapshot = track.snapshot();
        assert_eq!((snapshot.events.len(), snapshot.forgotten), (512, 788));
        for (event, number) in snapshot.events.iter().zip(788..) {
            let expected = Recorded { number, at: Duration::from_nanos(number), event: uniform(number) };
            assert_eq!(*event, expected);
        }
    }

    /// A writer that keeps overtaking its readers: what they get is complete, and in order.
    #[test]
    fn a_snapshot_beside_a_writer_has_no_torn_event() {
        let (track, writer) = track(256);
        let stop = AtomicBool::new(false);
        let seen = thread::scope(|scope| {
            scope.spawn(|| {
                let writer = writer;
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    writer.record(Duration::from_nanos(number), uniform(number));
                    number += 1;
                }
            });
            let (mut seen, mut looks) = (0, 0);
            // Until the writer has run, too.
            while looks < 20_000 || seen == 0 {
                looks += 1;
                let events = track.snapshot().events;
                assert!(events.is_sorted_by_key(|event| event.number));
                for Recorded { number, at, event } in &events {
                    assert_eq!((*at, *event), (Duration::from_nanos(*number), uniform(*number)));
                }
                seen += events.len();
            }
            stop.store(true, Ordering::Relaxed);
            seen
        });
        assert!(seen > 0);
    }
}
