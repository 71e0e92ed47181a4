//! The stock driver's own ioctls (linux: include/uapi/drm/virtgpu_drm.h): buffers, capability sets, EXECBUFFER and its
//! fences. Knows their structs; knows nothing of what a job does.

use crate::error::{AgentError, Doing};
use crate::mapping::Mapping;
use crate::port::wait_readable;
use drm::Device as _;
use job_stream::{CAPSET_ID, CAPSET_VERSION, Capset};
use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
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

/// As the driver calls itself.
pub(crate) const DRIVER: &str = "virtio_gpu";

const FENCE_FD_IN: u32 = 1;
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
/// Clones are the same context: it ends with the last of them, and with the last buffer.
#[derive(Clone)]
pub(crate) struct RenderNode(Arc<File>);

impl RenderNode {
    /// Opens the driver's first render node, if it takes jobs.
    pub(crate) fn open() -> Result<Self, AgentError> {
        let file = open_node("renderD", DRIVER)?.ok_or(AgentError::NoRenderNode)?;
        let node = Self(Arc::new(file));
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

    /// A context with rings of its own if the driver has such, else one without; and the ring that jobs go to.
    pub(crate) fn open_best(rings: u32) -> Result<(Self, Option<u32>), AgentError> {
        let node = Self::open()?;
        match node.has_rings()? {
            false => Ok((node, None)),
            true => Ok((Self::open_with_rings(rings)?, Some(0))),
        }
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
    pub(crate) fn create_buffer(&self, len: usize) -> Result<Buffer, AgentError> {
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
    pub(crate) fn create_blob(&self, len: usize) -> Result<Buffer, AgentError> {
        let mut request = CreateBlob { memory_and_flags: BLOB, size: len as u64, ..CreateBlob::default() };
        self.ioctl(RESOURCE_CREATE_BLOB, &mut request).doing(format!("create a blob of {len} bytes"))?;
        self.map(request.bo_handle, request.res_handle, len)
    }

    fn map(&self, handle: u32, resource: u32, len: usize) -> Result<Buffer, AgentError> {
        let mut buffer = Buffer { node: self.clone(), handle, resource, memory: None };
        let mut request = MapBuffer { handle, ..MapBuffer::default() };
        self.ioctl(MAP, &mut request).doing("ask where a buffer is to be mapped")?;
        buffer.memory = Some(Mapping::of_file(&self.0, request.offset, len)?);
        Ok(buffer)
    }

    /// Submits a job that uses these buffers.
    pub(crate) fn submit(&self, words: &[u32], buffers: &[Buffer]) -> Result<SyncFile, AgentError> {
        self.submit_on(None, words, buffers)
    }

    /// The same on a ring of the context's own.
    pub(crate) fn submit_on(
        &self,
        ring: Option<u32>,
        words: &[u32],
        buffers: &[Buffer],
    ) -> Result<SyncFile, AgentError> {
        let handles: Vec<u32> = buffers.iter().map(|buffer| buffer.handle).collect();
        self.submit_job(&Submission { ring, words, handles: &handles, ..Submission::default() })
    }

    /// Submits a job with all that goes with it.
    pub(crate) fn submit_job(&self, job: &Submission<'_>) -> Result<SyncFile, AgentError> {
        let bytes: Vec<u8> = job.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let waits = job.after.map_or(0, |_| FENCE_FD_IN);
        let mut request = ExecBuffer {
            flags: FENCE_FD_OUT | waits | job.ring.map_or(0, |_| ON_RING),
            ring_idx: job.ring.unwrap_or(0),
            size: bytes.len() as u32,
            command: bytes.as_ptr() as u64,
            bo_handles: job.handles.as_ptr() as u64,
            bo_count: job.handles.len() as u32,
            fence_fd: job.after.map_or(-1, |file| file.as_raw_fd()),
            syncobj_stride: size_of::<SyncPoint>() as u32,
            syncobj_counts: [job.waits_for.len() as u32, job.signals.len() as u32],
            syncobjs: [job.waits_for.as_ptr() as u64, job.signals.as_ptr() as u64],
        };
        self.ioctl(EXECBUFFER, &mut request).doing(format!("submit a job of {} words", job.words.len()))?;
        // SAFETY: the ioctl succeeded with FENCE_FD_OUT: it has opened this descriptor, for us alone.
        Ok(SyncFile(unsafe { OwnedFd::from_raw_fd(request.fence_fd) }))
    }

    /// Closes a buffer by its handle.
    pub(crate) fn close_handle(&self, handle: u32) -> Result<(), AgentError> {
        self.ioctl(GEM_CLOSE, &mut GemClose { handle, pad: 0 }).doing("close a buffer")
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

impl AsFd for RenderNode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
impl drm::Device for RenderNode {}
impl drm::control::Device for RenderNode {}

/// A node of /dev/dri, before it is known whose it is.
struct Node(File);

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
impl drm::Device for Node {}

/// The first node of this kind (`card`, `renderD`) and this driver.
pub(crate) fn open_node(kind: &str, driver: &str) -> Result<Option<File>, AgentError> {
    let entries = fs::read_dir("/dev/dri").doing("read /dev/dri")?;
    let is_node =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(kind));
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).filter(is_node).collect();
    paths.sort();
    for path in paths {
        let file = File::options().read(true).write(true).open(&path);
        let node = Node(file.doing(format!("open {}", path.display()))?);
        let found = node.get_driver().doing(format!("ask for the driver of {}", path.display()))?;
        if found.name() == driver {
            return Ok(Some(node.0));
        }
    }
    Ok(None)
}

/// A point of a timeline (linux: struct drm_virtgpu_execbuffer_syncobj).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SyncPoint {
    /// The syncobj.
    pub handle: u32,
    /// Whether it is reset.
    pub flags: u32,
    /// The point; 0 for one that has no timeline.
    pub point: u64,
}

/// A job, and what goes with it.
#[derive(Default)]
pub(crate) struct Submission<'a> {
    /// What is done.
    pub words: &'a [u32],
    /// The buffers that it uses.
    pub handles: &'a [u32],
    /// On which ring of the context.
    pub ring: Option<u32>,
    /// Behind this fence: the driver waits for it before it submits.
    pub after: Option<BorrowedFd<'a>>,
    /// Behind these.
    pub waits_for: &'a [SyncPoint],
    /// What is signalled at its end.
    pub signals: &'a [SyncPoint],
}

/// A buffer of guest memory that jobs can name; the driver frees it when it is dropped.
pub(crate) struct Buffer {
    node: RenderNode,
    handle: u32,
    resource: u32,
    /// None only while it is being made.
    memory: Option<Mapping>,
}

impl Buffer {
    /// Its resource id: the space by which jobs name it.
    pub(crate) fn resource(&self) -> u32 {
        self.resource
    }

    /// By which name its node knows it.
    pub(crate) fn handle(&self) -> u32 {
        self.handle
    }

    /// Its handle, which is then the caller's to close.
    pub(crate) fn into_handle(mut self) -> u32 {
        mem::take(&mut self.handle)
    }

    /// Closes the node's handle of it. Its memory stays for as long as it is mapped, or a job uses it.
    pub(crate) fn close(&mut self) -> Result<(), AgentError> {
        let handle = mem::take(&mut self.handle);
        self.node.close_handle(handle)
    }

    /// Its bytes, as they are now.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.memory.as_ref().map_or_else(Vec::new, Mapping::bytes)
    }

    /// A word of it, as it is now.
    pub(crate) fn word(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(at as usize, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Copies bytes of it out, from `at` on.
    pub(crate) fn read(&self, at: usize, into: &mut [u8]) {
        if let Some(memory) = &self.memory {
            memory.read(at, into);
        }
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

impl Drop for Buffer {
    fn drop(&mut self) {
        self.memory = None;
        if self.handle != 0 {
            // There is nobody to tell; the kernel frees it at the latest with the node.
            let _ = self.close();
        }
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

impl AsFd for SyncFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for SyncFile {
    fn from(file: OwnedFd) -> Self {
        Self(file)
    }
}
