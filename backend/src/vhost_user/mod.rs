//! What MirrorGPU adds to the `vhost` crate's vhost-user protocol: the messages that the crate rejects or whose
//! descriptors it hides. [`peek`] reads the next message without consuming it, so that the session can decide who
//! handles it; [`iotlb`] is the wire format of the device IOTLB; [`channel`] sends the MISSes; [`session_end`] is why a
//! session ends. The crate handles everything else on the socket. Knows nothing of the mirror or of the device.

pub mod channel;
pub mod iotlb;
pub mod memory;
pub mod peek;
pub mod session_end;

use zerocopy::native_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Front-end message numbers that the session checks before the crate does
/// (QEMU docs/interop/vhost-user.rst, "Front-end message types").
pub mod request {
    /// VHOST_USER_SET_FEATURES.
    pub const SET_FEATURES: u32 = 2;
    /// VHOST_USER_RESET_OWNER.
    pub const RESET_OWNER: u32 = 4;
    /// VHOST_USER_SET_MEM_TABLE.
    pub const SET_MEM_TABLE: u32 = 5;
    /// VHOST_USER_GET_VRING_BASE.
    pub const GET_VRING_BASE: u32 = 11;
    /// VHOST_USER_SET_BACKEND_REQ_FD.
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    /// VHOST_USER_IOTLB_MSG.
    pub const IOTLB_MSG: u32 = 22;
    /// VHOST_USER_GPU_SET_SOCKET.
    pub const GPU_SET_SOCKET: u32 = 33;
    /// VHOST_USER_RESET_DEVICE.
    pub const RESET_DEVICE: u32 = 34;
    /// VHOST_USER_REM_MEM_REG.
    pub const REM_MEM_REG: u32 = 38;
}

/// Bits of [`Header::flags`].
mod flag {
    /// The protocol's version, in the two lowest bits.
    pub(super) const VERSION_MASK: u32 = 0x3;
    /// The only version there is.
    pub(super) const VERSION: u32 = 0x1;
    /// This is a reply.
    pub(super) const REPLY: u32 = 0x4;
    /// The sender waits for a reply.
    pub(super) const NEED_REPLY: u32 = 0x8;
}

/// The header of every vhost-user message (vhost-user.rst, "Header"), in the byte order of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Header {
    request: U32,
    flags: U32,
    size: U32,
}

const _: () = assert!(size_of::<Header>() == 12);

impl Header {
    /// A request that asks for a reply, or does not.
    pub fn request(request: u32, size: u32, need_reply: bool) -> Self {
        let flags = flag::VERSION | if need_reply { flag::NEED_REPLY } else { 0 };
        Self { request: request.into(), flags: flags.into(), size: size.into() }
    }

    /// The header of the reply to `self`, with a payload of `size` bytes.
    pub fn reply(self, size: u32) -> Self {
        Self { request: self.request, flags: (flag::VERSION | flag::REPLY).into(), size: size.into() }
    }

    /// The message's number.
    pub fn code(self) -> u32 {
        self.request.get()
    }

    /// Bytes of payload.
    pub fn payload_len(self) -> usize {
        self.size.get() as usize
    }

    /// Whether the sender waits for a reply.
    pub fn needs_reply(self) -> bool {
        self.flags.get() & flag::NEED_REPLY != 0
    }

    /// Whether this is a reply.
    pub fn is_reply(self) -> bool {
        self.flags.get() & flag::REPLY != 0
    }

    /// Whether the version is the one that MirrorGPU speaks.
    pub fn is_of_our_version(self) -> bool {
        self.flags.get() & flag::VERSION_MASK == flag::VERSION
    }
}

/// A reply that says whether a request was carried out: 0 means yes (vhost-user.rst, "A u64 integer").
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Ack {
    header: Header,
    status: U64,
}

const _: () = assert!(size_of::<Ack>() == 20);

impl Ack {
    /// The answer to `request`.
    pub fn new(request: Header, done: bool) -> Self {
        Self { header: request.reply(size_of::<U64>() as u32), status: u64::from(!done).into() }
    }

    /// The header.
    pub fn header(&self) -> Header {
        self.header
    }

    /// Whether the request was carried out.
    pub fn done(&self) -> bool {
        self.status.get() == 0
    }
}
