//! What an INVALIDATE meant. Before it, what it takes from jobs is noted; each answer to a MISS says what is mapped
//! there now; a driver's mistake becomes a record. Which job is suspected of what, [`crate::jobs::schedule`] knows.

use std::collections::VecDeque;
use std::time::Duration;

use job_stream::Mode;

use super::effect::Effect;
use super::miss_port::{JobWait, Waiter};
use super::{Jobs, Session};
use crate::addr::{ByteRange, DomainId, Iova};
use crate::jobs::job::JobId;
use crate::jobs::schedule::{AtRest, JobVerdict, Revealed, mapped_of};
use crate::jobs::verdict::{Confidence, InvalidationInfo, Verdict};
use crate::mmu::Invalidation;
use crate::mmu::miss::{MissRequest, Resolution};
use crate::telemetry::record::Event;
use crate::telemetry::violation::{Fault, FaultCause, Violation};

/// How many acks are remembered.
const ACKS: usize = 64;

/// The INVALIDATE messages of a connection.
#[derive(Debug, Default)]
pub(super) struct Invalidations {
    /// How many have come.
    count: u64,
    /// When the last ones were acked.
    acks: VecDeque<(u64, Duration)>,
}

impl Invalidations {
    /// The number of the last one, counted from 1.
    pub(super) fn number(&self) -> u64 {
        self.count
    }

    /// The last one is acked now.
    pub(super) fn acked(&mut self, now: Duration) {
        if self.acks.len() >= ACKS {
            self.acks.pop_front();
        }
        self.acks.push_back((self.count, now));
    }

    fn ack_of(&self, number: u64) -> Option<Duration> {
        self.acks.iter().find(|(acked, _)| *acked == number).map(|(_, at)| *at)
    }
}

impl<T, J: Jobs> Session<T, J> {
    /// An INVALIDATE of this range has come: notes what it takes from jobs, to compare it with what the next MISS for
    /// it finds.
    pub(super) fn suspect(&mut self, now: Duration, range: ByteRange<Iova>) {
        self.invalidations.count = self.invalidations.count.saturating_add(1);
        let number = self.invalidations.count;
        self.record(now, Event::Invalidation { number, range });
        let judged = self.jobs.judged(DomainId::DEVICE, range.page_aligned());
        if !judged.is_empty() {
            let mapped = mapped_of(&self.mirror, DomainId::DEVICE, &judged);
            self.jobs.suspect(InvalidationInfo { number, range, begun: now, acked: None }, &mapped);
        }
        self.stats.unjudged.add(self.jobs.take_unjudged());
    }

    /// Judges earlier invalidations by the answer to a MISS.
    pub(super) fn judge(&mut self, now: Duration, resolution: &Resolution<Waiter>) {
        let Some(revealed) = Revealed::by(resolution) else { return };
        let asked: Vec<JobId> = resolution.waiters.iter().filter_map(|(_, waiter)| waiter.job()).collect();
        for job_verdict in self.jobs.reveal(&revealed, &asked) {
            self.stats.verdicts.count(job_verdict.mode, job_verdict.verdict, job_verdict.confidence);
            if is_violation(&job_verdict) {
                let violation = self.violation(now, &job_verdict);
                self.effect(Effect::Violation(violation));
            }
        }
    }

    fn violation(&self, at: Duration, job_verdict: &JobVerdict) -> Violation {
        let JobVerdict { verdict, confidence, job, context, packet, mode, range, access, .. } = *job_verdict;
        let acked = self.invalidations.ack_of(job_verdict.by.number);
        let invalidation = InvalidationInfo { acked, ..job_verdict.by };
        Violation { id: 0, at, verdict, confidence, mode, job, context, packet, range, access, invalidation }
    }

    /// The front-end refuses what a job needs. The job is still parked. If it uses an address space, it is no fault yet:
    /// the guest may have changed the page tables, and the job reads them once more. Its end says whether it was one.
    pub(super) fn job_fault(&mut self, at: Duration, wait: JobWait, page: MissRequest) {
        let at_rest = self.jobs.waiting_job(wait, page);
        let (Some(AtRest { context, mode, packet, translated: false, .. }), job) = (at_rest, wait.job) else {
            return;
        };
        let cause = FaultCause::Refused { range: page.range(), access: page.access };
        self.effect(Effect::Fault(Fault { at, job, context, packet, mode, cause }));
    }

    /// An ack has to wait: records for which job, if that is known.
    pub(super) fn record_parked(&mut self, now: Duration, number: u64, invalidation: &Invalidation) {
        let in_flight = invalidation.in_flight();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let (sections, pins) = (count(in_flight.sections), count(in_flight.pins));
        let job = self.jobs.first_in(DomainId::DEVICE, invalidation.range());
        self.record(now, Event::Parked { number, sections, pins, job });
    }
}

/// In fault mode the guest may unmap what it likes, and where the verdict is unknown no violation is reported. A job
/// and an INVALIDATE make one violation, however many pages they share.
fn is_violation(job_verdict: &JobVerdict) -> bool {
    job_verdict.is_first
        && job_verdict.verdict != Verdict::Benign
        && job_verdict.confidence != Confidence::CannotTell
        && job_verdict.mode != Mode::Fault
}
