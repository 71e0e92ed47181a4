//! The session's interface to the schedule of the jobs. The back-end implements it for the schedule that its threads
//! share, the simulation for its own; tests insert themselves in between.

use std::time::Duration;

use crate::addr::{ByteRange, DomainId, Iova};
use crate::jobs::job::JobId;
use crate::jobs::schedule::{AtRest, JobVerdict, JobWait, Revealed, Schedule};
use crate::jobs::verdict::InvalidationInfo;
use crate::mmu::MappedRange;
use crate::mmu::miss::MissRequest;

/// The jobs, as the session sees them. No method blocks.
pub trait Jobs {
    /// Stops the engines at their next step; all jobs stay. Parked jobs forget which translations they wait for.
    fn pause(&mut self, now: Duration);
    /// Lets the engines go on.
    fn resume(&mut self, now: Duration);
    /// Discards every job, those on engines included.
    fn discard(&mut self);
    /// An invalidation has ended: jobs that it kept from pinning try again.
    fn invalidation_ended(&mut self);
    /// Whether any job that has begun and not ended touches the range.
    fn touches(&mut self, space: DomainId, range: ByteRange<Iova>) -> bool;
    /// The first job that has begun and touches the range.
    fn first_in(&mut self, space: DomainId, range: ByteRange<Iova>) -> Option<JobId>;
    /// What begun jobs touch of the range, as far as the meaning of its invalidation will be judged. Disjoint.
    fn judged(&mut self, space: DomainId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>>;
    /// An invalidation removes these mappings.
    fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]);
    /// How much was too much to be judged since the last call.
    fn take_unjudged(&mut self) -> u64;
    /// Judges earlier invalidations by the answer to a MISS that these jobs requested.
    fn reveal(&mut self, revealed: &Revealed, asked: &[JobId]) -> Vec<JobVerdict>;
    /// Host addresses change their meaning: earlier invalidations can no longer be judged.
    fn forget_suspects(&mut self);
    /// The state of a job that is parked and waits for this page, in this wait.
    fn waiting_job(&mut self, wait: JobWait, page: MissRequest) -> Option<AtRest>;
    /// Whether the job can still use what it requested in this wait.
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

    fn touches(&mut self, space: DomainId, range: ByteRange<Iova>) -> bool {
        Schedule::touches(self, space, range)
    }

    fn first_in(&mut self, space: DomainId, range: ByteRange<Iova>) -> Option<JobId> {
        Schedule::first_in(self, space, range)
    }

    fn judged(&mut self, space: DomainId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        Schedule::judged(self, space, range)
    }

    fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]) {
        Schedule::suspect(self, by, mapped);
    }

    fn take_unjudged(&mut self) -> u64 {
        Schedule::take_unjudged(self)
    }

    fn reveal(&mut self, revealed: &Revealed, asked: &[JobId]) -> Vec<JobVerdict> {
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
