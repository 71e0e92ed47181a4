//! The table of the front-end's messages: their numbers, names and sizes, and what must be negotiated for them
//! (vhost-user.rst, "Front-end message types"). Knows nothing of what a message means.

use vhost::vhost_user::message::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures as Virtio};

/// The size of a message's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Size {
    /// This number of bytes.
    Exactly(usize),
    /// A memory table: 8 bytes, and 32 for each region.
    Table,
    /// A header of 12 bytes and the bytes of the configuration space that it specifies.
    Config,
    /// Not checked: the feature that it needs is never offered.
    Any,
}

/// What must be negotiated for a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Needs {
    Nothing,
    Protocol(Protocol),
    Virtio(Virtio),
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) code: u32,
    pub(super) name: &'static str,
    pub(super) size: Size,
    pub(super) needs: Needs,
}

/// The numbers of the messages whose content is checked.
pub(super) mod code {
    pub(in super::super) use crate::vhost_user::request::{
        GET_VRING_BASE, IOTLB_MSG, REM_MEM_REG, RESET_DEVICE, RESET_OWNER, SET_FEATURES, SET_MEM_TABLE,
    };
    pub(in super::super) const SET_OWNER: u32 = 3;
    pub(in super::super) const SET_VRING_NUM: u32 = 8;
    pub(in super::super) const SET_VRING_ADDR: u32 = 9;
    pub(in super::super) const SET_VRING_BASE: u32 = 10;
    pub(in super::super) const SET_VRING_KICK: u32 = 12;
    pub(in super::super) const SET_VRING_CALL: u32 = 13;
    pub(in super::super) const SET_VRING_ERR: u32 = 14;
    pub(in super::super) const SET_PROTOCOL_FEATURES: u32 = 16;
    pub(in super::super) const SET_VRING_ENABLE: u32 = 18;
    pub(in super::super) const ADD_MEM_REG: u32 = 37;
}

const fn message(code: u32, name: &'static str, size: Size, needs: Needs) -> Message {
    Message { code, name, size, needs }
}

const NONE: Size = Size::Exactly(0);
const U64: Size = Size::Exactly(8);
const STATE: Size = Size::Exactly(8);
const REGION: Size = Size::Exactly(40);
const NOTHING: Needs = Needs::Nothing;
const SLOTS: Needs = Needs::Protocol(Protocol::CONFIGURE_MEM_SLOTS);
const IN_FLIGHT: Needs = Needs::Protocol(Protocol::INFLIGHT_SHMFD);
const PAGE_FAULT: Needs = Needs::Protocol(Protocol::PAGEFAULT);
const CRYPTO: Needs = Needs::Protocol(Protocol::CRYPTO_SESSION);
const STATUS: Needs = Needs::Protocol(Protocol::STATUS);
const DEVICE_STATE: Needs = Needs::Protocol(Protocol::DEVICE_STATE);
const LOG: Needs = Needs::Virtio(Virtio::LOG_ALL);

/// All messages, by number. (What IOTLB_MSG needs is a separate rule.)
const MESSAGES: [Message; 44] = [
    message(1, "GET_FEATURES", NONE, NOTHING),
    message(2, "SET_FEATURES", U64, NOTHING),
    message(3, "SET_OWNER", NONE, NOTHING),
    message(4, "RESET_OWNER", NONE, NOTHING),
    message(5, "SET_MEM_TABLE", Size::Table, NOTHING),
    message(6, "SET_LOG_BASE", Size::Any, LOG),
    message(7, "SET_LOG_FD", Size::Any, LOG),
    message(8, "SET_VRING_NUM", STATE, NOTHING),
    message(9, "SET_VRING_ADDR", Size::Exactly(40), NOTHING),
    message(10, "SET_VRING_BASE", STATE, NOTHING),
    message(11, "GET_VRING_BASE", STATE, NOTHING),
    message(12, "SET_VRING_KICK", U64, NOTHING),
    message(13, "SET_VRING_CALL", U64, NOTHING),
    message(14, "SET_VRING_ERR", U64, NOTHING),
    message(15, "GET_PROTOCOL_FEATURES", NONE, NOTHING),
    message(16, "SET_PROTOCOL_FEATURES", U64, NOTHING),
    message(17, "GET_QUEUE_NUM", NONE, Needs::Protocol(Protocol::MQ)),
    message(18, "SET_VRING_ENABLE", STATE, Needs::Virtio(Virtio::PROTOCOL_FEATURES)),
    message(19, "SEND_RARP", Size::Any, Needs::Protocol(Protocol::RARP)),
    message(20, "NET_SET_MTU", Size::Any, Needs::Protocol(Protocol::MTU)),
    message(21, "SET_BACKEND_REQ_FD", NONE, Needs::Protocol(Protocol::BACKEND_REQ)),
    message(22, "IOTLB_MSG", Size::Exactly(32), NOTHING),
    message(23, "SET_VRING_ENDIAN", Size::Any, Needs::Protocol(Protocol::CROSS_ENDIAN)),
    message(24, "GET_CONFIG", Size::Config, Needs::Protocol(Protocol::CONFIG)),
    message(25, "SET_CONFIG", Size::Config, Needs::Protocol(Protocol::CONFIG)),
    message(26, "CREATE_CRYPTO_SESSION", Size::Any, CRYPTO),
    message(27, "CLOSE_CRYPTO_SESSION", Size::Any, CRYPTO),
    message(28, "POSTCOPY_ADVISE", Size::Any, PAGE_FAULT),
    message(29, "POSTCOPY_LISTEN", Size::Any, PAGE_FAULT),
    message(30, "POSTCOPY_END", Size::Any, PAGE_FAULT),
    message(31, "GET_INFLIGHT_FD", Size::Any, IN_FLIGHT),
    message(32, "SET_INFLIGHT_FD", Size::Any, IN_FLIGHT),
    message(33, "GPU_SET_SOCKET", NONE, NOTHING),
    message(34, "RESET_DEVICE", NONE, Needs::Protocol(Protocol::RESET_DEVICE)),
    message(35, "VRING_KICK", Size::Any, Needs::Protocol(Protocol::INBAND_NOTIFICATIONS)),
    message(36, "GET_MAX_MEM_SLOTS", NONE, SLOTS),
    message(37, "ADD_MEM_REG", REGION, SLOTS),
    message(38, "REM_MEM_REG", REGION, SLOTS),
    message(39, "SET_STATUS", Size::Any, STATUS),
    message(40, "GET_STATUS", Size::Any, STATUS),
    message(41, "GET_SHARED_OBJECT", Size::Any, Needs::Protocol(Protocol::SHARED_OBJECT)),
    message(42, "SET_DEVICE_STATE_FD", Size::Any, DEVICE_STATE),
    message(43, "CHECK_DEVICE_STATE", Size::Any, DEVICE_STATE),
    message(44, "GET_SHMEM_CONFIG", Size::Any, Needs::Protocol(Protocol::SHMEM)),
];

impl Message {
    /// The message with this number; `None` if the protocol has none.
    pub(super) fn of(code: u32) -> Option<&'static Self> {
        let index = usize::try_from(code).ok()?.checked_sub(1)?;
        MESSAGES.get(index)
    }

    /// Its name in reports, whether the protocol has it or not.
    pub(super) fn name_of(code: u32) -> &'static str {
        Self::of(code).map_or("a message that the protocol does not have", |message| message.name)
    }

    /// What is wrong with a payload of `len` bytes that begins with `payload`, if anything.
    pub(super) fn wrong_size(&self, len: usize, payload: &[u8]) -> Option<String> {
        let wanted = match self.size {
            Size::Any => return None,
            Size::Exactly(wanted) => wanted,
            Size::Table => {
                let regions = u32_at(payload, 0)? as usize;
                regions.saturating_mul(32).saturating_add(8)
            }
            Size::Config => {
                let bytes = u32_at(payload, 4)? as usize;
                bytes.saturating_add(12)
            }
        };
        (len != wanted).then(|| format!("{} with {len} bytes of payload, where {wanted} are due", self.name))
    }
}

/// A 32-bit number of a payload; `None` if it could not be read.
pub(super) fn u32_at(payload: &[u8], at: usize) -> Option<u32> {
    payload.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// A 64-bit number of a payload; `None` if it could not be read.
pub(super) fn u64_at(payload: &[u8], at: usize) -> Option<u64> {
    payload.get(at..)?.first_chunk().map(|bytes| u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_message_stands_at_its_number() {
        for (message, code) in MESSAGES.iter().zip(1..) {
            assert_eq!(message.code, code);
            assert_eq!(Message::of(code), Some(message));
        }
        assert_eq!((Message::of(0), Message::of(45), Message::of(u32::MAX)), (None, None, None));
    }

    #[test]
    fn a_payload_is_as_long_as_its_own_count_says() {
        let table = Message::of(code::SET_MEM_TABLE).unwrap();
        let payload = 2_u64.to_ne_bytes();
        assert_eq!(table.wrong_size(72, &payload), None);
        let seen = "SET_MEM_TABLE with 71 bytes of payload, where 72 are due";
        assert_eq!(table.wrong_size(71, &payload).as_deref(), Some(seen));
        let config = Message::of(24).unwrap();
        let payload: Vec<u8> = [0_u32, 16, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        assert_eq!(config.wrong_size(28, &payload), None);
        assert!(config.wrong_size(12, &payload).is_some());
        // What could not be read is not judged.
        assert_eq!(config.wrong_size(12, &[]), None);
    }
}
