//! Guest memory: a memfd, sealed as QEMU seals it, shown to the back-end as several regions, and mapped here too.
//! Knows regions, bytes and holes; which frames are in use is in `frames`.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use super::addr::{Gpa, PAGE, UserAddr};
use super::error::{Error, Result};

/// One line of the memory table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// The address at which the front-end claims to have it.
    pub user: UserAddr,
    /// Where it starts in the file.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// How much memory there is, and where.
#[derive(Clone, Copy, Debug)]
pub struct RamConfig {
    /// Bytes below 4 GiB, of which 640 KiB to 768 KiB belong to the VGA, as in a PC.
    pub low: u64,
    /// Bytes from 4 GiB on.
    pub high: u64,
    /// Bytes of a module that can be unplugged, at 1 TiB: nothing is allocated there unless a test asks for it.
    pub module: u64,
    /// Whether the file can no longer grow and shrink (memory-backend-memfd) or can (memory-backend-file).
    pub sealed: bool,
}

impl Default for RamConfig {
    fn default() -> Self {
        Self { low: 32 << 20, high: 32 << 20, module: 0, sealed: true }
    }
}

const VGA_HOLE: (u64, u64) = (0xa_0000, 0xc_0000);
const FOUR_GIB: u64 = 1 << 32;
// The higher half of guest memory lies at the lower user address, and neither is anything like the other addresses.
const USER_LOW: u64 = 0x7f80_0000_0000;
const USER_HIGH: u64 = 0x7f00_0000_0000;
const USER_MODULE: u64 = 0x7fc0_0000_0000;
const MODULE: u64 = 1 << 40;

/// Guest memory.
#[derive(Debug)]
pub struct GuestRam {
    file: File,
    base: NonNull<u8>,
    len: usize,
    regions: Vec<Region>,
}

// SAFETY: `base` is a mapping that only this value owns until its drop; its bytes are shared with another process
// anyway, and are only ever copied in and out or accessed as atomics.
unsafe impl Send for GuestRam {}
// SAFETY: as above; no reference to the bytes is handed out.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Allocates guest memory, all zeros and not yet backed by any page.
    pub fn new(config: RamConfig) -> Result<Self> {
        let len = config.low + config.high + config.module;
        let file = memory_file(c"soft-guest-ram", len, config.sealed)?;
        let bytes = usize::try_from(len).map_err(|_| Error::OutOfFrames { wanted: usize::MAX })?;
        let base = map(&file, bytes).map_err(Error::io("map guest memory"))?;
        let low =
            |gpa, end| Region { gpa: Gpa(gpa), user: UserAddr(USER_LOW + gpa), offset: gpa, len: end - gpa };
        let (gpa, user) = (Gpa(FOUR_GIB), UserAddr(USER_HIGH));
        let high = Region { gpa, user, offset: config.low, len: config.high };
        let mut regions = vec![low(0, VGA_HOLE.0), low(VGA_HOLE.1, config.low), high];
        if config.module != 0 {
            let (gpa, user, offset) = (Gpa(MODULE), UserAddr(USER_MODULE), config.low + config.high);
            regions.push(Region { gpa, user, offset, len: config.module });
        }
        Ok(Self { file, base, len: bytes, regions })
    }

    /// The memory table.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The frames of the module that can be unplugged.
    pub fn module_frames(&self) -> Vec<Gpa> {
        let module = self.regions.iter().filter(|region| region.gpa == Gpa(MODULE));
        module.flat_map(|module| (0..module.len / PAGE).map(|page| module.gpa.plus(page * PAGE))).collect()
    }

    /// The file, to be sent with the memory table.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The address under which the back-end knows a guest-physical address.
    pub fn user_addr(&self, at: Gpa) -> Result<UserAddr> {
        let region = self.region(at, 1)?;
        Ok(region.user.plus(at.0 - region.gpa.0))
    }

    /// Bytes from `at` to the end of its region: an UPDATE must not be longer.
    pub fn left_in_region(&self, at: Gpa) -> Result<u64> {
        let region = self.region(at, 1)?;
        Ok(region.gpa.0 + region.len - at.0)
    }

    fn region(&self, at: Gpa, len: u64) -> Result<&Region> {
        let inside = |region: &&Region| {
            let offset = at.0.checked_sub(region.gpa.0);
            offset.and_then(|offset| offset.checked_add(len)).is_some_and(|end| end <= region.len)
        };
        self.regions.iter().find(inside).ok_or(Error::NotMemory { at, len })
    }

    fn file_offset(&self, at: Gpa, len: u64) -> Result<u64> {
        let region = self.region(at, len)?;
        Ok(region.offset + (at.0 - region.gpa.0))
    }

    fn pointer(&self, at: Gpa, len: usize) -> Result<NonNull<u8>> {
        let offset = self.file_offset(at, len as u64)? as usize;
        assert!(offset + len <= self.len, "regions lie inside the file");
        // SAFETY: the range lies inside the mapping, as just checked.
        Ok(unsafe { self.base.add(offset) })
    }

    /// Copies guest memory out. The range must lie in one region.
    pub fn read(&self, at: Gpa, into: &mut [u8]) -> Result<()> {
        let from = self.pointer(at, into.len())?;
        // SAFETY: `pointer` has checked the length; the other process may write meanwhile, and then the bytes are
        // arbitrary, as for every device.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    /// Copies into guest memory. The range must lie in one region.
    pub fn write(&self, at: Gpa, from: &[u8]) -> Result<()> {
        let into = self.pointer(at, from.len())?;
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), into.as_ptr(), from.len()) };
        Ok(())
    }

    fn word(&self, at: Gpa) -> Result<&AtomicU16> {
        let pointer = self.pointer(at, 2)?;
        assert!(at.0.is_multiple_of(2), "ring indices are aligned");
        // SAFETY: aligned, inside the mapping for as long as `self` lives, and used as an atomic by both sides.
        Ok(unsafe { AtomicU16::from_ptr(pointer.as_ptr().cast()) })
    }

    /// Reads a ring index.
    pub fn load(&self, at: Gpa) -> Result<u16> {
        // ORDERING: what the device wrote before it advanced the index is seen after the index.
        Ok(self.word(at)?.load(Ordering::Acquire))
    }

    /// Writes a ring index.
    pub fn store(&self, at: Gpa, value: u16) -> Result<()> {
        // ORDERING: what the driver wrote before is seen by a device that sees the index.
        self.word(at)?.store(value, Ordering::Release);
        Ok(())
    }

    /// Truncates the file, which only works if it is unsealed. An access to the removed part, here or there, gets
    /// SIGBUS.
    pub fn truncate(&self, len: u64) -> Result<()> {
        self.file.set_len(len).map_err(Error::io("truncate guest memory"))
    }

    /// Returns the page of a frame to the system: the frame reads as zeros, and [`Self::is_populated`] tells whether
    /// anything has accessed it since.
    pub fn punch(&self, frame: Gpa) -> Result<()> {
        let offset = self.file_offset(frame, PAGE)?.cast_signed();
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: fallocate takes numbers only; the caller wants the mapping to lose the page.
        let result = unsafe { libc::fallocate(self.fd(), mode, offset, PAGE.cast_signed()) };
        check(result).map_err(Error::io("punch a hole into guest memory"))
    }

    /// Whether the frame has a page: it was read or written since it was last punched.
    pub fn is_populated(&self, frame: Gpa) -> Result<bool> {
        let offset = self.file_offset(frame, PAGE)?.cast_signed();
        // SAFETY: lseek takes numbers only; nothing uses the position of this file.
        let data = unsafe { libc::lseek(self.fd(), offset, libc::SEEK_DATA) };
        match data {
            0.. => Ok(data == offset),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => Ok(false),
                error => Err(Error::io("look for data in guest memory")(error)),
            },
        }
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new`, and no reference to it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// A memfd of `len` bytes, with the seals of QEMU's memory-backend-memfd if `sealed`.
pub fn memory_file(name: &CStr, len: u64, sealed: bool) -> Result<File> {
    // SAFETY: `name` is a C string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    check(fd).map_err(Error::io("create a memfd"))?;
    // SAFETY: memfd_create has just returned this descriptor, and nothing else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len).map_err(Error::io("size a memfd"))?;
    if sealed {
        let seals = libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
        // SAFETY: F_ADD_SEALS takes two numbers.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) };
        check(result).map_err(Error::io("seal a memfd"))?;
    }
    Ok(file)
}

fn map(file: &File, len: usize) -> io::Result<NonNull<u8>> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let (fd, flags) = (file.as_raw_fd(), libc::MAP_SHARED);
    // SAFETY: a new mapping at an address that the system chooses touches no existing one.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
    if base == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(base.cast()).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_punched_frame_tells_whether_it_was_read_or_written() {
        let ram = GuestRam::new(RamConfig::default()).unwrap();
        for (frame, write) in [(Gpa(0x9_f000), false), (Gpa(FOUR_GIB + 0x5000), true)] {
            ram.write(frame, b"before").unwrap();
            assert!(ram.is_populated(frame).unwrap());
            ram.punch(frame).unwrap();
            assert!(!ram.is_populated(frame).unwrap());
            if write {
                ram.write(frame.plus(0xfff), b"x").unwrap();
            } else {
                let mut byte = [1];
                ram.read(frame.plus(7), &mut byte).unwrap();
                assert_eq!(byte, [0]);
            }
            assert!(ram.is_populated(frame).unwrap());
        }
    }

    #[test]
    fn memory_has_a_hole_and_two_halves_whose_addresses_are_unlike() {
        let ram = GuestRam::new(RamConfig::default()).unwrap();
        assert_eq!(ram.user_addr(Gpa(FOUR_GIB + 1)).unwrap(), UserAddr(USER_HIGH + 1));
        assert_eq!(ram.user_addr(Gpa(0x10_0000)).unwrap(), UserAddr(USER_LOW + 0x10_0000));
        assert!(matches!(ram.user_addr(Gpa(0xb_0000)), Err(Error::NotMemory { at: Gpa(0xb_0000), len: 1 })));
        assert!(matches!(ram.write(Gpa(0x9_fffe), b"over"), Err(Error::NotMemory { .. })));
    }

    #[test]
    fn sealed_memory_cannot_shrink() {
        let ram = GuestRam::new(RamConfig::default()).unwrap();
        assert_eq!(ram.file.set_len(0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}
