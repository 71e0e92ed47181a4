//! Fences and buffers of another driver's: vgem, which has nothing but memory, and fences that a program signals, or does
//! not. Knows vgem's ioctls; knows nothing of how the driver waits.

use super::client::{Client, JOBS, LIMIT, PAGE, PAGES, PageState, With};
use super::process::Child;
use crate::error::{AgentError, Doing};
use crate::mapping::Mapping;
use crate::virtgpu::{SyncFile, open_node};
use drm::buffer::{Buffer as _, DrmFourcc};
use drm::control::Device as _;
use drm::control::dumbbuffer::DumbBuffer;
use guest_agent::stock_words::{Foreign, Shared, Until};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

/// For what must not come.
const PATIENCE: Duration = Duration::from_millis(200);
/// vgem's fences end by themselves after ten seconds, in error.
const EXPIRY: Duration = Duration::from_secs(20);
/// Jobs of another context, beside one that stands.
const BESIDE: u32 = 5;
/// linux: include/uapi/drm/vgem_drm.h and include/uapi/linux/dma-buf.h.
const ATTACH: u32 = code(b'd', 0x41, size_of::<Attach>());
const SIGNAL: u32 = code(b'd', 0x42, size_of::<Signal>());
const EXPORT: u32 = code(b'b', 2, size_of::<Export>());
const FOR_WRITE: u32 = 1;
const OF_WRITES: u32 = 1;

const fn code(kind: u8, number: u32, size: usize) -> u32 {
    3 << 30 | (size as u32) << 16 | (kind as u32) << 8 | number
}

#[repr(C)]
struct Attach {
    handle: u32,
    flags: u32,
    fence: u32,
    pad: u32,
}

#[repr(C)]
struct Signal {
    fence: u32,
    flags: u32,
}

#[repr(C)]
struct Export {
    flags: u32,
    file: i32,
}

/// The other driver's node.
struct Vgem(File);

impl AsFd for Vgem {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
impl drm::Device for Vgem {}
impl drm::control::Device for Vgem {}

impl Vgem {
    fn open() -> Result<Self, AgentError> {
        let file = open_node("card", "vgem")?;
        file.map(Self).ok_or_else(|| AgentError::NotBound("/dev/dri, driver vgem".into()))
    }

    fn buffer(&self) -> Result<DumbBuffer, AgentError> {
        self.create_dumb_buffer((PAGE as u32 / 4, PAGES as u32), DrmFourcc::Xrgb8888, 32)
            .doing("make a buffer of vgem's")
    }

    fn export(&self, buffer: &DumbBuffer) -> Result<OwnedFd, AgentError> {
        self.buffer_to_prime_fd(buffer.handle(), (libc::O_CLOEXEC | libc::O_RDWR) as u32)
            .doing("export a buffer of vgem's")
    }

    /// A fence that stands until it is signalled, and its number.
    fn fence(&self) -> Result<(SyncFile, u32), AgentError> {
        let buffer = self.buffer()?;
        let mut attach = Attach { handle: buffer.handle().into(), flags: FOR_WRITE, fence: 0, pad: 0 };
        ioctl(self.as_fd(), ATTACH, &mut attach).doing("have vgem make a fence")?;
        let exported = self.export(&buffer)?;
        let mut file = Export { flags: OF_WRITES, file: -1 };
        ioctl(exported.as_fd(), EXPORT, &mut file).doing("export a fence of vgem's")?;
        // SAFETY: the ioctl has opened it, for us alone.
        Ok((SyncFile::from(unsafe { OwnedFd::from_raw_fd(file.file) }), attach.fence))
    }

    fn signal(&self, fence: u32) -> Result<(), AgentError> {
        ioctl(self.as_fd(), SIGNAL, &mut Signal { fence, flags: 0 }).doing("have vgem signal a fence")
    }
}

/// `request` has to be the struct of the ioctl.
fn ioctl<T>(file: BorrowedFd<'_>, code: u32, request: &mut T) -> io::Result<()> {
    // SAFETY: `request` is as large as the code says, and outlives the call; it holds no address.
    match unsafe { libc::ioctl(file.as_raw_fd(), code.into(), &raw mut *request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Jobs behind fences of vgem's: one that comes, one whose process is killed, one that never comes.
pub(super) fn fences() -> Result<Foreign, AgentError> {
    let vgem = Vgem::open()?;
    let killed = killed_behind(&vgem)?;
    let (mut client, mut other) = (Client::open()?, Client::open()?);
    let (fence, number) = vgem.fence()?;
    let waiting = client.submit_aside(1, fence);
    for _ in 0..BESIDE {
        other.submit(Until::AtOnce)?;
    }
    other.wait_end()?;
    thread::sleep(PATIENCE);
    let stood = !waiting.is_finished() && client.page(1) == PageState::Poison;
    let beside = (1..=BESIDE).filter(|number| other.is_done(*number)).count() as u32;
    vgem.signal(number)?;
    client.join(waiting)?;
    client.wait_end()?;
    let went_on = client.is_done(1) && client.page(1) == PageState::Filled;
    let (fence, _) = vgem.fence()?;
    let begin = Instant::now();
    let waiting = client.submit_aside(2, fence);
    while !waiting.is_finished() && begin.elapsed() < EXPIRY {
        thread::sleep(Duration::from_millis(20));
    }
    let expired_ns = begin.elapsed().as_nanos() as u64;
    client.join(waiting)?;
    client.wait_end()?;
    let expired_ns = if client.is_done(2) { expired_ns } else { u64::MAX };
    Ok(Foreign { stood, beside, went_on, killed, expired_ns })
}

/// A process whose job stands behind a fence that never comes is killed.
fn killed_behind(vgem: &Vgem) -> Result<bool, AgentError> {
    let (fence, number) = vgem.fence()?;
    let mut child = Child::start(|mut parent| {
        let mut client = Client::open()?;
        parent.say(1)?;
        client.submit_with(Until::AtOnce, &With { after: Some(fence.as_fd()), ..With::default() })?;
        parent.say(2)
    })?;
    child.hear()?;
    let stood = !child.ends(PATIENCE)?;
    child.kill()?;
    let went = child.ends(LIMIT)?;
    vgem.signal(number)?;
    Ok(stood && went)
}

/// Buffers that go over to vgem, come back, and outlive their context; and one of vgem's that comes over.
pub(super) fn buffers() -> Result<Shared, AgentError> {
    let vgem = Vgem::open()?;
    let mut client = Client::open()?;
    let exported = client.export()?;
    let imported = vgem.prime_fd_to_buffer(exported.as_fd()).doing("have vgem take a buffer")?;
    let seen =
        Mapping::of_file(&File::from(exported.try_clone().doing("duplicate a dma-buf")?), 0, PAGES * PAGE)?;
    let back = client.node.prime_fd_to_buffer(exported.as_fd()).doing("take a buffer back")?;
    let comes_back = u32::from(back) == client.data.handle();
    client.submit(Until::AtOnce)?;
    client.wait_end()?;
    let is_seen = |number| super::client::state_of(&seen, number) == PageState::Filled;
    let mut shared = Shared { seen: is_seen(1) && !is_seen(2), comes_back, ..Shared::default() };
    let theirs = vgem.export(&vgem.buffer()?)?;
    shared.import_error = match client.node.prime_fd_to_buffer(theirs.as_fd()) {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap_or(-1),
    };
    client.submit(Until::Told)?;
    client.wait_begun(2)?;
    client.data.close()?;
    drop(exported);
    client.tell(JOBS);
    client.wait_end()?;
    shared.done = (1..=2).filter(|number| client.is_done(*number)).count() as u32;
    drop(client);
    shared.outlives = is_seen(1) && is_seen(2);
    vgem.close_buffer(imported).doing("have vgem give a buffer back")?;
    Ok(shared)
}
