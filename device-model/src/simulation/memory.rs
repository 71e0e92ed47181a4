//! The host memory that stands behind the model's guest: frames, twice. A change of the memory table moves every
//! frame from one copy to the other, so that whoever still uses the old table is seen. Knows frames and bytes;
//! knows nothing of who may touch them.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::Cell;

use crate::addr::PAGE_SIZE;
use crate::mmu::HostRange;

/// Frames of guest memory.
pub(super) const FRAMES: usize = 40;
const PAGE: usize = PAGE_SIZE as usize;
const LAYOUT: Layout = match Layout::from_size_align(2 * FRAMES * PAGE, PAGE) {
    Ok(layout) => layout,
    Err(_) => panic!("A page is a power of two"),
};
/// What is left where nobody may look any more.
pub(super) const POISON: u8 = 0xdb;

thread_local! {
    /// The allocation of the last world of this thread: thousands are made, one after the other.
    static SPARE: Cell<Option<Allocation>> = const { Cell::new(None) };
}

/// Both copies of all frames.
#[derive(Debug)]
struct Allocation(*mut u8);

impl Allocation {
    fn new() -> Self {
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc_zeroed(LAYOUT) };
        if base.is_null() {
            handle_alloc_error(LAYOUT);
        }
        Self(base)
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; whoever had an address of it is gone (see `Memory::host`).
        unsafe { dealloc(self.0, LAYOUT) };
    }
}

/// All frames, in two copies of which one is in the memory table.
#[derive(Debug)]
pub(super) struct Memory {
    /// There, until it is dropped.
    allocation: Option<Allocation>,
    base: *mut u8,
    /// Which copy is in the memory table: 0 or 1.
    copy: usize,
    /// The frames that hold nothing but poison.
    poisoned: [bool; FRAMES],
}

/// A byte of the host, as the model knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Whether it is in the memory table.
    pub(super) current: bool,
    pub(super) frame: usize,
}

impl Memory {
    pub(super) fn new() -> Self {
        let allocation = SPARE.take().unwrap_or_else(Allocation::new);
        Self { base: allocation.0, allocation: Some(allocation), copy: 0, poisoned: [false; FRAMES] }
    }

    fn frame(&self, copy: usize, frame: usize) -> *mut u8 {
        assert!(copy < 2 && frame < FRAMES, "There is no frame {frame} in copy {copy}");
        self.base.wrapping_add((copy * FRAMES + frame) * PAGE)
    }

    /// What an UPDATE that points at `len` bytes from the frame `first` on leads to, by the memory table of now.
    pub(super) fn host(&self, first: usize, len: usize) -> HostRange {
        assert!(len > 0 && first * PAGE + len <= FRAMES * PAGE, "There are no bytes {first}+{len:#x}");
        // SAFETY: INVARIANT: the frames live as long as `Memory`, which the world drops last, after its mirror.
        unsafe { HostRange::new(self.frame(self.copy, first), len) }
    }

    /// What the mirror said lies at this host address, to be mapped again.
    pub(super) fn host_again(&self, address: u64, len: u64) -> HostRange {
        assert!(self.place(address).is_some() && self.place(address + len - 1).is_some());
        // SAFETY: as in `host`.
        unsafe { HostRange::new(std::ptr::with_exposed_provenance_mut(address as usize), len as usize) }
    }

    /// Which byte of ours this is.
    pub(super) fn place(&self, address: u64) -> Option<Place> {
        let offset = address.checked_sub(self.base.expose_provenance() as u64)? as usize;
        let number = offset / PAGE;
        (number < 2 * FRAMES)
            .then_some(Place { current: number / FRAMES == self.copy, frame: number % FRAMES })
    }

    /// Writes a pattern that no other `version` has.
    pub(super) fn fill(&mut self, frame: usize, version: u64) {
        self.poisoned[frame] = false;
        let at = self.frame(self.copy, frame).cast::<u64>();
        for word in 0..PAGE / 8 {
            let value = (version << 16 | word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            // SAFETY: the word lies in the frame, and frames are aligned; there are no references into frames.
            unsafe { at.wrapping_add(word).write(value) };
        }
    }

    pub(super) fn poison(&mut self, frame: usize) {
        self.poisoned[frame] = true;
        let at = self.frame(self.copy, frame);
        // SAFETY: the whole frame lies in the allocation; there are no references into frames.
        unsafe { at.write_bytes(POISON, PAGE) };
    }

    /// Whether a part of a frame holds these bytes.
    pub(super) fn equals(&self, frame: usize, offset: usize, bytes: &[u8]) -> bool {
        assert!(offset + bytes.len() <= PAGE, "A part of one frame");
        let at = self.frame(self.copy, frame).wrapping_add(offset);
        // SAFETY: the bytes lie in the frame, and nobody writes while this reference lives: there is one thread.
        let there = unsafe { std::slice::from_raw_parts(at, bytes.len()) };
        there == bytes
    }

    /// All bytes of a frame.
    pub(super) fn bytes(&self, frame: usize) -> Vec<u8> {
        let at = self.frame(self.copy, frame);
        // SAFETY: the whole frame lies in the allocation, and nobody writes while this reference lives: there is one
        // thread.
        unsafe { std::slice::from_raw_parts(at, PAGE) }.to_vec()
    }

    /// Whether a frame that nobody may use has been left alone since it was poisoned.
    pub(super) fn is_untouched(&self, frame: usize) -> bool {
        !self.poisoned[frame] || self.equals(frame, 0, &[POISON; PAGE])
    }

    /// Somebody who may has written to a frame that nobody else may use.
    pub(super) fn written_incoherently(&mut self, frame: usize) {
        self.poisoned[frame] = false;
    }

    /// Copies out of host memory that the mirror once named.
    pub(super) fn read_at(&self, address: u64, into: &mut [u8]) {
        assert!(self.place(address).is_some(), "An address of ours");
        let from = std::ptr::with_exposed_provenance::<u8>(address as usize);
        // SAFETY: the address lies in the allocation; the caller reads within one page.
        unsafe { from.copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
    }

    /// Another memory table: the same frames lie elsewhere, and where they lay is poison.
    pub(super) fn move_all(&mut self) {
        let (old, new) = (self.frame(self.copy, 0), self.frame(1 - self.copy, 0));
        // SAFETY: two copies of all frames, which do not overlap.
        unsafe { old.copy_to_nonoverlapping(new, FRAMES * PAGE) };
        // SAFETY: one copy of all frames.
        unsafe { old.write_bytes(POISON, FRAMES * PAGE) };
        self.copy = 1 - self.copy;
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        SPARE.set(self.allocation.take());
    }
}
