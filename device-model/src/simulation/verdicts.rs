//! What an INVALIDATE meant: the session's verdicts beside those of their twin, and what the guest really did.

use job_stream::Mode;

use super::oracle::{Invariant, violation};
use super::suspicions;
use super::world::World;
use crate::addr::{ByteRange, DomainId, Iova};
use crate::jobs::job::JobId;
use crate::jobs::schedule::{JobState, JobStatus};
use crate::mmu::miss::Resolution;
use crate::session::miss_port::Waiter;
use crate::telemetry::violation::Fault;

impl World {
    /// Tells the twin of the verdicts what an INVALIDATE takes.
    pub(super) fn note_what_is_taken(&mut self, range: ByteRange<Iova>) {
        if self.suspicions.is_empty() {
            return;
        }
        let mut mapped = Vec::new();
        self.session.core.mirror().mapped_ranges(DomainId::DEVICE, range, |found| mapped.push(found));
        self.suspicions.invalidated(range, &mapped);
    }

    /// Checks that each verdict is that of the twin, and that no correct driver gets a violation.
    pub(super) fn check_verdicts(&mut self, wanted: &[suspicions::Told]) {
        let job_verdicts = std::mem::take(&mut self.session.core.jobs_mut().judged);
        for job_verdict in &job_verdicts {
            self.event("verdict", job_verdict.range.first().raw(), job_verdict.verdict as u64);
            self.counts.verdict(job_verdict.mode, job_verdict.verdict, job_verdict.confidence);
            if let Err(violation) = self.oracle.check_verdict(job_verdict, &self.guest, self.flavor.careful) {
                self.fail(violation);
            }
        }
        if !suspicions::match_job_verdicts(wanted, &job_verdicts) {
            let what = format!("The verdicts have to be {wanted:x?}, and are {job_verdicts:x?}");
            self.fail(violation(Invariant::Verdict, what));
        }
    }

    /// The twin's verdicts.
    pub(super) fn verdicts_due(&mut self, resolution: &Resolution<Waiter>) -> Vec<suspicions::Told> {
        if self.suspicions.are_none() {
            return Vec::new();
        }
        let asked: Vec<JobId> = resolution.waiters.iter().filter_map(|(_, waiter)| waiter.job()).collect();
        let checks = |job: &JobStatus| matches!(job.state, JobState::Checks(_)).then_some(job.id);
        let checking: Vec<JobId> = self.session.schedule().jobs().iter().filter_map(checks).collect();
        self.suspicions.answered((resolution.request, &resolution.outcome), &asked, &checking)
    }

    /// Checks the record of a job's fault.
    pub(super) fn check_fault(&mut self, fault: &Fault) {
        let Some(wanted) = self.oracle.faults(fault.job) else { return };
        if (fault.context, fault.mode) != wanted {
            let what = format!("The fault is recorded as {fault:?}, and is of {wanted:?}");
            return self.fail(violation(Invariant::Verdict, what));
        }
        self.counts.faults_in_fault_mode += u64::from(wanted.1 == Mode::Fault);
        self.counts.faults_in_other_modes += u64::from(wanted.1 != Mode::Fault);
    }
}
