//! The order of replies. A message whose reply waits for a drain keeps every later message unread until the reply is
//! sent. The session never blocks on it: it polls the drain when something wakes it, and at its deadlines.

use std::time::Duration;

use super::drain::{Draining, Progress, Summary};
use super::effect::{Effect, End};
use super::message::{Message, Unread};
use super::refusal::Refusal;
use super::{Jobs, Session, everything};
use crate::addr::{ByteRange, Iova};
use crate::mmu::{Drained, Invalidation, MemoryRevoked};
use crate::telemetry::record::Event;

/// The reason given for a trace when jobs had to be preempted.
const LATE: &str = "A job held the front-end up until the drain timeout";
/// How long the end of a session waits for what is in flight after memory was revoked.
const LAST_DRAIN: Duration = Duration::from_secs(1);

/// What follows a drain.
#[derive(Debug)]
pub(super) enum After<T> {
    /// Send the ack of an INVALIDATE; the message has been read.
    Ack(Option<T>),
    /// Handle a message that is still unread.
    HandOver,
    /// End the session.
    Close {
        /// Memory was revoked already, and an engine still did not leave.
        revoked: bool,
    },
}

/// What keeps later messages unread.
#[derive(Debug)]
pub(super) enum Pending<T> {
    /// Nothing: the next message may be read, and no reply is pending.
    Nothing,
    /// A drain; an ack or a message to be handled follows. Until then no reply is sent and no message read.
    Drain(Draining<After<T>>),
    /// Guest memory is being revoked because an engine does not leave. Nothing is acked until that is done.
    Revoking(Draining<After<T>>),
    /// The ack of a drained INVALIDATE is being sent. Only registration caches may still use its range.
    Ack(Summary),
    /// A message is being handled. If it needed a drain: the proof that the drain is over.
    HandOver(Option<(Drained, Summary)>),
    /// The session has ended, and nothing uses guest memory any more.
    Closed,
}

impl<T, J: Jobs> Session<T, J> {
    /// Takes a message of the main socket that was read at `now`. Only while [`Self::may_read`].
    pub fn message(&mut self, now: Duration, message: Message<T>) {
        debug_assert!(self.may_read(), "A message was read before the reply to the one before it");
        match message {
            Message::Invalidate { range, reply } => self.invalidate(now, range, reply),
            Message::Update { update, reply } => {
                let result = self.update(now, update);
                self.answer(reply, result);
            }
            Message::BadIotlb { error, reply } => self.answer(reply, Err(Refusal::Other(error))),
            Message::Channel { reply } => {
                self.misses.channel_replaced();
                self.has_channel = true;
                self.answer(reply, Ok(()));
            }
            Message::Display { reply } => self.answer(reply, Ok(())),
            Message::Unread(Unread::Other) => self.hand_over(None),
            Message::Unread(Unread::Remap) => self.drain_first(now, self.config.drain_timeout),
            Message::Unread(Unread::StopRing(queue)) => {
                queue.into_iter().for_each(|queue| self.stop_ring(now, queue));
                self.drain_first(now, Duration::ZERO);
            }
            Message::Unread(Unread::Reset) => {
                self.stop_all(now);
                self.drain_first(now, Duration::ZERO);
            }
        }
    }

    /// Answers a request without a drain. One that is refused and asked for no reply ends the session.
    fn answer(&mut self, reply: Option<T>, result: Result<(), Refusal>) {
        if let Err(refusal) = &result {
            self.stats.updates_rejected.add(1);
            log::warn!("Refused: {refusal}");
        }
        match (reply, result) {
            (Some(to), result) => self.effect(Effect::Reply { to, ok: result.is_ok() }),
            (None, Ok(())) => {}
            (None, Err(refusal)) => self.effect(Effect::End(End::Refused(refusal))),
        }
    }

    /// The unread message was handled, after [`Effect::HandOver`]. `refusal`: its handler refused it. `has_replied`: its
    /// handler has sent a NACK that says so.
    pub fn handed_over(&mut self, now: Duration, refusal: Option<Refusal>, has_replied: bool) {
        let Pending::HandOver(drained) = std::mem::replace(&mut self.pending, Pending::Nothing) else {
            return;
        };
        if let Some((drained, Summary { since, .. })) = drained {
            self.record(now, Event::Acked { number: 0, took: now.saturating_sub(since).into() });
            // The message's handler has sent the reply.
            drop(self.end_invalidation(drained));
            if self.running {
                // Without an IOMMU, what was dropped with the old memory table is mapped again at once.
                self.map_physical();
            }
            self.misses.resume(now);
        }
        match refusal {
            None => {}
            Some(refusal) if has_replied => log::warn!("A request of the front-end is refused: {refusal}"),
            Some(refusal) => self.effect(Effect::End(End::Refused(refusal))),
        }
    }

    /// The ack of [`Effect::Ack`] has been sent.
    pub fn replied(&mut self, now: Duration) {
        let Pending::Ack(summary) = &self.pending else { return };
        let Summary { since, was_late } = *summary;
        self.pending = Pending::Nothing;
        let took = now.saturating_sub(since);
        self.invalidations.acked(now);
        self.misses.resume(now);
        let number = self.invalidations.number();
        self.record(now, Event::Acked { number, took: took.into() });
        self.stats.ack_latency_ns.record(took);
        self.stats.frozen_ns.add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        if was_late {
            // After the ack, so that the trace has all of it.
            self.effect(Effect::Incident(LATE));
        }
    }

    /// Polls the current drain. `engines_starve` says whether the engines were not scheduled since they were told to
    /// leave; it is called only when one of them seems to be stuck.
    pub fn poll(&mut self, now: Duration, engines_starve: impl FnOnce() -> bool) {
        match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Drain(draining) => {
                let had_evicted = draining.has_evicted();
                match draining.poll(now) {
                    Progress::Stuck(draining) if engines_starve() => {
                        self.pending = Pending::Drain(draining.restart_grace_period(now));
                    }
                    Progress::Draining(draining) => {
                        if draining.has_evicted() && !had_evicted {
                            self.record(now, Event::Ladder { number: self.number_of(&draining.then) });
                            self.effect(Effect::EnginesToldToLeave);
                        }
                        self.pending = Pending::Drain(draining);
                    }
                    progress => self.progress(now, progress),
                }
            }
            other => self.pending = other,
        }
    }

    /// Whether a message is being handled that needed no drain.
    pub(super) fn is_handing_over_undrained(&self) -> bool {
        matches!(self.pending, Pending::HandOver(None))
    }

    /// For a test that has acked the INVALIDATE whose drain is under way: jobs are left alone until they end.
    pub fn forget_ladder(&mut self) {
        self.pending = match std::mem::replace(&mut self.pending, Pending::Nothing) {
            Pending::Drain(draining) => Pending::Drain(draining.without_ladder()),
            other => other,
        };
    }

    pub(super) fn draining(&self) -> Option<&Draining<After<T>>> {
        match &self.pending {
            Pending::Drain(draining) | Pending::Revoking(draining) => Some(draining),
            Pending::Nothing | Pending::Ack(_) | Pending::HandOver(_) | Pending::Closed => None,
        }
    }

    /// The number of the INVALIDATE that is drained; 0: the drain is for another message.
    fn number_of(&self, then: &After<T>) -> u64 {
        match then {
            After::Ack(_) => self.invalidations.number(),
            After::HandOver | After::Close { .. } => 0,
        }
    }

    fn progress(&mut self, now: Duration, progress: Progress<After<T>>) {
        match progress {
            Progress::Drained(drained, then, summary) => self.drained(drained, then, summary, now),
            Progress::Draining(draining) => self.park(now, draining),
            Progress::Stuck(draining) => self.stuck(now, draining),
        }
    }

    fn drained(&mut self, drained: Drained, then: After<T>, summary: Summary, now: Duration) {
        match then {
            After::Ack(to) => {
                let ended = self.end_invalidation(drained);
                log::debug!("Ack {} after {:?}", ended.range(), now.saturating_sub(summary.since));
                self.pending = Pending::Ack(summary);
                self.effect(Effect::Ack { to, ended });
            }
            After::HandOver => {
                // If the handler does not set the regions, the device must have none rather than stale ones.
                self.regions.clear();
                self.hand_over(Some((drained, summary)));
            }
            After::Close { .. } => {
                // No reply waits for this drain.
                drop(self.end_invalidation(drained));
                self.pending = Pending::Closed;
                self.effect(Effect::Closed);
            }
        }
    }

    fn hand_over(&mut self, drained: Option<(Drained, Summary)>) {
        self.pending = Pending::HandOver(drained);
        self.effect(Effect::HandOver);
    }

    /// The drain is not over: its reply waits.
    fn park(&mut self, now: Duration, draining: Draining<After<T>>) {
        self.effect(Effect::Parked);
        let number = self.number_of(&draining.then);
        self.record_parked(now, number, &draining.invalidation);
        self.effect(Effect::EnginesToldToLeave);
        self.pending = Pending::Drain(draining);
    }

    /// An INVALIDATE: begins it, and acks it at once if nothing uses its range.
    fn invalidate(&mut self, now: Duration, range: ByteRange<Iova>, reply: Option<T>) {
        log::debug!("INVALIDATE {range}");
        // The front-end serves no MISS until it is acked.
        self.misses.pause(now);
        let invalidation = self.begin_invalidation(now, range);
        let draining = Draining::new(invalidation, After::Ack(reply), now, self.config.drain_timeout);
        self.progress(now, draining.poll(now));
    }

    /// Leaves the message unread until everything is drained.
    fn drain_first(&mut self, now: Duration, patience: Duration) {
        self.misses.pause(now);
        let invalidation = self.begin_everything(now);
        let draining = Draining::new(invalidation, After::HandOver, now, patience);
        self.progress(now, draining.poll(now));
    }

    /// As for a message, but no reply follows.
    pub(super) fn drain_to_close(&mut self, now: Duration) {
        let revoked = self.is_revoked;
        let invalidation = self.begin_everything(now);
        let draining = Draining::new(invalidation, After::Close { revoked }, now, Duration::ZERO);
        // An engine that was stuck before gets a last chance.
        let draining = if revoked { draining.give_grace(now, LAST_DRAIN) } else { draining };
        self.progress(now, draining.poll(now));
    }

    /// Begins to invalidate everything, for a reason of the device's own. No mode keeps memory that goes away.
    fn begin_everything(&mut self, now: Duration) -> Invalidation {
        let (space, range) = everything();
        self.jobs.forget_suspects();
        self.record(now, Event::Invalidation { number: 0, range });
        self.misses.invalidate(space, range);
        self.audit_invalidated(range);
        self.effect(Effect::MirrorEmptied);
        self.mirror.begin_for_good(space, range)
    }

    /// An engine does not leave. Its access must not reach the guest any more when the ack is sent; then the session
    /// ends.
    fn stuck(&mut self, now: Duration, draining: Draining<After<T>>) {
        if matches!(draining.then, After::Close { revoked: true }) {
            return self.effect(Effect::Abort);
        }
        self.stats.revocations.add(1);
        self.record(now, Event::Revoked { number: self.number_of(&draining.then) });
        self.effect(Effect::Incident("Memory was revoked"));
        self.effect(Effect::Revoke);
        self.pending = Pending::Revoking(draining);
    }

    /// All guest memory was replaced, after [`Effect::Revoke`]: the device can no longer reach the guest's memory.
    pub fn revoked(&mut self, now: Duration, proof: MemoryRevoked) {
        let Pending::Revoking(mut draining) = std::mem::replace(&mut self.pending, Pending::Nothing) else {
            return;
        };
        self.is_revoked = true;
        if let After::Close { revoked } = &mut draining.then {
            // The replaced memory is unmapped next: the engine has to leave, or the process ends.
            *revoked = true;
            self.pending = Pending::Drain(draining.give_grace(now, LAST_DRAIN));
            return;
        }
        let summary = draining.summary();
        let drained = draining.invalidation.revoke(proof);
        match draining.then {
            then @ After::Ack(_) => self.drained(drained, then, summary, now),
            After::HandOver | After::Close { .. } => drop(self.end_invalidation(drained)),
        }
        self.effect(Effect::End(End::Revoked));
    }

    /// Ends an invalidation: what it kept from being pinned or mapped may go on.
    fn end_invalidation(&mut self, drained: Drained) -> crate::mmu::Ended {
        let ended = self.mirror.end(drained);
        self.jobs.invalidation_ended();
        ended
    }
}
