//! Reads the next message of a vhost-user socket without consuming it: MSG_PEEK leaves bytes and descriptors in place,
//! so the `vhost` crate can still handle the message itself. FIONREAD tells whether the body has arrived too: the crate
//! needs that (its `recv_data` is one recvmsg), and MSG_PEEK cannot see past a segment with descriptors. Also receives
//! whole messages with their descriptors, for the few that the crate does not know. Nothing blocks.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use rustix::net::{
    self, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::Header;

/// Largest payload of a message, as in the `vhost` crate (`MAX_MSG_SIZE`).
pub const MAX_PAYLOAD: usize = 0x1000;
/// Maximum number of descriptors in one message, as in the `vhost` crate.
const MAX_DESCRIPTORS: usize = 32;

/// What is at the head of the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// No byte has arrived.
    Empty,
    /// A message that has not arrived completely.
    Partial,
    /// A complete message, which can be received without blocking.
    Whole(Header),
    /// The peer has closed its end, and every byte was read.
    Closed,
}

/// Why the bytes at the head of the socket cannot be a valid message.
#[derive(Debug, thiserror::Error)]
pub enum PeekError {
    /// The socket failed.
    #[error("The vhost-user socket failed")]
    Socket(#[source] io::Error),
    /// The payload is larger than the maximum.
    #[error(
        "Message {code} announces {size} bytes of payload, more than the {MAX_PAYLOAD} that a message may have"
    )]
    Oversized {
        /// Number of the message.
        code: u32,
        /// Announced length of the payload.
        size: usize,
    },
    /// The version is not supported, or the message is a reply although no request is outstanding.
    #[error("Message {code} has flags that no request has")]
    NotARequest {
        /// Number of the message.
        code: u32,
    },
}

/// Reads the head of `socket` without consuming it.
pub fn next(socket: &UnixStream) -> Result<Next, PeekError> {
    match look(socket)? {
        // The end of the stream cannot be read while bytes are left. Bytes that arrived before the hang-up are seen by
        // a second peek.
        Next::Partial if is_polled(socket, PollFlags::RDHUP) => match look(socket)? {
            Next::Partial => Ok(Next::Closed),
            next => Ok(next),
        },
        next => Ok(next),
    }
}

fn look(socket: &UnixStream) -> Result<Next, PeekError> {
    let mut bytes = [0; size_of::<Header>()];
    let seen = match peek(socket, &mut bytes) {
        Ok(0) => return Ok(Next::Closed),
        Ok(seen) => seen,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Next::Empty),
        Err(e) => return Err(PeekError::Socket(e)),
    };
    if seen < bytes.len() {
        return Ok(Next::Partial);
    }
    let Ok(header) = Header::read_from_bytes(&bytes) else { return Ok(Next::Partial) };
    check(header)?;
    let whole = size_of::<Header>() + header.payload_len();
    let there = readable(socket).map_err(PeekError::Socket)?;
    Ok(if there < whole { Next::Partial } else { Next::Whole(header) })
}

fn check(header: Header) -> Result<(), PeekError> {
    let code = header.code();
    if header.payload_len() > MAX_PAYLOAD {
        return Err(PeekError::Oversized { code, size: header.payload_len() });
    }
    if header.is_reply() || !header.is_of_our_version() {
        return Err(PeekError::NotARequest { code });
    }
    Ok(())
}

/// The first 32 bits of the payload of the message whose header [`next`] returned, left in place; `None` if the payload
/// is shorter.
pub fn payload_u32(socket: &UnixStream) -> io::Result<Option<u32>> {
    let mut bytes = [0; size_of::<Header>() + 4];
    let seen = peek(socket, &mut bytes)?;
    let Ok((header, word)) = Header::read_from_prefix(&bytes) else { return Ok(None) };
    // With a shorter payload, the bytes may belong to the next message.
    let has_word = seen == bytes.len() && header.payload_len() >= 4;
    Ok(word.first_chunk().filter(|_| has_word).map(|word| u32::from_ne_bytes(*word)))
}

/// The payload of the message whose header [`next`] returned, left in place. It is complete unless the front-end has
/// sent it apart from a header with descriptors.
pub fn payload(socket: &UnixStream, header: Header) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; size_of::<Header>().saturating_add(header.payload_len())];
    let seen = peek(socket, &mut bytes)?;
    bytes.truncate(seen);
    Ok(bytes.split_off(size_of::<Header>().min(seen)))
}

/// Receives the message whose header [`next`] returned: its payload into `payload` (of exactly its length), and its
/// descriptors.
pub fn take(socket: &UnixStream, payload: &mut [u8]) -> io::Result<Vec<OwnedFd>> {
    let mut header = [0; size_of::<Header>()];
    let (read, descriptors) = receive(socket, &mut [IoSliceMut::new(&mut header)])?;
    let body = if payload.is_empty() { 0 } else { receive(socket, &mut [IoSliceMut::new(payload)])?.0 };
    // INVARIANT: `next` saw the whole message, and only this thread reads the socket.
    if read != header.len() || body != payload.len() {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
    }
    Ok(descriptors)
}

/// One recvmsg that does not block: the number of bytes read, and the descriptors received with them.
pub fn receive(socket: &UnixStream, into: &mut [IoSliceMut<'_>]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = net::recvmsg(socket, into, &mut control, flags)?;
    if received.flags.contains(ReturnFlags::CTRUNC) {
        // More descriptors than a message may have, or than this process may open: those that were received are closed.
        return Err(Errno::NOBUFS.into());
    }
    let rights = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok((received.bytes, rights.flatten().collect()))
}

/// Reads up to the length of `bytes` without consuming anything.
fn peek(socket: &UnixStream, bytes: &mut [u8]) -> io::Result<usize> {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    let mut no_descriptors = RecvAncillaryBuffer::default();
    Ok(net::recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut no_descriptors, flags)?.bytes)
}

/// Number of bytes that can be read from the socket.
fn readable(socket: &UnixStream) -> io::Result<usize> {
    Ok(usize::try_from(ioctl_fionread(socket)?).unwrap_or(0))
}

/// Whether the peer has not yet read something that was sent. (SIOCOUTQ, which has the same value as TIOCOUTQ: for a
/// UNIX socket, the bytes that the peer has not read, man 7 unix.)
pub fn is_unread(socket: &impl AsFd) -> bool {
    let mut count: libc::c_int = 0;
    // SAFETY: TIOCOUTQ writes one int, and `count` is one.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut count) };
    result == 0 && count > 0
}

/// Sends all of `message`, or nothing: a message of a few bytes fits into any socket that is writable. `Ok(false)`: the
/// socket is full; try again when it is writable.
pub fn send_whole(socket: &impl AsFd, message: &(impl IntoBytes + Immutable)) -> io::Result<bool> {
    let bytes = message.as_bytes();
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match net::sendmsg(socket, &[IoSlice::new(bytes)], &mut SendAncillaryBuffer::default(), flags) {
        Ok(sent) if sent == bytes.len() => Ok(true),
        // A UNIX stream socket accepts a message of less than a page as a whole.
        Ok(_) => Err(io::Error::from(io::ErrorKind::WriteZero)),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Whether a reply can be written without blocking (the crate uses blocking writes).
pub fn is_writable(socket: &UnixStream) -> bool {
    is_polled(socket, PollFlags::OUT)
}

fn is_polled(socket: &UnixStream, events: PollFlags) -> bool {
    let mut polled = [PollFd::new(socket, events)];
    let ready = poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
    ready == Ok(1) && polled.iter().any(|socket| socket.revents().intersects(events))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    use super::super::Ack;
    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    #[test]
    fn a_message_in_pieces_is_partial_until_its_last_byte() {
        let (ours, mut theirs) = pair();
        let header = Header::request(22, 3, true);
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend([1, 2, 3]);
        assert_eq!(next(&ours).unwrap(), Next::Empty);
        for byte in &bytes[..bytes.len() - 1] {
            theirs.write_all(&[*byte]).unwrap();
            assert_eq!(next(&ours).unwrap(), Next::Partial);
        }
        theirs.write_all(&bytes[bytes.len() - 1..]).unwrap();
        assert_eq!(next(&ours).unwrap(), Next::Whole(header));
        let mut payload = [0; 3];
        assert!(take(&ours, &mut payload).unwrap().is_empty());
        assert_eq!((payload, next(&ours).unwrap()), ([1, 2, 3], Next::Empty));
    }

    #[test]
    fn a_peeked_message_keeps_its_descriptors() {
        let (ours, theirs) = pair();
        let header = Header::request(33, 0, false);
        theirs.send_with_fd(header.as_bytes(), theirs.as_raw_fd()).unwrap();
        for _ in 0..3 {
            assert_eq!(next(&ours).unwrap(), Next::Whole(header));
        }
        assert_eq!(take(&ours, &mut []).unwrap().len(), 1);
    }

    #[test]
    fn a_payload_can_be_looked_at_before_its_message_is_taken() {
        let (ours, theirs) = pair();
        let header = Header::request(12, 3, false);
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend([1, 2, 3]);
        theirs.send_with_fd(&bytes[..], theirs.as_raw_fd()).unwrap();
        (&theirs).write_all(b"next").unwrap();
        for _ in 0..2 {
            assert_eq!(payload(&ours, header).unwrap(), [1, 2, 3]);
        }
        let mut taken = [0; 3];
        assert_eq!(take(&ours, &mut taken).unwrap().len(), 1);
        // A payload that is sent apart from its header, behind descriptors, cannot be seen yet.
        let (ours, theirs) = pair();
        theirs.send_with_fd(header.as_bytes(), theirs.as_raw_fd()).unwrap();
        (&theirs).write_all(&[1, 2, 3]).unwrap();
        assert_eq!(payload(&ours, header).unwrap(), [0; 0]);
    }

    #[test]
    fn a_word_is_of_the_payload_and_never_of_the_next_message() {
        let (ours, theirs) = pair();
        for (len, word) in [(0, None), (3, None), (4, Some(0x0403_0201)), (5, Some(0x0403_0201))] {
            let mut bytes = Header::request(11, len, false).as_bytes().to_vec();
            bytes.extend(&[1, 2, 3, 4, 5][..len as usize]);
            (&theirs).write_all(&bytes).unwrap();
            (&theirs).write_all(Header::request(34, 0, false).as_bytes()).unwrap();
            assert_eq!(payload_u32(&ours).unwrap(), word.map(u32::from_le), "{len} bytes");
            take(&ours, &mut vec![0; len as usize]).unwrap();
            take(&ours, &mut []).unwrap();
        }
    }

    #[test]
    fn what_came_before_the_hang_up_is_still_a_message() {
        let (ours, theirs) = pair();
        assert!(send_whole(&theirs, &Header::request(22, 0, true)).unwrap());
        drop(theirs);
        assert!(matches!(next(&ours).unwrap(), Next::Whole(_)));
        take(&ours, &mut []).unwrap();
        assert_eq!(next(&ours).unwrap(), Next::Closed);
    }

    #[test]
    fn a_message_that_is_cut_off_by_a_hang_up_is_the_end() {
        for len in [5, 12, 14] {
            let (ours, mut theirs) = pair();
            let mut bytes = Header::request(22, 3, true).as_bytes().to_vec();
            bytes.extend([1, 2, 3]);
            theirs.write_all(&bytes[..len]).unwrap();
            assert_eq!(next(&ours).unwrap(), Next::Partial);
            drop(theirs);
            assert_eq!(next(&ours).unwrap(), Next::Closed, "{len} bytes");
        }
    }

    #[test]
    fn sizes_and_flags_of_no_request_are_refused() {
        let (ours, theirs) = pair();
        assert!(send_whole(&theirs, &Header::request(5, 0x1001, true)).unwrap());
        assert!(matches!(next(&ours), Err(PeekError::Oversized { code: 5, size: 0x1001 })));
        let (ours, theirs) = pair();
        assert!(send_whole(&theirs, &Ack::new(Header::request(22, 0, true), true)).unwrap());
        assert!(matches!(next(&ours), Err(PeekError::NotARequest { code: 22 })));
    }

    #[test]
    fn a_full_socket_is_reported_and_not_waited_for() {
        let (ours, _theirs) = pair();
        while send_whole(&ours, &Header::request(1, 0, true)).unwrap() {}
        assert!(!is_writable(&ours));
    }
}
