//! One vhost-user session: a thread that reads the main socket, the back-end channel and the requests of the other
//! threads, and never waits for any of them but in epoll. It is the only writer of the mirror.
//!
//! QEMU holds its big lock while it waits for a reply, without a timeout, and serves no MISS until then. So a
//! drain is *parked* ([`drain::Owed`]): the thread goes back to epoll, where the last one out, a hang-up, or the
//! deadline of the ladder wakes it. A message that needs a drain first stays unread until the drain is over, so
//! that the `vhost` crate handles it and replies at once.

pub mod drain;
mod front_end;
mod iommu;
mod owed;
pub mod questions;
mod requests;
mod seeded;
pub mod start;
mod state;
mod verdicts;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use device_model::locking::lock;
use epoll::Events;
use log::{debug, info, warn};
use vhost::vhost_user::BackendReqHandler;

use self::drain::{For, Owed};
pub use self::state::SessionState;
use crate::faults::Injection;
use crate::telemetry::instruments::Clock;
use crate::threads::ThreadFailure;
use crate::vhost_user::channel::Channel;
use crate::vhost_user::iotlb::{self, IotlbEvent};
use crate::vhost_user::memory::sigbus;
use crate::vhost_user::peek::{self, Next, PeekError};
use crate::vhost_user::{Ack, Header, request};
use crate::wake::{Poller, Waker};

/// How long the rest of a message may take, and the first message of a connection.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(5);
/// How long the end of a session waits for what is in flight, after memory was revoked.
const LAST_DRAIN: Duration = Duration::from_secs(1);

/// Messages that are read before everything else is looked at again.
const MESSAGES_A_TURN: u32 = 64;

const MAIN: u64 = 0;
const CHANNEL: u64 = 1;
const WAKE: u64 = 2;
const SIGNAL: u64 = 3;

/// What a session is told from outside.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// When the jobs that a drain waits for are taken off.
    pub drain_timeout: Duration,
    /// What misbehaves.
    pub injection: Arc<Injection>,
}

/// Why a session is over.
#[derive(Debug, thiserror::Error)]
pub enum SessionEnd {
    /// The front-end has closed its end.
    #[error("The front-end has closed the connection")]
    Closed,
    /// SIGTERM or SIGINT.
    #[error("A signal asked the process to end")]
    Signal,
    /// What came is no vhost-user message.
    #[error("The front-end does not speak vhost-user")]
    NoMessage(#[from] PeekError),
    /// A message did not come whole in time.
    #[error("The front-end left a message unfinished for {MESSAGE_DEADLINE:?}")]
    Unfinished,
    /// The `vhost` crate gave up on a message.
    #[error("Message {code} of the front-end cannot be handled")]
    Request {
        /// Its number.
        code: u32,
        /// What the crate says.
        #[source]
        source: vhost::vhost_user::Error,
    },
    /// A request was refused, and the front-end did not ask to be told.
    #[error("Message {code} of the front-end is refused: {why}")]
    Refused {
        /// Its number.
        code: u32,
        /// Why.
        why: String,
    },
    /// A message that should carry one descriptor does not.
    #[error("Message {code} came with {count} descriptors instead of one")]
    Descriptors {
        /// Its number.
        code: u32,
        /// How many came.
        count: usize,
    },
    /// A socket or epoll failed.
    #[error("The session's sockets failed")]
    Io(#[from] io::Error),
    /// A file behind the guest's memory became shorter than the memory table says.
    #[error("The front-end's memory has lost pages that the memory table has: a file was truncated")]
    MemoryLost,
    /// An engine did not reach the end of its step: memory was revoked.
    #[error("An engine did not reach the end of a step: guest memory was revoked, and the session is over")]
    Revoked,
    /// A thread of the device has failed: what it serves would never be answered.
    #[error("A thread of the device has failed")]
    ThreadFailed(#[source] Arc<ThreadFailure>),
}

/// A connected front-end.
pub struct Session {
    socket: UnixStream,
    requests: BackendReqHandler<Mutex<SessionState>>,
    state: Arc<Mutex<SessionState>>,
    config: SessionConfig,
    poller: Poller,
    waker: Waker,
    owed: Owed,
    clock: Clock,
    /// The main socket may have something to read.
    readable: bool,
    /// When the message that has begun has to be whole.
    message_due: Option<Duration>,
    signalled: bool,
    /// The descriptor of the signals.
    signal: RawFd,
    /// Holes in guest memory before this session.
    holes: u64,
}

impl Session {
    /// A session on `socket`. `waker` is what the other threads wake it with, `signal` becomes readable when the
    /// process is asked to end.
    pub fn new(
        socket: UnixStream,
        state: SessionState,
        config: SessionConfig,
        waker: Waker,
        signal: &impl AsFd,
    ) -> io::Result<Self> {
        let poller = Poller::new()?;
        let edge = Events::EPOLLET;
        let main = Events::EPOLLIN | Events::EPOLLOUT | Events::EPOLLRDHUP | edge;
        poller.add(socket.as_raw_fd(), MAIN, main)?;
        poller.add(waker.as_raw_fd(), WAKE, Events::EPOLLIN | edge)?;
        poller.add(signal.as_fd().as_raw_fd(), SIGNAL, Events::EPOLLIN)?;
        let clock = state.sink.instruments().clock();
        // The crate handles one request at a time, on this thread: the mutex is what its trait asks for.
        let state = Arc::new(Mutex::new(state));
        let requests = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(&state));
        // Last, for a session that cannot begin takes its eventfd with it.
        sigbus::wake_at_a_hole(waker.as_raw_fd());
        Ok(Self {
            socket,
            requests,
            state,
            config,
            poller,
            waker,
            owed: Owed::Nothing,
            clock,
            readable: true,
            message_due: Some(clock.now().saturating_add(MESSAGE_DEADLINE)),
            signalled: false,
            signal: signal.as_fd().as_raw_fd(),
            holes: sigbus::holes(),
        })
    }

    /// Serves the front-end until the session ends; then everything that it used is drained and given back.
    pub fn run(mut self) -> SessionEnd {
        let end = loop {
            if let Err(end) = self.turn() {
                break end;
            }
        };
        self.lock().judge_end(&end);
        self.close();
        end
    }

    fn now(&self) -> Duration {
        self.clock.now()
    }

    fn lock(&self) -> MutexGuard<'_, SessionState> {
        lock(&self.state)
    }

    fn turn(&mut self) -> Result<(), SessionEnd> {
        self.wait()?;
        if self.signalled {
            return Err(SessionEnd::Signal);
        }
        if sigbus::holes() != self.holes {
            return Err(SessionEnd::MemoryLost);
        }
        if let Some(failure) = self.lock().failures.first() {
            return Err(SessionEnd::ThreadFailed(failure));
        }
        let now = self.now();
        self.lock().read_answers(now);
        self.look_at_owed()?;
        for _ in 0..MESSAGES_A_TURN {
            if !self.may_read() {
                break;
            }
            self.next_message()?;
        }
        if self.message_due.is_some_and(|due| due <= self.now()) {
            return Err(SessionEnd::Unfinished);
        }
        let now = self.now();
        let mut state = self.lock();
        state.expire_misses(now, &self.socket);
        state.answer_questions(now);
        state.send_misses(now);
        state.judge_front_end(now, &self.socket, matches!(self.owed, Owed::Nothing));
        Ok(())
    }

    /// Whether the next message may be looked at, and there may be one.
    fn may_read(&self) -> bool {
        matches!(self.owed, Owed::Nothing) && self.readable
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut tokens = Vec::new();
        self.poller.wait(self.timeout(), &mut tokens)?;
        for token in tokens {
            match token {
                MAIN => self.readable = true,
                WAKE => self.waker.clear(),
                SIGNAL => self.signalled = true,
                // Answers are read at every turn.
                _ => {}
            }
        }
        Ok(())
    }

    /// Milliseconds until the next deadline, rounded up; -1: there is none.
    fn timeout(&self) -> i32 {
        if self.may_read() {
            return 0;
        }
        let owed = match &self.owed {
            Owed::Drain(draining) => Some(draining.deadline()),
            Owed::Late(_, _, _, due) => Some(*due),
            Owed::Nothing | Owed::Unsent(_) => None,
        };
        let misses = self.lock().next_deadline();
        let Some(next) = [owed, misses, self.message_due].into_iter().flatten().min() else { return -1 };
        let left = next.saturating_sub(self.now());
        i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }

    fn send(&mut self, ack: Ack) -> Result<(), SessionEnd> {
        if !peek::send_whole(&self.socket, &ack)? {
            self.owed = Owed::Unsent(ack);
        }
        Ok(())
    }

    /// Looks at the next message and takes it, or hands it over.
    fn next_message(&mut self) -> Result<(), SessionEnd> {
        let header = match peek::next(&self.socket)? {
            Next::Whole(header) => header,
            Next::Closed => return Err(SessionEnd::Closed),
            Next::Empty => {
                self.readable = false;
                return Ok(());
            }
            Next::Partial => {
                let due = self.now().saturating_add(MESSAGE_DEADLINE);
                self.message_due.get_or_insert(due);
                self.readable = false;
                return Ok(());
            }
        };
        self.message_due = None;
        let now = self.now();
        // The answer to a MISS comes before the UPDATE of the next one.
        let mut state = self.lock();
        state.read_answers(now);
        state.judge_message(now, &self.socket, header)?;
        drop(state);
        match header.code() {
            request::IOTLB_MSG => self.iotlb_message(header),
            request::SET_BACKEND_REQ_FD => self.take_channel(header),
            request::GPU_SET_SOCKET => self.take_display(header),
            request::GET_VRING_BASE => self.stop_first(header),
            request::RESET_DEVICE | request::RESET_OWNER => {
                self.lock().stop_all();
                self.drain_first(header, Duration::ZERO)
            }
            request::SET_FEATURES | request::SET_MEM_TABLE | request::REM_MEM_REG => {
                self.drain_first(header, self.config.drain_timeout)
            }
            _ => self.hand_over(header),
        }
    }

    fn iotlb_message(&mut self, header: Header) -> Result<(), SessionEnd> {
        let mut payload = vec![0; header.payload_len()];
        drop(peek::take(&self.socket, &mut payload)?);
        match iotlb::parse(&payload) {
            Ok(IotlbEvent::Invalidate(range)) => {
                debug!("INVALIDATE {range}");
                let invalidation = self.lock().invalidate(range);
                self.begin_drain(invalidation, For::Invalidate(header), self.config.drain_timeout)
            }
            Ok(IotlbEvent::Update(update)) => {
                let result = self.lock().update(update);
                let result = result.map_err(|e| e.to_string());
                self.answer_update(header, result)
            }
            Err(e) => self.answer_update(header, Err(e.to_string())),
        }
    }

    fn answer_update(&mut self, header: Header, result: Result<(), String>) -> Result<(), SessionEnd> {
        if let Err(why) = &result {
            self.lock().stats.updates_rejected.add(1);
            warn!("Refused: {why}");
        }
        match result {
            _ if header.needs_reply() => self.send(Ack::new(header, result.is_ok())),
            Ok(()) => Ok(()),
            Err(why) => Err(SessionEnd::Refused { code: header.code(), why }),
        }
    }

    /// GET_VRING_BASE: the ring stops, jobs come off the engines, and then there is silence.
    fn stop_first(&mut self, header: Header) -> Result<(), SessionEnd> {
        if let Some(queue) = peek::payload_u32(&self.socket)? {
            self.lock().stop_ring(queue as usize);
        }
        self.drain_first(header, Duration::ZERO)
    }

    /// Lets the `vhost` crate handle the message at the head of the socket.
    fn hand_over(&mut self, header: Header) -> Result<(), SessionEnd> {
        // The crate writes its reply with blocking calls: only to a socket that has room for it.
        if !peek::is_writable(&self.socket) {
            return Err(SessionEnd::Io(io::Error::new(
                io::ErrorKind::WouldBlock,
                "The front-end sends requests and does not read the replies",
            )));
        }
        let result = self.requests.handle_request();
        let refusal = self.lock().take_refusal();
        match (result, refusal) {
            (Ok(()), None) => Ok(()),
            (_, Some(why)) if header.needs_reply() && self.lock().has_reply_ack() => {
                warn!("Message {} of the front-end is refused: {why}", header.code());
                Ok(())
            }
            (_, Some(why)) => Err(SessionEnd::Refused { code: header.code(), why }),
            (Err(source), None) => Err(SessionEnd::Request { code: header.code(), source }),
        }
    }

    fn take_channel(&mut self, header: Header) -> Result<(), SessionEnd> {
        let descriptor = self.take_descriptor(header)?;
        let channel = Channel::new(descriptor)?;
        let events = Events::EPOLLIN | Events::EPOLLOUT | Events::EPOLLET;
        self.poller.add(channel.as_fd().as_raw_fd(), CHANNEL, events)?;
        let mut state = self.lock();
        state.misses.channel_replaced();
        if let Some(referee) = &mut state.referee {
            referee.channel_replaced();
        }
        state.channel = Some(channel);
        drop(state);
        self.acknowledge_plain(header)
    }

    fn take_display(&mut self, header: Header) -> Result<(), SessionEnd> {
        let socket = UnixStream::from(self.take_descriptor(header)?);
        // Fails for anything but a UNIX socket.
        socket.local_addr()?;
        self.lock().display.connect(socket);
        self.acknowledge_plain(header)
    }

    fn acknowledge_plain(&mut self, header: Header) -> Result<(), SessionEnd> {
        if header.needs_reply() { self.send(Ack::new(header, true)) } else { Ok(()) }
    }

    fn take_descriptor(&mut self, header: Header) -> Result<OwnedFd, SessionEnd> {
        let mut payload = vec![0; header.payload_len()];
        let mut descriptors = peek::take(&self.socket, &mut payload)?;
        match (descriptors.pop(), descriptors.len()) {
            (Some(descriptor), 0) => Ok(descriptor),
            (last, more) => {
                let count = more + usize::from(last.is_some());
                Err(SessionEnd::Descriptors { code: header.code(), count })
            }
        }
    }

    /// Gives everything back: rings stop, jobs come off, memory goes away when nothing uses it any more.
    fn close(self) {
        let Self { state, requests, socket, poller, waker, signal, .. } = self;
        sigbus::wake_nobody();
        // It stays readable, and must not keep the last drain from waiting.
        let _ = poller.remove(signal);
        // The front-end sees the end of the connection once everything is drained.
        drop(requests);
        let Some(state) = Arc::into_inner(state) else {
            unreachable!("The request handler was the only other owner")
        };
        let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.close(&poller, &waker);
        drop(socket);
        info!("Session closed");
    }
}
