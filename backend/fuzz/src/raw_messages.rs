//! Bytes of the main socket, in pieces: what [`peek`] makes of them, beside a naive reader of the whole stream.

use std::io::Write;
use std::os::unix::net::UnixStream;

use device_model::addr::{ByteRange, Iova};
use mirrorgpu::vhost_user::iotlb::{self, IotlbError, IotlbEvent};
use mirrorgpu::vhost_user::peek::{self, MAX_PAYLOAD, Next, PeekError};
use mirrorgpu::vhost_user::request;

/// Bytes of a header: request, flags, size.
const HEADER: usize = 12;
const REPLY: u32 = 4;

/// What the naive reader finds at the head of the stream.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Empty,
    Partial,
    Oversized,
    NotARequest,
    Whole { code: u32, payload: Vec<u8> },
}

/// Sends `bytes` in pieces of this length, and reads what has come after each.
pub(crate) fn run(piece: usize, bytes: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("A pair of sockets");
    let (mut sent, mut taken) = (0, 0);
    for bytes_now in bytes.chunks(piece) {
        theirs.write_all(bytes_now).expect("An input fits a socket");
        sent += bytes_now.len();
        loop {
            let expected = head_of(&bytes[taken..sent]);
            let found = peek::next(&ours);
            match (&expected, &found) {
                (Expected::Whole { code, payload }, Ok(Next::Whole(header))) => {
                    assert_eq!((header.code(), header.payload_len()), (*code, payload.len()));
                    read_whole(&ours, *code, payload, *header);
                    taken += HEADER + payload.len();
                    continue;
                }
                (Expected::Empty, Ok(Next::Empty)) | (Expected::Partial, Ok(Next::Partial)) => {}
                // The session ends.
                (Expected::Oversized, Err(PeekError::Oversized { .. }))
                | (Expected::NotARequest, Err(PeekError::NotARequest { .. })) => return,
                _ => panic!("{found:?} was found, not {expected:?}"),
            }
            break;
        }
    }
    drop(theirs);
    assert!(matches!(peek::next(&ours), Ok(Next::Closed)), "The end is not seen");
}

fn read_whole(ours: &UnixStream, code: u32, expected: &[u8], header: mirrorgpu::vhost_user::Header) {
    let first = expected.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
    assert_eq!(peek::payload_u32(ours).expect("A message is there"), first);
    assert_eq!(peek::payload(ours, header).expect("A message is there"), expected);
    let mut payload = vec![0; header.payload_len()];
    assert!(peek::take(ours, &mut payload).expect("A message is there").is_empty());
    assert_eq!(payload, expected);
    if code == request::IOTLB_MSG {
        check_iotlb(&payload);
    }
}

fn head_of(bytes: &[u8]) -> Expected {
    let word = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    match bytes.len() {
        0 => return Expected::Empty,
        1..HEADER => return Expected::Partial,
        _ => {}
    }
    let (code, flags, size) = (word(0), word(4), word(8) as usize);
    if size > MAX_PAYLOAD {
        return Expected::Oversized;
    }
    if flags & REPLY != 0 || flags & 3 != 1 {
        return Expected::NotARequest;
    }
    match bytes.get(HEADER..HEADER + size) {
        Some(payload) => Expected::Whole { code, payload: payload.to_vec() },
        None => Expected::Partial,
    }
}

/// Compares what the payload of an IOTLB message means with the naive reading of its fields.
pub(crate) fn check_iotlb(payload: &[u8]) {
    let event = iotlb::parse(payload);
    let Ok(fields) = <[u8; 32]>::try_from(payload) else {
        return assert_eq!(event, Err(IotlbError::Length(payload.len())));
    };
    let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| fields[at + byte]));
    let (iova, size, uaddr, permission, kind) = (word(0), word(8), word(16), fields[24], fields[25]);
    let fits = |start: u64| u128::from(start) + u128::from(size) <= 1 << 64 && size > 0;
    match (kind, event) {
        (2, Ok(IotlbEvent::Update(update))) => {
            assert!(fits(iova) && fits(uaddr) && (1..=3).contains(&permission));
            assert_eq!((update.range.first().raw(), update.range.len()), (iova, size.into()));
            assert_eq!((update.target.first().raw(), update.target.len()), (uaddr, size.into()));
            assert_eq!((update.read, update.write), (permission & 1 != 0, permission & 2 != 0));
        }
        (2, Err(IotlbError::Permission(found))) => {
            assert!(found == permission && !(1..=3).contains(&permission))
        }
        (2, Err(IotlbError::Range(_))) => assert!(!(fits(iova) && fits(uaddr))),
        (3, Ok(IotlbEvent::Invalidate(range))) => {
            let named = ByteRange::new(Iova::new(iova), size);
            assert_eq!(range, if fits(iova) { named.expect("It fits") } else { ByteRange::everything() });
        }
        (_, Err(IotlbError::Kind(found))) => assert!(found == kind && kind != 2 && kind != 3),
        (_, event) => panic!("{event:?} came of type {kind}"),
    }
}
