//! Guest memory as bytes: the only place where a translation becomes a pointer. Copies race with the guest, which may
//! write at any time: they are volatile, and what was read is data, never a reference. Knows sections and pins by what
//! they translate; knows nothing of rings and jobs.

use std::marker::PhantomData;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{VolatileMemory, VolatileSlice};

use super::missing::{MISSING_PAGES, Missing};
use super::pin::Pin;
use super::section::Section;
use crate::addr::{Access, ByteRange, DomainId, Iova, RangeError};

/// Memory of this process that holds guest memory: mappings are made from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRange {
    address: u64,
    len: u64,
}

impl HostRange {
    /// The `len` bytes at `ptr`.
    ///
    /// # Safety
    /// `[ptr, ptr + len)` is one mapping (or several without a gap), readable and writable, and stays mapped until
    /// every mapping made from this range has been invalidated and drained. No Rust references into it exist.
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Self {
        Self { address: ptr.expose_provenance() as u64, len: len as u64 }
    }

    /// A range without memory, for tests that never touch what they map.
    #[cfg(any(test, feature = "test-utils"))]
    pub(crate) fn invented(address: u64, len: u64) -> Self {
        Self { address, len }
    }

    /// Its length in bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The host address of the first byte, as a number.
    pub fn address(self) -> u64 {
        self.address
    }
}

/// Contiguous host memory, valid for as long as the section or pin that it came from.
#[derive(Clone, Copy, Debug)]
pub struct HostSpan<'a> {
    address: u64,
    len: u64,
    held: PhantomData<&'a ()>,
}

impl<'a> HostSpan<'a> {
    /// INVARIANT: made only by a section's walk and from a pin's segments, with the lifetime of that section or pin.
    pub(super) fn new(address: u64, len: u64) -> Self {
        Self { address, len, held: PhantomData }
    }

    /// The host address, as a number.
    pub fn address(self) -> u64 {
        self.address
    }

    /// Bytes until the mapping ends, or the part of it that is known to be contiguous.
    pub fn len(self) -> u64 {
        self.len
    }

    /// Never: a translation has at least one byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first `len` bytes, or as many as there are.
    pub(super) fn slice(self, len: usize) -> VolatileSlice<'a> {
        let len = self.len.min(len as u64) as usize;
        let address = std::ptr::with_exposed_provenance_mut(self.address as usize);
        // SAFETY: `HostRange::new` promised that this memory stays mapped until its invalidation is drained, and the
        // drain waits for the section or pin that `'a` stands for.
        unsafe { VolatileSlice::new(address, len) }
    }
}

/// Why an access failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The mirror does not map these pages with this permission: request them, then try again.
    #[error("Range {0} is not in the mirror")]
    Missing(Missing),
    /// The access is outside of what the job pinned, which is a bug of MirrorGPU.
    #[error("Range {} is not part of the pin", .0)]
    NotPinned(Missing),
    /// A value is not aligned to its size, which is a bug of MirrorGPU: the caller has to check that.
    #[error("Value at {0} is not aligned")]
    Unaligned(Iova),
    /// The access runs past the end of the address space.
    #[error("Access past the end of the address space")]
    Wraps(#[source] RangeError),
}

/// A job step's view of guest memory. No method waits.
///
/// An access that fails may have moved the bytes before the first missing page; repeating it moves them again.
pub trait JobMemory {
    /// Copies `into.len()` bytes at `at` out of the guest.
    fn read(&self, space: DomainId, at: Iova, into: &mut [u8]) -> Result<(), MemoryError>;

    /// Copies `from` into the guest at `at`.
    fn write(&self, space: DomainId, at: Iova, from: &[u8]) -> Result<(), MemoryError>;

    /// Copies `len` bytes within the guest. If the two ranges share memory, the result is undefined.
    fn copy(&self, space: DomainId, from: Iova, to: Iova, len: usize) -> Result<(), MemoryError>;

    /// Does `operation` on the aligned value at `at`, atomically for all threads and the guest's processors. Returns
    /// the previous value; for a store, which reads nothing, 0.
    fn atomic(
        &self,
        space: DomainId,
        at: Iova,
        width: Width,
        operation: AtomicOperation,
    ) -> Result<u64, MemoryError>;

    /// The memory behind the page of `at`, to be compared with what is behind it later; `None`: this access would miss.
    fn host_page(&self, space: DomainId, at: Iova, access: Access) -> Option<HostPage>;

    /// The host address that an access at `at` would reach, for an oracle that has to know it before the access.
    #[cfg(any(test, feature = "test-utils"))]
    fn locate(&self, _space: DomainId, _at: Iova, _access: Access) -> Option<u64> {
        None
    }
}

/// Names the memory behind a page. It is no way to reach that memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPage {
    /// How often all memory has gone away. Addresses from before mean nothing.
    epoch: u64,
    address: u64,
}

impl HostPage {
    /// The page at a host address.
    pub(crate) fn new(epoch: u64, address: u64) -> Self {
        Self { epoch, address }
    }

    /// Whether it certainly is other memory than `before`.
    pub fn differs(self, before: Self) -> bool {
        self.epoch == before.epoch && self.address != before.address
    }
}

/// The size of a value. Larger numbers are truncated to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 32 bits.
    Word,
    /// 64 bits.
    Wide,
}

impl Width {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Word => 4,
            Self::Wide => 8,
        }
    }

    /// The low bits of `value` that fit.
    pub fn cut(self, value: u64) -> u64 {
        match self {
            Self::Word => value & u64::from(u32::MAX),
            Self::Wide => value,
        }
    }
}

/// An atomic operation on a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtomicOperation {
    /// Reads it (acquire).
    Load,
    /// Writes it (release).
    Store(u64),
    /// Adds to it and wraps (acquire and release).
    Add(u64),
    /// Replaces it if it has the expected value (acquire and release).
    CompareExchange {
        /// The value to compare with.
        expected: u64,
        /// The new value.
        new: u64,
    },
}

impl AtomicOperation {
    /// The permissions that it needs.
    pub fn accesses(self) -> &'static [Access] {
        match self {
            Self::Load => &[Access::Read],
            Self::Store(_) => &[Access::Write],
            Self::Add(_) | Self::CompareExchange { .. } => &[Access::Read, Access::Write],
        }
    }

    /// The value that replaces `old`.
    pub fn result(self, old: u64) -> u64 {
        match self {
            Self::Load => old,
            Self::Store(new) => new,
            Self::Add(addend) => old.wrapping_add(addend),
            Self::CompareExchange { expected, new } if old == expected => new,
            Self::CompareExchange { .. } => old,
        }
    }
}

impl JobMemory for Section<'_> {
    fn read(&self, space: DomainId, at: Iova, into: &mut [u8]) -> Result<(), MemoryError> {
        let find =
            |at, all| self.translate(space, at, Access::Read).map_err(|missing| self.run(missing, all));
        read_with(find, at, into)
    }

    fn write(&self, space: DomainId, at: Iova, from: &[u8]) -> Result<(), MemoryError> {
        let find =
            |at, all| self.translate(space, at, Access::Write).map_err(|missing| self.run(missing, all));
        write_with(find, at, from)
    }

    fn copy(&self, space: DomainId, from: Iova, to: Iova, len: usize) -> Result<(), MemoryError> {
        let find =
            |at, all, access| self.translate(space, at, access).map_err(|missing| self.run(missing, all));
        copy_with(find, from, to, len)
    }

    fn atomic(
        &self,
        space: DomainId,
        at: Iova,
        width: Width,
        operation: AtomicOperation,
    ) -> Result<u64, MemoryError> {
        atomic_with(
            |access| self.translate(space, at, access).map_err(MemoryError::Missing),
            at,
            (width, operation),
        )
    }

    fn host_page(&self, space: DomainId, at: Iova, access: Access) -> Option<HostPage> {
        // The epoch first: it changes only after all mappings are gone.
        let epoch = self.epoch();
        Some(HostPage::new(epoch, self.translate(space, at.page(), access).ok()?.address()))
    }

    #[cfg(any(test, feature = "test-utils"))]
    fn locate(&self, space: DomainId, at: Iova, access: Access) -> Option<u64> {
        self.translate(space, at, access).ok().map(HostSpan::address)
    }
}

impl Section<'_> {
    /// `missing`, which is one page, together with the missing pages that follow it, up to the end of `all`.
    pub(super) fn run(&self, missing: Missing, all: ByteRange<Iova>) -> MemoryError {
        let mut range = missing.range;
        for _ in 1..MISSING_PAGES {
            let next = range.last().checked_add(1).filter(|&next| next <= all.last());
            let Some(next) =
                next.filter(|&next| self.translate(missing.space, next, missing.access).is_err())
            else {
                break;
            };
            range = ByteRange::inclusive(range.first(), next.page_range().last()).unwrap_or(range);
        }
        MemoryError::Missing(Missing { range, ..missing })
    }
}

impl JobMemory for Pin {
    fn read(&self, space: DomainId, at: Iova, into: &mut [u8]) -> Result<(), MemoryError> {
        read_with(|at, _| self.find(space, at, Access::Read), at, into)
    }

    fn write(&self, space: DomainId, at: Iova, from: &[u8]) -> Result<(), MemoryError> {
        write_with(|at, _| self.find(space, at, Access::Write), at, from)
    }

    fn copy(&self, space: DomainId, from: Iova, to: Iova, len: usize) -> Result<(), MemoryError> {
        copy_with(|at, _, access| self.find(space, at, access), from, to, len)
    }

    fn atomic(
        &self,
        space: DomainId,
        at: Iova,
        width: Width,
        operation: AtomicOperation,
    ) -> Result<u64, MemoryError> {
        atomic_with(|access| self.find(space, at, access), at, (width, operation))
    }

    /// What a pin holds stays the same.
    fn host_page(&self, space: DomainId, at: Iova, access: Access) -> Option<HostPage> {
        Some(HostPage::new(0, self.find(space, at.page(), access).ok()?.address()))
    }

    #[cfg(any(test, feature = "test-utils"))]
    fn locate(&self, space: DomainId, at: Iova, access: Access) -> Option<u64> {
        self.find(space, at, access).ok().map(HostSpan::address)
    }
}

/// Operates on one value. `find` translates its address for an access; the operation's last access is used.
pub(super) fn atomic_with<'a>(
    find: impl Fn(Access) -> Result<HostSpan<'a>, MemoryError>,
    at: Iova,
    (width, operation): (Width, AtomicOperation),
) -> Result<u64, MemoryError> {
    let unaligned = |_| MemoryError::Unaligned(at);
    let mut span = None;
    for access in operation.accesses() {
        span = Some(find(*access)?);
    }
    let slice = span.ok_or(MemoryError::Unaligned(at))?.slice(8);
    match width {
        Width::Word => {
            let value: &AtomicU32 = slice.get_atomic_ref(0).map_err(unaligned)?;
            Ok(change_word(value, operation).into())
        }
        Width::Wide => Ok(change_wide(slice.get_atomic_ref(0).map_err(unaligned)?, operation)),
    }
}

// ORDERING: as each operation promises to the guest: what an acquire sees, it sees together with all that was written
// before the release.
macro_rules! change {
    ($name:ident, $Atomic:ty, $int:ty) => {
        fn $name(value: &$Atomic, operation: AtomicOperation) -> $int {
            match operation {
                AtomicOperation::Load => value.load(Ordering::Acquire),
                AtomicOperation::Store(new) => {
                    value.store(new as $int, Ordering::Release);
                    0
                }
                AtomicOperation::Add(addend) => value.fetch_add(addend as $int, Ordering::AcqRel),
                AtomicOperation::CompareExchange { expected, new } => {
                    let (expected, new) = (expected as $int, new as $int);
                    let old = value.compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire);
                    old.unwrap_or_else(|old| old)
                }
            }
        }
    };
}
change!(change_word, AtomicU32, u32);
change!(change_wide, AtomicU64, u64);

/// Copies out, span by span. `find` gets an address and the whole range of the access.
pub(super) fn read_with<'a>(
    find: impl Fn(Iova, ByteRange<Iova>) -> Result<HostSpan<'a>, MemoryError>,
    at: Iova,
    into: &mut [u8],
) -> Result<(), MemoryError> {
    let Some(all) = whole(at, into.len())? else { return Ok(()) };
    let (mut at, mut rest) = (at, into);
    loop {
        let span = find(at, all)?.slice(rest.len());
        let (now, later) = rest.split_at_mut(span.len());
        span.copy_to(now);
        match at.checked_add(span.len() as u64).filter(|_| !later.is_empty()) {
            Some(next) => (at, rest) = (next, later),
            None => return Ok(()),
        }
    }
}

/// Copies in, span by span.
pub(super) fn write_with<'a>(
    find: impl Fn(Iova, ByteRange<Iova>) -> Result<HostSpan<'a>, MemoryError>,
    at: Iova,
    from: &[u8],
) -> Result<(), MemoryError> {
    let Some(all) = whole(at, from.len())? else { return Ok(()) };
    let (mut at, mut rest) = (at, from);
    loop {
        let span = find(at, all)?.slice(rest.len());
        let (now, later) = rest.split_at(span.len());
        span.copy_from(now);
        match at.checked_add(span.len() as u64).filter(|_| !later.is_empty()) {
            Some(next) => (at, rest) = (next, later),
            None => return Ok(()),
        }
    }
}

/// Copies from one place to another, in pieces that are contiguous in both, without a buffer in between.
pub(super) fn copy_with<'a>(
    find: impl Fn(Iova, ByteRange<Iova>, Access) -> Result<HostSpan<'a>, MemoryError>,
    mut from: Iova,
    mut to: Iova,
    len: usize,
) -> Result<(), MemoryError> {
    let (Some(source), Some(target)) = (whole(from, len)?, whole(to, len)?) else { return Ok(()) };
    let mut left = len;
    loop {
        let readable = find(from, source, Access::Read)?.slice(left);
        let writable = find(to, target, Access::Write)?.slice(readable.len());
        readable.copy_to_volatile_slice(writable);
        left = left.saturating_sub(writable.len());
        let step = |at: Iova| at.checked_add(writable.len() as u64).filter(|_| left > 0);
        match (step(from), step(to)) {
            (Some(next_from), Some(next_to)) => (from, to) = (next_from, next_to),
            _ => return Ok(()),
        }
    }
}

/// The range of an access; none if it has no bytes.
fn whole(at: Iova, len: usize) -> Result<Option<ByteRange<Iova>>, MemoryError> {
    match ByteRange::new(at, len as u64) {
        Ok(range) => Ok(Some(range)),
        Err(RangeError::Empty { .. }) => Ok(None),
        Err(error) => Err(MemoryError::Wraps(error)),
    }
}
