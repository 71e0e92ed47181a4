//! The model's front-end, which behaves like QEMU: it does one thing after the other and waits for each reply; it
//! answers a MISS with an UPDATE and, when that is acked, with the reply on the channel. In some schedules it does not
//! wait for the acks of its INVALIDATEs, in others it loses answers or claims too many permissions.

use std::collections::VecDeque;

use super::guest::{iova, page_at};
use super::memory::FRAMES;
use super::ops::Serve;
use super::world::{PAGES, World};
use crate::addr::{ByteRange, Iova, PAGE_SIZE};
use crate::mmu::Permissions;
use crate::mmu::miss::MissRequest;

/// A message to the device on the main socket. Each has a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    Update {
        range: ByteRange<Iova>,
        frame: usize,
        claimed: Permissions,
    },
    Invalidate {
        id: u64,
        range: ByteRange<Iova>,
    },
    /// GET_VRING_BASE.
    Stop,
    /// SET_VRING_KICK and the like.
    Start,
    Reset,
    ChangeMemory,
    NewChannel,
}

impl Message {
    /// Whether the front-end sends it only when nothing else is pending, and waits for its reply.
    fn is_alone(self) -> bool {
        !matches!(self, Self::Update { .. } | Self::Invalidate { .. })
    }
}

/// A reply that the device has to send.
#[derive(Clone, Copy, Debug)]
enum Due {
    /// To an UPDATE, and the answer that the front-end then sends on the channel.
    Update(Option<bool>),
    Invalidate(u64),
    Alone,
}

#[derive(Debug, Default)]
pub(super) struct FrontEnd {
    /// What the guest and the monitor want to send.
    todo: VecDeque<Message>,
    /// Unread messages.
    pub(super) main: VecDeque<Message>,
    due: VecDeque<Due>,
    /// The back-end channel, both ways.
    pub(super) misses: VecDeque<MissRequest>,
    pub(super) replies: VecDeque<bool>,
    /// An UPDATE was sent, and its MISS is not answered yet.
    answering: bool,
    /// The UPDATE was acked: the answer to send on the channel.
    answer: Option<bool>,
    /// GET_VRING_BASE was sent: MISSes are refused.
    pub(super) stopped: bool,
    /// MISSes and answers do not match any more.
    pub(super) out_of_step: bool,
    turn: bool,
}

impl FrontEnd {
    pub(super) fn wants(&mut self, message: Message) {
        self.todo.push_back(message);
    }

    /// Whether the guest is blocked: by the monitor, or by a register that its CPU writes.
    pub(super) fn holds_the_guest(&self) -> bool {
        let holds = |message: &Message| matches!(message, Message::Stop | Message::Start | Message::Reset);
        self.stopped || self.todo.iter().any(holds) || self.due.iter().any(|due| matches!(due, Due::Alone))
    }

    pub(super) fn is_idle(&self) -> bool {
        let messages = self.todo.is_empty() && self.main.is_empty() && self.due.is_empty();
        messages && self.misses.is_empty() && self.replies.is_empty() && !self.answering
    }

    /// Whether a message can be sent, or a MISS be served, although replies may be pending.
    fn may_go_on(&self, pipelined: bool) -> bool {
        self.due.is_empty() || pipelined && !self.due.iter().any(|due| matches!(due, Due::Alone))
    }

    fn forget_channel(&mut self) {
        self.misses.clear();
        self.replies.clear();
        self.answering = false;
        self.answer = None;
        self.out_of_step = false;
    }
}

impl World {
    /// The front-end does one thing, if possible.
    pub(super) fn front_end_turn(&mut self, serve: Serve) {
        let fe = &mut self.front_end;
        let goes_on = fe.may_go_on(self.flavor.pipelined);
        let can_send = fe
            .todo
            .front()
            .is_some_and(|message| if message.is_alone() { fe.due.is_empty() } else { goes_on });
        let can_serve = goes_on && !fe.answering && !fe.misses.is_empty();
        fe.turn = !fe.turn;
        if can_send && (fe.turn || !can_serve && fe.answer.is_none()) {
            let message = fe.todo.pop_front();
            message.into_iter().for_each(|message| self.send(message, None));
        } else if let Some(granted) = fe.answer.take() {
            fe.answering = false;
            self.reply(granted);
        } else if can_serve {
            self.serve_miss(serve);
        }
    }

    fn send(&mut self, message: Message, then: Option<bool>) {
        let fe = &mut self.front_end;
        fe.due.push_back(match message {
            Message::Update { .. } => Due::Update(then),
            Message::Invalidate { id, .. } => Due::Invalidate(id),
            Message::Stop => {
                fe.stopped = true;
                Due::Alone
            }
            Message::Start => {
                fe.stopped = false;
                Due::Alone
            }
            Message::Reset | Message::ChangeMemory | Message::NewChannel => Due::Alone,
        });
        fe.main.push_back(message);
        self.event("front-end sends", message_code(message), 0);
        self.wake();
    }

    fn serve_miss(&mut self, serve: Serve) {
        let faulty = self.flavor.faulty || matches!(serve, Serve::Honest | Serve::Large | Serve::Refuse);
        let Some(request) = self.front_end.misses.pop_front() else { return };
        let serve = if faulty { serve } else { Serve::Honest };
        if self.front_end.out_of_step || !matches!(serve, Serve::Honest | Serve::Large) {
            self.errs();
        }
        if serve == Serve::Lose {
            self.counts.answers_lost += 1;
            self.front_end.out_of_step = true;
            return;
        }
        let update = if self.front_end.stopped { None } else { self.update_for(request, serve) };
        match update {
            Some(update) => {
                self.front_end.answering = true;
                self.send(update, Some(true));
            }
            None => self.reply(false),
        }
    }

    /// The front-end makes an error: jobs in flight may fail because of it until it replaces the channel.
    fn errs(&mut self) {
        self.oracle.excuse(self.stamp);
    }

    /// The UPDATE that answers a MISS; `None`: it is refused.
    fn update_for(&self, request: MissRequest, serve: Serve) -> Option<Message> {
        let page = page_at(request.iova)?;
        let mapping = self.guest.mapping(page).filter(|mapping| mapping.permissions.allow(request.access))?;
        let claimed = if self.flavor.overclaims { Permissions::READ_WRITE } else { mapping.permissions };
        let frame = mapping.frame;
        let update = |len, claimed| {
            let range = ByteRange::new(iova(page), len).ok()?;
            Some(Message::Update { range, frame, claimed })
        };
        match serve {
            Serve::Refuse | Serve::Lose => None,
            Serve::Honest => update(PAGE_SIZE, claimed),
            Serve::Half => update(PAGE_SIZE / 2, claimed),
            Serve::Large => update(self.alike(page) * PAGE_SIZE, claimed),
            Serve::OtherPage(other) => self.unasked(other.into()).or_else(|| update(PAGE_SIZE, claimed)),
            Serve::OtherPermission => {
                let read = request.access == crate::addr::Access::Write;
                update(PAGE_SIZE, Permissions { read, write: !read })
            }
        }
    }

    /// How many pages from `page` on are mapped with the same permissions to consecutive frames.
    fn alike(&self, page: usize) -> u64 {
        let goes_on = |&count: &usize| {
            let next = page.checked_add(count).filter(|&next| next < PAGES).and_then(|next| {
                let follows = iova(next).raw().wrapping_sub(iova(page).raw()) == count as u64 * PAGE_SIZE;
                self.guest.mapping(next).filter(|_| follows)
            });
            match (self.guest.mapping(page), next) {
                (Some(first), Some(next)) => {
                    next.permissions == first.permissions
                        && next.frame == first.frame + count
                        && next.frame < FRAMES
                }
                _ => false,
            }
        };
        1 + (1..PAGES).take_while(goes_on).count() as u64
    }

    fn unasked(&self, page: usize) -> Option<Message> {
        let mapping = self.guest.mapping(page)?;
        let range = ByteRange::new(iova(page), PAGE_SIZE).ok()?;
        Some(Message::Update { range, frame: mapping.frame, claimed: mapping.permissions })
    }

    /// Sends an UPDATE that answers no MISS.
    pub(super) fn send_unasked(&mut self, page: usize) {
        if self.front_end.may_go_on(self.flavor.pipelined)
            && let Some(update) = self.unasked(page)
        {
            self.send(update, None);
        }
    }

    /// Sends an answer to no MISS.
    pub(super) fn send_unexpected(&mut self) {
        if self.flavor.faulty {
            self.errs();
            self.front_end.out_of_step = true;
            self.reply(true);
        }
    }

    fn reply(&mut self, granted: bool) {
        self.event("front-end replies", granted.into(), 0);
        self.front_end.replies.push_back(granted);
        self.wake();
    }

    /// The device has replied to the oldest message.
    pub(super) fn replied(&mut self) {
        match self.front_end.due.pop_front() {
            Some(Due::Update(then)) => {
                self.front_end.answer = then.or(self.front_end.answer);
            }
            Some(Due::Invalidate(id)) => {
                self.event("acked", id, 0);
                self.guest.acked(id, self.stamp, &mut self.memory);
            }
            Some(Due::Alone) => {}
            None => panic!("The device replies to nothing"),
        }
    }

    /// The old channel is gone with its contents.
    pub(super) fn channel_replaced(&mut self) {
        self.counts.channels_replaced += 1;
        if self.front_end.out_of_step {
            self.errs();
        }
        self.front_end.forget_channel();
    }
}

fn message_code(message: Message) -> u64 {
    match message {
        Message::Update { range, .. } => range.first().raw(),
        Message::Invalidate { id, .. } => 1 + (id << 3),
        Message::Stop => 2,
        Message::Start => 3,
        Message::Reset => 4,
        Message::ChangeMemory => 5,
        Message::NewChannel => 6,
    }
}
