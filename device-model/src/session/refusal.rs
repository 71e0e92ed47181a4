//! Why a request of the front-end is refused. A refusal changes nothing.

use crate::addr::{ByteRange, FrontendVa, Iova};

/// A request that is refused, with its reason in words for the log.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// UPDATEs only make sense behind an IOMMU.
    #[error("IOTLB UPDATE came without VIRTIO_F_ACCESS_PLATFORM")]
    NoIommu,
    /// An UPDATE points outside the memory table, or across two regions.
    #[error("IOTLB UPDATE of {range} points at {target}, which is not in one region of the memory table")]
    NotInOneRegion {
        /// The IOVAs that it maps.
        range: ByteRange<Iova>,
        /// Where it points.
        target: ByteRange<FrontendVa>,
    },
    /// The device has no ring of this number.
    #[error("There is no ring {index}: the device has {rings}")]
    NoRing {
        /// The number that was named.
        index: u32,
        /// How many there are.
        rings: usize,
    },
    /// A started ring cannot be set up.
    #[error("Ring {index} is started: stop it (GET_VRING_BASE) before it is set up again")]
    RingStarted {
        /// Which ring.
        index: u32,
    },
    /// A ring size that virtio does not allow, or that the device does not support.
    #[error("Ring size {size} is not a power of two of at most {most}")]
    RingSize {
        /// The requested size.
        size: u32,
        /// The largest.
        most: u16,
    },
    /// A split ring's index has 16 bits.
    #[error("Ring index {index:#x} does not fit 16 bits")]
    RingIndex {
        /// The requested index.
        index: u32,
    },
    /// A ring address outside guest memory, where addresses are the front-end's.
    #[error("Ring address {address:#x} is not in the memory table")]
    RingAddress {
        /// The address.
        address: u64,
    },
    /// A ring without a kick eventfd would have to be polled.
    #[error("Ring {index} has no kick descriptor: it cannot be polled without")]
    NoKick {
        /// Which ring.
        index: u32,
    },
    /// Virtio features that the device does not have.
    #[error("Features {0:#x} were not offered")]
    Features(u64),
    /// Protocol features that the back-end does not have.
    #[error("Protocol features {0:#x} were not offered")]
    ProtocolFeatures(u64),
    /// The IOTLB needs acks and a channel for MISSes.
    #[error(
        "VIRTIO_F_ACCESS_PLATFORM needs the protocol features REPLY_ACK and BACKEND_REQ: {missing:#x} is missing"
    )]
    IotlbNeeds {
        /// The bits that were not chosen.
        missing: u64,
    },
    /// Features are fixed while a ring is started.
    #[error("Features cannot be changed while a ring is started")]
    FeaturesInUse,
    /// A refusal from outside the session: a memory table, a descriptor, a message that cannot be parsed.
    #[error(transparent)]
    Other(Box<dyn std::error::Error + Send + Sync>),
}

impl Refusal {
    /// A refusal for a reason from outside the session.
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Other(error.into())
    }
}
