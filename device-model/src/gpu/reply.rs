//! Replies to the guest: the native form, and the bytes on the wire. Knows which response goes with which reply; knows
//! nothing of queues.

use std::fmt;

use job_stream::AsFault;
use zerocopy::IntoBytes;

use crate::gpu::error::CommandError;
use crate::gpu::payload;
use crate::gpu::request::Fence;
use crate::gpu::scanout::{DisplayModes, Edid};
use crate::wire::gpu::response;

/// The reply to a command that succeeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    NoData,
    DisplayInfo(Box<DisplayModes>),
    Edid(Edid),
    /// The only capability set: id, version and size.
    CapsetInfo(u32, u32, u32),
    Capset(Vec<u8>),
    /// A fault that the driver has to answer.
    Fault(AsFault),
}

/// A response for the guest, every byte of it defined. If the guest's buffer is too short, only the first bytes are
/// written.
#[derive(Clone, PartialEq, Eq)]
pub struct Response {
    kind: u32,
    /// The fence that it completes.
    fence: Option<u64>,
    bytes: Vec<u8>,
}

impl Response {
    pub(crate) fn new(result: &Result<Reply, CommandError>, fence: Option<&Fence>) -> Self {
        let kind = match result {
            Ok(Reply::NoData) => response::OK_NODATA,
            Ok(Reply::DisplayInfo(_)) => response::OK_DISPLAY_INFO,
            Ok(Reply::Edid(_)) => response::OK_EDID,
            Ok(Reply::CapsetInfo(..)) => response::OK_CAPSET_INFO,
            Ok(Reply::Capset(_)) => response::OK_CAPSET,
            Ok(Reply::Fault(_)) => AsFault::NUMBER,
            Err(error) => error.status(),
        };
        let mut bytes = payload::response_header(kind, fence).as_bytes().to_vec();
        match result {
            Ok(Reply::DisplayInfo(modes)) => {
                bytes.extend_from_slice(payload::display_info(modes).as_bytes());
            }
            Ok(Reply::Edid(edid)) => bytes.extend_from_slice(payload::edid(edid).as_bytes()),
            Ok(Reply::CapsetInfo(id, version, size)) => {
                bytes.extend_from_slice(payload::capset_info(*id, *version, *size).as_bytes());
            }
            Ok(Reply::Capset(capset)) => bytes.extend_from_slice(capset),
            Ok(Reply::Fault(fault)) => bytes.extend(fault.words().into_iter().flat_map(u32::to_le_bytes)),
            Ok(Reply::NoData) | Err(_) => {}
        }
        Self { kind, fence: fence.map(|fence| fence.id), bytes }
    }

    /// The answer to a request that cannot be read, so that neither its command nor its fence is known.
    pub fn unreadable() -> Self {
        let kind = response::ERR_UNSPEC;
        Self { kind, fence: None, bytes: payload::response_header(kind, None).as_bytes().to_vec() }
    }

    /// The bytes, including the header.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes, including the header.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// The type of the response (virtio 1.3, 5.7.6.7): VIRTIO_GPU_RESP_…
    pub fn kind(&self) -> u32 {
        self.kind
    }

    /// The fence that it completes, if there is one.
    pub fn fence(&self) -> Option<u64> {
        self.fence
    }

    /// Whether it reports an error.
    pub fn is_error(&self) -> bool {
        self.kind >= response::ERR_UNSPEC
    }
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Response({:#x}, {} bytes)", self.kind, self.bytes.len())
    }
}
