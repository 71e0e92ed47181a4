//! The I/O of one vhost-user session: a thread that reads the main socket, the back-end channel and the requests of the
//! other threads, and blocks in epoll only. [`device_model::session`] makes the decisions; this thread passes messages
//! and times to it, and carries out its effects.
//!
//! QEMU holds its big lock while it waits for a reply, without a timeout, and serves no MISS until then. So nothing
//! here waits for a drain: the thread returns to epoll, and the end of the last section or pin, a hang-up, or the next
//! deadline wakes it. A message that needs a drain first stays unread until the drain has ended, so that the `vhost`
//! crate handles it and replies at once.

mod channel_io;
mod front_end;
mod injected;
mod jobs;
pub mod queries;
mod requests;
pub mod start;
mod state;

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use device_model::locking::lock;
use device_model::mmu::{HostRange, Permissions};
use device_model::session::{Effect, End, Message, Unread, Update};
use epoll::Events;
use log::info;
use vhost::vhost_user::BackendReqHandler;

pub use self::state::SessionState;
use crate::fault_injection::{Bug, Injection};
use crate::telemetry::instruments::Clock;
use crate::vhost_user::channel::Channel;
use crate::vhost_user::iotlb::{self, IotlbEvent};
use crate::vhost_user::memory::sigbus;
use crate::vhost_user::peek::{self, Next};
use crate::vhost_user::session_end::{MESSAGE_DEADLINE, SessionEnd};
use crate::vhost_user::{Ack, Header, request};
use crate::wake::{Poller, Waker};

/// Messages that are read in one turn, before the other sources are checked again.
const MESSAGES_A_TURN: u32 = 64;

const MAIN: u64 = 0;
const CHANNEL: u64 = 1;
const WAKE: u64 = 2;
const SIGNAL: u64 = 3;

/// A reply that has not been sent yet.
#[derive(Debug)]
enum Outgoing {
    /// The ack of an INVALIDATE; not sent before this time (`--inject delay-ack`), and no message is read until then.
    Held(Ack, Duration),
    /// The reply did not fit into the socket: it is sent when there is room, and no message is read until then.
    Unsent {
        ack: Ack,
        /// It is the ack of an INVALIDATE.
        of_invalidate: bool,
    },
}

/// A connected front-end.
pub struct Session {
    socket: UnixStream,
    requests: BackendReqHandler<Mutex<SessionState>>,
    state: Arc<Mutex<SessionState>>,
    injection: Arc<Injection>,
    poller: Arc<Poller>,
    waker: Waker,
    /// The header of the last message that was handled or peeked at.
    current: Option<Header>,
    outgoing: Option<Outgoing>,
    clock: Clock,
    /// The main socket may be readable.
    readable: bool,
    /// When the message that has begun must be complete.
    message_due: Option<Duration>,
    signalled: bool,
    /// The signalfd.
    signal: RawFd,
    /// Holes in guest memory that were found before this session.
    holes: u64,
}

impl Session {
    /// A session on `socket`. The other threads wake it with `waker`; `signal` becomes readable when the process has to
    /// end.
    pub fn new(
        socket: UnixStream,
        state: SessionState,
        waker: Waker,
        signal: &impl AsFd,
    ) -> io::Result<Self> {
        let poller = Arc::new(Poller::new()?);
        let edge = Events::EPOLLET;
        let main = Events::EPOLLIN | Events::EPOLLOUT | Events::EPOLLRDHUP | edge;
        poller.add(socket.as_raw_fd(), MAIN, main)?;
        poller.add(waker.as_raw_fd(), WAKE, Events::EPOLLIN | edge)?;
        poller.add(signal.as_fd().as_raw_fd(), SIGNAL, Events::EPOLLIN)?;
        let clock = state.sink.instruments().clock();
        let injection = Arc::clone(&state.injection);
        // The crate handles one request at a time, on this thread; the mutex is there because its trait requires it.
        let state = Arc::new(Mutex::new(state));
        let requests = BackendReqHandler::from_stream(socket.try_clone()?, Arc::clone(&state));
        // Done last: a session that fails to start closes its eventfd.
        sigbus::wake_at_a_hole(waker.as_raw_fd());
        Ok(Self {
            socket,
            requests,
            state,
            injection,
            poller,
            waker,
            current: None,
            outgoing: None,
            clock,
            readable: true,
            message_due: Some(clock.now().saturating_add(MESSAGE_DEADLINE)),
            signalled: false,
            signal: signal.as_fd().as_raw_fd(),
            holes: sigbus::holes(),
        })
    }

    /// Serves the front-end until the session ends; then drains and releases everything that it used.
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
        self.send_outgoing(now)?;
        self.poll_drain(now)?;
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
        let idle = self.is_idle();
        let mut state = self.lock();
        state.expire_misses(now, &self.socket);
        state.answer_queries(now);
        state.send_misses(now);
        state.judge_front_end(now, &self.socket, idle);
        Ok(())
    }

    /// Checks how far the current drain is.
    fn poll_drain(&mut self, now: Duration) -> Result<(), SessionEnd> {
        self.ack_early()?;
        {
            let mut state = self.lock();
            let SessionState { core, turns, .. } = &mut *state;
            core.poll(now, || turns.starve(now));
        }
        self.carry_out()
    }

    /// Whether no reply is pending.
    fn is_idle(&self) -> bool {
        self.outgoing.is_none() && self.lock().core.may_read()
    }

    /// Whether the next message may be read, and there may be one.
    fn may_read(&self) -> bool {
        self.readable && self.is_idle()
    }

    /// Carries out the effects of the session core.
    fn carry_out(&mut self) -> Result<(), SessionEnd> {
        loop {
            let now = self.now();
            let effect = {
                let mut state = self.lock();
                state.carry_out(now);
                state.core.next_effect()
            };
            match effect {
                None => return Ok(()),
                Some(Effect::Ack { to, .. }) => self.acknowledge(to)?,
                Some(Effect::Reply { to, ok }) => self.send(Ack::new(to, ok), false)?,
                Some(Effect::HandOver) => self.hand_over()?,
                Some(Effect::Revoke) => {
                    let mut state = self.lock();
                    let proof = state.revoke_memory();
                    state.core.revoked(now, proof);
                }
                Some(Effect::End(End::Refused(why))) => {
                    let code = self.current.map_or(0, |header| header.code());
                    return Err(SessionEnd::Refused { code, why });
                }
                Some(Effect::End(End::Revoked)) => return Err(SessionEnd::Revoked),
                Some(Effect::Abort) => state::abort(),
                // All other effects are carried out within the device, and a running session does not close.
                Some(_) => {}
            }
        }
    }

    /// The drain of an INVALIDATE has ended.
    fn acknowledge(&mut self, to: Option<Header>) -> Result<(), SessionEnd> {
        let was_early = {
            let mut state = self.lock();
            let SessionState { core, faults, .. } = &mut *state;
            faults.drained(core.mirror_mut())
        };
        let Some(to) = to.filter(|_| !was_early) else {
            let now = self.now();
            self.lock().core.replied(now);
            return Ok(());
        };
        let ack = Ack::new(to, true);
        if let Some(delay) = self.injection.delay(Bug::DelayAck) {
            self.outgoing = Some(Outgoing::Held(ack, self.now().saturating_add(delay)));
            return Ok(());
        }
        self.send(ack, true)
    }

    /// The seeded bugs "ack before drain", "skip section" and "skip pin": the front-end gets the ack before the drain
    /// has ended.
    fn ack_early(&mut self) -> Result<(), SessionEnd> {
        let Some(header) = self.current.filter(|header| header.code() == request::IOTLB_MSG) else {
            return Ok(());
        };
        let early = {
            let mut state = self.lock();
            let left = state.core.in_flight();
            let early = left.is_some_and(|left| state.faults.acks_early(left));
            if early {
                state.core.forget_ladder();
            }
            early
        };
        if early && header.needs_reply() {
            peek::send_whole(&self.socket, &Ack::new(header, true))?;
        }
        Ok(())
    }

    /// Sends a reply that was held back, or did not fit into the socket.
    fn send_outgoing(&mut self, now: Duration) -> Result<(), SessionEnd> {
        match self.outgoing.take() {
            Some(Outgoing::Held(ack, due)) if due > now => self.outgoing = Some(Outgoing::Held(ack, due)),
            Some(Outgoing::Held(ack, _)) => self.send(ack, true)?,
            Some(Outgoing::Unsent { ack, of_invalidate }) => self.send(ack, of_invalidate)?,
            None => {}
        }
        Ok(())
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut tokens = Vec::new();
        self.poller.wait(self.timeout(), &mut tokens)?;
        for token in tokens {
            match token {
                MAIN => self.readable = true,
                WAKE => self.waker.clear(),
                SIGNAL => self.signalled = true,
                // Answers are read in every turn.
                _ => {}
            }
        }
        Ok(())
    }

    /// Milliseconds until the next deadline, rounded up; -1 if there is none.
    fn timeout(&self) -> i32 {
        if self.may_read() {
            return 0;
        }
        let held = match &self.outgoing {
            Some(Outgoing::Held(_, due)) => Some(*due),
            Some(Outgoing::Unsent { .. }) | None => None,
        };
        let state = self.lock().next_deadline();
        let Some(next) = [held, state, self.message_due].into_iter().flatten().min() else { return -1 };
        let left = next.saturating_sub(self.now());
        i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }

    fn send(&mut self, ack: Ack, of_invalidate: bool) -> Result<(), SessionEnd> {
        if !peek::send_whole(&self.socket, &ack)? {
            self.outgoing = Some(Outgoing::Unsent { ack, of_invalidate });
        } else if of_invalidate {
            let now = self.now();
            self.lock().core.replied(now);
        }
        Ok(())
    }

    /// Peeks at the next message, and handles it here or passes it to the `vhost` crate.
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
        // The answer to a MISS is read before the UPDATE of the next one.
        let mut state = self.lock();
        state.read_answers(now);
        state.judge_message(now, &self.socket, header)?;
        drop(state);
        self.current = Some(header);
        let message = match header.code() {
            request::IOTLB_MSG => self.take_iotlb(header)?,
            request::SET_BACKEND_REQ_FD => self.take_channel(header)?,
            request::GPU_SET_SOCKET => self.take_display(header)?,
            request::GET_VRING_BASE => {
                let queue = peek::payload_u32(&self.socket)?;
                Message::Unread(Unread::StopRing(queue.map(|queue| queue as usize)))
            }
            request::RESET_DEVICE | request::RESET_OWNER => Message::Unread(Unread::Reset),
            request::SET_FEATURES | request::SET_MEM_TABLE | request::REM_MEM_REG => {
                Message::Unread(Unread::Remap)
            }
            _ => Message::Unread(Unread::Other),
        };
        self.lock().core.message(now, message);
        self.ack_early()?;
        self.carry_out()
    }

    fn take_iotlb(&mut self, header: Header) -> Result<Message<Header>, SessionEnd> {
        let mut payload = vec![0; header.payload_len()];
        drop(peek::take(&self.socket, &mut payload)?);
        let reply = header.needs_reply().then_some(header);
        let mut state = self.lock();
        let SessionState { core, faults, memory, .. } = &mut *state;
        Ok(match iotlb::parse(&payload) {
            Ok(IotlbEvent::Invalidate(range)) => {
                Message::Invalidate { range: faults.invalidating(core.mirror(), range), reply }
            }
            Ok(IotlbEvent::Update(iotlb::Update { range, target, read, write })) => {
                // SAFETY: INVARIANT: a region of the memory table stays mapped here until it is dropped, which happens
                // only after everything in the mirror was invalidated and drained.
                let host = memory.translate(target).map(|at| unsafe { HostRange::new(at.host, at.len) });
                let mut update = Update { range, target, host, claimed: Permissions { read, write } };
                faults.updated(&mut update);
                Message::Update { update, reply }
            }
            Err(error) => Message::BadIotlb { error: Box::new(error), reply },
        })
    }

    /// Lets the `vhost` crate handle the message at the head of the socket.
    fn hand_over(&mut self) -> Result<(), SessionEnd> {
        // The crate replies with blocking writes, so the socket must have room for the reply.
        if !peek::is_writable(&self.socket) {
            return Err(SessionEnd::Io(io::Error::new(
                io::ErrorKind::WouldBlock,
                "The front-end sends requests and does not read the replies",
            )));
        }
        let Some(header) = self.current else {
            unreachable!("A message is handed over after it was looked at")
        };
        let result = self.requests.handle_request();
        let now = self.now();
        let mut state = self.lock();
        // After every message, also a refused one: each drain of everything forgets where memory is.
        state.memory_is_here();
        let refusal = state.take_refusal();
        if let (Err(source), None) = (result, &refusal) {
            return Err(SessionEnd::Request { code: header.code(), source });
        }
        let has_replied = header.needs_reply() && state.core.has_reply_ack();
        state.core.handed_over(now, refusal, has_replied);
        Ok(())
    }

    fn take_channel(&mut self, header: Header) -> Result<Message<Header>, SessionEnd> {
        let descriptor = self.take_descriptor(header)?;
        let channel = Channel::new(descriptor, &self.poller, CHANNEL)?;
        self.lock().replace_channel(channel);
        Ok(Message::Channel { reply: header.needs_reply().then_some(header) })
    }

    fn take_display(&mut self, header: Header) -> Result<Message<Header>, SessionEnd> {
        let socket = UnixStream::from(self.take_descriptor(header)?);
        // Fails for anything but a UNIX socket.
        socket.local_addr()?;
        self.lock().display.connect(socket);
        Ok(Message::Display { reply: header.needs_reply().then_some(header) })
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

    /// Releases everything: stops the rings, discards the jobs, and unmaps memory once nothing uses it.
    fn close(self) {
        let Self { state, requests, socket, poller, waker, signal, .. } = self;
        sigbus::wake_nobody();
        // It stays readable, and would keep the wait for the last drain from blocking.
        let _ = poller.remove(signal);
        // The front-end sees the connection close only after everything is drained.
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
