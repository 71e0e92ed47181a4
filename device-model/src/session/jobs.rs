//! What the session asks of the jobs' schedule, and tells it. The back-end implements it for the schedule that its
//! threads share, the simulation for the one that it owns; tests put themselves between.

use std::time::Duration;

use crate::addr::{ByteRange, Iova, SpaceId};
use crate::jobs::job::JobId;
use crate::jobs::schedule::{AtRest, JobWait, Judgement, Revealed, Schedule};
use crate::mmu::MappedRange;
use crate::mmu::miss::MissRequest;
use crate::telemetry::violation::InvalidationInfo;

/// The jobs, as the session knows them. No method waits.
pub trait Jobs {
    /// Engines stop at their next step; all jobs stay. Parked jobs forget which translations they wait for.
    fn pause(&mut self, now: Duration);
    /// Engines go on.
    fn resume(&mut self, now: Duration);
    /// Discards every job, those on engines included.
    fn discard(&mut self);
    /// An invalidation has ended: jobs that it kept from pinning try again.
    fn invalidation_ended(&mut self);
    /// Whether a job that has begun and not ended touches any of the range.
    fn touches(&mut self, space: SpaceId, range: ByteRange<Iova>) -> bool;
    /// The first job that has begun and touches any of the range.
    fn first_in(&mut self, space: SpaceId, range: ByteRange<Iova>) -> Option<JobId>;
    /// What begun jobs touch of the range, if what its invalidation meant is to be found out. Disjoint.
    fn judged(&mut self, space: SpaceId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>>;
    /// An invalidation takes away what was mapped like this.
    fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]);
    /// How much is not judged because it is too much, since this was last asked.
    fn take_unjudged(&mut self) -> u64;
    /// What an answer to a MISS, asked for by these jobs, says of what was taken away.
    fn reveal(&mut self, revealed: &Revealed, asked: &[JobId]) -> Vec<Judgement>;
    /// Host addresses mean something else from now on: nothing can be said of what was taken away before.
    fn forget_suspects(&mut self);
    /// What is known of a job that is parked and waits for this page, in this wait.
    fn waiting_job(&mut self, wait: JobWait, page: MissRequest) -> Option<AtRest>;
    /// Whether the job may still use what it asked for in this wait.
    fn is_current(&mut self, wait: JobWait) -> bool;
}

impl Jobs for Schedule {
    fn pause(&mut self, now: Duration) {
        Schedule::pause(self, now);
    }

    fn resume(&mut self, now: Duration) {
        Schedule::resume(self, now);
    }

    fn discard(&mut self) {
        Schedule::discard(self);
    }

    fn invalidation_ended(&mut self) {
        Schedule::invalidation_ended(self);
    }

    fn touches(&mut self, space: SpaceId, range: ByteRange<Iova>) -> bool {
        Schedule::touches(self, space, range)
    }

    fn first_in(&mut self, space: SpaceId, range: ByteRange<Iova>) -> Option<JobId> {
        Schedule::first_in(self, space, range)
    }

    fn judged(&mut self, space: SpaceId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        Schedule::judged(self, space, range)
    }

    fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]) {
        Schedule::suspect(self, by, mapped);
    }

    fn take_unjudged(&mut self) -> u64 {
        Schedule::take_unjudged(self)
    }

    fn reveal(&mut self, revealed: &Revealed, asked: &[JobId]) -> Vec<Judgement> {
        Schedule::reveal(self, revealed, asked)
    }

    fn forget_suspects(&mut self) {
        Schedule::forget_suspects(self);
    }

    fn waiting_job(&mut self, wait: JobWait, page: MissRequest) -> Option<AtRest> {
        Schedule::waiting_job(self, wait, page)
    }

    fn is_current(&mut self, wait: JobWait) -> bool {
        Schedule::is_current(self, wait)
    }
}
