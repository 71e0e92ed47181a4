//! VFIO's container of type 1 with one group in it (linux: include/uapi/linux/vfio.h): which memory the device may
//! touch, under which addresses. Knows nothing of the device.

use crate::error::{AgentError, Doing};
use crate::mapping::Mapping;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

const KIND: libc::c_ulong = 0x3b << 8;
const SET_IOMMU: libc::c_ulong = KIND | 102;
const GROUP_GET_STATUS: libc::c_ulong = KIND | 103;
const GROUP_SET_CONTAINER: libc::c_ulong = KIND | 104;
const GROUP_GET_DEVICE_FD: libc::c_ulong = KIND | 106;
const DEVICE_GET_REGION_INFO: libc::c_ulong = KIND | 108;
const MAP_DMA: libc::c_ulong = KIND | 113;
const UNMAP_DMA: libc::c_ulong = KIND | 114;
const TYPE1V2: libc::c_ulong = 3;
const VIABLE: u32 = 1;
const READ: u32 = 1;
const WRITE: u32 = 2;

#[repr(C)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}

#[repr(C)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
struct MapDma {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct UnmapDma {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// A container with one group.
pub(crate) struct Container {
    container: File,
    group: File,
}

impl Container {
    /// Opens the group at `path` and puts it into a container of its own.
    pub(crate) fn open(path: &Path) -> Result<Self, AgentError> {
        let open = |path: &Path| {
            File::options().read(true).write(true).open(path).doing(format!("open {}", path.display()))
        };
        let (container, group) = (open(Path::new("/dev/vfio/vfio"))?, open(path)?);
        let mut status = GroupStatus { argsz: size_of::<GroupStatus>() as u32, flags: 0 };
        // SAFETY: the struct is the one of this call, and lives as long.
        let result = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_GET_STATUS, &raw mut status) };
        check(result).doing("look at the IOMMU group")?;
        if status.flags & VIABLE == 0 {
            return Err(AgentError::NotBound(path.to_owned()));
        }
        let fd = container.as_raw_fd();
        // SAFETY: the call reads one descriptor, which is open.
        let result = unsafe { libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &raw const fd) };
        check(result).doing("put the IOMMU group into a container")?;
        // SAFETY: the call takes a number.
        let result = unsafe { libc::ioctl(fd, SET_IOMMU, TYPE1V2) };
        check(result).doing("give the container an IOMMU of type 1")?;
        Ok(Self { container, group })
    }

    /// The device called `name`.
    pub(crate) fn device(&self, name: &str) -> Result<File, AgentError> {
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the name ends with a NUL and lives as long as the call.
        let result = unsafe { libc::ioctl(self.group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
        check(result).doing("open the device")?;
        // SAFETY: the call has succeeded: it has opened this descriptor, for us alone.
        Ok(unsafe { File::from_raw_fd(result) })
    }

    /// Lets the device read, and maybe write, `len` bytes of `memory`, from `iova` on. The kernel pins them: they stay
    /// until they are unmapped here, whatever happens to our mapping of them.
    pub(crate) fn map(
        &mut self,
        iova: u64,
        memory: &Mapping,
        len: usize,
        write: bool,
    ) -> Result<(), AgentError> {
        let (argsz, flags) = (size_of::<MapDma>() as u32, if write { READ | WRITE } else { READ });
        let request = MapDma { argsz, flags, vaddr: memory.address(), iova, size: len as u64 };
        // SAFETY: the struct is the one of this call, and lives as long; the kernel checks what it says.
        let result = unsafe { libc::ioctl(self.container.as_raw_fd(), MAP_DMA, &raw const request) };
        check(result).doing(format!("map {len:#x} bytes at {iova:#x}"))
    }

    /// Takes them away from the device; returns when the device has acked it.
    pub(crate) fn unmap(&mut self, iova: u64, len: usize) -> Result<(), AgentError> {
        let argsz = size_of::<UnmapDma>() as u32;
        let mut request = UnmapDma { argsz, flags: 0, iova, size: len as u64 };
        // SAFETY: the struct is the one of this call, and lives as long.
        let result = unsafe { libc::ioctl(self.container.as_raw_fd(), UNMAP_DMA, &raw mut request) };
        check(result).doing(format!("unmap {len:#x} bytes at {iova:#x}"))?;
        if request.size == len as u64 {
            return Ok(());
        }
        Err(AgentError::UnmappedOther { iova, wanted: len as u64, found: request.size })
    }
}

/// Where in the file of a device its region `index` begins.
pub(crate) fn region(device: &File, index: u32) -> Result<u64, AgentError> {
    let argsz = size_of::<RegionInfo>() as u32;
    let mut info = RegionInfo { argsz, flags: 0, index, cap_offset: 0, size: 0, offset: 0 };
    // SAFETY: the struct is the one of this call, and lives as long.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_GET_REGION_INFO, &raw mut info) };
    check(result).doing(format!("ask for the device's region {index}"))?;
    Ok(info.offset)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
