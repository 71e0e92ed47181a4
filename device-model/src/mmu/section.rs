//! Sections: the time in which a thread may use translations. A section is an epoch of its thread's slot (odd while it
//! is open), and a drain waits for the epochs that it found odd. Knows no ranges, pins or guests.
//!
//! There are two store-load races, and each side of each has its fence:
//! * entry: *epoch odd → fence → walk* against *zap → fence → read the epochs*: a section that the drain did not see
//!   does not see what was zapped;
//! * exit: *epoch even → fence → read `awaited`* against *`awaited` := epoch → fence → read the epoch again*: a
//!   drain that still saw the section open is woken when it leaves.
//!
//! `awaited` is in the slot and names one epoch, so while a drain is parked (on a pin, say, for 100 ms) only the
//! sections that it waits for wake it, each once.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use super::Shared;
use super::memory::HostSpan;
use super::missing::Missing;
use super::ring_memory::RingView;
use crate::addr::{Access, DomainId, Iova, PAGE_SHIFT};
use crate::sync::{Arc, AtomicU64, Ordering, fence};

/// One thread's epoch. Alone on its cache lines: it is written twice per section.
#[repr(align(128))]
pub(super) struct ReaderSlot {
    /// Odd while a section is open. Only the slot's reader stores it.
    epoch: AtomicU64,
    /// The odd epoch at whose end a drain wants to be woken. Only the writer stores it.
    awaited: AtomicU64,
}

/// All slots.
pub(super) struct Slots(Box<[Arc<ReaderSlot>]>);

impl Slots {
    pub(super) fn new(count: usize) -> Self {
        Self(
            (0..count)
                .map(|_| Arc::new(ReaderSlot { epoch: AtomicU64::new(0), awaited: AtomicU64::new(0) }))
                .collect(),
        )
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<ReaderSlot>> {
        self.0.iter()
    }

    /// The sections that may still see what was zapped or unlinked before this call.
    pub(super) fn open(&self) -> OpenSections {
        // ORDERING: with the fence of `Reader::enter` (the race on entry, see above).
        fence(Ordering::SeqCst);
        let epochs = self.0.iter().map(|slot| slot.epoch.load(Ordering::Acquire)).enumerate();
        OpenSections(epochs.filter(|&(_, epoch)| epoch & 1 == 1).collect())
    }
}

/// The sections that were open at one moment: slot and epoch of each.
pub(super) struct OpenSections(Vec<(usize, u64)>);

impl OpenSections {
    /// Drops those that have left since; returns whether none remains.
    pub(super) fn have_left(&mut self, slots: &Slots) -> bool {
        // ORDERING: Acquire pairs with the Release of the epoch's stores: what the section did comes before.
        self.0.retain(|&(slot, epoch)| {
            slots.0.get(slot).is_some_and(|slot| slot.epoch.load(Ordering::Acquire) == epoch)
        });
        self.0.is_empty()
    }

    /// As [`Self::have_left`]; each that remains calls the waker when it leaves.
    pub(super) fn have_left_or_will_wake(&mut self, slots: &Slots) -> bool {
        if self.have_left(slots) {
            return true;
        }
        for &(slot, epoch) in &self.0 {
            if let Some(slot) = slots.0.get(slot) {
                slot.awaited.store(epoch, Ordering::Relaxed);
            }
        }
        // ORDERING: with the fence of `Reader::leave` (the race on exit, see above).
        fence(Ordering::SeqCst);
        self.have_left(slots)
    }

    /// How many are still open.
    pub(super) fn count(&self, slots: &Slots) -> usize {
        let open = |&&(slot, epoch): &&(usize, u64)| {
            // ORDERING: a figure for people.
            slots
                .0
                .get(slot)
                .is_some_and(|slot: &Arc<ReaderSlot>| slot.epoch.load(Ordering::Relaxed) == epoch)
        };
        self.0.iter().filter(open).count()
    }
}

/// The proof that a section of this mirror is open for `'a`: walks require it.
#[derive(Clone, Copy)]
pub(super) struct Inside<'a>(PhantomData<&'a ()>);

/// A thread's right to touch guest memory. Each thread has its own; it can be passed on, not shared.
pub struct Reader {
    pub(super) shared: Arc<Shared>,
    slot: Arc<ReaderSlot>,
    /// The slot's epoch, which only this reader changes.
    epoch: Cell<u64>,
    /// Nested open sections.
    depth: Cell<u32>,
}

impl Reader {
    pub(super) fn new(shared: Arc<Shared>, slot: Arc<ReaderSlot>) -> Self {
        Self { shared, slot, epoch: Cell::new(0), depth: Cell::new(0) }
    }

    /// Opens a section. Translations are valid within it. It has to end within a step (64 KiB, microseconds), for every
    /// invalidation waits for it, and it must not contain a wait. A nested section costs nothing.
    #[inline]
    pub fn enter(&self) -> Section<'_> {
        self.open();
        Section { reader: self }
    }

    /// Opens a section without a guard: each call is paired with one of [`Reader::close`].
    #[inline]
    pub(super) fn open(&self) {
        let depth = self.depth.get();
        self.depth.set(depth + 1);
        if depth == 0 {
            let epoch = self.epoch.get() + 1;
            self.epoch.set(epoch);
            // ORDERING: Relaxed is enough: if a drain finds this epoch instead of the one that it waits for, the fence
            // at that section's exit orders that section before it. The fence here is the one on entry.
            self.slot.epoch.store(epoch, Ordering::Relaxed);
            fence(Ordering::SeqCst);
        }
    }

    /// Closes a section. Returns whether a drain has to be woken.
    #[inline]
    pub(super) fn close(&self) -> bool {
        let depth = self.depth.get() - 1;
        self.depth.set(depth);
        if depth > 0 {
            return false;
        }
        let left = self.epoch.get();
        self.epoch.set(left + 1);
        // ORDERING: Release pairs with the drain's Acquire; the fence is the one on exit.
        self.slot.epoch.store(left + 1, Ordering::Release);
        fence(Ordering::SeqCst);
        self.slot.awaited.load(Ordering::Relaxed) == left
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("epoch", &self.epoch.get()).field("depth", &self.depth.get()).finish()
    }
}

/// An open section. What it translates is valid until it is dropped, and an invalidation waits until then.
pub struct Section<'a> {
    reader: &'a Reader,
}

impl Section<'_> {
    /// Where the byte `at` of `space` is now, and how many bytes follow, if the mirror maps it with the permission for
    /// `access`.
    #[inline]
    pub fn translate(&self, space: DomainId, at: Iova, access: Access) -> Result<HostSpan<'_>, Missing> {
        self.reader.shared.translate(space, at, access, Inside(PhantomData))
    }

    /// As [`Shared::epoch`].
    pub(super) fn epoch(&self) -> u64 {
        self.reader.shared.epoch()
    }
}

impl RingView {
    /// As [`Section::translate`]; a view is reached only through an open section.
    pub(super) fn translate(
        &self,
        space: DomainId,
        at: Iova,
        access: Access,
    ) -> Result<HostSpan<'_>, Missing> {
        self.shared().translate(space, at, access, Inside(PhantomData))
    }
}

impl Shared {
    #[inline]
    fn translate<'a>(
        &self,
        space: DomainId,
        at: Iova,
        access: Access,
        inside: Inside<'a>,
    ) -> Result<HostSpan<'a>, Missing> {
        let leaf = self.roots(space).and_then(|roots| roots.walk(at.raw() >> PAGE_SHIFT, inside));
        match leaf.filter(|leaf| leaf.allows(access)) {
            Some(leaf) => {
                let (host, len) = leaf.resolve(at.raw());
                Ok(HostSpan::new(host, len))
            }
            None => Err(Missing { space, range: at.page_range(), access }),
        }
    }
}

impl Drop for Section<'_> {
    #[inline]
    fn drop(&mut self) {
        if self.reader.close() {
            self.reader.shared.waker.wake();
        }
    }
}

impl fmt::Debug for Section<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reader.fmt(f)
    }
}
