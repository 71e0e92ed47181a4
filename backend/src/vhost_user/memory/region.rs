//! One region of the front-end's memory, mapped into this process. It is checked before it is mapped: the file must be
//! as long as the region says (an access past the end of a file only fails when it is made, with SIGBUS).

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ptr::{self, NonNull};

use device_model::addr::{ByteRange, FrontendVa, Gpa, RangeError};
use rustix::mm::{self, Advice, MapFlags, ProtFlags};

use super::sigbus;

/// A region as SET_MEM_TABLE and ADD_MEM_REG describe it (vhost-user.rst, "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address of the first byte in the front-end.
    pub user_address: u64,
    /// Where the region starts in its file.
    pub file_offset: u64,
}

/// Why a region was refused.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The region is empty, or wraps around in one of its address spaces.
    #[error("Memory region is no range")]
    Range(#[from] RangeError),
    /// The region lies past the maximum file offset.
    #[error("Memory region of {size:#x} bytes at offset {offset:#x} lies beyond any file")]
    Offset {
        /// Length of the region.
        size: u64,
        /// Start in the file.
        offset: u64,
    },
    /// The file ends before the region does.
    #[error("Memory region needs {needed:#x} bytes of its file, which has {len:#x}")]
    ShortFile {
        /// Length that the file must have.
        needed: u64,
        /// Length that it has.
        len: u64,
    },
    /// The length of the file cannot be determined.
    #[error("Memory region's file cannot be examined")]
    Stat(#[source] io::Error),
    /// mmap failed.
    #[error("Memory region of {size:#x} bytes cannot be mapped")]
    Map {
        /// Length of the region.
        size: u64,
        /// Error of mmap.
        #[source]
        source: io::Error,
    },
}

/// A mapped region. Dropping it unmaps it: everything that used it must have been drained before.
pub struct Region {
    gpa: ByteRange<Gpa>,
    user: ByteRange<FrontendVa>,
    /// First byte of the region in this process.
    host: NonNull<u8>,
    /// The whole mapping, which starts at a page boundary of the file.
    mapping: Mapping,
    spec: RegionSpec,
}

// SAFETY: INVARIANT: `host` points into `mapping`, which this region owns; the pointer is valid on every thread.
unsafe impl Send for Region {}

/// Where the mapping of a region lies in its file, in whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct PlaceInFile {
    /// Where the mapping starts.
    offset: u64,
    /// Bytes of the mapping before the region: a region need not start at a page boundary (QEMU's mmap_offset).
    skip: usize,
    /// Length of the mapping.
    len: usize,
    /// End of the region in the file.
    end: u64,
    /// Page size of the file.
    page: usize,
}

impl PlaceInFile {
    fn of(spec: RegionSpec, page: usize) -> Result<Self, RegionError> {
        let beyond = || RegionError::Offset { size: spec.size, offset: spec.file_offset };
        let end = spec.file_offset.checked_add(spec.size).ok_or_else(beyond)?;
        let skip = spec.file_offset % page as u64;
        let offset = spec.file_offset - skip;
        let len = usize::try_from(spec.size)
            .ok()
            .and_then(|size| size.checked_add(skip as usize))
            .and_then(|len| len.checked_next_multiple_of(page))
            .ok_or_else(beyond)?;
        // File offsets are signed in the kernel.
        if i64::try_from(end).is_err() {
            return Err(beyond());
        }
        Ok(Self { offset, skip: skip as usize, len, end, page })
    }
}

struct Mapping {
    base: NonNull<u8>,
    len: usize,
    slot: sigbus::RegionSlot,
}

impl Region {
    /// Checks and maps a region.
    pub fn map(spec: RegionSpec, file: &File) -> Result<Self, RegionError> {
        let gpa = ByteRange::new(Gpa::new(spec.gpa), spec.size)?;
        let user = ByteRange::new(FrontendVa::new(spec.user_address), spec.size)?;
        let len = file.metadata().map_err(RegionError::Stat)?.len();
        let place = PlaceInFile::of(spec, page_size(file).map_err(RegionError::Stat)?)?;
        if place.end > len {
            return Err(RegionError::ShortFile { needed: place.end, len });
        }
        let mapping =
            Mapping::new(file, place).map_err(|source| RegionError::Map { size: spec.size, source })?;
        // SAFETY: `skip` is less than a page and so less than the mapping's length.
        let host = unsafe { mapping.base.add(place.skip) };
        Ok(Self { gpa, user, host, mapping, spec })
    }

    /// Guest-physical addresses of the region.
    pub fn gpa(&self) -> ByteRange<Gpa> {
        self.gpa
    }

    /// The region's addresses in the front-end.
    pub fn user(&self) -> ByteRange<FrontendVa> {
        self.user
    }

    /// The host address of the region's byte `offset`. The caller has checked the offset against the length.
    pub fn host_at(&self, offset: u64) -> *mut u8 {
        self.host.as_ptr().wrapping_add(offset as usize)
    }

    /// The region as the front-end described it.
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    /// Replaces the region by zero pages at the same address: remaining pointers stay harmless, and no access reaches
    /// the guest any more. Replaces the whole mapping at once, because single pages fail on hugetlb.
    pub fn revoke(&self) -> io::Result<()> {
        self.mapping.replace_by_zeroes()
    }
}

impl Mapping {
    fn new(file: &File, PlaceInFile { offset, len, page, .. }: PlaceInFile) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced.
        let base = unsafe { mm::mmap(ptr::null_mut(), len, protection, flags, file, offset) }?;
        // Guest memory does not belong in a core dump. A failure here has no other effect.
        // SAFETY: the range is the mapping just made, and the call does not change its content.
        let _ = unsafe { mm::madvise(base, len, Advice::LinuxDontDump) };
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        match sigbus::RegionSlot::register(base.as_ptr() as usize, len, page) {
            Some(slot) => Ok(Self { base, len, slot }),
            None => {
                // SAFETY: the range is the mapping just made, and no pointer to it exists elsewhere.
                unsafe { mm::munmap(base.as_ptr().cast(), len) }?;
                Err(io::Error::from(io::ErrorKind::QuotaExceeded))
            }
        }
    }

    fn replace_by_zeroes(&self) -> io::Result<()> {
        // SAFETY: the range is this whole mapping; accesses through remaining pointers see zeroes from now on.
        unsafe { zero_pages(self.base.as_ptr().cast(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.slot.forget();
        // SAFETY: INVARIANT: regions are dropped only after everything that used them was drained, so nothing
        // points into the mapping any more.
        let unmapped = unsafe { mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "a whole mapping can be unmapped");
    }
}

/// Replaces the pages of a mapping by anonymous zero pages. Safe in a signal handler.
///
/// # Safety
///
/// The range is whole pages of a mapping of guest memory, which stays registered during the call. The pages hold
/// nothing but guest memory, so remaining pointers find what a guest could have written.
pub(super) unsafe fn zero_pages(base: *mut c_void, len: usize) -> io::Result<()> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the caller guarantees it.
    unsafe { mm::mmap_anonymous(base, len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
    Ok(())
}

/// The page size of a file: that of its file system if that is hugetlbfs, else the host's.
fn page_size(file: &File) -> io::Result<usize> {
    const HUGETLBFS: i64 = 0x9584_58f6;
    let file_system = rustix::fs::fstatfs(file)?;
    // Other file systems report their preferred block size here, which is not the alignment that mmap needs.
    let own = (file_system.f_type == HUGETLBFS).then_some(file_system.f_bsize);
    Ok(own.and_then(|size| usize::try_from(size).ok()).unwrap_or_else(rustix::param::page_size))
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;

    use super::*;

    fn file(len: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        file
    }

    fn spec(size: u64, file_offset: u64) -> RegionSpec {
        RegionSpec { gpa: 0, size, user_address: 0x7000_0000, file_offset }
    }

    #[test]
    fn a_region_longer_than_its_file_is_refused() {
        let result = Region::map(spec(0x3000, 0), &file(0x2000));
        assert!(matches!(result, Err(RegionError::ShortFile { needed: 0x3000, len: 0x2000 })));
        assert!(Region::map(spec(0x2000, 0x1000), &file(0x3000)).is_ok());
    }

    #[test]
    fn a_region_of_no_bytes_or_beyond_any_file_is_refused() {
        assert!(matches!(Region::map(spec(0, 0), &file(0x1000)), Err(RegionError::Range(_))));
        let result = Region::map(spec(0x1000, u64::MAX), &file(0x1000));
        assert!(matches!(result, Err(RegionError::Offset { .. })));
        let mut wraps = spec(0x2000, 0);
        wraps.gpa = u64::MAX - 0xfff;
        assert!(matches!(Region::map(wraps, &file(0x2000)), Err(RegionError::Range(_))));
    }

    #[test]
    fn a_mapping_is_whole_pages_of_the_host_whatever_their_size() {
        for page in [4096, 16 << 10, 64 << 10, 2 << 20] {
            let place = PlaceInFile::of(spec(0x3000, 0x21_1000), page).unwrap();
            let (offset, bytes) = (place.offset as usize, place.skip + 0x3000);
            assert!(offset.is_multiple_of(page) && place.len.is_multiple_of(page), "{place:?}");
            assert!(offset + place.skip == 0x21_1000 && place.skip < page, "{place:?}");
            assert!(bytes <= place.len && place.len < bytes + page, "{place:?}");
            assert_eq!((place.end, place.page), (0x21_4000, page));
        }
    }

    #[test]
    fn a_file_has_the_pages_of_the_host_or_huge_ones_of_its_own() {
        assert_eq!(page_size(&file(0x1000)).unwrap(), rustix::param::page_size());
        let memory = |flags| rustix::fs::memfd_create("test", flags | MemfdFlags::CLOEXEC);
        assert_eq!(
            page_size(&memory(MemfdFlags::empty()).unwrap().into()).unwrap(),
            rustix::param::page_size()
        );
        // A kernel without 2 MiB pages has no such files.
        if let Ok(huge) = memory(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB) {
            assert_eq!(page_size(&huge.into()).unwrap(), 2 << 20);
        }
    }

    #[test]
    fn an_offset_that_is_no_page_is_honoured() {
        use std::os::unix::fs::FileExt;
        let file = file(0x3000);
        file.write_all_at(b"here", 0x1010).unwrap();
        let region = Region::map(spec(0x1000, 0x1010), &file).unwrap();
        // SAFETY: the first four bytes of a mapping of 0x1000.
        let seen = unsafe { std::slice::from_raw_parts(region.host_at(0), 4) };
        assert_eq!(seen, b"here");
    }

    #[test]
    fn a_revoked_region_no_longer_reaches_the_file() {
        use std::os::unix::fs::FileExt;
        let file = file(0x1000);
        let region = Region::map(spec(0x1000, 0), &file).unwrap();
        region.revoke().unwrap();
        // SAFETY: the first byte of a mapping of 0x1000.
        unsafe { region.host_at(0).write_volatile(7) };
        let mut byte = [1];
        file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [0]);
    }
}
