//! The mirror as vm-memory's `GuestMemory`, for virtqueues: every translation happens in a section that lasts as long
//! as the guard, and every miss is remembered, because virtio-queue hides them. Knows nothing of rings.

use std::fmt;
use std::iter::FusedIterator;
use std::ops::Deref;
use std::sync::{Arc, Mutex};

use vm_memory::guest_memory::{Error, GuestMemorySliceIterator, Result};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

use super::memory::{
    AtomicOperation, HostPage, HostSpan, JobMemory, MemoryError, Width, atomic_with, copy_with, read_with,
    write_with,
};
use super::missing::Missing;
use super::section::Reader;
use crate::addr::{Access, ByteRange, DomainId, Iova};
use crate::locking::lock;

/// The most misses that are remembered until they are taken.
pub const STICKY_MISSES: usize = 64;

/// Guest memory as the virtqueues see it. Clones are the same memory through the same reader.
///
/// LOCKING: the reader's lock is held for a few instructions when a section opens or closes, never inside one.
#[derive(Clone)]
pub struct RingMemory(Arc<SharedRingMemory>);

struct SharedRingMemory {
    reader: Mutex<Reader>,
    /// The same mirror, for walks inside a section of `reader`.
    shared: crate::sync::Arc<super::Shared>,
    missing: Mutex<Vec<Missing>>,
}

impl RingMemory {
    /// Rings over the memory that `reader` reads.
    pub fn new(reader: Reader) -> Self {
        let shared = reader.shared.clone();
        Self(Arc::new(SharedRingMemory { reader: Mutex::new(reader), shared, missing: Mutex::default() }))
    }

    /// Opens a section of the rings' reader. As with [`Reader::enter`], it must not contain a wait.
    pub fn enter(&self) -> RingSection {
        self.0.open();
        RingSection { memory: RingView(Arc::clone(&self.0)) }
    }

    /// The misses since the last call, each once. If there are any, the previous ring call cannot be trusted.
    pub fn take_missing(&self) -> Vec<Missing> {
        std::mem::take(&mut *self.0.missing())
    }
}

impl fmt::Debug for RingMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RingMemory").field("missing", &self.0.missing().len()).finish()
    }
}

impl GuestAddressSpace for RingMemory {
    type M = RingView;
    type T = RingSection;

    fn memory(&self) -> RingSection {
        self.enter()
    }
}

impl SharedRingMemory {
    fn open(&self) {
        lock(&self.reader).open();
    }

    fn close(&self) {
        // The guard is dropped first: the waker is never called with a lock held.
        let wake = lock(&self.reader).close();
        if wake {
            self.shared.waker.wake();
        }
    }

    fn missing(&self) -> std::sync::MutexGuard<'_, Vec<Missing>> {
        lock(&self.missing)
    }

    fn note(&self, missing: Missing) {
        let mut list = self.missing();
        if list.len() < STICKY_MISSES && !list.contains(&missing) {
            list.push(missing);
        }
    }
}

/// An open section of the rings' reader. A clone is another section, in the same epoch.
pub struct RingSection {
    memory: RingView,
}

impl Clone for RingSection {
    fn clone(&self) -> Self {
        let ring = &self.memory.0;
        ring.open();
        Self { memory: RingView(Arc::clone(ring)) }
    }
}

impl Drop for RingSection {
    fn drop(&mut self) {
        self.memory.0.close();
    }
}

impl Deref for RingSection {
    type Target = RingView;

    fn deref(&self) -> &RingView {
        &self.memory
    }
}

impl JobMemory for RingSection {
    fn read(&self, space: DomainId, at: Iova, into: &mut [u8]) -> std::result::Result<(), MemoryError> {
        read_with(|at, _| self.memory.find(space, at, Access::Read).map_err(MemoryError::Missing), at, into)
    }

    fn write(&self, space: DomainId, at: Iova, from: &[u8]) -> std::result::Result<(), MemoryError> {
        write_with(|at, _| self.memory.find(space, at, Access::Write).map_err(MemoryError::Missing), at, from)
    }

    fn copy(
        &self,
        space: DomainId,
        from: Iova,
        to: Iova,
        len: usize,
    ) -> std::result::Result<(), MemoryError> {
        let find = |at, _, access| self.memory.find(space, at, access).map_err(MemoryError::Missing);
        copy_with(find, from, to, len)
    }

    fn atomic(
        &self,
        space: DomainId,
        at: Iova,
        width: Width,
        operation: AtomicOperation,
    ) -> std::result::Result<u64, MemoryError> {
        let find = |access| self.memory.find(space, at, access).map_err(MemoryError::Missing);
        atomic_with(find, at, (width, operation))
    }

    fn host_page(&self, space: DomainId, at: Iova, access: Access) -> Option<HostPage> {
        let epoch = self.memory.shared().epoch();
        Some(HostPage::new(epoch, self.memory.find(space, at.page(), access).ok()?.address()))
    }
}

/// What a [`RingSection`] derefs to. INVARIANT: it is reached only through one, so a section is open.
pub struct RingView(Arc<SharedRingMemory>);

impl RingView {
    pub(super) fn shared(&self) -> &super::Shared {
        &self.0.shared
    }

    fn find(&self, space: DomainId, at: Iova, access: Access) -> std::result::Result<HostSpan<'_>, Missing> {
        self.translate(space, at, access).inspect_err(|&missing| self.0.note(missing))
    }

    /// The contiguous piece at `at` that permits all of `access`.
    fn piece(&self, at: Iova, len: usize, access: Permissions) -> Result<VolatileSlice<'_>> {
        let read = self.find_if(access != Permissions::Write, at, Access::Read);
        let write = self.find_if(access.has_write(), at, Access::Write);
        match (read, write) {
            (Ok(Some(span)), Ok(_)) | (Ok(None), Ok(Some(span))) => Ok(span.slice(len)),
            _ => Err(Error::InvalidGuestAddress(GuestAddress(at.raw()))),
        }
    }

    fn find_if(
        &self,
        needed: bool,
        at: Iova,
        access: Access,
    ) -> std::result::Result<Option<HostSpan<'_>>, Missing> {
        needed.then(|| self.find(DomainId::DEVICE, at, access)).transpose()
    }
}

impl GuestMemory for RingView {
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.get_slices(addr, count, access).is_ok_and(|mut slices| slices.all(|slice| slice.is_ok()))
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, ()>> {
        let at = Iova::new(addr.0);
        if count > 0 && ByteRange::new(at, count as u64).is_err() {
            return Err(Error::GuestAddressOverflow);
        }
        Ok(Slices { view: self, at: Some(at), rest: count, access })
    }
}

/// The pieces of a range, translated one by one. It ends at the first error.
struct Slices<'a> {
    view: &'a RingView,
    at: Option<Iova>,
    rest: usize,
    access: Permissions,
}

impl<'a> Iterator for Slices<'a> {
    type Item = Result<VolatileSlice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        let at = self.at.filter(|_| self.rest > 0)?;
        let piece = self.view.piece(at, self.rest, self.access);
        match &piece {
            Ok(slice) => {
                self.rest -= slice.len();
                self.at = at.checked_add(slice.len() as u64);
            }
            Err(_) => self.at = None,
        }
        Some(piece)
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a> {}
