//! Feature negotiation: what is offered, what was chosen, and what follows from it. Knows bits; knows nothing of rings.

use super::refusal::Refusal;

/// VIRTIO_F_ACCESS_PLATFORM: every address of the driver is an IOVA (virtio 1.3, 6).
pub const ACCESS_PLATFORM: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_IOMMU_PLATFORM;
/// VHOST_USER_F_PROTOCOL_FEATURES (QEMU docs/interop/vhost-user.rst): rings are enabled by a message of their own.
pub const VHOST_USER_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK: the front-end may ask for a reply to any message.
pub const REPLY_ACK: u64 = 1 << 3;
/// VHOST_USER_PROTOCOL_F_BACKEND_REQ: the back-end has a channel for requests of its own.
pub const BACKEND_REQ: u64 = 1 << 5;

/// What the front-end may choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Virtio feature bits.
    pub virtio: u64,
    /// Bits that a front-end may pass on from the driver whether or not they are offered.
    pub passed_on: u64,
    /// Protocol feature bits.
    pub protocol: u64,
}

/// What was offered and what was chosen.
#[derive(Debug)]
pub(super) struct Features {
    offer: Offer,
    virtio: u64,
    protocol: u64,
}

impl Features {
    pub(super) fn new(offer: Offer) -> Self {
        Self { offer, virtio: 0, protocol: 0 }
    }

    pub(super) fn offer(&self) -> Offer {
        self.offer
    }

    pub(super) fn virtio(&self) -> u64 {
        self.virtio
    }

    /// Takes the driver's choice. `in_use`: a ring is started.
    pub(super) fn choose(&mut self, features: u64, in_use: bool) -> Result<(), Refusal> {
        let unknown = features & !(self.offer.virtio | self.offer.passed_on);
        if unknown != 0 {
            return Err(Refusal::Features(unknown));
        }
        let missing = (REPLY_ACK | BACKEND_REQ) & !self.protocol;
        if features & ACCESS_PLATFORM != 0 && missing != 0 {
            return Err(Refusal::IotlbNeeds { missing });
        }
        if in_use && features != self.virtio {
            return Err(Refusal::FeaturesInUse);
        }
        self.virtio = features;
        Ok(())
    }

    /// Takes the front-end's choice of protocol features.
    pub(super) fn choose_protocol(&mut self, features: u64) -> Result<(), Refusal> {
        match features & !self.offer.protocol {
            0 => self.protocol = features,
            unknown => return Err(Refusal::ProtocolFeatures(unknown)),
        }
        Ok(())
    }

    /// Whether addresses are IOVAs. Without, they are guest-physical, and the mirror holds the memory table.
    pub(super) fn has_iommu(&self) -> bool {
        self.virtio & ACCESS_PLATFORM != 0
    }

    /// Whether the front-end can be told of a refusal.
    pub(super) fn has_reply_ack(&self) -> bool {
        self.protocol & REPLY_ACK != 0
    }

    /// Whether rings are enabled by a message of their own; otherwise a started ring is enabled.
    pub(super) fn enables_rings(&self) -> bool {
        self.virtio & VHOST_USER_PROTOCOL_FEATURES != 0
    }
}
