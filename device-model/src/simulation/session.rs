//! The session in the simulation: the same [`crate::session`] that the back-end drives, with a model's I/O around it.
//! All decisions are made there; here messages are handed over and effects carried out, and both are checked and
//! counted. Seeded bugs are played here, at the seams: an effect is carried out early, twice or not at all. The session
//! sleeps until something wakes it, so that a lost wake-up is detected.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::bug::Bug;
use super::front_end::Message;
use super::oracle::{Invariant, violation};
use super::queue::Mail;
use super::sim_jobs::SimJobs;
use super::world::{DRAIN_TIMEOUT, ENGINES, MISS_TIMEOUT, SLACK, World};
use crate::addr::{ByteRange, DomainId, Iova};
use crate::jobs::schedule::Schedule;
use crate::mmu::miss::{MissRequest, Outcome};
use crate::mmu::{DrainWaker, HostRange, MappedRange, MemoryRevoked, MirrorWriter, Permissions};
use crate::session;
use crate::session::drain::STEP_END;
use crate::session::miss_port::{MissAnswer, MissPort, SessionWaker, Waiter};
use crate::session::{
    ACCESS_PLATFORM, BACKEND_REQ, CONTROL_QUEUE, Config, Effect, Offer, REPLY_ACK, Settled, Unread, Update,
    VHOST_USER_PROTOCOL_FEATURES,
};
use crate::telemetry::stats::Stats;

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

impl SessionWaker for Wake {
    fn wake(&self) {
        self.now();
    }
}

/// An UPDATE whose MISS is not answered yet.
#[derive(Clone, Copy, Debug)]
struct Staged {
    range: ByteRange<Iova>,
    frame: usize,
    claimed: Permissions,
    /// An INVALIDATE of its range has come since.
    invalidated: bool,
}

pub(super) struct Session {
    pub(super) core: session::Session<(), SimJobs>,
    pub(super) port: MissPort,
    pub(super) wake: Wake,
    stats: Arc<Stats>,
    /// The UPDATE that waits for its reply, for counts and seeded bugs.
    staged: Option<Staged>,
    /// What a seeded bug keeps from being zapped.
    survivors: Vec<MappedRange>,
    /// The engines' turns at the beginning of the current drain.
    turns_before: [u64; ENGINES],
    /// The message that is not answered yet, and when it arrived.
    message: Option<(Message, Duration)>,
    /// A seeded bug has answered it already.
    answered: bool,
    revoked: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("message", &self.message).finish_non_exhaustive()
    }
}

impl Session {
    /// A session whose device runs.
    pub(super) fn new(mirror: MirrorWriter, wake: Wake, bug: Option<Bug>) -> Self {
        let port = MissPort::new(Arc::new(wake.clone()));
        let stats = Arc::new(Stats::default());
        let features = ACCESS_PLATFORM | VHOST_USER_PROTOCOL_FEATURES;
        let offer = Offer { virtio: features, passed_on: 0, protocol: REPLY_ACK | BACKEND_REQ };
        // The seeded bug: jobs are never preempted.
        let drain_timeout = if bug == Some(Bug::ForgetLadder) { Duration::MAX } else { DRAIN_TIMEOUT };
        let config = Config { drain_timeout, miss_timeout: MISS_TIMEOUT, offer };
        let jobs = SimJobs::new(Schedule::new(), bug);
        let mut core = session::Session::new(config, mirror, jobs, port.clone(), Arc::clone(&stats));
        core.set_protocol_features(offer.protocol).expect("They are offered");
        core.set_features(features).expect("They are offered");
        core.message(Duration::ZERO, session::Message::Channel { reply: None });
        core.start_ring(Duration::ZERO, CONTROL_QUEUE);
        core.enable_ring(Duration::ZERO, CONTROL_QUEUE, true);
        while core.next_effect().is_some() {}
        Self {
            core,
            port,
            wake,
            stats,
            staged: None,
            survivors: Vec::new(),
            turns_before: [0; ENGINES],
            message: None,
            answered: false,
            revoked: false,
        }
    }

    pub(super) fn schedule(&self) -> &Schedule {
        &self.core.jobs().schedule
    }

    pub(super) fn schedule_mut(&mut self) -> &mut Schedule {
        &mut self.core.jobs_mut().schedule
    }

    fn is_awake(&self) -> bool {
        self.wake.awake.load(Ordering::Relaxed)
    }
}

impl World {
    pub(super) fn wake(&self) {
        self.session.wake.now();
    }

    pub(super) fn session_turn(&mut self) {
        let due = self.session.core.next_deadline().is_some_and(|deadline| deadline <= self.now);
        if !due && !self.session.is_awake() || self.over {
            return;
        }
        self.session.wake.awake.store(false, Ordering::Relaxed);
        self.read_answers();
        self.ack_early();
        self.session.core.poll(self.now, || false);
        self.carry_out_session();
        while self.session.core.may_read() && !self.over {
            self.read_answers();
            let Some(message) = self.front_end.main.pop_front() else { break };
            self.message(message);
        }
        for settled in self.session.core.expire(self.now, || false) {
            self.apply(settled);
        }
        self.send_misses();
    }

    fn message(&mut self, message: Message) {
        self.session.message = Some((message, self.now));
        self.session.answered = false;
        match message {
            Message::Update { range, frame, claimed } => {
                self.session.staged = Some(Staged { range, frame, claimed, invalidated: false });
            }
            Message::Invalidate { range, .. } => self.before_invalidation(range),
            Message::NewChannel => {
                self.session.staged = None;
                self.channel_replaced();
            }
            Message::ChangeMemory if self.is(Bug::SwapMemoryBeforeDrain) => self.memory.move_all(),
            _ => {}
        }
        if matches!(message, Message::Stop | Message::Reset | Message::ChangeMemory) {
            self.suspicions.forget();
        }
        let given = self.given(message);
        self.session.core.message(self.now, given);
        self.count_drain(message);
        self.ack_early();
        self.carry_out_session();
    }

    /// The message in the form that the session takes.
    fn given(&mut self, message: Message) -> session::Message<()> {
        let reply = Some(());
        match message {
            Message::Update { range, frame, claimed } => {
                let host = Some(self.memory.host(frame, range.len() as usize));
                let target = ByteRange::everything();
                session::Message::Update { update: Update { range, target, host, claimed }, reply }
            }
            Message::Invalidate { range, .. } => session::Message::Invalidate { range, reply },
            Message::NewChannel => session::Message::Channel { reply },
            Message::Stop => session::Message::Unread(Unread::StopRing(Some(CONTROL_QUEUE))),
            Message::Reset => session::Message::Unread(Unread::Reset),
            Message::ChangeMemory => session::Message::Unread(Unread::Remap),
            Message::Start => session::Message::Unread(Unread::Other),
        }
    }

    fn before_invalidation(&mut self, range: ByteRange<Iova>) {
        self.counts.invalidations += 1;
        self.counts.whole_domain += u64::from(range == ByteRange::everything());
        self.counts.odd_ranges += u64::from(range != range.page_aligned());
        if let Some(staged) = &mut self.session.staged
            && staged.range.page_aligned().overlaps(range.page_aligned())
        {
            staged.invalidated = true;
            self.counts.staged_discarded += 1;
        }
        if self.is(Bug::DropZap) {
            let survivors = &mut self.session.survivors;
            self.session
                .core
                .mirror()
                .mapped_ranges(DomainId::DEVICE, range, |mapped| survivors.push(mapped));
        }
        self.note_what_is_taken(range);
    }

    /// Counts what the start of a message's drain finds in flight.
    fn count_drain(&mut self, message: Message) {
        let in_flight = self.session.core.in_flight();
        if let Message::Invalidate { range, .. } = message {
            let found = in_flight.unwrap_or_default();
            self.counts.invalidations_with_pins += u64::from(found.pins > 0);
            self.counts.invalidations_with_sections += u64::from(found.sections > 0);
            self.counts.incoherent_pins = self.session.stats.incoherent_pins.get();
            self.event("invalidates", range.first().raw(), found.pins as u64);
        }
        if in_flight.is_some() {
            self.counts.memory_changes_with_work += u64::from(message == Message::ChangeMemory);
            self.counts.parked_acks += 1;
            self.event("parks the ack", 0, 0);
            self.session.turns_before = std::array::from_fn(|engine| self.engines[engine].turns);
        }
    }

    /// The seeded bugs: answers a message before its drain is over.
    fn ack_early(&mut self) {
        let (Some(left), Some((message, _))) = (self.session.core.in_flight(), self.session.message) else {
            return;
        };
        let is_invalidate = matches!(message, Message::Invalidate { .. });
        let early = match self.bug {
            Some(Bug::AckBeforeDrain) => is_invalidate,
            Some(Bug::ForgetPins) => is_invalidate && left.sections == 0,
            Some(Bug::ForgetSections) => is_invalidate && left.pins == 0,
            Some(Bug::CacheKeepsPins) => !is_invalidate && left.sections == 0 && self.only_caches_have_pins(),
            _ => false,
        };
        if early && !std::mem::replace(&mut self.session.answered, true) {
            match message {
                Message::Invalidate { .. } => self.replied(),
                message => self.hand_over(message),
            }
        }
    }

    /// Carries out the session's effects.
    fn carry_out_session(&mut self) {
        while let Some(effect) = self.session.core.next_effect() {
            match effect {
                Effect::Ack { .. } => self.ack(),
                Effect::Reply { .. } => self.replied(),
                Effect::HandOver => {
                    if let Some((message, since)) = self.session.message {
                        self.check_ack_time(since);
                        if !self.session.answered {
                            self.hand_over(message);
                        }
                    }
                    self.session.core.handed_over(self.now, None, true);
                }
                Effect::Stopped => self.stopped(),
                Effect::ServeRing { queue: CONTROL_QUEUE } => self.queue.mailbox.push_back(Mail::RingReady),
                Effect::ResetDevice { .. } => self.queue.mailbox.push_back(Mail::Reset),
                Effect::Mapped { request, range, host, .. } => self.mapped(request, range, host),
                Effect::MissAnswered { waiter, request, answer } => self.tell(waiter, request, answer),
                Effect::Fault(fault) => self.check_fault(&fault),
                Effect::Revoke => self.revoke(),
                Effect::End(_) => self.over = true,
                Effect::Abort => self.fail(violation(Invariant::I2, "The process is to end".into())),
                Effect::ServeRing { .. }
                | Effect::SetRing { .. }
                | Effect::ForgetKick { .. }
                | Effect::SetFeatures(_)
                | Effect::Started
                | Effect::Parked
                | Effect::EnginesToldToLeave
                | Effect::MirrorEmptied
                | Effect::Record { .. }
                | Effect::Violation(_)
                | Effect::Incident(_)
                | Effect::AuditProgress(_)
                | Effect::AuditEnded(_)
                | Effect::Closed => {}
            }
        }
    }

    /// Sends the ack of an INVALIDATE.
    fn ack(&mut self) {
        if let Some((_, since)) = self.session.message {
            self.check_ack_time(since);
            self.counts.ladders += u64::from(self.now.saturating_sub(since) >= DRAIN_TIMEOUT);
        }
        self.let_survive();
        if !self.session.answered && !self.session.revoked {
            self.replied();
        }
        self.session.core.replied(self.now);
    }

    /// The device has stopped.
    fn stopped(&mut self) {
        self.counts.stops += 1;
        self.counts.stops_with_running_jobs += u64::from(self.engines_busy() > 0);
        self.counts.stops_with_waiting_jobs += u64::from(self.session.schedule().waiting() > 0);
        self.session.staged = None;
    }

    /// The seeded bug: restores what was mapped before the invalidation.
    fn let_survive(&mut self) {
        for old in std::mem::take(&mut self.session.survivors) {
            let len = old.range.len() as u64;
            if self.memory.place(old.host).is_some_and(|place| place.current) {
                let host = self.memory.host_again(old.host, len);
                let _ = self.session.core.mirror_mut().map(old.space, old.range, host, old.permissions);
            }
        }
    }

    /// Handles a message like the `vhost` crate's handler in the back-end.
    fn hand_over(&mut self, message: Message) {
        let core = &mut self.session.core;
        match message {
            Message::Start => {
                core.start_ring(self.now, CONTROL_QUEUE);
                core.enable_ring(self.now, CONTROL_QUEUE, true);
            }
            Message::Stop => core.base_given(CONTROL_QUEUE, 0),
            Message::Reset => {
                let jobs = core.jobs().schedule.waiting() + self.engines_busy();
                self.counts.resets_with_jobs += u64::from(jobs > 0);
                self.session.core.reset_device(self.now);
                self.suspicions.clear();
                self.queue.ring.clear();
                self.oracle.reset_begins();
            }
            Message::ChangeMemory => {
                self.counts.memory_changes += 1;
                if !self.is(Bug::SwapMemoryBeforeDrain) {
                    self.memory.move_all();
                }
                self.session.core.memory_is_here(Vec::new());
            }
            Message::Update { .. } | Message::Invalidate { .. } | Message::NewChannel => {}
        }
        self.event("hands over", 0, 0);
        self.replied();
    }

    /// I2: the drain timeout plus one step.
    fn check_ack_time(&mut self, since: Duration) {
        let took = self.now.saturating_sub(since);
        let most = if self.is_wedged() { DRAIN_TIMEOUT + STEP_END + SLACK } else { DRAIN_TIMEOUT + SLACK };
        if took > most {
            self.fail(violation(Invariant::I2, format!("An ack took {took:?}")));
        }
    }

    /// An engine hangs: memory is revoked, and the session ends.
    fn revoke(&mut self) {
        if !self.is_wedged() {
            let what = "Engines that reach the ends of their steps are said to hang".into();
            self.fail(violation(Invariant::I2, what));
        }
        if let Some(since) = self.session.core.waits_since() {
            self.check_ack_time(since);
        }
        self.counts.revocations += 1;
        self.session.revoked = true;
        self.session.core.revoked(self.now, MemoryRevoked::all_regions_replaced());
    }

    /// What must hold between any two operations.
    pub(super) fn check_session(&mut self) {
        if self.over {
            return;
        }
        let (Some(left), Some(since)) = (self.session.core.in_flight(), self.session.core.waits_since())
        else {
            return;
        };
        if left.is_none() && !self.session.is_awake() {
            let what = "Nothing is in flight, an ack is parked, and nobody woke the session".into();
            self.fail(violation(Invariant::I2, what));
        }
        let have_left = |engine: usize| self.engines[engine].has_left(self.session.turns_before[engine]);
        if !left.is_none() && (0..ENGINES).all(have_left) {
            let what = "No job in fence mode is in flight, all steps are over, and an ack is parked".into();
            self.fail(violation(Invariant::I2, what));
        }
        self.check_ack_time(since);
    }

    fn read_answers(&mut self) {
        while let Some(granted) = self.front_end.replies.pop_front() {
            if granted {
                self.keep_staged_update();
            }
            let retries = self.session.stats.miss_retries.get();
            match self.session.core.channel_answered(self.now, granted) {
                Ok(Some(settled)) => self.apply(settled),
                Ok(None) if self.session.stats.miss_retries.get() == retries => {
                    self.counts.stale_answers += 1
                }
                Ok(None) => self.counts.miss_retries += 1,
                Err(session::Unasked) => {}
            }
            self.session.staged = None;
        }
    }

    /// The seeded bug: maps an UPDATE that was staged when an INVALIDATE of its range came.
    fn keep_staged_update(&mut self) {
        if let Some(Staged { range, frame, claimed, invalidated: true }) = self.session.staged
            && self.is(Bug::KeepStagedUpdate)
        {
            let host = self.memory.host(frame, range.len() as usize);
            let _ = self.session.core.mirror_mut().map(DomainId::DEVICE, range, host, claimed);
        }
    }

    fn apply(&mut self, settled: Settled) {
        let resolution = settled.resolution().clone();
        match resolution.outcome {
            Outcome::Refused | Outcome::NotCovered => self.counts.misses_refused += 1,
            Outcome::TimedOut => {
                self.counts.miss_timeouts += 1;
                self.oracle.excuse(self.stamp);
            }
            Outcome::Mapped { .. } | Outcome::NoChannel => {}
        }
        let wanted = self.verdicts_due(&resolution);
        self.session.core.apply(self.now, settled);
        self.check_verdicts(&wanted);
        let is_mapped = matches!(resolution.outcome, Outcome::Mapped { .. });
        self.count_maps(is_mapped);
        self.event("miss answered", resolution.request.iova.raw(), is_mapped.into());
        self.carry_out_session();
    }

    /// Counts a granted translation that could not be cached.
    fn count_maps(&mut self, is_mapped: bool) {
        let kept = self.session.core.effects().any(|effect| matches!(effect, Effect::Mapped { .. }));
        let refused =
            |effect: &Effect<()>| matches!(effect, Effect::MissAnswered { answer: MissAnswer::Refused, .. });
        if is_mapped && !kept {
            self.counts.maps_refused += 1;
            if self.session.core.effects().any(refused) {
                // The tables are too small for it.
                self.oracle.excuse(self.stamp);
            }
        }
    }

    /// The seeded bug: caches a translation with the permission that the UPDATE claims.
    fn mapped(&mut self, request: MissRequest, range: ByteRange<Iova>, host: HostRange) {
        if let Some(staged) = self.session.staged
            && self.is(Bug::CacheClaimedPermission)
        {
            let _ = self.session.core.mirror_mut().map(request.space, range, host, staged.claimed);
        }
    }

    fn tell(&mut self, waiter: Waiter, request: MissRequest, answer: MissAnswer) {
        match waiter {
            Waiter::Job(_) if self.is(Bug::LoseMissAnswer) => {}
            Waiter::Job(wait) => {
                let wrong = self.is(Bug::FailWhatWasGranted);
                let told = if wrong { MissAnswer::Refused } else { answer };
                self.session.schedule_mut().miss_answered(wait, request, told.for_job(request));
            }
            Waiter::RingInput(_) | Waiter::RingOutput(_) => self.queue.mailbox.push_back(Mail::MissAnswered),
            Waiter::Ahead(_) | Waiter::Audit(_) => {}
        }
    }

    fn send_misses(&mut self) {
        while let Some(request) = self.session.core.next_request() {
            self.session.core.ask(self.now, request);
        }
        while let Some(miss) = self.session.core.next_miss(self.now) {
            self.counts.misses += 1;
            self.event("miss", miss.iova.raw(), miss.access as u64);
            self.front_end.misses.push_back(miss);
        }
        self.carry_out_session();
    }
}
