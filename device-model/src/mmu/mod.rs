//! The mirrored MMU: page tables that mirror the guest's IOMMU, and the protocol that proves that a mapping is unused
//! before its INVALIDATE is acked.
//!
//! Made of: `entry`, `page_table`, `table_writer`, `limbo` (the tables: one writer, readers without locks, memory
//! reclaimed by epochs), `section` (using a translation for a moment), `pin` and `registry` (holding one for longer),
//! `invalidation` (its life as values), `memory` and `ring_memory` (bytes), `missing` and `miss` (what to request from
//! the front-end). Knows nothing of sockets, threads, messages, jobs or clocks.
//!
//! LOCKING: the reader of a [`RingMemory`], its list of misses, the registry and the orphans are leaves of the locking
//! order (ARCHITECTURE.md, "Locking order"). The [`DrainWaker`] is called with none of them held. Walks and copies take
//! no lock.

mod entry;
mod invalidation;
mod limbo;
mod memory;
pub mod miss;
mod missing;
mod page_table;
mod pin;
mod registry;
mod ring_memory;
mod section;
mod table_writer;
mod writer;

pub use entry::Permissions;
pub use invalidation::{Drained, Ended, InFlight, Invalidation, MemoryRevoked, SeededBug};
pub use memory::{AtomicOperation, HostPage, HostRange, HostSpan, JobMemory, MemoryError, Width};
pub use missing::{MISSING_PAGES, Missing};
pub use pin::{Pin, PinError, PinMode, PinRange};
pub use ring_memory::{RingMemory, RingSection, RingView, STICKY_MISSES};
pub use section::{Reader, Section};
pub use writer::{MapError, Mapped, MappedRange, MirrorWriter};

use crate::addr::DomainId;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering};
use page_table::{Owner, Roots};
use registry::Registry;
use section::Slots;

/// Address spaces of a device. There is one so far.
const SPACES: usize = 1;

/// The size of a mirror.
#[derive(Clone, Copy, Debug)]
pub struct MirrorConfig {
    /// Threads that touch guest memory, each with a [`Reader`].
    pub readers: usize,
    /// The most bytes of page tables.
    pub table_limit: usize,
}

/// Wakes the session when a parked invalidation may be drained. The last thread to leave calls it, with no lock held;
/// it must not wait, and it may be called more often than needed.
pub trait DrainWaker: Send + Sync {
    /// Makes the session poll its parked invalidations.
    fn wake(&self);
}

/// What the writer and all readers share.
struct Shared {
    spaces: [Roots; SPACES],
    slots: Slots,
    registry: Mutex<Registry>,
    waker: std::sync::Arc<dyn DrainWaker>,
    table_limit: usize,
    /// How often all memory has gone away.
    epoch: AtomicU64,
    /// What was still in limbo when the writer was dropped. Freed with the rest.
    orphans: std::sync::Mutex<Vec<entry::TableEntry>>,
}

impl Shared {
    /// How often all memory has gone away. Read before a lookup whose result it belongs to.
    fn epoch(&self) -> u64 {
        // ORDERING: Acquire pairs with the Release of `memory_is_gone`: a lookup that follows finds nothing from before.
        self.epoch.load(Ordering::Acquire)
    }

    /// All mappings are zapped, and what they led to goes away.
    fn memory_is_gone(&self) {
        self.epoch.fetch_add(1, Ordering::Release);
    }

    fn roots(&self, space: DomainId) -> Option<&Roots> {
        self.spaces.get(space.raw() as usize)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // No thread can be in a section any more: the tables can go.
        let mut owner = Owner::new();
        self.spaces.iter().for_each(|roots| owner.free_all(roots));
        let orphans = self.orphans.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        orphans.drain(..).for_each(|table| owner.free(table));
    }
}

/// Makes a mirror: its one writer, and a reader for each thread.
pub fn mirror(config: MirrorConfig, waker: std::sync::Arc<dyn DrainWaker>) -> (MirrorWriter, Vec<Reader>) {
    let shared = Arc::new(Shared {
        spaces: std::array::from_fn(|_| Roots::new()),
        slots: Slots::new(config.readers),
        registry: Mutex::new(Registry::default()),
        waker,
        table_limit: config.table_limit,
        epoch: AtomicU64::new(0),
        orphans: std::sync::Mutex::default(),
    });
    let readers =
        shared.slots.iter().map(|slot| Reader::new(Arc::clone(&shared), Arc::clone(slot))).collect();
    (MirrorWriter::new(shared), readers)
}

#[cfg(all(test, not(loom)))]
mod tests;

#[cfg(all(test, loom))]
mod loom_models;
