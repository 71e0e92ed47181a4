//! The stock driver's own ioctls (linux: include/uapi/drm/virtgpu_drm.h): buffers, capability sets, EXECBUFFER and its
//! fences. Knows their structs; knows nothing of what a job does.

use crate::error::{AgentError, Doing};
use crate::mapping::Mapping;
use crate::port::wait_readable;
use job_stream::{CAPSET_ID, CAPSET_VERSION, Capset};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Numbers of the ioctls: the driver's begin at 0x40.
const GEM_CLOSE: u8 = 0x09;
const MAP: u8 = 0x41;
const EXECBUFFER: u8 = 0x42;
const GETPARAM: u8 = 0x43;
const RESOURCE_CREATE: u8 = 0x44;
const WAIT: u8 = 0x48;
const GET_CAPS: u8 = 0x49;
const RESOURCE_CREATE_BLOB: u8 = 0x4a;
const CONTEXT_INIT: u8 = 0x4b;
const IOCTL_WRITE: u32 = 1;
const IOCTL_READ: u32 = 2;
const IOCTL_KIND: u32 = b'd' as u32;

const FENCE_FD_OUT: u32 = 2;
const ON_RING: u32 = 4;
const PARAM_3D: u64 = 1;
const PARAM_BLOB: u64 = 3;
const PARAM_CONTEXT_INIT: u64 = 6;
/// The capability set of a context.
const CONTEXT_CAPSET: u64 = 1;
/// How many rings a context has.
const CONTEXT_RINGS: u64 = 2;
/// A blob of guest memory, that can be mapped.
const BLOB: [u32; 2] = [1, 1];
/// What Gallium calls a buffer of bytes: target, format R8_UNORM, bound as a vertex buffer.
const BUFFER: [u32; 3] = [0, 64, 16];

#[repr(C)]
#[derive(Default)]
struct GemClose {
    handle: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct MapBuffer {
    offset: u64,
    handle: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct ExecBuffer {
    flags: u32,
    size: u32,
    command: u64,
    bo_handles: u64,
    bo_count: u32,
    fence_fd: i32,
    ring_idx: u32,
    syncobj_stride: u32,
    syncobj_counts: [u32; 2],
    syncobjs: [u64; 2],
}

#[repr(C)]
#[derive(Default)]
struct GetParam {
    param: u64,
    value: u64,
}

#[repr(C)]
#[derive(Default)]
struct ResourceCreate {
    target_format_bind: [u32; 3],
    width: u32,
    height_depth_layers: [u32; 3],
    level_samples_flags: [u32; 3],
    bo_handle: u32,
    res_handle: u32,
    size: u32,
    stride: u32,
}

#[repr(C)]
#[derive(Default)]
struct WaitBuffer {
    handle: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct GetCaps {
    id: u32,
    version: u32,
    address: u64,
    size: u32,
    pad: u32,
}

#[repr(C)]
#[derive(Default)]
struct CreateBlob {
    memory_and_flags: [u32; 2],
    bo_handle: u32,
    res_handle: u32,
    size: u64,
    pad: u32,
    command_size: u32,
    command: u64,
    id: u64,
}

#[repr(C)]
#[derive(Default)]
struct ContextInit {
    count: u32,
    pad: u32,
    parameters: u64,
}

/// The driver's node for those who only compute. Each opened one is a context of the device.
pub(crate) struct RenderNode(File);

impl RenderNode {
    /// Opens the first render node, if its driver takes jobs.
    pub(crate) fn open() -> Result<Self, AgentError> {
        let entries = fs::read_dir("/dev/dri").doing("read /dev/dri")?;
        let is_node = |path: &Path| path.to_string_lossy().contains("renderD");
        let path = entries.flatten().map(|entry| entry.path()).find(|path| is_node(path));
        let path = path.ok_or(AgentError::NoRenderNode)?;
        let file = File::options().read(true).write(true).open(&path);
        let node = Self(file.doing(format!("open {}", path.display()))?);
        match node.param(PARAM_3D)? {
            0 => Err(AgentError::NoRenderNode),
            _ => Ok(node),
        }
    }

    /// The same; its context is one of our capability set, and has so many rings with fences of their own.
    pub(crate) fn open_with_rings(rings: u32) -> Result<Self, AgentError> {
        let node = Self::open()?;
        let parameters = [[CONTEXT_CAPSET, CAPSET_ID.into()], [CONTEXT_RINGS, rings.into()]];
        let mut request = ContextInit { count: 2, pad: 0, parameters: parameters.as_ptr() as u64 };
        node.ioctl(CONTEXT_INIT, &mut request).doing(format!("make a context with {rings} rings"))?;
        Ok(node)
    }

    /// Whether the device has blobs.
    pub(crate) fn has_blobs(&self) -> Result<bool, AgentError> {
        Ok(self.param(PARAM_BLOB)? != 0)
    }

    /// Whether contexts can have rings.
    pub(crate) fn has_rings(&self) -> Result<bool, AgentError> {
        Ok(self.param(PARAM_CONTEXT_INIT)? != 0)
    }

    fn param(&self, param: u64) -> Result<i32, AgentError> {
        let mut value = 0_i32;
        let mut request = GetParam { param, value: (&raw mut value) as u64 };
        self.ioctl(GETPARAM, &mut request).doing(format!("ask the driver for its parameter {param}"))?;
        Ok(value)
    }

    /// What the device says of its job streams.
    pub(crate) fn capset(&self) -> Result<Capset, AgentError> {
        let mut bytes = [0; Capset::BYTES];
        let (address, size) = (bytes.as_mut_ptr() as u64, bytes.len() as u32);
        let mut request = GetCaps { id: CAPSET_ID, version: CAPSET_VERSION, address, size, pad: 0 };
        self.ioctl(GET_CAPS, &mut request).doing(format!("get the capability set {CAPSET_ID}"))?;
        Capset::parse(&bytes).map_err(AgentError::Capset)
    }

    /// Makes a buffer of `len` bytes and maps it.
    pub(crate) fn create_buffer(&self, len: usize) -> Result<Buffer<'_>, AgentError> {
        let width = u32::try_from(len).unwrap_or(u32::MAX);
        let mut request = ResourceCreate {
            target_format_bind: BUFFER,
            width,
            height_depth_layers: [1; 3],
            size: width,
            ..ResourceCreate::default()
        };
        self.ioctl(RESOURCE_CREATE, &mut request).doing(format!("create a buffer of {len} bytes"))?;
        self.map(request.bo_handle, request.res_handle, len)
    }

    /// Makes a blob of guest memory of `len` bytes and maps it.
    pub(crate) fn create_blob(&self, len: usize) -> Result<Buffer<'_>, AgentError> {
        let mut request = CreateBlob { memory_and_flags: BLOB, size: len as u64, ..CreateBlob::default() };
        self.ioctl(RESOURCE_CREATE_BLOB, &mut request).doing(format!("create a blob of {len} bytes"))?;
        self.map(request.bo_handle, request.res_handle, len)
    }

    fn map(&self, handle: u32, resource: u32, len: usize) -> Result<Buffer<'_>, AgentError> {
        let mut buffer = Buffer { node: self, handle, resource, memory: None };
        let mut request = MapBuffer { handle, ..MapBuffer::default() };
        self.ioctl(MAP, &mut request).doing("ask where a buffer is to be mapped")?;
        buffer.memory = Some(Mapping::of_file(&self.0, request.offset, len)?);
        Ok(buffer)
    }

    /// Submits a job that uses these buffers.
    pub(crate) fn submit(&self, words: &[u32], buffers: &[Buffer<'_>]) -> Result<SyncFile, AgentError> {
        self.submit_on(None, words, buffers)
    }

    /// The same on a ring of the context's own.
    pub(crate) fn submit_on(
        &self,
        ring: Option<u32>,
        words: &[u32],
        buffers: &[Buffer<'_>],
    ) -> Result<SyncFile, AgentError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let handles: Vec<u32> = buffers.iter().map(|buffer| buffer.handle).collect();
        let mut request = ExecBuffer {
            flags: FENCE_FD_OUT | ring.map_or(0, |_| ON_RING),
            ring_idx: ring.unwrap_or(0),
            size: bytes.len() as u32,
            command: bytes.as_ptr() as u64,
            bo_handles: handles.as_ptr() as u64,
            bo_count: handles.len() as u32,
            ..ExecBuffer::default()
        };
        self.ioctl(EXECBUFFER, &mut request).doing(format!("submit a job of {} words", words.len()))?;
        // SAFETY: the ioctl succeeded with FENCE_FD_OUT: it has opened this descriptor, for us alone.
        Ok(SyncFile(unsafe { OwnedFd::from_raw_fd(request.fence_fd) }))
    }

    /// `request` has to be the struct of the ioctl `number`; addresses in it have to be valid for what it says.
    fn ioctl<T>(&self, number: u8, request: &mut T) -> io::Result<()> {
        let direction = if number == GEM_CLOSE { IOCTL_WRITE } else { IOCTL_READ | IOCTL_WRITE };
        let size = size_of::<T>() as u32;
        let code = direction << 30 | size << 16 | IOCTL_KIND << 8 | u32::from(number);
        loop {
            // SAFETY: `request` is as large as the code says, and lives as long as the call, as do the arrays whose
            // addresses the callers have put into it.
            let result = unsafe { libc::ioctl(self.0.as_raw_fd(), code.into(), &raw mut *request) };
            match io::Error::last_os_error() {
                _ if result >= 0 => return Ok(()),
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            }
        }
    }
}

/// A buffer of guest memory that jobs can name; the driver frees it when it is dropped.
pub(crate) struct Buffer<'a> {
    node: &'a RenderNode,
    handle: u32,
    resource: u32,
    /// None only while it is being made.
    memory: Option<Mapping>,
}

impl Buffer<'_> {
    /// Its resource id: the space by which jobs name it.
    pub(crate) fn resource(&self) -> u32 {
        self.resource
    }

    /// Its bytes, as they are now.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.memory.as_ref().map_or_else(Vec::new, Mapping::bytes)
    }

    /// A word of it, as it is now.
    pub(crate) fn word(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        if let Some(memory) = &self.memory {
            memory.read(at as usize, &mut bytes);
        }
        u32::from_le_bytes(bytes)
    }

    /// Writes from its start on.
    pub(crate) fn write(&self, bytes: &[u8]) {
        if let Some(memory) = &self.memory {
            memory.write(0, bytes);
        }
    }

    /// Waits until no job uses it any more, as far as the driver knows.
    pub(crate) fn wait(&self) -> Result<(), AgentError> {
        let mut request = WaitBuffer { handle: self.handle, flags: 0 };
        self.node.ioctl(WAIT, &mut request).doing("wait for a buffer")
    }
}

impl Drop for Buffer<'_> {
    fn drop(&mut self) {
        self.memory = None;
        let mut request = GemClose { handle: self.handle, pad: 0 };
        // There is nobody to tell; the kernel frees it at the latest with the node.
        let _ = self.node.ioctl(GEM_CLOSE, &mut request);
    }
}

/// The fence of a job. It tells of the job's end, never whether it was a good one: the stock driver drops the error.
pub(crate) struct SyncFile(OwnedFd);

impl SyncFile {
    /// Whether the job has ended, waited for up to `limit`.
    pub(crate) fn is_signalled(&self, limit: Duration) -> Result<bool, AgentError> {
        wait_readable(self.0.as_fd(), limit).doing("wait for a fence")
    }
}
