//! Memory that a device works on while we look: mapped, and touched only by copies in and out. Knows bytes; knows
//! nothing of who else sees them.

use crate::error::{AgentError, Doing};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU16, Ordering, fence};

/// A mapping of our address space; unmapped when it is dropped.
///
/// INVARIANT: `[start, start + len)` is mapped readable and writable for as long as this lives, and no reference into
/// it ever exists: others write to it at any time.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// `len` bytes of `file`, from `offset` on.
    pub(crate) fn of_file(file: &File, offset: u64, len: usize) -> Result<Self, AgentError> {
        let offset = libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX);
        Self::map(libc::MAP_SHARED, file.as_raw_fd(), offset, len)
            .doing(format!("map {len} bytes of a buffer"))
    }

    /// `len` bytes of zeros that stand in memory.
    pub(crate) fn anonymous(len: usize) -> Result<Self, AgentError> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        Self::map(flags, -1, 0, len).doing(format!("map {len} bytes of memory"))
    }

    /// `len` bytes of zeros in the memory of a NUMA node; of another they are not taken.
    pub(crate) fn on_node(len: usize, node: u32) -> Result<Self, AgentError> {
        let memory = Self::map(libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0, len)
            .doing(format!("map {len} bytes of memory"))?;
        let nodes = 1_u64.checked_shl(node).unwrap_or(0);
        let (start, bits, none) = (memory.start.as_ptr(), u64::BITS, 0);
        // SAFETY: the range is the mapping's own, and the set of nodes has as many bits as are said; it outlives the call.
        let result = unsafe {
            libc::syscall(libc::SYS_mbind, start, len, libc::MPOL_BIND, &raw const nodes, bits + 1, none)
        };
        let bound = if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        bound.doing(format!("take memory from the node {node}"))?;
        memory.write(0, &vec![0; len]);
        Ok(memory)
    }

    fn map(flags: libc::c_int, fd: libc::c_int, offset: libc::off_t, len: usize) -> io::Result<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: no address is asked for, so nothing that is mapped is replaced; the kernel checks the rest.
        let start = unsafe { libc::mmap(ptr::null_mut(), len, rights, flags, fd, offset) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(start.cast()).map(|start| Self { start, len }).ok_or_else(io::Error::last_os_error)
    }

    /// Where it begins in our address space.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// All of its bytes, as they are now.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        self.read(0, &mut bytes);
        bytes
    }

    /// Copies bytes out, from `at` on.
    pub(crate) fn read(&self, at: usize, into: &mut [u8]) {
        self.check(at, into.len());
        // SAFETY: INVARIANT of the type; `check` has found that offset and length stay within.
        let from = unsafe { self.start.as_ptr().add(at) };
        // SAFETY: both ranges are valid for this length; `into` is ours alone, so they do not overlap. A device that
        // writes meanwhile makes the bytes any bytes, which u8 may be.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Copies bytes in, from `at` on.
    pub(crate) fn write(&self, at: usize, from: &[u8]) {
        self.check(at, from.len());
        // SAFETY: INVARIANT of the type; `check` has found that offset and length stay within.
        let to = unsafe { self.start.as_ptr().add(at) };
        // SAFETY: both ranges are valid for this length, and `from` is no part of the mapping: no reference to it
        // exists.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), to, from.len()) }
    }

    /// Reads an index of a ring; what was written before it is visible afterwards.
    pub(crate) fn load(&self, at: usize) -> u16 {
        // ORDERING: the device writes entries, then the index (virtio 1.3, 2.7.8.2).
        u16::from_le(self.index(at).load(Ordering::Acquire))
    }

    /// Writes an index of a ring, after everything that was written before.
    pub(crate) fn store(&self, at: usize, value: u16) {
        // ORDERING: the device reads the index, then the entries (virtio 1.3, 2.7.13.3).
        self.index(at).store(value.to_le(), Ordering::Release);
        // ORDERING: and it reads it when it is notified, which comes next.
        fence(Ordering::SeqCst);
    }

    fn index(&self, at: usize) -> &AtomicU16 {
        self.check(at, 2);
        assert_eq!(at % 2, 0, "an index of a ring at {at:#x}");
        // SAFETY: INVARIANT of the type; `check` has found that offset and length stay within.
        let place = unsafe { self.start.as_ptr().add(at) };
        // SAFETY: valid for as long as `self` is borrowed, aligned as was checked, and shared by atomic accesses only.
        unsafe { AtomicU16::from_ptr(place.cast()) }
    }

    /// PANIC: offsets are the agent's own; one that is wrong is a bug of the agent's.
    fn check(&self, at: usize, len: usize) {
        let end = at.checked_add(len);
        assert!(end.is_some_and(|end| end <= self.len), "{at:#x}+{len:#x} of {:#x} bytes", self.len);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: INVARIANT of the type: the range is ours, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_an_index_is_little_endian() {
        let memory = Mapping::anonymous(4096).unwrap();
        memory.write(4093, &[1, 2, 3]);
        let mut read = [0; 2];
        memory.read(4094, &mut read);
        assert_eq!((read, memory.bytes().len()), ([2, 3], 4096));
        memory.store(10, 0x0102);
        assert_eq!((memory.load(10), &memory.bytes()[9..13]), (0x0102, &[0, 2, 1, 0][..]));
    }

    #[test]
    #[should_panic(expected = "0xfff+0x2 of 0x1000 bytes")]
    fn nothing_is_touched_behind_the_end() {
        Mapping::anonymous(4096).unwrap().write(4095, &[1, 2]);
    }
}
