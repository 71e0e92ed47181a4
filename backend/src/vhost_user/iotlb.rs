//! The device IOTLB's messages (vhost-user.rst, "An IOTLB message"; linux/vhost_types.h, struct
//! vhost_iotlb_msg): bytes in, checked values out.

use device_model::addr::{Access, ByteRange, FrontendVa, Iova, RangeError};
use zerocopy::native_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Header;

/// VHOST_USER_BACKEND_IOTLB_MSG, on the back-end channel.
const BACKEND_IOTLB_MSG: u32 = 1;

const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;

const READ: u8 = 0x1;
const WRITE: u8 = 0x2;

/// struct vhost_iotlb_msg.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct IotlbMsg {
    iova: U64,
    size: U64,
    uaddr: U64,
    permission: u8,
    kind: u8,
    padding: [u8; 6],
}

const _: () = assert!(size_of::<IotlbMsg>() == 32);

/// A MISS as it goes out.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct MissMsg {
    header: Header,
    body: [u8; size_of::<IotlbMsg>()],
}

const _: () = assert!(size_of::<MissMsg>() == 44);

/// A message of the front-end about the IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IotlbEvent {
    /// A new translation.
    Update(Update),
    /// The translations of this range are no longer valid.
    Invalidate(ByteRange<Iova>),
}

/// A translation that the front-end sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Update {
    /// The I/O virtual addresses that are mapped.
    pub range: ByteRange<Iova>,
    /// Where the range lies in the front-end's memory; as long as `range`.
    pub target: ByteRange<FrontendVa>,
    /// Whether the front-end claims that reads are allowed.
    pub read: bool,
    /// Whether the front-end claims that writes are allowed.
    pub write: bool,
}

/// Why a message is not a valid IOTLB message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum IotlbError {
    /// The payload is not a struct vhost_iotlb_msg.
    #[error("IOTLB message has {0} bytes of payload, not {expected}", expected = size_of::<IotlbMsg>())]
    Length(usize),
    /// A back-end accepts only UPDATE and INVALIDATE.
    #[error("IOTLB message is of type {0}, neither UPDATE nor INVALIDATE")]
    Kind(u8),
    /// An UPDATE of an empty range, or of one past the end of an address space.
    #[error("IOTLB UPDATE names no range")]
    Range(#[from] RangeError),
    /// An UPDATE that allows no access, or has unknown permission bits.
    #[error("IOTLB UPDATE has permission {0:#x}: not read, write or both")]
    Permission(u8),
}

/// Parses the payload of a VHOST_USER_IOTLB_MSG.
pub fn parse(payload: &[u8]) -> Result<IotlbEvent, IotlbError> {
    let msg = IotlbMsg::read_from_bytes(payload).map_err(|_| IotlbError::Length(payload.len()))?;
    match msg.kind {
        UPDATE => msg.update().map(IotlbEvent::Update),
        INVALIDATE => Ok(IotlbEvent::Invalidate(msg.invalidated())),
        kind => Err(IotlbError::Kind(kind)),
    }
}

impl IotlbMsg {
    fn update(self) -> Result<Update, IotlbError> {
        if self.permission == 0 || self.permission & !(READ | WRITE) != 0 {
            return Err(IotlbError::Permission(self.permission));
        }
        Ok(Update {
            range: ByteRange::new(Iova::new(self.iova.get()), self.size.get())?,
            target: ByteRange::new(FrontendVa::new(self.uaddr.get()), self.size.get())?,
            read: self.permission & READ != 0,
            write: self.permission & WRITE != 0,
        })
    }

    /// An invalidation is never refused: QEMU would report it to the guest as done in any case. One that names no range
    /// (size 0, which is SMMUv3's flush-all, or a range that wraps) invalidates everything.
    fn invalidated(self) -> ByteRange<Iova> {
        ByteRange::new(Iova::new(self.iova.get()), self.size.get()).unwrap_or(ByteRange::everything())
    }
}

/// A MISS for one page and one access, with NEED_REPLY (without it, a refusal would bring no answer).
pub fn miss(page: Iova, access: Access) -> MissMsg {
    let body = IotlbMsg {
        iova: page.raw().into(),
        size: 0.into(),
        uaddr: 0.into(),
        permission: match access {
            Access::Read => READ,
            Access::Write => WRITE,
        },
        kind: MISS,
        padding: [0; 6],
    };
    let header = Header::request(BACKEND_IOTLB_MSG, size_of::<IotlbMsg>() as u32, true);
    MissMsg { header, body: zerocopy::transmute!(body) }
}

/// Whether `header` is that of an answer to a MISS.
pub fn answers_miss(header: Header) -> bool {
    header.is_reply() && header.code() == BACKEND_IOTLB_MSG && header.payload_len() == size_of::<U64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, iova: u64, size: u64, uaddr: u64, permission: u8) -> [u8; 32] {
        let (iova, size, uaddr) = (iova.into(), size.into(), uaddr.into());
        zerocopy::transmute!(IotlbMsg { iova, size, uaddr, permission, kind, padding: [0; 6] })
    }

    #[test]
    fn an_invalidate_without_a_range_takes_everything() {
        for (iova, size) in [(0, 0), (0x1000, 0), (u64::MAX, 2), (0x1000, u64::MAX)] {
            let event = parse(&message(INVALIDATE, iova, size, 0, 0));
            assert_eq!(event, Ok(IotlbEvent::Invalidate(ByteRange::everything())), "{iova:#x}+{size:#x}");
        }
    }

    #[test]
    fn an_invalidate_may_reach_the_last_byte_of_the_space() {
        let event = parse(&message(INVALIDATE, 0xfef0_0000, 0xffff_ffff_0110_0000, 0, 0));
        let expected = ByteRange::inclusive(Iova::new(0xfef0_0000), Iova::new(u64::MAX)).unwrap();
        assert_eq!(event, Ok(IotlbEvent::Invalidate(expected)));
    }

    #[test]
    fn an_update_of_nothing_wrapping_or_without_permission_is_refused() {
        let empty = IotlbError::Range(RangeError::Empty { start: 0x1000 });
        assert_eq!(parse(&message(UPDATE, 0x1000, 0, 0x1000, 3)), Err(empty));
        let wraps = IotlbError::Range(RangeError::Wraps { start: u64::MAX, len: 2 });
        assert_eq!(parse(&message(UPDATE, u64::MAX, 2, 0, 3)), Err(wraps));
        let target = IotlbError::Range(RangeError::Wraps { start: u64::MAX - 1, len: 0x1000 });
        assert_eq!(parse(&message(UPDATE, 0x1000, 0x1000, u64::MAX - 1, 3)), Err(target));
        assert_eq!(parse(&message(UPDATE, 0x1000, 0x1000, 0, 0)), Err(IotlbError::Permission(0)));
        assert_eq!(parse(&message(UPDATE, 0x1000, 0x1000, 0, 4)), Err(IotlbError::Permission(4)));
    }

    #[test]
    fn other_types_and_lengths_are_refused() {
        assert_eq!(parse(&message(MISS, 0, 0, 0, 1)), Err(IotlbError::Kind(MISS)));
        assert_eq!(parse(&message(4, 0, 0, 0, 1)), Err(IotlbError::Kind(4)));
        assert_eq!(parse(&[0; 31]), Err(IotlbError::Length(31)));
    }
}
