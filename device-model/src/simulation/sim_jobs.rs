//! The jobs as the session of the simulation sees them: the schedule, and in between the seeded bugs that lose or
//! distort the session's calls.

use std::time::Duration;

use super::bug::Bug;
use crate::addr::{ByteRange, DomainId, Iova};
use crate::jobs::job::JobId;
use crate::jobs::schedule::{AtRest, JobVerdict, JobWait, Revealed, Schedule};
use crate::jobs::verdict::{InvalidationInfo, Verdict};
use crate::mmu::MappedRange;
use crate::mmu::miss::MissRequest;
use crate::session::Jobs;

#[derive(Debug)]
pub(super) struct SimJobs {
    pub(super) schedule: Schedule,
    bug: Option<Bug>,
    /// The verdicts that were not taken yet.
    pub(super) judged: Vec<JobVerdict>,
}

impl SimJobs {
    pub(super) fn new(schedule: Schedule, bug: Option<Bug>) -> Self {
        Self { schedule, bug, judged: Vec::new() }
    }

    fn is(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }
}

impl Jobs for SimJobs {
    fn pause(&mut self, now: Duration) {
        self.schedule.pause(now);
    }

    fn resume(&mut self, now: Duration) {
        self.schedule.resume(now);
    }

    fn discard(&mut self) {
        self.schedule.discard();
    }

    fn invalidation_ended(&mut self) {
        if !self.is(Bug::LoseInvalidationEnd) {
            self.schedule.invalidation_ended();
        }
    }

    fn touches(&mut self, space: DomainId, range: ByteRange<Iova>) -> bool {
        self.schedule.touches(space, range)
    }

    fn first_in(&mut self, space: DomainId, range: ByteRange<Iova>) -> Option<JobId> {
        self.schedule.first_in(space, range)
    }

    fn judged(&mut self, space: DomainId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        self.schedule.judged(space, range)
    }

    fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]) {
        // After the zap, no mapping is found any more.
        let mapped = if self.is(Bug::SuspectAfterZap) { &[] } else { mapped };
        self.schedule.suspect(by, mapped);
    }

    fn take_unjudged(&mut self) -> u64 {
        self.schedule.take_unjudged()
    }

    fn reveal(&mut self, revealed: &Revealed, asked: &[JobId]) -> Vec<JobVerdict> {
        let mut job_verdicts = self.schedule.reveal(revealed, asked);
        if self.is(Bug::CallMovedBenign) {
            let moved = job_verdicts.iter_mut().filter(|job_verdict| job_verdict.verdict == Verdict::Moved);
            moved.for_each(|job_verdict| job_verdict.verdict = Verdict::Benign);
        }
        self.judged.extend(job_verdicts.iter().copied());
        job_verdicts
    }

    fn forget_suspects(&mut self) {
        if !self.is(Bug::RememberWhatWasThere) {
            self.schedule.forget_suspects();
        }
    }

    fn waiting_job(&mut self, wait: JobWait, page: MissRequest) -> Option<AtRest> {
        self.schedule.waiting_job(wait, page)
    }

    fn is_current(&mut self, wait: JobWait) -> bool {
        self.schedule.is_current(wait)
    }
}
