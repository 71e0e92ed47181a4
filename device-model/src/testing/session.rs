//! Interprets bytes as the actions of a front-end, of threads and of the clock on a session. [`play`] carries the
//! effects out beside a shadow model, and asserts that replies, drains and translations keep their promises. The same
//! bytes come from proptest (`session::tests`) and from the fuzz target `session_core`. Uses the session from outside.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::addr::{Access, ByteRange, DomainId, FrontendVa, Iova, PAGE_SIZE};
use crate::jobs::schedule::Schedule;
use crate::mmu::miss::MissRequest;
use crate::mmu::{
    DrainWaker, HostRange, MemoryRevoked, MirrorConfig, Missing, Permissions, Pin, PinMode, PinRange, Reader,
    mirror,
};
use crate::session::miss_port::{MissPort, RingWait, SessionWaker, Waiter};
use crate::session::{
    ACCESS_PLATFORM, BACKEND_REQ, CONTROL_QUEUE, Config, Effect, Message, Offer, QUEUES, REPLY_ACK, Session,
    Unread, Update, VHOST_USER_PROTOCOL_FEATURES,
};
use crate::telemetry::stats::Stats;

const SPACE: DomainId = DomainId::DEVICE;
const PAGES: u64 = 24;
const FRAMES: u64 = 0x10_0000_0000;
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);
/// More than passes between two polls: see [`Play::pass`].
const LATE: Duration = Duration::from_millis(256);
/// How long a reply may be pending. The poll that preempts jobs is late by up to this, and they leave before the next.
const LONGEST: Duration = DRAIN_TIMEOUT.saturating_add(LATE).saturating_add(LATE);
const FEATURES: u64 = ACCESS_PLATFORM | VHOST_USER_PROTOCOL_FEATURES;

struct NoWaker;

impl DrainWaker for NoWaker {
    fn wake(&self) {}
}

impl SessionWaker for NoWaker {
    fn wake(&self) {}
}

/// The message that is not answered yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Reply,
    Ack(ByteRange<Iova>),
    HandOver(Unread),
}

struct Play<'a> {
    core: Session<u32, Schedule>,
    reader: &'a Reader,
    now: Duration,
    /// Counts actions.
    step: u64,
    due: Option<(Due, u64, Duration)>,
    /// When the open section was opened.
    section: Option<u64>,
    pins: Vec<(Pin, PinMode, ByteRange<Iova>, u64)>,
    /// MISSes that are sent and not answered; `None`: from before a stop.
    sent: VecDeque<MissRequest>,
    /// Where each page may point, for each access.
    proved: BTreeMap<(Access, u64), u64>,
    /// Requests of each waiter for each page, minus answers.
    asked: BTreeMap<(Waiter, MissRequest), u32>,
    rings: [(bool, bool); QUEUES],
    over: bool,
}

/// Plays `bytes`: each byte is an action, and the bytes after it are its arguments.
pub fn play(bytes: &[u8]) {
    let config = MirrorConfig { readers: 2, table_limit: 1 << 22 };
    let (writer, mut readers) = mirror(config, Arc::new(NoWaker));
    let (Some(reader), Some(holder)) = (readers.pop(), readers.pop()) else {
        unreachable!("Two were asked for")
    };
    let offer = Offer { virtio: FEATURES, passed_on: 0, protocol: REPLY_ACK | BACKEND_REQ };
    let config = Config { drain_timeout: DRAIN_TIMEOUT, miss_timeout: Duration::from_millis(300), offer };
    let port = MissPort::new(Arc::new(NoWaker));
    let core = Session::new(config, writer, Schedule::new(), port, Arc::new(Stats::default()));
    let mut play = Play {
        core,
        reader: &reader,
        now: Duration::ZERO,
        step: 0,
        due: None,
        section: None,
        pins: Vec::new(),
        sent: VecDeque::new(),
        proved: BTreeMap::new(),
        asked: BTreeMap::new(),
        rings: [(false, false); QUEUES],
        over: false,
    };
    play.core.set_protocol_features(REPLY_ACK | BACKEND_REQ).expect("They are offered");
    play.core.set_features(FEATURES).expect("They are offered");
    play.give(Message::Channel { reply: Some(0) }, Due::Reply);
    play.core.start_ring(play.now, CONTROL_QUEUE);
    play.core.enable_ring(play.now, CONTROL_QUEUE, true);
    play.carry_out();
    let mut bytes = bytes.iter().copied();
    while let Some(next) = bytes.next().filter(|_| !play.over) {
        play.next(next, &mut bytes, &holder);
    }
    play.end();
}

fn pages(first: u64, count: u64) -> ByteRange<Iova> {
    let first = first % PAGES;
    let count = (count % 4 + 1).min(PAGES - first);
    ByteRange::new(Iova::new(first * PAGE_SIZE), count * PAGE_SIZE).unwrap_or(ByteRange::everything())
}

fn access_of(byte: u8) -> Access {
    if byte & 0x80 == 0 { Access::Read } else { Access::Write }
}

fn number(page: Iova) -> u64 {
    page.raw() / PAGE_SIZE
}

impl Play<'_> {
    fn next(&mut self, what: u8, rest: &mut impl Iterator<Item = u8>, holder: &Reader) {
        self.step += 1;
        let mut argument = || rest.next().unwrap_or(0);
        match what % 16 {
            0 | 1 => self.invalidate(argument(), argument()),
            2 | 3 => self.ask(argument(), argument()),
            4..=6 => self.serve(argument()),
            7 => self.pin(argument(), argument()),
            8 => drop(self.pins.pop()),
            9 if self.section.is_none() => {
                let section = holder.enter();
                self.section = Some(self.step);
                let inner = argument();
                self.next(inner, rest, holder);
                self.poll();
                self.section = None;
                drop(section);
            }
            10 => self.pass(Duration::from_millis(argument().into())),
            11 => self.handle(argument()),
            12 => self.channel(argument()),
            13 => self.core.begin_audit(self.now),
            14 => self.update(pages(argument().into(), argument().into()), argument()),
            _ => self.core.continue_audit(self.now),
        }
        self.carry_out();
        self.poll();
        self.check();
    }

    fn give(&mut self, message: Message<u32>, due: Due) {
        if self.core.may_read() && !self.over {
            self.due = Some((due, self.step, self.now));
            self.core.message(self.now, message);
            self.carry_out();
        }
    }

    fn invalidate(&mut self, first: u8, count: u8) {
        let range = if count == 0xff { ByteRange::everything() } else { pages(first.into(), count.into()) };
        if self.core.may_read() {
            self.proved.retain(|(_, page), _| !range.contains(Iova::new(page * PAGE_SIZE)));
            self.give(Message::Invalidate { range, reply: Some(1) }, Due::Ack(range));
        }
    }

    fn ask(&mut self, who: u8, page: u8) {
        let range = pages(page.into(), (who >> 2).into());
        let missing = Missing { space: SPACE, range, access: access_of(page) };
        let wait = RingWait { queue: usize::from(who & 1), start: 0 };
        let waiter = if who & 2 == 0 { Waiter::RingInput(wait) } else { Waiter::RingOutput(wait) };
        for iova in missing.pages() {
            let request = MissRequest { space: SPACE, access: missing.access, iova };
            *self.asked.entry((waiter, request)).or_default() += 1;
        }
        self.core.ask(self.now, crate::session::miss_port::MissRequest { missing, waiter });
        self.carry_out();
        self.sent.extend(std::iter::from_fn(|| self.core.next_miss(self.now)));
    }

    /// The front-end answers its oldest MISS: correctly, with too little or too much, for another page, or not at all.
    fn serve(&mut self, how: u8) {
        let Some(request) = self.sent.front().copied() else { return };
        let around = ByteRange::new(Iova::new(number(request.iova) / 4 * 4 * PAGE_SIZE), 4 * PAGE_SIZE);
        match how % 8 {
            0..=3 => self.update(request.range(), how),
            4 => self.update(around.unwrap_or(request.range()), how),
            5 => self.update(pages(how.into(), 0), how),
            _ => {}
        }
        if self.core.may_read() {
            self.sent.pop_front();
            let settled = self.core.channel_answered(self.now, how % 8 != 7).expect("A MISS was sent");
            settled.into_iter().for_each(|settled| self.core.apply(self.now, settled));
            self.carry_out();
        }
        self.sent.extend(std::iter::from_fn(|| self.core.next_miss(self.now)));
    }

    fn update(&mut self, range: ByteRange<Iova>, how: u8) {
        let frame = FRAMES + u64::from(how >> 6) * PAGES * PAGE_SIZE + range.first().raw();
        let len = u64::try_from(range.len()).unwrap_or(u64::MAX);
        let host = (how & 0x30 != 0x30).then(|| HostRange::invented(frame, len));
        let target = ByteRange::new(FrontendVa::new(frame), len).unwrap_or(ByteRange::everything());
        let claimed = if how & 8 == 0 { Permissions::READ_WRITE } else { Permissions::READ };
        let update = Update { range, target, host, claimed };
        self.give(Message::Update { update, reply: Some(2) }, Due::Reply);
    }

    fn pin(&mut self, mode: u8, page: u8) {
        let mode = [PinMode::Fence, PinMode::Preempt, PinMode::RegistrationCache][usize::from(mode % 3)];
        let wanted = PinRange { space: SPACE, range: pages(page.into(), 0), access: access_of(page) };
        if let Ok(pin) = self.reader.pin_as(mode, &[wanted]) {
            self.pins.push((pin, mode, wanted.range, self.step));
        }
    }

    /// Handles a message that was handed over.
    fn handle(&mut self, what: u8) {
        let unread = match what % 4 {
            0 => Unread::StopRing(Some(usize::from(what >> 2) % 3)),
            1 => Unread::Reset,
            2 => Unread::Remap,
            _ => Unread::Other,
        };
        if unread != Unread::Other && self.core.may_read() {
            self.proved.clear();
        }
        self.give(Message::Unread(unread), Due::HandOver(unread));
    }

    fn channel(&mut self, what: u8) {
        match what % 4 {
            0 if self.core.may_read() => {
                self.sent.clear();
                self.give(Message::Channel { reply: Some(4) }, Due::Reply);
            }
            1 => {
                self.sent.clear();
                for settled in self.core.channel_lost() {
                    self.core.apply(self.now, settled);
                }
            }
            2 if self.sent.is_empty() => {
                assert!(self.core.channel_answered(self.now, true).is_err(), "Nothing was asked");
            }
            _ => {}
        }
        self.carry_out();
        self.sent.extend(std::iter::from_fn(|| self.core.next_miss(self.now)));
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        // Jobs leave when they are told to.
        self.pins.retain(|(pin, ..)| !pin.evicted());
        for settled in self.core.expire(self.now, || false) {
            self.core.apply(self.now, settled);
        }
    }

    fn poll(&mut self) {
        self.core.poll(self.now, || false);
        self.carry_out();
    }

    fn carry_out(&mut self) {
        while let Some(effect) = self.core.next_effect() {
            match effect {
                Effect::Reply { .. } => {
                    assert_eq!(self.due.take().map(|(due, ..)| due), Some(Due::Reply));
                }
                Effect::Ack { ended, .. } => self.ack(ended.range()),
                Effect::HandOver => self.hand_over(),
                Effect::Mapped { range, host, permissions, .. } => self.mapped(range, host, permissions),
                Effect::MissAnswered { waiter, request, .. } => {
                    let left = self.asked.get_mut(&(waiter, request)).expect("It was asked for");
                    // A waiter that asks twice before the answer is answered once.
                    *left = left.checked_sub(1).expect("It is answered once");
                }
                Effect::SetRing { queue, started, enabled } => self.rings[queue] = (started, enabled),
                Effect::Revoke => {
                    assert!(self.section.is_some(), "Only a section that does not end is stuck");
                    self.core.revoked(self.now, MemoryRevoked::all_regions_replaced());
                }
                Effect::End(_) | Effect::Abort => self.over = true,
                _ => {}
            }
        }
    }

    /// Nothing from before the message may still be in the way of its reply.
    fn assert_drained(&self, since: u64, range: ByteRange<Iova>, caches: bool) {
        assert!(
            self.section.is_none_or(|opened| opened > since),
            "A section is open from before the message"
        );
        let in_the_way = |(_, mode, pinned, at): &&(Pin, PinMode, ByteRange<Iova>, u64)| {
            (caches || *mode != PinMode::RegistrationCache) && *at <= since && pinned.overlaps(range)
        };
        assert_eq!(self.pins.iter().find(in_the_way).map(|(_, mode, ..)| mode), None, "A pin is in the way");
    }

    fn ack(&mut self, range: ByteRange<Iova>) {
        let Some((Due::Ack(wanted), since, at)) = self.due.take() else {
            panic!("No INVALIDATE is unanswered")
        };
        assert_eq!(range, wanted.page_aligned());
        if !self.over {
            self.assert_drained(since, range, false);
        }
        assert!(self.now - at <= LONGEST, "An ack took {:?}", self.now - at);
        self.core.replied(self.now);
    }

    fn hand_over(&mut self) {
        let Some((Due::HandOver(unread), since, _)) = self.due.take() else { panic!("No message is unread") };
        if unread != Unread::Other {
            self.assert_drained(since, ByteRange::everything(), true);
        }
        match unread {
            Unread::StopRing(Some(queue)) if queue < QUEUES => {
                assert!(!self.rings[queue].0, "The ring is stopped before its message is handled");
                self.core.base_given(queue, 0);
            }
            Unread::Reset => {
                assert!(self.rings.iter().all(|(started, _)| !started), "A reset stops all rings");
                self.core.reset_device(self.now);
            }
            Unread::Other => {
                (0..QUEUES).for_each(|queue| self.core.start_ring(self.now, queue));
                (0..QUEUES).for_each(|queue| self.core.enable_ring(self.now, queue, true));
            }
            Unread::StopRing(_) | Unread::Remap => {}
        }
        self.core.handed_over(self.now, None, true);
    }

    fn mapped(&mut self, range: ByteRange<Iova>, host: HostRange, permissions: Permissions) {
        for access in [Access::Read, Access::Write] {
            for page in range.whole_pages().into_iter().flat_map(ByteRange::pages) {
                let at = host.address() + (page.raw() - range.first().raw());
                if permissions.allow(access) {
                    self.proved.insert((access, number(page)), at);
                } else if self.proved.get(&(access, number(page))).is_some_and(|old| *old != at) {
                    // Another frame replaces the entry with its permissions.
                    self.proved.remove(&(access, number(page)));
                }
            }
        }
    }

    /// I1 and I7: everything in the mirror was proved since it was last invalidated.
    fn check(&self) {
        let section = self.reader.enter();
        for (page, access) in (0..PAGES).flat_map(|page| [(page, Access::Read), (page, Access::Write)]) {
            if let Ok(span) = section.translate(SPACE, Iova::new(page * PAGE_SIZE), access) {
                assert_eq!(
                    self.proved.get(&(access, page)),
                    Some(&span.address()),
                    "Page {page} for {access}"
                );
            }
        }
        assert_eq!(self.core.is_running(), self.rings[CONTROL_QUEUE] == (true, true));
        drop(section);
        assert_eq!(
            self.due.is_none(),
            self.core.may_read() || self.over,
            "A reply is due, or the next message may come"
        );
    }

    /// Everything leaves: pending requests are answered, and the session closes.
    fn end(&mut self) {
        self.pins.clear();
        self.poll();
        if !self.over {
            self.check();
            assert!(self.core.may_read(), "Nothing is in flight, and a reply is due");
        }
        self.core.close(self.now);
        let mut closed = false;
        while let Some(effect) = self.core.next_effect() {
            closed |= matches!(effect, Effect::Closed);
        }
        assert!(closed, "Nothing is in flight, and the session does not close");
    }
}
