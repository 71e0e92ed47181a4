//! Checks the front-end (`--check-front-end`) against the vhost-user protocol, and against what a vIOMMU must do for
//! the devices behind it. The session reports its events to the [`FrontEndCheck`], which produces findings, each for a rule
//! of one table ([`rules`]). Has no influence on the session; without the flag there is no checker.
//!
//! Knows nothing of sockets and threads; time is a parameter. What has to be looked up in QEMU's source or the
//! specification (is this allowed?) is in the table, not here.

mod book;
mod finding;
mod kept;
mod messages;
mod misses;
mod order;
mod removed;
mod rules;
mod stale;
#[cfg(test)]
mod tests;

use std::time::Duration;

use device_model::addr::{ByteRange, Iova};
use device_model::mmu::MirrorWriter;
use device_model::mmu::miss::{MissRequest, Resolution};
use device_model::session::Offer;

pub use self::finding::{Finding, Report};
pub use self::kept::{Findings, Kept};
pub use self::rules::{RULES, Row, Rule, Severity};
pub(crate) use self::rules::{SHORT_HELP, long_help};

use self::book::Book;
use self::messages::{Message, code};
use self::misses::Misses;
use self::order::Order;
use self::stale::Stale;
use crate::vhost_user::Header;
use crate::vhost_user::channel::ChannelError;
use crate::vhost_user::iotlb::{self, IotlbError, IotlbEvent};
use crate::vhost_user::memory::MemoryTable;
use crate::vhost_user::peek::PeekError;
use crate::vhost_user::session_end::SessionEnd;

/// The state that the front-end's messages are compared with.
#[derive(Clone, Copy)]
pub struct World<'a> {
    /// The memory table.
    pub memory: &'a MemoryTable,
    /// The translations that the device holds.
    pub mirror: &'a MirrorWriter,
}

/// Checks one connection.
#[derive(Debug)]
pub struct FrontEndCheck {
    order: Order,
    misses: Misses,
    stale: Stale,
    book: Book,
    /// The message that is being handled.
    message: Option<&'static str>,
}

impl FrontEndCheck {
    /// A checker for a front-end with this offer and this time limit for answers.
    pub fn new(offer: Offer, miss_timeout: Duration) -> Self {
        let (misses, stale) = (Misses::new(miss_timeout), Stale::default());
        Self { order: Order::new(offer), misses, stale, book: Book::default(), message: None }
    }

    /// A message is at the head of the main socket and is handled next. `payload` is the part of it that could be read
    /// without consuming it.
    pub fn message(&mut self, now: Duration, header: Header, payload: &[u8], world: World<'_>) {
        self.book.turn_to(now);
        self.book.at_fault = false;
        self.message = Some(Message::name_of(header.code()));
        let had_iommu = self.order.has_iommu();
        self.order.message(header, payload, &mut self.book);
        match header.code() {
            code::IOTLB_MSG => self.iotlb(header, payload, world.memory),
            code::SET_MEM_TABLE | code::REM_MEM_REG if had_iommu => {
                removed::look(header.code(), payload, world, &mut self.book);
            }
            _ => {}
        }
        self.name_fresh();
    }

    /// The device has dropped its translations of `range`, so no INVALIDATE is required for it.
    pub fn mirror_emptied(&mut self, range: ByteRange<Iova>) {
        self.stale.invalidated(range);
        self.misses.invalidated(range);
    }

    fn iotlb(&mut self, header: Header, payload: &[u8], memory: &MemoryTable) {
        if !self.order.has_iommu() {
            let seen = "VIRTIO_F_ACCESS_PLATFORM (bit 33) was not negotiated".to_owned();
            self.book.find(Rule::IotlbNotNegotiated, 0, seen);
            return;
        }
        let event = iotlb::parse(payload);
        if let (Ok(event), false) = (&event, header.needs_reply()) {
            let (rule, range) = match event {
                IotlbEvent::Invalidate(range) => (Rule::InvalidateNotAwaited, *range),
                IotlbEvent::Update(update) => (Rule::UpdateNotAwaited, update.range),
            };
            if let Some(found) = self.book.find(rule, 0, format!("a message for {range} without NEED_REPLY"))
            {
                found.range = Some(range);
            }
        }
        let (rule, error) = match event {
            Ok(IotlbEvent::Invalidate(range)) => return self.mirror_emptied(range),
            Ok(IotlbEvent::Update(update)) if memory.translate(update.target).is_some() => {
                return self.misses.updated(&update, &mut self.book);
            }
            Ok(IotlbEvent::Update(update)) => {
                let seen = format!(
                    "the UPDATE of {} points at {}, which is not in one region of the memory table",
                    update.range, update.target
                );
                if let Some(found) =
                    self.book.find(Rule::UpdateOutsideMemory, update.range.first().raw(), seen)
                {
                    found.range = Some(update.range);
                }
                return self.misses.update_rejected();
            }
            // The size was already judged.
            Err(IotlbError::Length(_)) => return,
            Err(error) => (rule_of(&error), error),
        };
        self.book.find(rule, 0, crate::error::chain(&error));
        self.misses.update_rejected();
    }

    /// The message that is being handled was refused.
    pub fn refused(&mut self, now: Duration, why: &str) {
        self.book.turn_to(now);
        // An earlier finding about the message already gives the reason.
        if !self.book.at_fault {
            self.book.find(Rule::RequestRefused, 0, why.to_owned());
        }
        self.name_fresh();
    }

    /// A MISS is sent.
    pub fn miss_sent(&mut self, now: Duration, request: MissRequest) {
        self.misses.sent(now, request);
    }

    /// A reply has come on the back-end channel: the oldest MISS was granted or refused.
    pub fn miss_answered(&mut self, now: Duration, granted: bool) {
        self.book.turn_to(now);
        self.misses.answered(granted, &mut self.book);
    }

    /// A MISS was not answered in time.
    pub fn miss_timed_out(&mut self, now: Duration, request: MissRequest) {
        self.book.turn_to(now);
        self.misses.gave_up(request, &mut self.book);
    }

    /// A MISS was settled, and `mirror` has not been updated yet.
    pub fn miss_resolved<W>(&mut self, now: Duration, resolution: &Resolution<W>, mirror: &MirrorWriter) {
        self.stale.resolved(now, resolution, mirror);
    }

    /// The back-end channel has failed.
    pub fn channel_failed(&mut self, now: Duration, error: &ChannelError) {
        self.book.turn_to(now);
        let rule = match error {
            ChannelError::Unasked => Rule::AnswerUnasked,
            ChannelError::NotAnAnswer(_) => Rule::AnswerMalformed,
            // One end has closed the connection, which breaks no rule.
            ChannelError::Socket(_) | ChannelError::Closed => return,
        };
        self.book.find(rule, 0, crate::error::chain(error));
    }

    /// The front-end has sent a new back-end channel.
    pub fn channel_replaced(&mut self) {
        self.misses.channel_replaced();
    }

    /// Whether [`Self::main_socket_empty`] has work to do.
    pub fn wants_empty_socket(&self) -> bool {
        self.misses.has_unsettled()
    }

    /// Nothing is left to read on the main socket.
    pub fn main_socket_empty(&mut self, now: Duration) {
        self.book.turn_to(now);
        self.misses.settle(&mut self.book);
    }

    /// When [`Self::expire`] has to be called next.
    pub fn deadline(&self) -> Option<Duration> {
        [self.misses.deadline(), self.stale.deadline()].into_iter().flatten().min()
    }

    /// Judges what has become due.
    pub fn expire(&mut self, now: Duration) {
        self.book.turn_to(now);
        self.misses.expire(&mut self.book);
        self.stale.expire(&mut self.book);
    }

    /// The connection has ended.
    pub fn ended(&mut self, now: Duration, end: &SessionEnd) {
        self.book.turn_to(now);
        let ended = match end {
            SessionEnd::Closed => self.order.running().map(|ring| {
                (Rule::LeftWhileRunning, format!("ring {ring} was started and enabled at the end"))
            }),
            SessionEnd::NoMessage(PeekError::Socket(_)) => None,
            SessionEnd::NoMessage(error) => Some((Rule::MessageHeader, crate::error::chain(error))),
            SessionEnd::Unfinished => Some((Rule::MessageCutOff, end.to_string())),
            SessionEnd::Descriptors { .. } => Some((Rule::DescriptorsWrong, end.to_string())),
            SessionEnd::Request { source: vhost::vhost_user::Error::IncorrectFds, .. } => {
                Some((Rule::DescriptorsWrong, crate::error::chain(end)))
            }
            SessionEnd::MemoryLost => Some((Rule::MemoryTruncated, end.to_string())),
            SessionEnd::Request { .. } | SessionEnd::Refused { .. } if !self.book.at_fault => {
                Some((Rule::RequestRefused, crate::error::chain(end)))
            }
            SessionEnd::Request { .. }
            | SessionEnd::Refused { .. }
            | SessionEnd::Signal
            | SessionEnd::Io(_)
            | SessionEnd::ThreadFailed(_)
            | SessionEnd::Revoked => None,
        };
        if let Some((rule, seen)) = ended {
            self.book.find(rule, 0, seen);
        }
        self.misses.end(&mut self.book);
    }

    /// The findings since the last call.
    pub fn take(&mut self) -> Vec<Finding> {
        self.book.take()
    }

    /// Adds the name of the message that is being handled to its findings.
    fn name_fresh(&mut self) {
        self.book.name_fresh(self.message);
    }
}

/// The rule that an invalid IOTLB message breaks.
fn rule_of(error: &IotlbError) -> Rule {
    match error {
        IotlbError::Length(_) => Rule::MessageSize,
        IotlbError::Kind(_) => Rule::IotlbBadType,
        IotlbError::Range(_) => Rule::UpdateWithoutRange,
        IotlbError::Permission(_) => Rule::UpdateBadPermission,
    }
}
