//! Guest memory for tests of jobs: present and missing pages, and a record of the accesses.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use crate::mmu::{AtomicOperation, HostPage, JobMemory, MemoryError, Missing, PinRange, Width};

/// The bytes of a page.
pub type Page = [u8; PAGE_SIZE as usize];

/// Memory of whole pages, in the address space of the device.
#[derive(Debug, Default)]
pub struct SparseMemory {
    pages: RefCell<BTreeMap<Iova, Box<Page>>>,
    /// If set, only these ranges may be touched.
    pinned: Option<Vec<PinRange>>,
    touched: RefCell<BTreeSet<Iova>>,
    accesses: RefCell<Vec<(Iova, usize, Access)>>,
}

impl SparseMemory {
    /// Memory without pages.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes all pages of `range` present, every byte a function of its address.
    pub fn fill(&mut self, range: ByteRange<Iova>) {
        for page in range.pages() {
            self.pages.get_mut().entry(page).or_insert_with(|| {
                let mut bytes = Box::new([0; PAGE_SIZE as usize]);
                for (byte, at) in bytes.iter_mut().zip(page.raw()..) {
                    *byte = pattern(Iova::new(at));
                }
                bytes
            });
        }
    }

    /// Removes the page of `at`.
    pub fn unmap(&mut self, at: Iova) {
        self.pages.get_mut().remove(&at.page());
    }

    /// Removes the page and returns its contents.
    pub fn take_page(&mut self, at: Iova) -> Option<Box<Page>> {
        self.pages.get_mut().remove(&at.page())
    }

    /// Puts a page back.
    pub fn put_page(&mut self, at: Iova, page: Box<Page>) {
        self.pages.get_mut().insert(at.page(), page);
    }

    /// From now on only these ranges may be touched, as over a pin.
    pub fn pin(&mut self, ranges: Vec<PinRange>) {
        self.pinned = Some(ranges);
    }

    /// The pages touched since the last call.
    pub fn take_touched(&self) -> BTreeSet<Iova> {
        self.touched.take()
    }

    /// The successful accesses since the last call: address, length, kind.
    pub fn take_accesses(&self) -> Vec<(Iova, usize, Access)> {
        self.accesses.take()
    }

    /// Splits `len` bytes at `at` by pages: the page, the offset in it, the offset in the buffer, the length.
    fn access(
        &self,
        at: Iova,
        len: usize,
        access: Access,
        mut each: impl FnMut(&mut Page, std::ops::Range<usize>, std::ops::Range<usize>),
    ) -> Result<(), MemoryError> {
        let Ok(range) = ByteRange::new(at, len as u64) else { return Ok(()) };
        let missing = |range: ByteRange<Iova>| Missing { space: DomainId::DEVICE, range, access };
        let covers = |pin: &PinRange| pin.access == access && pin.range.covers(range);
        if self.pinned.as_ref().is_some_and(|pins| !pins.iter().any(covers)) {
            return Err(MemoryError::NotPinned(missing(range.page_aligned())));
        }
        let mut pages = self.pages.borrow_mut();
        for number in range.pages() {
            let whole = ByteRange::new(number, PAGE_SIZE).expect("a page");
            let here = whole.intersection(range).expect("shared bytes");
            let Some(page) = pages.get_mut(&number) else { return Err(MemoryError::Missing(missing(whole))) };
            self.touched.borrow_mut().insert(number);
            let (start, count) = (here.first().page_offset() as usize, here.len() as usize);
            let done = (here.first().raw() - at.raw()) as usize;
            each(page, start..start + count, done..done + count);
        }
        self.accesses.borrow_mut().push((at, len, access));
        Ok(())
    }
}

/// The byte that [`SparseMemory::fill`] writes at an address: never 0, so that it differs from what was not copied.
pub fn pattern(at: Iova) -> u8 {
    let mixed = at.raw().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    mixed as u8 | 1
}

impl JobMemory for SparseMemory {
    fn read(&self, _: DomainId, at: Iova, into: &mut [u8]) -> Result<(), MemoryError> {
        self.access(at, into.len(), Access::Read, |page, there, here| {
            into[here].copy_from_slice(&page[there]);
        })
    }

    fn write(&self, _: DomainId, at: Iova, from: &[u8]) -> Result<(), MemoryError> {
        self.access(at, from.len(), Access::Write, |page, there, here| {
            page[there].copy_from_slice(&from[here]);
        })
    }

    fn copy(&self, space: DomainId, from: Iova, to: Iova, len: usize) -> Result<(), MemoryError> {
        let mut bytes = vec![0; len];
        self.read(space, from, &mut bytes)?;
        self.write(space, to, &bytes)
    }

    fn atomic(
        &self,
        space: DomainId,
        at: Iova,
        width: Width,
        operation: AtomicOperation,
    ) -> Result<u64, MemoryError> {
        if !at.raw().is_multiple_of(width.bytes()) {
            return Err(MemoryError::Unaligned(at));
        }
        let mut old = [0; 8];
        let bytes = &mut old[..width.bytes() as usize];
        if operation.accesses().contains(&Access::Read) {
            self.read(space, at, bytes)?;
        }
        let old = u64::from_le_bytes(old);
        if operation.accesses().contains(&Access::Write) {
            self.write(space, at, &operation.result(old).to_le_bytes()[..width.bytes() as usize])?;
        }
        Ok(old)
    }

    fn host_page(&self, _: DomainId, at: Iova, _: Access) -> Option<HostPage> {
        let page = std::ptr::from_ref::<Page>(self.pages.borrow().get(&at.page())?);
        Some(HostPage::new(0, page.expose_provenance() as u64))
    }
}
