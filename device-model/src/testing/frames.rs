//! Real memory of this process that a mirror can map, for tests that read and write through it. It is never freed, so
//! that mappings of it cannot dangle.

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use crate::addr::PAGE_SIZE;
use crate::mmu::HostRange;

/// Contiguous pages of memory.
#[derive(Clone, Copy, Debug)]
pub struct Frames(&'static GuestMemoryMmap<()>);

impl Frames {
    /// This many zero pages, for the rest of the process's life.
    pub fn leaked(count: u64) -> Self {
        let bytes = usize::try_from(count * PAGE_SIZE).expect("Memory that can be had");
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("Memory that can be had");
        Self(Box::leak(Box::new(memory)))
    }

    /// `len` bytes from an offset on, as host memory.
    pub fn host(self, at: u64, len: usize) -> HostRange {
        let slices = self.0.get_slices(GuestAddress(at), len, Permissions::ReadWrite);
        let slice = slices.expect("Bytes that there are").next().and_then(Result::ok);
        let slice = slice.filter(|slice| slice.len() == len).expect("Bytes that there are");
        // SAFETY: the slice has `len` bytes, and the memory is leaked, so it stays for the rest of the process's life.
        // It is accessed otherwise only with the volatile accesses of `vm-memory`.
        unsafe { HostRange::new(slice.ptr_guard_mut().as_ptr(), len) }
    }

    /// Copies bytes out, from an offset on.
    pub fn read(self, at: u64, into: &mut [u8]) {
        self.0.read_slice(into, GuestAddress(at)).expect("Bytes that there are");
    }

    /// Copies bytes in, from an offset on.
    pub fn write(self, at: u64, from: &[u8]) {
        self.0.write_slice(from, GuestAddress(at)).expect("Bytes that there are");
    }
}
