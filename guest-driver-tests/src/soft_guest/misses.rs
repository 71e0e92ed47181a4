//! The main loop's half of the front-end: it reads the back-end channel and answers misses as QEMU does, or in odd
//! ways that a test selects. UPDATE first, on the main socket, then the reply here; both with the big lock held, so
//! that no miss is served while an INVALIDATE waits. Knows nothing of rings.

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};
use zerocopy::{FromBytes, IntoBytes};

use super::addr::{Gpa, Iova, PAGE};
use super::error::{Error, Result};
use super::front_end::Core;
use super::link::Link;
use super::turn::held;
use super::wire::{
    self, IOTLB_MISS, IotlbMessage, Message, NEED_REPLY, PERM_BOTH, PERM_READ, REPLY, VERSION, request,
};

/// A miss, as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// The requested address.
    pub iova: Iova,
    /// Whether write permission is requested: QEMU takes everything except "read only" for a write.
    pub write: bool,
    /// The permission bits as sent.
    pub permission: u8,
    /// Whether the back-end wants an acknowledgement.
    pub need_reply: bool,
}

/// How a miss is answered.
#[derive(Clone, Debug)]
pub enum Answer {
    /// As QEMU: UPDATE for the page, saying "read and write" whatever the IOMMU allows; or a fault and reply 1.
    Serve,
    /// As QEMU with huge pages: one UPDATE for all neighbours whose frames are neighbours too.
    ServeRun,
    /// UPDATE as QEMU sends it, but the reply only when [`super::front_end::FrontEnd::release_replies`] is called;
    /// the big lock is free meanwhile. QEMU never does so, others may.
    ServeTorn,
    /// As [`Self::Serve`], but without requesting the acknowledgement of the UPDATE.
    ServeHasty,
    /// As [`Self::Serve`], but the reply comes twice.
    ServeTwice,
    /// As [`Self::Serve`], but half of the reply's payload is missing.
    ServeGarbled,
    /// Reply 1 and a fault in the log, although the page may be mapped.
    Refuse,
    /// No answer at all.
    Silence,
    /// These UPDATEs, then this reply.
    Odd {
        /// Sent first, each waited for.
        updates: Vec<IotlbMessage>,
        /// Reply to the miss.
        status: u64,
    },
}

/// Decides how misses are answered.
pub type Policy = Box<dyn FnMut(&Miss) -> Answer + Send>;

/// What the miss service has seen and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MissCounts {
    /// Misses that came.
    pub seen: u64,
    /// Misses answered with reply 1.
    pub refused: u64,
    /// Misses not answered.
    pub ignored: u64,
    /// UPDATEs sent because of a miss.
    pub updates: u64,
    /// Of those, the ones that the back-end acknowledged with something but 0.
    pub updates_rejected: u64,
    /// Misses that came after a stop.
    pub after_stop: u64,
    /// Misses whose UPDATE has been sent, and whose reply is being held back.
    pub torn: u64,
    /// Messages on the channel that are not misses.
    pub foreign: u64,
}

const REMEMBERED: usize = 4096;

/// State that tests read and control.
pub(super) struct MissDesk {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    counts: MissCounts,
    recent: VecDeque<Miss>,
    policy: Policy,
    held_back: bool,
    released: bool,
    stop: bool,
}

impl MissDesk {
    pub(super) fn new() -> Self {
        let state = State {
            counts: MissCounts::default(),
            recent: VecDeque::new(),
            policy: Box::new(|_| Answer::Serve),
            held_back: false,
            released: false,
            stop: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn counts(&self) -> MissCounts {
        held(&self.state).counts
    }

    pub(super) fn recent(&self) -> Vec<Miss> {
        held(&self.state).recent.iter().copied().collect()
    }

    pub(super) fn set_policy(&self, policy: Policy) {
        let mut state = held(&self.state);
        state.policy = policy;
        state.released = false;
    }

    pub(super) fn hold_back(&self, yes: bool) {
        held(&self.state).held_back = yes;
        self.changed.notify_all();
    }

    pub(super) fn release_replies(&self) {
        held(&self.state).released = true;
        self.changed.notify_all();
    }

    fn keep_reply_back(&self) {
        self.count(|counts| counts.torn += 1);
        let waiting = |state: &mut State| !state.released && !state.stop;
        let waited = self.changed.wait_while(held(&self.state), waiting);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn wait(&self, timeout: Duration, until: impl Fn(&MissCounts) -> bool) -> bool {
        let waiting = |state: &mut State| !until(&state.counts);
        let waited = self.changed.wait_timeout_while(held(&self.state), timeout, waiting);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    fn count(&self, change: impl FnOnce(&mut MissCounts)) {
        change(&mut held(&self.state).counts);
        self.changed.notify_all();
    }

    /// Records the miss, waits while misses are held back, and returns how to answer; `None`: the service ends.
    fn decide(&self, miss: &Miss) -> Option<Answer> {
        let mut state = held(&self.state);
        state.counts.seen += 1;
        if state.recent.len() == REMEMBERED {
            state.recent.pop_front();
        }
        state.recent.push_back(*miss);
        self.changed.notify_all();
        let waiting = |state: &mut State| state.held_back && !state.stop;
        let mut state = self.changed.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner);
        if state.stop { None } else { Some((state.policy)(miss)) }
    }
}

/// The thread that reads the back-end channel.
pub(super) struct MissService {
    core: Arc<Core>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl MissService {
    pub(super) fn start(core: Arc<Core>, channel: UnixStream) -> Result<Self> {
        let wake = EventFd::new(EFD_CLOEXEC).map_err(Error::io("create an eventfd"))?;
        let stop = wake.try_clone().map_err(Error::io("duplicate an eventfd"))?;
        let served = core.clone();
        let body = move || {
            while let Ok(Some(0)) = wire::wait_readable(&[channel.as_raw_fd(), stop.as_raw_fd()], None) {
                let Ok(Some(message)) = wire::receive(&channel) else { return };
                // An error here means that one of the sockets is gone: the test sees that in its own call.
                if serve(&served, &channel, &message).is_err() {
                    return;
                }
            }
        };
        let thread = thread::Builder::new().name("miss-service".into()).spawn(body);
        let thread = Some(thread.map_err(Error::io("start a thread"))?);
        Ok(Self { core, wake, thread })
    }
}

impl Drop for MissService {
    fn drop(&mut self) {
        held(&self.core.desk.state).stop = true;
        self.core.desk.changed.notify_all();
        let woken = self.wake.write(1);
        if let (Ok(()), Some(thread)) = (woken, self.thread.take()) {
            // It cannot panic, and a panic here would hide the one that ended the test.
            let _ = thread.join();
        }
    }
}

fn serve(core: &Core, channel: &UnixStream, message: &Message) -> Result<()> {
    let Some(miss) = parse(message) else {
        core.desk.count(|counts| counts.foreign += 1);
        return Ok(());
    };
    let Some(answer) = core.desk.decide(&miss) else { return Ok(()) };
    let torn = matches!(answer, Answer::ServeTorn);
    let (copies, length) = match answer {
        Answer::ServeTwice => (2, 8),
        Answer::ServeGarbled => (1, 4),
        _ => (1, 8),
    };
    let mut link = core.link.lock();
    let Some(status) = answer_with(core, &mut link, &miss, answer)? else {
        core.desk.count(|counts| counts.ignored += 1);
        return Ok(());
    };
    if status != 0 {
        core.desk.count(|counts| counts.refused += 1);
    }
    if !miss.need_reply {
        return Ok(());
    }
    if torn {
        drop(link);
        core.desk.keep_reply_back();
    }
    let payload = &status.to_le_bytes()[..length];
    for _ in 0..copies {
        wire::send(channel, request::BACKEND_IOTLB_MSG, VERSION | REPLY, payload, &[])
            .map_err(Error::io("reply on the back-end channel"))?;
    }
    Ok(())
}

fn parse(message: &Message) -> Option<Miss> {
    let iotlb = IotlbMessage::read_from_bytes(&message.body).ok()?;
    let known = message.request == request::BACKEND_IOTLB_MSG && iotlb.kind() == IOTLB_MISS;
    known.then(|| Miss {
        iova: iotlb.iova(),
        write: iotlb.permission() != PERM_READ,
        permission: iotlb.permission(),
        need_reply: message.flags & NEED_REPLY != 0,
    })
}

fn answer_with(core: &Core, link: &mut Link, miss: &Miss, answer: Answer) -> Result<Option<u64>> {
    if !core.is_started() {
        core.desk.count(|counts| counts.after_stop += 1);
        return Ok(Some(1));
    }
    match answer {
        Answer::Silence => Ok(None),
        Answer::Refuse => {
            core.iommu.log_fault(miss.iova, miss.write);
            Ok(Some(1))
        }
        Answer::Odd { updates, status } => {
            for update in updates {
                send_update(core, link, &update)?;
            }
            Ok(Some(status))
        }
        Answer::ServeHasty => {
            let Some(update) = update_for(core, miss.iova, miss.write, false) else { return Ok(Some(1)) };
            link.send(request::IOTLB_MSG, VERSION, update.as_bytes(), &[])?;
            core.desk.count(|counts| counts.updates += 1);
            Ok(Some(0))
        }
        Answer::Serve | Answer::ServeRun | Answer::ServeTorn | Answer::ServeTwice | Answer::ServeGarbled => {
            let run = matches!(answer, Answer::ServeRun);
            let Some(update) = update_for(core, miss.iova, miss.write, run) else { return Ok(Some(1)) };
            send_update(core, link, &update)?;
            Ok(Some(0))
        }
    }
}

/// The UPDATE that answers a miss; `None` with a fault in the log, or for memory that is not in the table.
pub(super) fn update_for(core: &Core, iova: Iova, write: bool, run: bool) -> Option<IotlbMessage> {
    let entry = core.iommu.translate(iova, write)?;
    let (first, pages) = match core.iommu.run_around(iova) {
        Some(around) if run => around,
        _ => (iova.page(), 1),
    };
    let frame = Gpa(entry.frame.0 - (iova.page().0 - first.0));
    let (user, left) = core.user_addr(frame)?;
    Some(IotlbMessage::update(first, (pages as u64 * PAGE).min(left), user, PERM_BOTH))
}

fn send_update(core: &Core, link: &mut Link, update: &IotlbMessage) -> Result<()> {
    let ack = link.acked("IOTLB UPDATE", request::IOTLB_MSG, update.as_bytes())?;
    core.desk.count(|counts| {
        counts.updates += 1;
        counts.updates_rejected += u64::from(ack.status != 0);
    });
    Ok(())
}
