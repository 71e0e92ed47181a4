//! The naive twin of [`crate::jobs::schedule`]'s verdicts: what INVALIDATEs under jobs must lead to, page by page.
//! Knows what the mirror had when a page was invalidated, and what the front-end answers next; knows nothing of how the
//! schedule remembers that.

use std::collections::{BTreeMap, BTreeSet};

use job_stream::Mode;

use super::guest::{iova, page_at};
use crate::addr::{Access, ByteRange, Iova};
use crate::jobs::job::{Job, JobId};
use crate::jobs::schedule::JobVerdict;
use crate::jobs::verdict::{Confidence, Verdict};
use crate::mmu::MappedRange;
use crate::mmu::miss::{MissRequest, Outcome};

/// A verdict on a page.
pub(super) type Told = (JobId, usize, Access, Verdict, Confidence);

/// A job from its first turn to its end.
#[derive(Debug)]
struct Suspected {
    touches: BTreeSet<(usize, Access)>,
    tells: bool,
    mode: Mode,
    /// What was invalidated, and its host address at that time.
    taken: BTreeMap<(usize, Access), u64>,
    /// What was requested at its end, before its fence.
    asked: BTreeSet<(usize, Access)>,
    /// The device was stopped since it began: an engine may still request what the job lacked before that, and the job
    /// may take the answers for those that it waits for.
    was_stopped: bool,
}

/// All jobs from which memory may have been taken.
#[derive(Debug, Default)]
pub(super) struct Suspicions {
    jobs: BTreeMap<JobId, Suspected>,
}

impl Suspicions {
    /// An engine takes the job: from now on it is in flight.
    pub(super) fn begin(&mut self, job: &Job) {
        self.jobs.entry(job.id()).or_insert_with(|| {
            let touches = job.working_set().into_iter().flat_map(|used| {
                used.range.pages().filter_map(move |at| Some((page_at(at)?, used.access))).collect::<Vec<_>>()
            });
            let (taken, asked) = (BTreeMap::new(), BTreeSet::new());
            let (tells, mode) = (job.tells_by_memory(), job.mode());
            Suspected { touches: touches.collect(), tells, mode, taken, asked, was_stopped: false }
        });
    }

    pub(super) fn end(&mut self, job: JobId) {
        self.jobs.remove(&job);
    }

    /// Discards all jobs.
    pub(super) fn clear(&mut self) {
        self.jobs.clear();
    }

    /// Whether no job is in flight.
    pub(super) fn is_empty(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Earlier mappings become meaningless.
    pub(super) fn forget(&mut self) {
        for job in self.jobs.values_mut() {
            job.taken.clear();
            job.asked.clear();
            job.was_stopped = true;
        }
    }

    /// A job that is done asks what INVALIDATEs meant, before its fence.
    pub(super) fn asks(&mut self, job: JobId) {
        if let Some(job) = self.jobs.get_mut(&job) {
            job.asked = job.taken.keys().copied().collect();
        }
    }

    /// Whether something still has to be requested or answered before the fence of a job. `has_asked`: it was parked to
    /// ask.
    pub(super) fn is_open(&self, job: JobId, has_asked: bool) -> bool {
        self.jobs.get(&job).is_some_and(|job| {
            if job.was_stopped {
                return false;
            }
            if has_asked { !job.asked.is_empty() } else { job.mode == Mode::Fence && !job.taken.is_empty() }
        })
    }

    /// An INVALIDATE takes a range; these are its mappings in the mirror.
    pub(super) fn invalidated(&mut self, range: ByteRange<Iova>, mapped: &[MappedRange]) {
        let range = range.page_aligned();
        for job in self.jobs.values_mut().filter(|job| job.mode != Mode::RegistrationCache) {
            for &(page, access) in job.touches.iter().filter(|(page, _)| range.contains(iova(*page))) {
                let had = |mapped: &&MappedRange| {
                    mapped.range.contains(iova(page)) && mapped.permissions.allow(access)
                };
                if let Some(mapped) = mapped.iter().find(had) {
                    let host = mapped.host + (iova(page).raw() - mapped.range.first().raw());
                    job.taken.entry((page, access)).or_insert(host);
                }
            }
        }
    }

    /// Whether no verdict is pending.
    pub(super) fn are_none(&self) -> bool {
        self.jobs.values().all(|job| job.taken.is_empty())
    }

    /// The verdicts that must follow an answer to a MISS that these jobs requested. `checking`: the jobs that are done,
    /// and wait for answers before their fence.
    pub(super) fn answered(
        &mut self,
        (request, outcome): (MissRequest, &Outcome),
        asked: &[JobId],
        checking: &[JobId],
    ) -> Vec<Told> {
        let mut told = Vec::new();
        for (&id, job) in &mut self.jobs {
            // A job that needs the page is the best evidence; if a job is done, only its fence shows that.
            let confidence = match (checking.contains(&id), asked.contains(&id), job.tells) {
                (false, true, _) | (true, _, false) => Confidence::Certain,
                (false, false, false) => Confidence::Likely,
                (false, false, true) | (true, _, true) => Confidence::CannotTell,
            };
            let Suspected { taken, asked, .. } = job;
            taken.retain(|&(page, access), &mut host| {
                let Some(verdict) = verdict((page, access, host), request, outcome) else { return true };
                if let Ok(verdict) = verdict {
                    told.push((id, page, access, verdict, confidence));
                }
                asked.remove(&(page, access));
                false
            });
        }
        told
    }
}

/// What an answer says about a page. `None`: nothing. `Err`: it will never be known.
fn verdict(
    (page, access, host): (usize, Access, u64),
    request: MissRequest,
    outcome: &Outcome,
) -> Option<Result<Verdict, ()>> {
    let asked = page_at(request.iova) == Some(page) && request.access == access;
    match outcome {
        Outcome::Mapped { range, host: there, .. } => {
            range.whole_pages().filter(|pages| pages.contains(iova(page)))?;
            let now = there.address() + (iova(page).raw() - range.first().raw());
            match now == host {
                true if access != request.access => None,
                true => Some(Ok(Verdict::Benign)),
                false => Some(Ok(Verdict::Moved)),
            }
        }
        Outcome::Refused => asked.then_some(Ok(Verdict::Gone)),
        Outcome::NotCovered | Outcome::TimedOut | Outcome::NoChannel => asked.then_some(Err(())),
    }
}

/// Whether the model gave exactly these verdicts.
pub(super) fn match_job_verdicts(wanted: &[Told], job_verdicts: &[JobVerdict]) -> bool {
    let pages = |job_verdict: &JobVerdict| {
        let JobVerdict { job, access, verdict, confidence, .. } = *job_verdict;
        let at = job_verdict.range.pages().filter_map(page_at);
        at.map(move |page| (job, page, access, verdict, confidence)).collect::<Vec<_>>()
    };
    let mut told: Vec<Told> = job_verdicts.iter().flat_map(pages).collect();
    told.sort_by_key(|(job, page, access, ..)| (*job, *page, *access));
    wanted == told
}
