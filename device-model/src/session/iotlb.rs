//! The IOTLB side of a session: UPDATEs in, MISSes out, answers to the waiting threads. An UPDATE is cached only once
//! the front-end has granted the MISS that it answers, with the permission that this MISS asked for (I7).

use std::time::Duration;

use super::effect::Effect;
use super::message::Update;
use super::miss_port::{MissAnswer, MissRequest as PortRequest, Waiter};
use super::refusal::Refusal;
use super::{Jobs, Session};
use crate::addr::{ByteRange, DomainId, Iova};
use crate::mmu::miss::{Answer, MissRequest, Outcome, Resolution, UpdateVerdict};
use crate::mmu::{HostRange, Invalidation, Permissions};
use crate::telemetry::record::{Event, MissEnd, UpdateUse};

/// A MISS that has been answered, but not yet applied to the mirror. Give it to [`Session::apply`].
#[derive(Debug)]
#[must_use = "the waiters have to be told"]
pub struct Settled(Resolution<Waiter>);

impl Settled {
    /// What was requested, by whom, and the outcome.
    pub fn resolution(&self) -> &Resolution<Waiter> {
        &self.0
    }
}

impl<T, J: Jobs> Session<T, J> {
    /// Holds an UPDATE until the MISS that it answers is granted. One that answers no MISS (QEMU sends the pages of the
    /// used rings at the start) is checked, acked and not cached.
    pub(super) fn update(&mut self, now: Duration, update: Update) -> Result<(), Refusal> {
        let Update { range, target, host, claimed } = update;
        if !self.has_iommu() {
            return Err(Refusal::NoIommu);
        }
        let host = host.ok_or(Refusal::NotInOneRegion { range, target })?;
        self.stats.updates.add(1);
        let used = match self.misses.on_update(range, host, claimed) {
            UpdateVerdict::Staged => UpdateUse::Staged,
            UpdateVerdict::Stale => UpdateUse::Stale,
            UpdateVerdict::Unsolicited => {
                self.stats.updates_unsolicited.add(1);
                UpdateUse::Unsolicited
            }
        };
        self.record(now, Event::Update { range, used });
        Ok(())
    }

    /// Begins to invalidate what the guest has unmapped.
    pub(super) fn begin_invalidation(&mut self, now: Duration, range: ByteRange<Iova>) -> Invalidation {
        self.stats.invalidations.add(1);
        self.audit_invalidated(range);
        self.misses.invalidate(DomainId::DEVICE, range);
        // Before the zap: what is mapped now is what the invalidation removes.
        self.suspect(now, range);
        let invalidation = self.mirror.begin(DomainId::DEVICE, range);
        if self.jobs.touches(DomainId::DEVICE, invalidation.range()) {
            self.stats.invalidations_with_work_in_flight.add(1);
        }
        self.stats.incoherent_pins.add(invalidation.incoherent() as u64);
        invalidation
    }

    /// The oldest MISS was answered on the back-end channel. `Ok(None)`: nothing more has to be done about it. `Err`:
    /// no MISS was sent, so the front-end is at fault, and the channel cannot be used any more.
    pub fn channel_answered(&mut self, now: Duration, granted: bool) -> Result<Option<Settled>, Unasked> {
        match self.misses.on_reply(now, granted) {
            Answer::Resolved(resolution) => return Ok(Some(Settled(resolution))),
            Answer::AskedAgain => self.stats.miss_retries.add(1),
            Answer::Stale => {}
            Answer::Unexpected => return Err(Unasked),
        }
        Ok(None)
    }

    /// The back-end channel is gone: no translation can be requested any more.
    pub fn channel_lost(&mut self) -> Vec<Settled> {
        self.has_channel = false;
        self.misses.channel_lost().into_iter().map(Settled).collect()
    }

    /// The next request that another thread has put into the port. Without an IOMMU there is none during a drain: the
    /// mirror accepts no mapping before its end.
    pub fn next_request(&mut self) -> Option<PortRequest> {
        if !self.has_iommu() && !self.may_read() {
            return None;
        }
        self.port.take()
    }

    /// A thread needs translations: requests every page, or answers at once if there is nothing to request.
    pub fn ask(&mut self, now: Duration, request: PortRequest) {
        let PortRequest { missing, waiter } = request;
        // The front-end refuses MISSes while the device is stopped, and no job uses what it requested before a stop:
        // the waiter asks again after the next start.
        if !self.running || waiter.wait().is_some_and(|wait| !self.jobs.is_current(wait)) {
            return;
        }
        if self.has_iommu() && self.has_channel {
            return self.misses.ask(now, missing, waiter);
        }
        for iova in missing.pages() {
            let page = MissRequest { space: missing.space, access: missing.access, iova };
            let answer = if self.has_iommu() { MissAnswer::NoChannel } else { self.physical_answer(page) };
            self.tell(now, waiter, page, answer);
        }
    }

    /// Answers a request as if the front-end had refused each of its pages.
    pub fn refuse(&mut self, now: Duration, request: PortRequest) {
        for iova in request.missing.pages() {
            let page = MissRequest { space: request.missing.space, access: request.missing.access, iova };
            self.tell(now, request.waiter, page, MissAnswer::Refused);
        }
    }

    /// Without an IOMMU, the memory table is the answer.
    fn physical_answer(&mut self, page: MissRequest) -> MissAnswer {
        let wanted = page.range();
        let holds = |range: ByteRange<Iova>| range.contains(wanted.first()) && range.contains(wanted.last());
        let region = self.regions.iter().find(|region| holds(region.range)).copied();
        match region.map(|region| self.map_region(region)) {
            Some(Ok(())) => MissAnswer::Mapped,
            Some(Err(e)) if e.is_momentary() => MissAnswer::Mapped,
            Some(Err(_)) | None => MissAnswer::Refused,
        }
    }

    /// The next MISS to send; it counts as sent.
    pub fn next_miss(&mut self, now: Duration) -> Option<MissRequest> {
        let miss = self.misses.next_to_send(now)?;
        self.stats.misses.add(1);
        self.record(now, Event::Miss { range: miss.range(), access: miss.access });
        Some(miss)
    }

    /// Times out the misses that were not answered in time. `has_unread` says whether the front-end has unread
    /// messages: then it is stalled, and gets more time. It is called only when a miss is overdue.
    pub fn expire(&mut self, now: Duration, has_unread: impl FnOnce() -> bool) -> Vec<Settled> {
        if self.misses.is_due(now) {
            let waits = if has_unread() { self.misses.put_off(now) } else { self.misses.reads_again(now) };
            if waits {
                return Vec::new();
            }
        }
        self.misses.expire(now).into_iter().map(Settled).collect()
    }

    /// Maps what a MISS has proved, and notifies the waiters.
    pub fn apply(&mut self, now: Duration, Settled(resolution): Settled) {
        let request = resolution.request;
        self.judge(now, &resolution);
        for (_, waiter) in &resolution.waiters {
            if let Waiter::Audit(number) = waiter {
                self.audit_answered(now, *number, &resolution.outcome);
            }
        }
        let answer = match resolution.outcome {
            Outcome::Mapped { range, host, permissions } => self.keep(request, (range, host, permissions)),
            Outcome::Refused | Outcome::NotCovered => {
                self.stats.miss_refused.add(1);
                MissAnswer::Refused
            }
            Outcome::TimedOut => {
                self.stats.miss_timeouts.add(1);
                MissAnswer::TimedOut
            }
            Outcome::NoChannel => MissAnswer::NoChannel,
        };
        log::debug!("MISS {} for {}: {answer:?}", request.iova, request.access);
        let (range, access) = (request.range(), request.access);
        self.record(now, Event::MissSettled { range, access, end: end_of(answer) });
        self.stats.mapped_bytes.set(self.mirror.table_bytes() as u64);
        for (page, waiter) in resolution.waiters {
            self.tell(now, waiter, page, answer);
        }
    }

    /// Puts a translation into the mirror.
    fn keep(
        &mut self,
        request: MissRequest,
        (range, host, permissions): (ByteRange<Iova>, HostRange, Permissions),
    ) -> MissAnswer {
        match self.mirror.map(request.space, range, host, permissions) {
            Ok(_) => {
                self.effect(Effect::Mapped { request, range, host, permissions });
                MissAnswer::Mapped
            }
            Err(e) if e.is_momentary() => {
                log::debug!("A translation of {range} cannot be kept now: {e}");
                // The waiter looks it up, finds nothing and asks again.
                MissAnswer::Mapped
            }
            Err(e) => {
                log::warn!("A translation of {range} cannot be kept: {e}");
                MissAnswer::Refused
            }
        }
    }

    /// Tells a waiter how one page was answered.
    fn tell(&mut self, now: Duration, waiter: Waiter, request: MissRequest, answer: MissAnswer) {
        if let (Waiter::Job(wait), MissAnswer::Refused) = (waiter, answer) {
            self.job_fault(now, wait, request);
        }
        match waiter {
            Waiter::Job(_) | Waiter::RingInput(_) | Waiter::RingOutput(_) => {
                self.effect(Effect::MissAnswered { waiter, request, answer });
            }
            // A job does not wait for a prefetched page; the audit was told before the page was mapped.
            Waiter::Ahead(_) | Waiter::Audit(_) => {}
        }
    }
}

/// An answer came on the back-end channel although no MISS was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unasked;

fn end_of(answer: MissAnswer) -> MissEnd {
    match answer {
        MissAnswer::Mapped => MissEnd::Mapped,
        MissAnswer::Refused => MissEnd::Refused,
        MissAnswer::TimedOut => MissEnd::TimedOut,
        MissAnswer::NoChannel => MissEnd::NoChannel,
    }
}
