//! The host memory of the model's guest: frames, in two copies. A change of the memory table moves every frame from one
//! copy to the other, so that a use of the old table is detected. Knows frames and bytes; knows nothing of who may
//! touch them.

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
/// The contents of memory that must not be used any more.
pub(super) const POISON: u8 = 0xdb;

thread_local! {
    /// The allocation of this thread's last world: thousands are created one after the other.
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
        // SAFETY: allocated with this layout; nothing has an address of it any more (see `Memory::host`).
        unsafe { dealloc(self.0, LAYOUT) };
    }
}

/// All frames, in two copies, one of which is in the memory table.
#[derive(Debug)]
pub(super) struct Memory {
    /// `Some` until it is dropped.
    allocation: Option<Allocation>,
    base: *mut u8,
    /// Which copy is in the memory table: 0 or 1.
    copy: usize,
    /// The frames that contain only poison.
    poisoned: [bool; FRAMES],
}

/// A byte of host memory, as the model knows it.
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

    /// The host memory of an UPDATE that points at `len` bytes from the frame `first` on, by the current memory table.
    pub(super) fn host(&self, first: usize, len: usize) -> HostRange {
        assert!(len > 0 && first * PAGE + len <= FRAMES * PAGE, "There are no bytes {first}+{len:#x}");
        // SAFETY: INVARIANT: the frames live as long as `Memory`, which the world drops last, after its mirror.
        unsafe { HostRange::new(self.frame(self.copy, first), len) }
    }

    /// The memory at a host address from the mirror, to be mapped again.
    pub(super) fn host_again(&self, address: u64, len: u64) -> HostRange {
        assert!(self.place(address).is_some() && self.place(address + len - 1).is_some());
        // SAFETY: as in `host`.
        unsafe { HostRange::new(std::ptr::with_exposed_provenance_mut(address as usize), len as usize) }
    }

    /// The frame and offset of a host address.
    pub(super) fn place(&self, address: u64) -> Option<Place> {
        let offset = address.checked_sub(self.base.expose_provenance() as u64)? as usize;
        let number = offset / PAGE;
        (number < 2 * FRAMES)
            .then_some(Place { current: number / FRAMES == self.copy, frame: number % FRAMES })
    }

    /// Writes a pattern that is unique to `version`.
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

    /// Whether a part of a frame has these contents.
    pub(super) fn equals(&self, frame: usize, offset: usize, bytes: &[u8]) -> bool {
        assert!(offset + bytes.len() <= PAGE, "A part of one frame");
        let at = self.frame(self.copy, frame).wrapping_add(offset);
        // SAFETY: the bytes lie in the frame; there is one thread, and it does not write while this reference lives.
        let there = unsafe { std::slice::from_raw_parts(at, bytes.len()) };
        there == bytes
    }

    /// All bytes of a frame.
    pub(super) fn bytes(&self, frame: usize) -> Vec<u8> {
        let at = self.frame(self.copy, frame);
        // SAFETY: the whole frame lies in the allocation, and there is one thread: no write happens while this
        // reference lives.
        unsafe { std::slice::from_raw_parts(at, PAGE) }.to_vec()
    }

    /// Whether an unused frame has been left alone since it was poisoned.
    pub(super) fn is_untouched(&self, frame: usize) -> bool {
        !self.poisoned[frame] || self.equals(frame, 0, &[POISON; PAGE])
    }

    /// A registration cache has legitimately written to a frame that is otherwise unused.
    pub(super) fn written_incoherently(&mut self, frame: usize) {
        self.poisoned[frame] = false;
    }

    /// Reads host memory at an address that was once in the mirror.
    pub(super) fn read_at(&self, address: u64, into: &mut [u8]) {
        assert!(self.place(address).is_some(), "An address of ours");
        let from = std::ptr::with_exposed_provenance::<u8>(address as usize);
        // SAFETY: the address lies in the allocation; the caller reads within one page.
        unsafe { from.copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
    }

    /// Changes the memory table: moves all frames to the other copy, and poisons the old one.
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
