//! vhost-user messages as bytes: what the `vhost` crate's front-end does not send (IOTLB messages, the display
//! socket, malformed ones), and the receiving end for the back-end channel. Knows framing, not meaning.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::sock_ctrl_msg::ScmSocket;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::addr::{Iova, UserAddr};

/// Version 1 of the protocol: bits 0 and 1 of the flags.
pub const VERSION: u32 = 0x1;
/// The message is a reply.
pub const REPLY: u32 = 0x4;
/// A reply is requested although the message has none of its own.
pub const NEED_REPLY: u32 = 0x8;

/// IOTLB message: the device asks for a translation.
pub const IOTLB_MISS: u8 = 1;
/// IOTLB message: a translation for the device.
pub const IOTLB_UPDATE: u8 = 2;
/// IOTLB message: translations that are no longer valid.
pub const IOTLB_INVALIDATE: u8 = 3;
/// Permission bit of an IOTLB message: the device may read.
pub const PERM_READ: u8 = 1;
/// Permission bit of an IOTLB message: the device may write.
pub const PERM_WRITE: u8 = 2;
/// What QEMU's UPDATEs claim, whatever the IOMMU allows.
pub const PERM_BOTH: u8 = PERM_READ | PERM_WRITE;

/// Request numbers, as in the vhost-user specification, of the messages that are sent raw here.
pub mod request {
    /// SET_MEM_TABLE.
    pub const SET_MEM_TABLE: u32 = 5;
    /// GET_VRING_BASE.
    pub const GET_VRING_BASE: u32 = 11;
    /// IOTLB_MSG.
    pub const IOTLB_MSG: u32 = 22;
    /// GPU_SET_SOCKET.
    pub const GPU_SET_SOCKET: u32 = 33;
    /// ADD_MEM_REG.
    pub const ADD_MEM_REG: u32 = 37;
    /// REM_MEM_REG.
    pub const REM_MEM_REG: u32 = 38;
    /// BACKEND_IOTLB_MSG, on the back-end channel.
    pub const BACKEND_IOTLB_MSG: u32 = 1;
}

/// Header of every vhost-user message (vhost-user specification, "Header").
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Header {
    /// Number of the request.
    pub request: U32,
    /// Version and flags.
    pub flags: U32,
    /// Bytes that follow.
    pub size: U32,
}
const _: () = assert!(size_of::<Header>() == 12);

/// Payload of IOTLB messages (vhost-user specification, "An IOTLB message"; struct vhost_iotlb_msg).
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IotlbMessage {
    iova: U64,
    size: U64,
    user: U64,
    permission: u8,
    kind: u8,
    padding: [u8; 6],
}
const _: () = assert!(size_of::<IotlbMessage>() == 32);

impl IotlbMessage {
    /// UPDATE: `size` bytes from `iova` on are at `user`.
    pub fn update(iova: Iova, size: u64, user: UserAddr, permission: u8) -> Self {
        Self::new(iova, size, user, permission, IOTLB_UPDATE)
    }

    /// INVALIDATE of `size` bytes from `iova` on.
    pub fn invalidate(iova: Iova, size: u64) -> Self {
        Self::new(iova, size, UserAddr(0), 0, IOTLB_INVALIDATE)
    }

    /// A message of any kind.
    pub fn new(iova: Iova, size: u64, user: UserAddr, permission: u8, kind: u8) -> Self {
        Self {
            iova: iova.0.into(),
            size: size.into(),
            user: user.0.into(),
            permission,
            kind,
            padding: [0; 6],
        }
    }

    /// The address it is about.
    pub fn iova(&self) -> Iova {
        Iova(self.iova.get())
    }

    /// Bytes it is about; a MISS leaves it 0.
    pub fn size(&self) -> u64 {
        self.size.get()
    }

    /// Permission bits.
    pub fn permission(&self) -> u8 {
        self.permission
    }

    /// MISS, UPDATE or INVALIDATE.
    pub fn kind(&self) -> u8 {
        self.kind
    }
}

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Number of the request.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// Descriptors that came along.
    pub files: Vec<OwnedFd>,
}

impl Message {
    /// The body as a number, which is what most replies are.
    pub fn number(&self) -> Option<u64> {
        self.body.as_slice().try_into().ok().map(u64::from_le_bytes)
    }
}

/// The bytes of a message.
pub fn encode(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let size = u32::try_from(body.len()).unwrap_or(u32::MAX);
    let header = Header { request: request.into(), flags: flags.into(), size: size.into() };
    [header.as_bytes(), body].concat()
}

/// Sends one message, with descriptors attached to its first byte.
pub fn send(stream: &UnixStream, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) -> io::Result<()> {
    send_bytes(stream, &encode(request, flags, body), fds)
}

/// Sends arbitrary bytes, with descriptors attached to the first.
pub fn send_bytes(stream: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let mut sent = 0;
    while sent < bytes.len() {
        let fds = if sent == 0 { fds } else { &[] };
        match stream.send_with_fds(&[&bytes[sent..]], fds) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => sent += n,
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
        }
    }
    Ok(())
}

/// Receives one message; `None` when the peer has closed the connection between two messages.
pub fn receive(stream: &UnixStream) -> io::Result<Option<Message>> {
    let mut header = [0; size_of::<Header>()];
    let (mut got, files) = receive_with_files(stream, &mut header)?;
    if got == 0 {
        return Ok(None);
    }
    while got < header.len() {
        got += some_bytes(stream, &mut header[got..])?;
    }
    let header = Header::read_from_bytes(&header).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut body = vec![0; header.size.get() as usize];
    let mut got = 0;
    while got < body.len() {
        got += some_bytes(stream, &mut body[got..])?;
    }
    Ok(Some(Message { request: header.request.get(), flags: header.flags.get(), body, files }))
}

fn some_bytes(stream: &UnixStream, into: &mut [u8]) -> io::Result<usize> {
    match receive_with_files(stream, into)? {
        (0, _) => Err(io::ErrorKind::UnexpectedEof.into()),
        (got, _) => Ok(got),
    }
}

fn receive_with_files(stream: &UnixStream, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut fds = [0; 32];
    loop {
        let mut iovec = [libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() }];
        // SAFETY: the iovec names exactly the bytes of `into`, which any data may overwrite.
        match unsafe { stream.recv_with_fds(&mut iovec, &mut fds) } {
            Ok((bytes, count)) => return Ok((bytes, fds[..count].iter().map(own).collect())),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
        }
    }
}

fn own(fd: &RawFd) -> OwnedFd {
    // SAFETY: recvmsg has just returned this descriptor, and nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(*fd) }
}

/// A duplicate of a descriptor, to keep or to give away.
pub fn duplicate(fd: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: F_DUPFD_CLOEXEC takes two numbers and touches no memory.
    let copy = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0) };
    if copy < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: fcntl has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { File::from_raw_fd(copy) })
}

/// Waits until one of the descriptors is readable (or has hung up) and returns which; `None` after `timeout`.
pub fn wait_readable(fds: &[RawFd], timeout: Option<Duration>) -> io::Result<Option<usize>> {
    let deadline = timeout.map(|timeout| Instant::now() + timeout);
    let mut polled: Vec<_> =
        fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    loop {
        let wait = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let spec = wait.map(|wait| libc::timespec {
            tv_sec: wait.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        });
        let spec = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the pointers name `polled` and `spec` above, which outlive the call; no signal mask is given.
        let ready = unsafe { libc::ppoll(polled.as_mut_ptr(), polled.len() as _, spec, std::ptr::null()) };
        match ready {
            0 => return Ok(None),
            1.. => return Ok(polled.iter().position(|fd| fd.revents != 0)),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// Waits until the peer has closed the connection; returns whether it did within `timeout`. Reads nothing.
pub fn wait_hang_up(stream: &UnixStream, timeout: Duration) -> io::Result<bool> {
    let events = libc::POLLRDHUP | libc::POLLHUP;
    let mut polled = libc::pollfd { fd: stream.as_raw_fd(), events, revents: 0 };
    let milliseconds = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the pointer names `polled` above, which outlives the call.
    match unsafe { libc::poll(&raw mut polled, 1, milliseconds) } {
        0 => Ok(false),
        1.. => Ok(true),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_arrives_with_its_body_and_descriptors() {
        let (here, there) = UnixStream::pair().unwrap();
        let update = IotlbMessage::update(Iova(0x1000), 0x2000, UserAddr(0x7f00), PERM_BOTH);
        send(&here, request::IOTLB_MSG, VERSION | NEED_REPLY, update.as_bytes(), &[here.as_raw_fd()])
            .unwrap();
        let message = receive(&there).unwrap().unwrap();
        assert_eq!((message.request, message.flags, message.files.len()), (22, 9, 1));
        assert_eq!(
            message.body,
            [
                0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0x7f, 0, 0, 0, 0, 0, 0, 3, 2, 0, 0,
                0, 0, 0, 0
            ]
        );
    }

    #[test]
    fn a_close_between_messages_is_not_an_error_but_one_inside_is() {
        let (here, there) = UnixStream::pair().unwrap();
        send_bytes(&here, &encode(1, VERSION, &[1; 8])[..15], &[]).unwrap();
        drop(here);
        assert_eq!(receive(&there).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(receive(&there).unwrap().is_none());
    }
}
