//! The IOTLB's side of a session: UPDATEs in, MISSes out, answers to whoever waits. What an UPDATE says is checked
//! against the memory table and cached only when its own MISS was granted, with the permission that this MISS
//! asked for (I7). Invalidations are begun here and drained by [`super::Session`].

use std::os::unix::net::UnixStream;
use std::time::Duration;

use device_model::addr::{ByteRange, Gpa, Iova, SpaceId};
use device_model::jobs::job::JobError;
use device_model::jobs::schedule::AtRest;
use device_model::mmu::miss::{Answer, MissRequest, Outcome, Requested, Resolution, UpdateVerdict};
use device_model::mmu::{HostRange, Invalidation, MapError, Missing, Permissions};
use device_model::telemetry::record::{Event, MissEnd, UpdateUse};
use device_model::telemetry::violation::Fault;
use log::{debug, warn};

use super::state::{SessionState, map_region};
use crate::faults::Bug;
use crate::queues::mailbox::{Mail, Side};
use crate::vhost_user::channel::{Channel, ChannelError};
use crate::vhost_user::iotlb::Update;
use crate::vhost_user::memory::Region;
use crate::vhost_user::peek;
use device_model::session::miss_port::{JobWait, MissAnswer, Waiter};

/// Why an UPDATE is answered with a non-zero reply, and changes nothing.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// UPDATEs only make sense behind an IOMMU.
    #[error("IOTLB UPDATE came without VIRTIO_F_ACCESS_PLATFORM")]
    NoIommu,
    /// It points outside the memory table, or across two regions.
    #[error("IOTLB UPDATE of {range} points at {target}, which is not in one region of the memory table")]
    NotInOneRegion {
        /// What it maps.
        range: ByteRange<Iova>,
        /// Where it points.
        target: ByteRange<device_model::addr::FrontendVa>,
    },
}

impl SessionState {
    /// Takes an UPDATE. It is held until the MISS that it answers is granted; one that nobody asked for (QEMU
    /// sends the used rings' pages at the start) is checked, acked and not cached.
    pub fn update(&mut self, update: Update) -> Result<(), UpdateError> {
        if !self.has_iommu() {
            return Err(UpdateError::NoIommu);
        }
        let Some(target) = self.memory.translate(update.target) else {
            return Err(UpdateError::NotInOneRegion { range: update.range, target: update.target });
        };
        self.stats.updates.add(1);
        // SAFETY: INVARIANT: a region of the memory table lies at this place until it is dropped, which happens
        // only after everything in the mirror was invalidated and drained.
        let host = unsafe { HostRange::new(target.host, target.len) };
        let claimed = Permissions { read: update.read, write: update.write };
        self.seeded.claims(claimed);
        let used = match self.misses.on_update(update.range, host, claimed) {
            UpdateVerdict::Staged => UpdateUse::Staged,
            UpdateVerdict::Stale => UpdateUse::Stale,
            UpdateVerdict::Unsolicited => {
                self.stats.updates_unsolicited.add(1);
                UpdateUse::Unsolicited
            }
        };
        self.sink.record(Event::Update { range: update.range, used });
        Ok(())
    }

    /// Begins to invalidate what the guest has taken away.
    pub fn invalidate(&mut self, range: ByteRange<Iova>) -> Invalidation {
        self.stats.invalidations.add(1);
        if let Some(audit) = self.questions.audit() {
            audit.invalidated(range);
        }
        if !self.seeded.injection.fires(Bug::KeepStagedUpdate) {
            self.misses.invalidate(SpaceId::DEVICE, range);
        }
        self.seeded.note(&self.mirror, range);
        // Before the zap: what is mapped now is what is taken away.
        self.suspect(range);
        let everything = self.seeded.injection.fires(Bug::DrainEverything);
        let range = if everything { ByteRange::everything() } else { range };
        let invalidation = self.mirror.begin(SpaceId::DEVICE, range);
        if self.scheduler.touches(SpaceId::DEVICE, invalidation.range()) {
            self.stats.invalidations_with_work_in_flight.add(1);
        }
        self.stats.incoherent_pins.add(invalidation.incoherent() as u64);
        invalidation
    }

    /// Reads the answers that have come on the back-end channel. `false`: the channel is gone.
    pub fn read_answers(&mut self, now: Duration) -> bool {
        loop {
            let Some(channel) = &mut self.channel else { return false };
            match channel.next_answer() {
                Ok(Some(granted)) => {
                    if !self.take_answer(now, granted) {
                        self.lose_channel(&ChannelError::Unasked);
                        return false;
                    }
                }
                Ok(None) => return true,
                Err(e) => {
                    self.lose_channel(&e);
                    return false;
                }
            }
        }
    }

    /// Takes an answer to the oldest miss. `false`: nothing was asked.
    fn take_answer(&mut self, now: Duration, granted: bool) -> bool {
        if let Some(referee) = &mut self.referee {
            referee.miss_answered(now, granted);
        }
        match self.misses.on_reply(now, granted) {
            Answer::Resolved(resolution) => self.resolve(resolution),
            Answer::AskedAgain => self.stats.miss_retries.add(1),
            Answer::Stale => {}
            Answer::Unexpected => return false,
        }
        true
    }

    /// Sends what misses the channel takes.
    pub fn send_misses(&mut self, now: Duration) {
        self.take_requests(now);
        let Some(channel) = &mut self.channel else { return };
        if let Err(e) = channel.flush() {
            return self.lose_channel(&e);
        }
        while channel.is_ready() {
            let Some(miss) = self.misses.next_to_send() else { return };
            self.stats.misses.add(1);
            if let Some(referee) = &mut self.referee {
                referee.miss_sent(now, miss);
            }
            if let Some(range) = page_range(miss) {
                self.sink.record(Event::Miss { range, access: miss.access });
            }
            if let Err(e) = channel.send_miss(miss.iova, miss.access) {
                return self.lose_channel(&e);
            }
        }
    }

    /// Takes what the other threads are missing, as far as the table has room.
    fn take_requests(&mut self, now: Duration) {
        loop {
            while let Some((page, waiter)) = self.backlog.pop_front() {
                if self.request(now, page, waiter) == Requested::Full {
                    self.backlog.push_front((page, waiter));
                    return;
                }
            }
            while let Some(request) = self.miss_port.take() {
                self.seeded.hold_back(now, request);
            }
            let Some(request) = self.seeded.due(now) else { return };
            // The front-end refuses misses while the device is stopped, and nobody uses what a job asked for before that:
            // whoever waits asks again later.
            let is_stale = request.waiter.wait().is_some_and(|wait| !self.scheduler.is_current(wait));
            if self.running && !is_stale {
                self.backlog.extend(request.missing.pages().map(|page| {
                    let one = MissRequest {
                        space: request.missing.space,
                        access: request.missing.access,
                        iova: page,
                    };
                    (one, request.waiter)
                }));
            }
        }
    }

    fn request(&mut self, now: Duration, page: MissRequest, waiter: Waiter) -> Requested {
        let of_job = matches!(waiter, Waiter::Job(_));
        if of_job && self.seeded.injection.fires(Bug::RefuseMiss) {
            self.answer(waiter, page, MissAnswer::Refused);
        } else if !self.has_iommu() {
            let Some(answer) = self.physical_answer(page) else { return Requested::Full };
            self.answer(waiter, page, answer);
        } else if self.channel.is_none() {
            self.answer(waiter, page, MissAnswer::Refused);
        } else {
            return self.misses.request(now, page.space, page.iova, page.access, waiter);
        }
        Requested::Queued
    }

    /// Without an IOMMU nobody is asked: the page is in the memory table, and mapped again, or it is not. `None`: an
    /// invalidation of it is under way, ask again after that.
    fn physical_answer(&mut self, page: MissRequest) -> Option<MissAnswer> {
        let wanted = page_range(page)?;
        let region = self.memory.regions().iter().find(|region| holds(region, wanted));
        match region.map(|region| map_region(&mut self.mirror, region)) {
            Some(Ok(())) => Some(MissAnswer::Mapped),
            Some(Err(MapError::Invalidating { .. })) => None,
            Some(Err(_)) | None => Some(MissAnswer::Refused),
        }
    }

    /// Ends the misses that were not answered in time. A front-end that stands still is given more of it: it has not read
    /// a MISS yet, or, on the main socket, the ack of the UPDATE that comes before an answer.
    pub fn expire_misses(&mut self, now: Duration, main: &UnixStream) {
        if self.misses.is_due(now) {
            let is_unread = self.channel.as_ref().is_some_and(Channel::is_unread) || peek::is_unread(main);
            let bears = if is_unread { self.misses.put_off(now) } else { self.misses.reads_again(now) };
            if bears {
                return;
            }
        }
        for resolution in self.misses.expire(now) {
            self.resolve(resolution);
        }
    }

    fn resolve(&mut self, resolution: Resolution<Waiter>) {
        let page = resolution.request;
        self.judge(&resolution);
        let now = self.scheduler.now();
        self.judge_answer(now, &resolution);
        for (_, waiter) in &resolution.waiters {
            if let Waiter::Audit(number) = waiter {
                self.audit_answered(now, *number, &resolution.outcome);
            }
        }
        let answer = match resolution.outcome {
            Outcome::Mapped { range, host, permissions } => {
                let permissions = self.seeded.permissions(permissions);
                match self.mirror.map(page.space, range, host, permissions) {
                    Ok(_) => {
                        self.seeded.use_stale(&mut self.mirror, page.iova, permissions);
                        MissAnswer::Mapped
                    }
                    Err(e) if e.is_momentary() => {
                        debug!("A translation of {range} cannot be kept now: {e}");
                        // Whoever waits looks, finds nothing and asks again.
                        MissAnswer::Mapped
                    }
                    Err(e) => {
                        warn!("A translation of {range} cannot be kept: {e}");
                        MissAnswer::Refused
                    }
                }
            }
            Outcome::Refused | Outcome::NotCovered => {
                self.stats.miss_refused.add(1);
                MissAnswer::Refused
            }
            Outcome::TimedOut => {
                self.stats.miss_timeouts.add(1);
                MissAnswer::TimedOut
            }
        };
        debug!("MISS {} for {}: {answer:?}", page.iova, page.access);
        if let Some(range) = page_range(page) {
            self.sink.record_at(now, Event::MissSettled { range, access: page.access, end: end_of(answer) });
        }
        self.stats.mapped_bytes.set(self.mirror.table_bytes() as u64);
        for (page, waiter) in resolution.waiters {
            self.answer(waiter, page, answer);
        }
    }

    fn answer(&self, waiter: Waiter, page: MissRequest, answer: MissAnswer) {
        match waiter {
            Waiter::Ahead(_) => {}
            Waiter::Job(wait) => {
                if answer == MissAnswer::Refused {
                    self.job_fault(wait, page);
                }
                self.scheduler.miss_answered(wait, page, job_answer(page, answer));
            }
            Waiter::RingInput(wait) => {
                self.queue.mailbox.post(Mail::MissAnswered { wait, side: Side::Input, answer });
            }
            Waiter::RingOutput(wait) => {
                self.queue.mailbox.post(Mail::MissAnswered { wait, side: Side::Output, answer });
            }
            // It was told before the page was mapped, by what came.
            Waiter::Audit(_) => {}
        }
    }

    /// A job needs what the front-end refuses. It is still parked.
    fn job_fault(&self, wait: JobWait, page: MissRequest) {
        let at_rest = self.scheduler.waiting_job(wait, page);
        let (Some(at_rest), Some(range)) = (at_rest, page_range(page)) else { return };
        let (job, AtRest { context, mode, packet, .. }) = (wait.job, at_rest);
        let (at, access) = (self.scheduler.now(), page.access);
        self.sink.instruments().fault(Fault { at, job, context, packet, range, access, mode });
    }

    /// Without a channel, nothing that is missing will ever come: what was asked for times out.
    fn lose_channel(&mut self, error: &ChannelError) {
        if let Some(referee) = &mut self.referee {
            referee.channel_failed(self.scheduler.now(), error);
        }
        warn!("The back-end channel is gone, no translation can be asked for any more: {error}");
        self.channel = None;
    }
}

/// Whether all of a page of guest-physical addresses lies in the region.
fn holds(region: &Region, page: ByteRange<Iova>) -> bool {
    let gpa = region.gpa();
    gpa.contains(Gpa::new(page.first().raw())) && gpa.contains(Gpa::new(page.last().raw()))
}

/// What the answer to a miss means for a job that needs the page.
fn job_answer(page: MissRequest, answer: MissAnswer) -> Result<(), JobError> {
    let missing = page_range(page).map(|range| Missing { space: page.space, range, access: page.access });
    match (answer, missing) {
        (MissAnswer::Mapped, _) => Ok(()),
        (MissAnswer::Refused, Some(missing)) => Err(JobError::Refused(missing)),
        (MissAnswer::TimedOut, Some(missing)) => Err(JobError::TimedOut(missing)),
        (_, None) => Err(JobError::Killed),
    }
}

/// The page that is asked for.
fn page_range(page: MissRequest) -> Option<ByteRange<Iova>> {
    ByteRange::inclusive(page.iova, page.iova).map(ByteRange::page_aligned)
}

fn end_of(answer: MissAnswer) -> MissEnd {
    match answer {
        MissAnswer::Mapped => MissEnd::Mapped,
        MissAnswer::Refused => MissEnd::Refused,
        MissAnswer::TimedOut => MissEnd::TimedOut,
    }
}
