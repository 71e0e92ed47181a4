//! What a session owes, and how it is paid: drains begin, are looked at whenever the session wakes up, climb their ladder,
//! and end in an ack or in the message that waited for them. Never blocks. What is owed is a value of [`super::drain`].

use std::time::Duration;

use device_model::mmu::{Drained, Invalidation, MemoryRevoked, SeededBug};
use device_model::telemetry::record::Event;
use log::{debug, error};

use super::drain::{Draining, For, Owed, Progress};
use super::{Session, SessionEnd};
use crate::faults::Bug;
use crate::vhost_user::Header;

/// What a trace is written for, and called after, when the ladder was needed.
const LATE: &str = "A job held the front-end up until the drain timeout";

impl Session {
    /// Looks whether what is owed can be paid.
    pub(super) fn look_at_owed(&mut self) -> Result<(), SessionEnd> {
        match std::mem::take(&mut self.owed) {
            Owed::Nothing => Ok(()),
            Owed::Unsent(ack) => self.send(ack),
            Owed::Late(header, drained, since, due) if due <= self.now() => {
                self.acknowledge(header, drained, since)
            }
            late @ Owed::Late(..) => {
                self.owed = late;
                Ok(())
            }
            Owed::Drain(draining) if self.skips(draining.then, &draining.invalidation) => {
                let (then, since) = (draining.then, draining.since());
                self.drained(draining.invalidation.skip_drain(SeededBug::ack_before_drain()), then, since)
            }
            Owed::Drain(draining) => self.look_at_drain(draining),
        }
    }

    fn look_at_drain(&mut self, draining: Draining) -> Result<(), SessionEnd> {
        // With a timeout of 0 jobs are always told to leave at once: that is no incident.
        let is_late = draining.has_evicted() && !self.config.drain_timeout.is_zero();
        match self.watched(draining) {
            Progress::Draining(draining) => {
                self.owed = Owed::Drain(draining);
                Ok(())
            }
            Progress::Drained(drained, then, since) => {
                self.drained(drained, then, since)?;
                if is_late {
                    // After the ack, so that its trace has all of it.
                    self.lock().sink.instruments().incident(LATE);
                }
                Ok(())
            }
            Progress::Stuck(draining) => self.stuck(draining),
        }
    }

    /// Looks how far a drain is, and records it when its jobs are told to leave.
    fn watched(&self, draining: Draining) -> Progress {
        let (before, number) = (draining.has_evicted(), self.number(draining.then));
        let now = self.now();
        match draining.poll(now) {
            Progress::Draining(draining) if draining.has_evicted() && !before => {
                let mut state = self.lock();
                state.sink.record(Event::Ladder { number });
                state.turns.told(now);
                Progress::Draining(draining)
            }
            // The host is busy, and the engine has had no chance to leave.
            Progress::Stuck(draining) if self.lock().turns.starve(now) => {
                Progress::Draining(draining.bear(now))
            }
            progress => progress,
        }
    }

    /// The number of the invalidation that is drained: one drain is under way at a time.
    fn number(&self, of: For) -> u64 {
        match of {
            For::Invalidate(_) => self.lock().taken.number(),
            For::Message(_) => 0,
        }
    }

    fn drained(&mut self, drained: Drained, then: For, since: Duration) -> Result<(), SessionEnd> {
        match then {
            For::Invalidate(header) => self.acknowledge_late(header, drained, since),
            For::Message(header) => {
                let result = self.hand_over(header);
                let mut state = self.lock();
                let took = state.scheduler.now().saturating_sub(since).into();
                state.sink.record(Event::Acked { number: 0, took });
                // The reply has gone out with the message itself.
                drop(state.end(drained));
                if state.running {
                    // What was dropped with the old memory table is there again at once without an IOMMU.
                    state.map_physical();
                }
                let now = self.now();
                state.misses.resume(now);
                result
            }
        }
    }

    /// The seeded bugs "ack before drain", "skip section" and "skip pin".
    fn skips(&self, then: For, invalidation: &Invalidation) -> bool {
        matches!(then, For::Invalidate(_)) && self.lock().seeded.skips(invalidation)
    }

    /// The ack of an INVALIDATE that may be held back on purpose.
    fn acknowledge_late(
        &mut self,
        header: Header,
        drained: Drained,
        since: Duration,
    ) -> Result<(), SessionEnd> {
        let Some(delay) = self.config.injection.delay(Bug::DelayAck) else {
            return self.acknowledge(header, drained, since);
        };
        let now = self.now();
        self.lock().misses.pause(now);
        self.owed = Owed::Late(header, drained, since, now.saturating_add(delay));
        Ok(())
    }

    /// The ack of an INVALIDATE: only a drained invalidation can be acked.
    fn acknowledge(&mut self, header: Header, drained: Drained, since: Duration) -> Result<(), SessionEnd> {
        let now = self.now();
        let took = now.saturating_sub(since);
        let ended = {
            let mut state = self.lock();
            let ended = state.end(drained);
            state.acked(now);
            state.misses.resume(now);
            let number = state.taken.number();
            state.sink.record_at(now, Event::Acked { number, took: took.into() });
            state.stats.ack_latency_ns.record(took);
            state.stats.frozen_ns.add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
            ended
        };
        debug!("Ack {} after {took:?}", ended.range());
        self.acknowledge_plain(header)
    }

    /// Drains; what follows the drain follows at once if nothing is in flight.
    pub(super) fn begin_drain(
        &mut self,
        invalidation: Invalidation,
        then: For,
        patience: Duration,
    ) -> Result<(), SessionEnd> {
        let now = self.now();
        if self.skips(then, &invalidation) {
            let drained = invalidation.skip_drain(SeededBug::ack_before_drain());
            return self.drained(drained, then, now);
        }
        match Draining::new(invalidation, then, now, patience).poll(now) {
            Progress::Drained(drained, then, since) => self.drained(drained, then, since),
            Progress::Draining(draining) => {
                let number = self.number(draining.then);
                let mut state = self.lock();
                state.stats.acks_parked.add(1);
                state.record_parked(number, &draining.invalidation);
                // The front-end serves no miss while it waits for us.
                state.misses.pause(now);
                state.turns.told(now);
                drop(state);
                self.owed = Owed::Drain(draining);
                Ok(())
            }
            Progress::Stuck(draining) => self.stuck(draining),
        }
    }

    /// Leaves the message unread until everything is drained.
    pub(super) fn drain_first(&mut self, header: Header, patience: Duration) -> Result<(), SessionEnd> {
        let invalidation = self.lock().begin_everything();
        self.begin_drain(invalidation, For::Message(header), patience)
    }

    /// An engine does not come back. Its access can no longer reach the guest, so the ack may go out; then the
    /// session is over.
    fn stuck(&mut self, draining: Draining) -> Result<(), SessionEnd> {
        let state = self.lock();
        state.stats.revocations.add(1);
        state.sink.record(Event::Revoked { number: state.taken.number() });
        state.sink.instruments().incident("Memory was revoked");
        error!(
            "An engine does not reach the end of its step: revoking all guest memory. This is a bug of MirrorGPU"
        );
        if state.memory.revoke().is_err() {
            error!("Guest memory cannot be revoked: ending the process, so that nothing touches it any more");
            std::process::abort();
        }
        drop(state);
        let (then, since) = (draining.then, draining.since());
        let drained = draining.invalidation.revoke(MemoryRevoked::all_regions_replaced());
        if let For::Invalidate(header) = then {
            self.acknowledge(header, drained, since)?;
        }
        Err(SessionEnd::Revoked)
    }
}
