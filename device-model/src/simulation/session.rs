//! The model's session: what the back-end's session thread does with messages, answers, drains and misses, in the same
//! order, over the same parts of the model. It sleeps until something wakes it, so that a wake-up that is lost is
//! seen.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::bug::Bug;
use super::front_end::Message;
use super::oracle::{Invariant, violation};
use super::queue::Mail;
use super::world::{DRAIN_TIMEOUT, ENGINES, MISS_TIMEOUT, SLACK, World};
use crate::addr::{ByteRange, Iova, SpaceId};
use crate::jobs::job::{JobError, JobId};
use crate::jobs::schedule::Schedule;
use crate::mmu::miss::{Answer, MissRequest, MissTable, Outcome, Requested, Resolution, UpdateVerdict};
use crate::mmu::{
    DrainWaker, Drained, Invalidation, MappedRange, MemoryRevoked, MirrorWriter, Missing, Permissions,
    SeededBug,
};
use crate::session::drain::{Draining, Progress, STEP_END};

/// Who waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Waiter {
    Ring,
    Job(JobId),
    /// Nobody; but this job comes to it soon.
    Ahead(JobId),
}

/// What follows a drain.
#[derive(Clone, Copy, Debug)]
pub(super) enum For {
    Invalidate,
    Message(Message),
}

/// Wakes the session.
#[derive(Clone, Debug, Default)]
pub(super) struct Wake {
    awake: Arc<AtomicBool>,
    /// The seeded bug: drains do not wake it.
    deaf: bool,
}

impl Wake {
    pub(super) fn new(deaf: bool) -> Self {
        Self { awake: Arc::new(AtomicBool::new(true)), deaf }
    }

    pub(super) fn now(&self) {
        self.awake.store(true, Ordering::Relaxed);
    }
}

impl DrainWaker for Wake {
    fn wake(&self) {
        if !self.deaf {
            self.now();
        }
    }
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) mirror: MirrorWriter,
    pub(super) misses: MissTable<Waiter>,
    pub(super) schedule: Schedule,
    /// What the other threads asked for.
    pub(super) port: VecDeque<(Waiter, Missing)>,
    backlog: VecDeque<(MissRequest, Waiter)>,
    pub(super) owed: Option<Draining<For>>,
    pub(super) running: bool,
    pub(super) wake: Wake,
    /// The UPDATE that waits for its reply, for the count and for seeded bugs.
    staged: Option<(ByteRange<Iova>, Permissions)>,
    /// What a seeded bug does not zap.
    survivors: Vec<MappedRange>,
    /// The turns that the engines had made when the drain began that is owed.
    turns_before: [u64; ENGINES],
}

impl Session {
    pub(super) fn new(mirror: MirrorWriter, wake: Wake) -> Self {
        let mut schedule = Schedule::new();
        schedule.resume();
        Self {
            mirror,
            misses: MissTable::new(MISS_TIMEOUT),
            schedule,
            port: VecDeque::new(),
            backlog: VecDeque::new(),
            owed: None,
            running: true,
            wake,
            staged: None,
            survivors: Vec::new(),
            turns_before: [0; ENGINES],
        }
    }

    fn is_awake(&self) -> bool {
        self.wake.awake.load(Ordering::Relaxed)
    }

    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let owed = self.owed.as_ref().map(Draining::deadline);
        [owed, self.misses.next_deadline()].into_iter().flatten().min()
    }

    /// Whether nothing is on its way in it.
    pub(super) fn is_idle(&self) -> bool {
        self.owed.is_none() && self.port.is_empty() && self.backlog.is_empty() && self.misses.is_idle()
    }
}

impl World {
    pub(super) fn wake(&self) {
        self.session.wake.now();
    }

    /// As the back-end's `Session::turn`.
    pub(super) fn session_turn(&mut self) {
        let due = self.session.next_deadline().is_some_and(|deadline| deadline <= self.now);
        if !due && !self.session.is_awake() || self.over {
            return;
        }
        self.session.wake.awake.store(false, Ordering::Relaxed);
        self.read_answers();
        self.look_at_owed();
        while self.session.owed.is_none() && !self.over {
            self.read_answers();
            let Some(message) = self.front_end.main.pop_front() else { break };
            self.message(message);
        }
        for resolution in self.session.misses.expire(self.now) {
            self.resolve(resolution);
        }
        self.send_misses();
    }

    fn message(&mut self, message: Message) {
        match message {
            Message::Update { range, frame, claimed } => self.update(range, frame, claimed),
            Message::Invalidate { range, .. } => {
                let invalidation = self.invalidate(range);
                self.begin_drain(invalidation, For::Invalidate, DRAIN_TIMEOUT);
            }
            Message::Stop => {
                self.pause();
                self.drain_first(message, Duration::ZERO);
            }
            Message::Reset => {
                self.pause();
                self.drain_first(message, Duration::ZERO);
            }
            Message::ChangeMemory => {
                if self.is(Bug::SwapMemoryBeforeDrain) {
                    self.memory.move_all();
                }
                self.drain_first(message, DRAIN_TIMEOUT);
            }
            Message::Start => {
                self.session.running = true;
                self.session.schedule.resume();
                self.queue.mailbox.push_back(Mail::RingReady);
                self.replied();
            }
            Message::NewChannel => {
                self.session.misses.channel_replaced();
                self.session.staged = None;
                self.channel_replaced();
                self.replied();
            }
        }
    }

    fn update(&mut self, range: ByteRange<Iova>, frame: usize, claimed: Permissions) {
        let host = self.memory.host(frame, range.len() as usize);
        let verdict = self.session.misses.on_update(range, host, claimed);
        if verdict == UpdateVerdict::Staged {
            self.session.staged = Some((range, claimed));
        }
        self.replied();
    }

    fn invalidate(&mut self, range: ByteRange<Iova>) -> Invalidation {
        let space = SpaceId::DEVICE;
        self.counts.invalidations += 1;
        self.counts.whole_domain += u64::from(range == ByteRange::everything());
        self.counts.odd_ranges += u64::from(range != range.page_aligned());
        if self.session.staged.is_some_and(|(staged, _)| staged.page_aligned().overlaps(range.page_aligned()))
        {
            self.counts.staged_discarded += 1;
        }
        if !self.is(Bug::KeepStagedUpdate) {
            self.session.misses.invalidate(space, range);
        }
        if self.is(Bug::DropZap) {
            let survivors = &mut self.session.survivors;
            self.session.mirror.mapped_ranges(space, range, |mapped| survivors.push(mapped));
        }
        self.note_what_is_taken(range);
        if !self.is(Bug::SuspectAfterZap) {
            self.suspect(range);
        }
        let invalidation = self.session.mirror.begin(space, range);
        if self.is(Bug::SuspectAfterZap) {
            self.suspect(range);
        }
        self.counts.incoherent_pins += invalidation.incoherent() as u64;
        let in_flight = invalidation.in_flight();
        self.counts.invalidations_with_pins += u64::from(in_flight.pins > 0);
        self.counts.invalidations_with_sections += u64::from(in_flight.sections > 0);
        self.event("invalidates", range.first().raw(), in_flight.pins as u64);
        invalidation
    }

    /// As the back-end's `update_running`.
    fn pause(&mut self) {
        if !self.session.running {
            return;
        }
        self.counts.stops += 1;
        self.counts.stops_with_running_jobs += u64::from(self.engines_busy() > 0);
        self.counts.stops_with_waiting_jobs += u64::from(self.session.schedule.waiting() > 0);
        self.session.running = false;
        self.session.schedule.pause();
        self.session.port.clear();
        self.session.backlog.clear();
        self.session.misses.clear();
        self.session.staged = None;
    }

    fn drain_first(&mut self, message: Message, patience: Duration) {
        let everything = ByteRange::everything();
        if !self.is(Bug::RememberWhatWasThere) {
            self.session.schedule.forget_suspects();
        }
        self.suspicions.forget();
        self.session.misses.invalidate(SpaceId::DEVICE, everything);
        let mirror = &mut self.session.mirror;
        let invalidation = match self.bug {
            Some(Bug::CacheKeepsPins) => mirror.begin(SpaceId::DEVICE, everything),
            // No mode goes on with memory that goes away.
            _ => mirror.begin_for_good(SpaceId::DEVICE, everything),
        };
        if message == Message::ChangeMemory && !invalidation.in_flight().is_none() {
            self.counts.memory_changes_with_work += 1;
        }
        self.begin_drain(invalidation, For::Message(message), patience);
    }

    fn begin_drain(&mut self, invalidation: Invalidation, then: For, patience: Duration) {
        let patience = if self.is(Bug::ForgetLadder) { Duration::MAX } else { patience };
        let draining = Draining::new(invalidation, then, self.now, patience);
        match self.poll(draining) {
            Progress::Draining(draining) => {
                self.counts.parked_acks += 1;
                self.event("parks the ack", 0, 0);
                self.session.misses.pause(self.now);
                self.session.turns_before = std::array::from_fn(|engine| self.engines[engine].turns);
                self.session.owed = Some(draining);
            }
            progress => self.progress(progress),
        }
    }

    fn look_at_owed(&mut self) {
        if let Some(draining) = self.session.owed.take() {
            let progress = self.poll(draining);
            self.progress(progress);
        }
    }

    /// Polls a drain, as wrongly as the seeded bug wants.
    fn poll(&self, draining: Draining<For>) -> Progress<For> {
        let in_flight = draining.invalidation.in_flight();
        let skip = match self.bug {
            Some(Bug::AckBeforeDrain) => matches!(draining.then, For::Invalidate),
            Some(Bug::ForgetPins) => in_flight.sections == 0,
            Some(Bug::ForgetSections) => in_flight.pins == 0,
            _ => false,
        };
        if skip {
            let (then, since) = (draining.then, draining.since());
            let drained = draining.invalidation.skip_drain(SeededBug::ack_before_drain());
            return Progress::Drained(drained, then, since);
        }
        draining.poll(self.now)
    }

    fn progress(&mut self, progress: Progress<For>) {
        match progress {
            Progress::Drained(drained, then, since) => self.drained(drained, then, since),
            Progress::Draining(draining) => self.session.owed = Some(draining),
            Progress::Stuck(draining) => self.stuck(draining),
        }
    }

    fn drained(&mut self, drained: Drained, then: For, since: Duration) {
        self.check_ack_time(since);
        self.counts.ladders += u64::from(self.now.saturating_sub(since) >= DRAIN_TIMEOUT);
        match then {
            For::Invalidate => {
                self.end(drained);
                self.session.misses.resume(self.now);
                self.let_survive();
                self.replied();
            }
            For::Message(message) => {
                self.hand_over(message);
                self.end(drained);
                self.session.misses.resume(self.now);
            }
        }
    }

    fn end(&mut self, drained: Drained) {
        drop(self.session.mirror.end(drained));
        if !self.is(Bug::LoseInvalidationEnd) {
            self.session.schedule.invalidation_ended();
        }
    }

    /// The seeded bug: what was there before the invalidation is there again.
    fn let_survive(&mut self) {
        for old in std::mem::take(&mut self.session.survivors) {
            let len = old.range.len() as u64;
            if self.memory.place(old.host).is_some_and(|place| place.current) {
                let host = self.memory.host_again(old.host, len);
                let _ = self.session.mirror.map(old.space, old.range, host, old.permissions);
            }
        }
    }

    fn hand_over(&mut self, message: Message) {
        match message {
            Message::Reset => {
                let jobs = self.session.schedule.waiting() + self.engines_busy();
                self.counts.resets_with_jobs += u64::from(jobs > 0);
                self.session.schedule.discard();
                self.suspicions.clear();
                self.queue.ring.clear();
                self.oracle.reset_begins();
                self.queue.mailbox.push_back(Mail::Reset);
            }
            Message::ChangeMemory => {
                self.counts.memory_changes += 1;
                if !self.is(Bug::SwapMemoryBeforeDrain) {
                    self.memory.move_all();
                }
            }
            _ => {}
        }
        self.event("hands over", 0, 0);
        self.replied();
    }

    /// I2: the drain timeout and one step.
    fn check_ack_time(&mut self, since: Duration) {
        let took = self.now.saturating_sub(since);
        let most = if self.is_wedged() { DRAIN_TIMEOUT + STEP_END + SLACK } else { DRAIN_TIMEOUT + SLACK };
        if took > most {
            self.fail(violation(Invariant::I2, format!("An ack took {took:?}")));
        }
    }

    /// An engine hangs: memory is revoked, and the session is over.
    fn stuck(&mut self, draining: Draining<For>) {
        if !self.is_wedged() {
            let what = "Engines that reach the ends of their steps are said to hang".into();
            self.fail(violation(Invariant::I2, what));
        }
        self.check_ack_time(draining.since());
        self.counts.revocations += 1;
        let drained = draining.invalidation.revoke(MemoryRevoked::all_regions_replaced());
        self.end(drained);
        self.over = true;
    }

    /// What has to be true between any two operations.
    pub(super) fn check_session(&mut self) {
        let Some(owed) = self.session.owed.as_ref().filter(|_| !self.over) else { return };
        let (since, nothing) = (owed.since(), owed.invalidation.in_flight().is_none());
        if nothing && !self.session.is_awake() {
            let what = "Nothing is in flight, an ack is parked, and nobody woke the session".into();
            self.fail(violation(Invariant::I2, what));
        }
        let have_left = |engine: usize| self.engines[engine].has_left(self.session.turns_before[engine]);
        if !nothing && (0..ENGINES).all(have_left) {
            let what = "No job in fence mode is in flight, all steps are over, and an ack is parked".into();
            self.fail(violation(Invariant::I2, what));
        }
        self.check_ack_time(since);
    }

    fn read_answers(&mut self) {
        while let Some(granted) = self.front_end.replies.pop_front() {
            match self.session.misses.on_reply(self.now, granted) {
                Answer::Resolved(resolution) => self.resolve(resolution),
                Answer::AskedAgain => self.counts.miss_retries += 1,
                Answer::Stale => self.counts.stale_answers += 1,
                Answer::Unexpected => {}
            }
            self.session.staged = None;
        }
    }

    fn resolve(&mut self, resolution: Resolution<Waiter>) {
        let page = resolution.request;
        self.judge(&resolution);
        let answer = match resolution.outcome {
            Outcome::Mapped { range, host, permissions } => {
                let claimed = self.session.staged.map(|(_, claimed)| claimed);
                let permissions = if self.is(Bug::CacheClaimedPermission) {
                    claimed.unwrap_or(permissions)
                } else {
                    permissions
                };
                let mapped = self.session.mirror.map(page.space, range, host, permissions);
                self.counts.maps_refused += u64::from(mapped.is_err());
                match mapped {
                    Err(error) if !error.is_momentary() => {
                        // The tables are too small for it.
                        self.oracle.excuse(self.stamp);
                        Err(JobError::Refused(missing(page)))
                    }
                    _ => Ok(()),
                }
            }
            Outcome::Refused | Outcome::NotCovered => {
                self.counts.misses_refused += 1;
                Err(JobError::Refused(missing(page)))
            }
            Outcome::TimedOut => {
                self.counts.miss_timeouts += 1;
                self.oracle.excuse(self.stamp);
                Err(JobError::TimedOut(missing(page)))
            }
        };
        self.event("miss answered", page.iova.raw(), answer.is_ok().into());
        for waiter in resolution.waiters {
            match waiter {
                Waiter::Job(_) if self.is(Bug::LoseMissAnswer) => {}
                Waiter::Job(id) if self.is(Bug::FailWhatWasGranted) => {
                    let refused = Err(JobError::Refused(missing(page)));
                    self.session.schedule.miss_answered(id, refused);
                }
                Waiter::Job(id) => {
                    if matches!(answer, Err(JobError::Refused(_))) {
                        self.job_fault(id);
                    }
                    self.session.schedule.miss_answered(id, answer);
                }
                Waiter::Ahead(_) => {}
                Waiter::Ring => self.queue.mailbox.push_back(Mail::MissAnswered),
            }
        }
    }

    fn send_misses(&mut self) {
        self.take_requests();
        while let Some(miss) = self.session.misses.next_to_send() {
            self.counts.misses += 1;
            self.event("miss", miss.iova.raw(), miss.access as u64);
            self.front_end.misses.push_back(miss);
        }
    }

    fn take_requests(&mut self) {
        loop {
            while let Some((page, waiter)) = self.session.backlog.pop_front() {
                let (space, iova) = (page.space, page.iova);
                let requested = self.session.misses.request(self.now, space, iova, page.access, waiter);
                if requested == Requested::Full {
                    self.session.backlog.push_front((page, waiter));
                    return;
                }
            }
            let Some((waiter, missing)) = self.session.port.pop_front() else { return };
            if self.session.running {
                let one = |iova| (MissRequest { space: missing.space, access: missing.access, iova }, waiter);
                self.session.backlog.extend(missing.pages().map(one));
            }
        }
    }
}

fn missing(page: MissRequest) -> Missing {
    Missing { space: page.space, range: page.iova.page_range(), access: page.access }
}
