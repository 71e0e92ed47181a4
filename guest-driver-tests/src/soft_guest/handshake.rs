//! Negotiation: what QEMU requests of a vhost-user GPU before it creates the device, and what it requires.

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::error::{Error, Result};
use super::front_end::{FrontEndConfig, feature};
use super::link::Link;

/// What was agreed on.
pub(super) struct Negotiated {
    pub(super) config: FrontEndConfig,
    pub(super) features: u64,
    pub(super) protocol: VhostUserProtocolFeatures,
}

pub(super) fn negotiate(link: &mut Link, config: FrontEndConfig) -> Result<Negotiated> {
    use VhostUserProtocolFeatures as Protocol;
    let offered = link.tell("GET_FEATURES", |front_end| front_end.get_features())?;
    if offered & feature::PROTOCOL_FEATURES == 0 {
        return Err(Error::Reply { message: "GET_FEATURES", got: format!("{offered:#x}") });
    }
    let known = link.tell("GET_PROTOCOL_FEATURES", |front_end| front_end.get_protocol_features())?;
    let mut wanted = Protocol::MQ | Protocol::REPLY_ACK | Protocol::BACKEND_REQ | Protocol::CONFIG;
    if config.announce_reset {
        wanted |= Protocol::RESET_DEVICE;
    }
    if config.memory_slots {
        wanted |= Protocol::CONFIGURE_MEM_SLOTS;
    }
    let protocol = known & wanted;
    // QEMU refuses a GPU without CONFIG, and an IOMMU without a back-end channel and replies.
    let mut needed = Protocol::CONFIG;
    if config.iommu {
        needed |= Protocol::REPLY_ACK | Protocol::BACKEND_REQ;
    }
    if !protocol.contains(needed) {
        return Err(Error::Reply { message: "GET_PROTOCOL_FEATURES", got: format!("{known:?}") });
    }
    link.tell("SET_PROTOCOL_FEATURES", |front_end| front_end.set_protocol_features(protocol))?;
    if protocol.contains(Protocol::MQ) {
        link.tell("GET_QUEUE_NUM", |front_end| front_end.get_queue_num())?;
    }
    if protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
        link.tell("GET_MAX_MEM_SLOTS", |front_end| front_end.get_max_mem_slots())?;
    }
    let mut features = offered & (config.gpu_features | feature::VERSION_1) | config.ring_features;
    features |= feature::PROTOCOL_FEATURES;
    if config.iommu {
        features |= feature::ACCESS_PLATFORM;
    }
    Ok(Negotiated { config, features, protocol })
}
