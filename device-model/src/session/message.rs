//! Messages of the front-end to the session, as values. `T` identifies the message that a reply belongs to.

use crate::addr::{ByteRange, FrontendVa, Iova};
use crate::mmu::{HostRange, Permissions};

/// An IOTLB UPDATE: what the front-end says about a range of the guest's IOMMU.
#[derive(Clone, Copy, Debug)]
pub struct Update {
    /// The IOVAs, in bytes.
    pub range: ByteRange<Iova>,
    /// Where they point, in the front-end's address space.
    pub target: ByteRange<FrontendVa>,
    /// The same memory in this process; `None`: it is not in one region of the memory table.
    pub host: Option<HostRange>,
    /// The permissions that the UPDATE claims. QEMU claims both, whatever the guest has granted.
    pub claimed: Permissions,
}

/// A message on the main socket. `reply` is set where the front-end waits for one.
#[derive(Debug)]
pub enum Message<T> {
    /// IOTLB UPDATE.
    Update {
        /// What it says.
        update: Update,
        /// Where the reply goes.
        reply: Option<T>,
    },
    /// IOTLB INVALIDATE: the guest unmaps a range.
    Invalidate {
        /// The range, in bytes.
        range: ByteRange<Iova>,
        /// Where the ack goes.
        reply: Option<T>,
    },
    /// A malformed IOTLB message.
    BadIotlb {
        /// What is wrong with it.
        error: Box<dyn std::error::Error + Send + Sync>,
        /// Where the reply goes.
        reply: Option<T>,
    },
    /// SET_BACKEND_REQ_FD: from now on MISSes go out on this channel.
    Channel {
        /// Where the reply goes.
        reply: Option<T>,
    },
    /// GPU_SET_SOCKET: the display's socket was received.
    Display {
        /// Where the reply goes.
        reply: Option<T>,
    },
    /// Any other message. It stays unread until [`super::Effect::HandOver`].
    Unread(Unread),
}

/// A message that the session does not handle itself, by what has to be drained first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// GET_VRING_BASE of a ring, if the message names one: the ring stops, jobs leave the engines.
    StopRing(Option<usize>),
    /// RESET_DEVICE, RESET_OWNER: all rings stop, jobs leave the engines.
    Reset,
    /// SET_FEATURES, SET_MEM_TABLE, REM_MEM_REG: the contents of the mirror become invalid; jobs may end first.
    Remap,
    /// Nothing has to be drained.
    Other,
}
