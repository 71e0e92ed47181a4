//! The back-end channel (VHOST_USER_SET_BACKEND_REQ_FD): sends MISSes and receives their answers. Never blocks; a
//! message that does not fit into a full socket is kept and sent first. Knows nothing of what the answers mean.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use device_model::addr::{Access, Iova};
use epoll::Events;

use super::iotlb::{self, MissMsg};
use super::{Ack, peek};
use crate::wake::{Poller, Watch};

/// The back-end's end of the channel.
pub struct Channel {
    /// Dropped before the socket is closed.
    _watch: Watch,
    socket: UnixStream,
    /// A MISS that did not fit into the socket.
    unsent: Option<MissMsg>,
    /// The first bytes of an answer that has not arrived completely.
    partial: [u8; size_of::<Ack>()],
    have: usize,
}

/// Why the channel can no longer be used.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The socket failed.
    #[error("The back-end channel failed")]
    Socket(#[source] io::Error),
    /// The front-end has closed it.
    #[error("The front-end has closed the back-end channel")]
    Closed,
    /// An answer arrived although no MISS is outstanding.
    #[error("The front-end answers a MISS that was never sent")]
    Unasked,
    /// The message is not an answer to a MISS.
    #[error("The front-end sent message {0} on the back-end channel, which is no answer to a MISS")]
    NotAnAnswer(u32),
}

impl Channel {
    /// Takes the descriptor that the front-end sent; it must be a UNIX stream socket. `poller` reports its events with
    /// this token.
    pub fn new(descriptor: OwnedFd, poller: &Arc<Poller>, token: u64) -> io::Result<Self> {
        let socket = UnixStream::from(descriptor);
        // Fails for anything but a UNIX socket.
        socket.local_addr()?;
        socket.set_nonblocking(true)?;
        let events = Events::EPOLLIN | Events::EPOLLOUT | Events::EPOLLET;
        let watch = poller.watch(socket.as_raw_fd(), token, events)?;
        Ok(Self { _watch: watch, socket, unsent: None, partial: [0; size_of::<Ack>()], have: 0 })
    }

    /// Whether [`Self::send_miss`] may be called now.
    pub fn is_ready(&self) -> bool {
        self.unsent.is_none()
    }

    /// Sends a MISS for one page, or keeps it until [`Self::flush`] finds room. Call it only while [`Self::is_ready`].
    pub fn send_miss(&mut self, page: Iova, access: Access) -> Result<(), ChannelError> {
        self.unsent = Some(iotlb::miss(page, access));
        self.flush()
    }

    /// Whether the front-end has not yet read some MISS: it is then stopped, or does not listen.
    pub fn is_unread(&self) -> bool {
        self.unsent.is_some() || peek::is_unread(&self.socket)
    }

    /// Sends the MISS that did not fit before.
    pub fn flush(&mut self) -> Result<(), ChannelError> {
        if let Some(message) = &self.unsent
            && peek::send_whole(&self.socket, message).map_err(ChannelError::Socket)?
        {
            self.unsent = None;
        }
        Ok(())
    }

    /// The next answer to a MISS, oldest first: whether it was granted. `None` if no more have arrived.
    pub fn next_answer(&mut self) -> Result<Option<bool>, ChannelError> {
        while let Some(rest) = self.partial.get_mut(self.have..).filter(|rest| !rest.is_empty()) {
            match peek::receive(&self.socket, &mut [IoSliceMut::new(rest)]) {
                Ok((0, _)) => return Err(ChannelError::Closed),
                Ok((read, _)) => self.have += read,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(e) => return Err(ChannelError::Socket(e)),
            }
        }
        self.have = 0;
        let answer: Ack = zerocopy::transmute!(self.partial);
        let header = answer.header();
        if iotlb::answers_miss(header) {
            Ok(Some(answer.done()))
        } else {
            Err(ChannelError::NotAnAnswer(header.code()))
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use zerocopy::IntoBytes;

    use super::super::Header;
    use super::*;

    fn pair() -> (Channel, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Channel::new(ours.into(), &Arc::new(Poller::new().unwrap()), 0).unwrap(), theirs)
    }

    #[test]
    fn answers_come_in_order_whatever_pieces_they_come_in() {
        let (mut channel, mut theirs) = pair();
        let request = Header::request(1, 32, true);
        let mut bytes = Ack::new(request, true).as_bytes().to_vec();
        bytes.extend(Ack::new(request, false).as_bytes());
        for byte in &bytes[..19] {
            theirs.write_all(&[*byte]).unwrap();
            assert_eq!(channel.next_answer().unwrap(), None);
        }
        theirs.write_all(&bytes[19..]).unwrap();
        assert_eq!(channel.next_answer().unwrap(), Some(true));
        assert_eq!(channel.next_answer().unwrap(), Some(false));
        assert_eq!(channel.next_answer().unwrap(), None);
    }

    #[test]
    fn a_miss_is_unread_until_the_front_end_has_taken_it() {
        let (mut channel, mut theirs) = pair();
        assert!(!channel.is_unread());
        channel.send_miss(Iova::new(0x1000), Access::Read).unwrap();
        assert!(channel.is_unread());
        theirs.read_exact(&mut [0; size_of::<MissMsg>()]).unwrap();
        assert!(!channel.is_unread());
    }

    #[test]
    fn a_miss_that_does_not_fit_is_kept_and_goes_first() {
        let (mut channel, mut theirs) = pair();
        let mut page = 0;
        while channel.is_ready() {
            channel.send_miss(Iova::new(page << 12), Access::Read).unwrap();
            page += 1;
        }
        let mut message = [0; size_of::<MissMsg>()];
        for expected in 0..page {
            theirs.read_exact(&mut message).unwrap();
            assert_eq!(u64::from_ne_bytes(message[12..20].try_into().unwrap()), expected << 12);
            channel.flush().unwrap();
        }
        assert!(channel.is_ready());
    }

    #[test]
    fn a_closed_channel_and_a_stranger_on_it_are_told_apart() {
        let (mut channel, mut theirs) = pair();
        theirs.write_all(Ack::new(Header::request(7, 0, true), true).as_bytes()).unwrap();
        assert!(matches!(channel.next_answer(), Err(ChannelError::NotAnAnswer(7))));
        drop(theirs);
        assert!(matches!(channel.next_answer(), Err(ChannelError::Closed)));
    }
}
