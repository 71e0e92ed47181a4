//! What an INVALIDATE meant, as the model's session finds it out: as the back-end's, and beside it the twin of the
//! verdicts, and what the guest has really done.

use job_stream::Mode;

use super::bug::Bug;
use super::oracle::{Invariant, violation};
use super::session::Waiter;
use super::suspicions;
use super::world::World;
use crate::addr::{ByteRange, Iova, SpaceId};
use crate::jobs::job::JobId;
use crate::jobs::schedule::{JobState, JobStatus, Revealed, mapped_of};
use crate::mmu::miss::Resolution;
use crate::telemetry::violation::{InvalidationInfo, Verdict};

impl World {
    /// For the twin of the verdicts.
    pub(super) fn note_what_is_taken(&mut self, range: ByteRange<Iova>) {
        if self.suspicions.is_empty() {
            return;
        }
        let mut mapped = Vec::new();
        self.session.mirror.mapped_ranges(SpaceId::DEVICE, range, |found| mapped.push(found));
        self.suspicions.invalidated(range, &mapped);
    }

    /// As the back-end's.
    pub(super) fn suspect(&mut self, range: ByteRange<Iova>) {
        let judged = self.session.schedule.judged(SpaceId::DEVICE, range.page_aligned());
        let mapped = mapped_of(&self.session.mirror, SpaceId::DEVICE, &judged);
        let by = InvalidationInfo { number: self.counts.invalidations, range, begun: self.now, acked: None };
        self.session.schedule.suspect(by, &mapped);
    }

    /// As the back-end's; each verdict is what its twin says, and no driver is accused that has done nothing.
    pub(super) fn judge(&mut self, resolution: &Resolution<Waiter>) {
        let job = |waiter: &Waiter| match waiter {
            Waiter::Job(id) | Waiter::Ahead(id) => Some(*id),
            Waiter::Ring => None,
        };
        let asked: Vec<JobId> = resolution.waiters.iter().filter_map(job).collect();
        let wanted = self.verdicts_due(resolution, &asked);
        let revealed = Revealed::by(resolution);
        let judgements = revealed.map(|revealed| self.session.schedule.reveal(&revealed, &asked));
        let mut judgements = judgements.unwrap_or_default();
        if self.is(Bug::CallMovedBenign) {
            let moved = judgements.iter_mut().filter(|judgement| judgement.verdict == Verdict::Moved);
            moved.for_each(|judgement| judgement.verdict = Verdict::Benign);
        }
        for judgement in &judgements {
            self.event("verdict", judgement.range.first().raw(), judgement.verdict as u64);
            self.counts.verdict(judgement.mode, judgement.verdict, judgement.confidence);
            if let Err(violation) = self.oracle.check_verdict(judgement, &self.guest, self.flavor.careful) {
                self.fail(violation);
            }
        }
        if !suspicions::is_what_was_told(&wanted, &judgements) {
            let what = format!("The verdicts have to be {wanted:x?}, and are {judgements:x?}");
            self.fail(violation(Invariant::Verdict, what));
        }
    }

    /// What the twin of the verdicts says.
    fn verdicts_due(&mut self, resolution: &Resolution<Waiter>, asked: &[JobId]) -> Vec<suspicions::Told> {
        if self.suspicions.are_none() {
            return Vec::new();
        }
        let checks = |job: &JobStatus| matches!(job.state, JobState::Checks(_)).then_some(job.id);
        let checking: Vec<JobId> = self.session.schedule.jobs().iter().filter_map(checks).collect();
        self.suspicions.answered((resolution.request, &resolution.outcome), asked, &checking)
    }

    /// As the back-end's: the fault of a job is recorded, with its name.
    pub(super) fn job_fault(&mut self, id: JobId) {
        // What was asked for before a stop may be answered when the job does not wait for it any more.
        let Some(found) = self.session.schedule.parked_job(id) else { return };
        let Some(wanted) = self.oracle.faults(id) else { return };
        if (found.context, found.mode) != wanted {
            let what =
                format!("The fault of job {} is recorded as that of {found:?}, not {wanted:?}", id.raw());
            return self.fail(violation(Invariant::Verdict, what));
        }
        self.counts.faults_in_fault_mode += u64::from(wanted.1 == Mode::Fault);
        self.counts.faults_in_other_modes += u64::from(wanted.1 != Mode::Fault);
    }
}
