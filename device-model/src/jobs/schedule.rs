//! Which job an engine takes next, and where jobs wait. A parked job holds no section and no pin (I4): it is a
//! value in a map, until every page that it waits for is answered or the invalidation in its way has ended.
//!
//! A state machine of values: whoever shares it between threads puts a lock around it and wakes the engines. Knows
//! nothing of threads, of the mirror, or of how a miss is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use job_stream::Mode;

mod footprints;
mod looks;
mod ready;
mod suspects;
mod wait;

use crate::addr::{ByteRange, Iova, SpaceId};
use crate::jobs::engine::{Leaves, Left};
use crate::jobs::job::{Job, JobError, JobId, JobOutcome};
use crate::mmu::miss::MissRequest;
use crate::mmu::{MappedRange, Missing};
use crate::running_clock::RunningClock;
use crate::telemetry::violation::{InvalidationInfo, Verdict};
use footprints::Footprints;
use looks::Looks;
use ready::Ready;
use suspects::Stands;
pub use suspects::{Found, Judgement, Revealed, mapped_of};
use wait::Unanswered;
pub use wait::{JobWait, pages_of};

/// A job on its way through the engines.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct ScheduledJob {
    /// What is to be done.
    pub job: Job,
    /// How often an invalidation came between the answers to its misses and its pin.
    pub pin_attempts: u32,
    /// The first page that its last pin lacked.
    pub missed: Option<Iova>,
    /// The answer to a miss of it was no: an engine ends the job with this.
    pub failed: Option<JobError>,
    /// How many invalidations had ended when an engine took it: before any pin of it was tried.
    seen: u64,
    /// How often everything had been discarded when it was submitted.
    generation: u64,
    /// How often its WAIT has looked in vain since it was last told to look.
    looks: u32,
    /// It has done something.
    pub(crate) stepped: bool,
    /// It is done, and was parked once more to see whether its memory was still its own.
    pub(crate) checked: bool,
}

impl ScheduledJob {
    /// A job that has not started.
    pub fn new(job: Job) -> Self {
        Self {
            job,
            pin_attempts: 0,
            missed: None,
            failed: None,
            seen: 0,
            generation: 0,
            looks: 0,
            stepped: false,
            checked: false,
        }
    }

    /// How often everything had been discarded when it was submitted (see [`Schedule::generation`]).
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// A job that an engine is done with.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct FinishedJob {
    /// The job.
    pub job: Job,
    /// How it ended.
    pub outcome: JobOutcome,
}

/// What an engine is to do next.
#[derive(Debug)]
pub enum Turn {
    /// This.
    Run(ScheduledJob),
    /// Wait until something changes: nothing is ready, or the device is paused.
    Wait,
    /// End: the device closes.
    Close,
}

/// What is to be done about a job that has left an engine.
#[derive(Debug)]
pub enum Disposed {
    /// It is at its end: the device is to be told.
    Finished(FinishedJob),
    /// It waits for translations: they are to be asked for. It is parked already, so that the answers find it.
    Missing {
        /// Who waits, and for which time.
        wait: JobWait,
        /// For what.
        missing: Vec<Missing>,
        /// To be asked for after that; it does not wait for these.
        ahead: Vec<Missing>,
    },
    /// It waits for its turn, or for the end of an invalidation.
    Waits,
    /// It is from before everything was discarded: nobody waits for it any more.
    Stale,
}

#[derive(Debug)]
enum Parked {
    /// Waits for the answers to these pages.
    Misses { work: ScheduledJob, unanswered: Unanswered },
    /// Waits for the end of an invalidation.
    Invalidation(ScheduledJob),
    /// Looks again at this running time whether a value in memory is what it waits for.
    Wait { work: ScheduledJob, look: Duration },
}

impl Parked {
    fn into_work(self) -> ScheduledJob {
        let (Self::Misses { work, .. } | Self::Invalidation(work) | Self::Wait { work, .. }) = self;
        work
    }

    fn work(&self) -> &ScheduledJob {
        let (Self::Misses { work, .. } | Self::Invalidation(work) | Self::Wait { work, .. }) = self;
        work
    }

    fn work_mut(&mut self) -> &mut ScheduledJob {
        let (Self::Misses { work, .. } | Self::Invalidation(work) | Self::Wait { work, .. }) = self;
        work
    }
}

/// How soon a WAIT looks again at first; twice as long after each time, up to [`LONGEST_LOOK`].
const FIRST_LOOK: Duration = Duration::from_micros(50);
/// How long a WAIT leaves memory unlooked at.
const LONGEST_LOOK: Duration = Duration::from_millis(1);

/// The queue of work before the engines.
#[derive(Debug, Default)]
pub struct Schedule {
    ready: Ready,
    /// The device's time, and how long the device has been running in it.
    now: Duration,
    clock: RunningClock,
    parked: BTreeMap<JobId, Parked>,
    /// INVARIANT: those of the jobs that are parked for a WAIT.
    looks: Looks,
    /// Each job from when an engine first took it to its end, wherever it waits in between.
    footprints: Footprints,
    invalidations_ended: u64,
    /// How often jobs have waited for translations, and how often they had at the last stop or reset: nobody wants any
    /// more what was asked for in one of those waits.
    waits: u64,
    stale_waits: u64,
    /// How often everything was discarded.
    generation: u64,
    paused: bool,
    closing: bool,
}

impl Schedule {
    /// A schedule without work, paused until the device starts.
    pub fn new() -> Self {
        Self { paused: true, clock: RunningClock::paused(), ..Self::default() }
    }

    /// Takes a new job.
    pub fn submit(&mut self, job: Job) {
        self.ready.push_back(ScheduledJob { generation: self.generation, ..ScheduledJob::new(job) });
    }

    /// Sets the time. WAITs whose time it is to look again are ready.
    pub fn set_time(&mut self, now: Duration) {
        self.now = self.now.max(now);
        let due = self.looks.take_due(self.running());
        self.look(due);
    }

    /// When the time is to be set next, if there is nothing else to do.
    pub fn next_look(&self) -> Option<Duration> {
        self.clock.when(self.looks.next()?)
    }

    /// How long the device has been running: what WAITs and SPINs are measured in, so that a stop costs none of them its
    /// time.
    pub fn running(&self) -> Duration {
        self.clock.running(self.now)
    }

    /// The clock that [`Self::running`] is read from, for engines that read it without a lock.
    pub(crate) fn clock(&self) -> RunningClock {
        self.clock
    }

    /// What an engine does next.
    pub fn turn(&mut self) -> Turn {
        if self.closing {
            return Turn::Close;
        }
        let work = if self.paused { None } else { self.ready.pop() };
        match work {
            Some(work) => {
                self.footprints.begin(&work.job);
                Turn::Run(ScheduledJob { seen: self.invalidations_ended, ..work })
            }
            None => Turn::Wait,
        }
    }

    /// Whether a job that has begun and not ended touches any of the range. Unlike a pin, which a job loses and takes
    /// anew, and a section, which has no range, this says what the guest took away under a job.
    pub fn touches(&mut self, space: SpaceId, range: ByteRange<Iova>) -> bool {
        self.footprints.touches(space, range)
    }

    /// What those jobs touch of the range for which it will be found out what an invalidation of it meant. No two have a
    /// page in common, so that what was mapped there is named once, and whole.
    pub fn judged(&mut self, space: SpaceId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        self.footprints.judged(space, range)
    }

    /// An invalidation takes away what was mapped like this.
    pub fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]) {
        self.footprints.suspect(by, mapped);
    }

    /// The front-end has answered a MISS that these jobs wait for, or come to soon: what that says of what was taken
    /// away under jobs. A job in *fence* mode that has worked on memory, needs more of it, and finds it moved, ends with
    /// that: what it has done so far is of another memory.
    pub fn reveal(&mut self, revealed: &Revealed, asked: &[JobId]) -> Vec<Judgement> {
        let Self { footprints, parked, .. } = self;
        let asked: BTreeSet<JobId> = asked.iter().copied().collect();
        let judgements = footprints.judge(revealed, |id| {
            let work = parked.get(&id).map(Parked::work);
            let stands = match work {
                Some(work) if work.checked => Stands::Checks,
                _ if asked.contains(&id) => Stands::Needs,
                _ => Stands::Apart,
            };
            (stands, work.and_then(|work| work.job.packet()))
        });
        let moved = |judgement: &&Judgement| {
            (judgement.verdict, judgement.mode) == (Verdict::Moved, Mode::Fence)
                && asked.contains(&judgement.job)
        };
        for Judgement { job, range, access, .. } in judgements.iter().filter(moved) {
            let work = parked.get_mut(job).map(Parked::work_mut);
            if let Some(work) = work.filter(|work| work.stepped && !work.checked) {
                let range = Missing { space: revealed.space, range: *range, access: *access };
                work.failed.get_or_insert(JobError::Moved(range));
            }
        }
        judgements
    }

    /// What was mapped where means nothing any more: the memory table changes, or the device stops.
    pub fn forget_suspects(&mut self) {
        self.footprints.forget();
    }

    /// How much was not judged because it is too much, since this was last asked: jobs, and ranges that an invalidation
    /// took away. None of these becomes a violation.
    pub fn take_unjudged(&mut self) -> u64 {
        self.footprints.take_unjudged()
    }

    /// Whether engines have to give back what they have: the device is stopped, or closes.
    pub fn is_stopped(&self) -> bool {
        self.paused || self.closing
    }

    /// How often everything was discarded: a job of another life than this has to leave its engine.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether an engine would find work.
    pub fn has_ready(&self) -> bool {
        self.ready() > 0
    }

    /// Jobs that wait for an answer or for the end of an invalidation.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Jobs that no engine has.
    pub fn waiting(&self) -> usize {
        self.ready.len().saturating_add(self.parked.len())
    }

    /// Takes a job back that has left its engine.
    pub fn dispose(&mut self, left: Left) -> Disposed {
        let Left { work, leaves } = left;
        if work.generation != self.generation {
            return Disposed::Stale;
        }
        match leaves {
            Leaves::Finished(outcome) => {
                let missing = if outcome == JobOutcome::Done { self.to_check(&work) } else { Vec::new() };
                if !missing.is_empty() {
                    let work = ScheduledJob { checked: true, ..work };
                    return self.park_for_misses(work, missing, Vec::new());
                }
                self.look_at_what_it_writes(work.job.id());
                // Before its answer can reach the guest, who may take the memory away then.
                self.footprints.end(work.job.id());
                return Disposed::Finished(FinishedJob { job: work.job, outcome });
            }
            Leaves::SliceOver => {
                // It may have signalled meanwhile.
                self.look_at_what_it_writes(work.job.id());
                self.ready.push_back(work);
            }
            Leaves::Waiting { until } => self.park_for_wait(work, until),
            Leaves::Preempted | Leaves::Evicted => self.put_back(work),
            Leaves::Invalidating => self.park_for_invalidation(work),
            Leaves::Missing(missing) => return self.park_for_misses(work, missing, Vec::new()),
            Leaves::Faulted { missing, ahead } => return self.park_for_misses(work, vec![missing], ahead),
        }
        Disposed::Waits
    }

    /// What has to be asked for of a job that is done, because an invalidation overlapped it and no answer has said yet
    /// what that meant: its fence waits for that, so that a driver that unmaps after the fence is never taken for one
    /// that unmaps before it.
    fn to_check(&self, work: &ScheduledJob) -> Vec<Missing> {
        if work.checked || self.paused {
            return Vec::new();
        }
        self.footprints.to_check(work.job.id())
    }

    /// Puts a job back that was taken off its engine: it is the next to go on.
    fn put_back(&mut self, work: ScheduledJob) {
        self.ready.push_front(work);
    }

    /// Parks a job until the answers to all of `missing` have come.
    fn park_for_misses(
        &mut self,
        work: ScheduledJob,
        missing: Vec<Missing>,
        ahead: Vec<Missing>,
    ) -> Disposed {
        let wait = JobWait { job: work.job.id(), number: self.waits };
        let unanswered = Unanswered::new(wait, &missing);
        // A pause answers nothing any more: whatever was asked for is forgotten, and asked again.
        if unanswered.pages() == 0 || self.paused {
            self.put_back(work);
            return Disposed::Waits;
        }
        self.waits = self.waits.wrapping_add(1);
        self.parked.insert(wait.job, Parked::Misses { work, unanswered });
        Disposed::Missing { wait, missing, ahead }
    }

    /// Parks a job until an invalidation ends, if none has since an engine took the job.
    fn park_for_invalidation(&mut self, work: ScheduledJob) {
        if self.invalidations_ended == work.seen {
            self.parked.insert(work.job.id(), Parked::Invalidation(work));
        } else {
            self.put_back(work);
        }
    }

    /// Parks a job until it looks again, or gives up.
    fn park_for_wait(&mut self, mut work: ScheduledJob, until: Duration) {
        let pause = FIRST_LOOK.saturating_mul(1 << work.looks.min(8)).min(LONGEST_LOOK);
        work.looks = work.looks.saturating_add(1);
        let look = self.running().saturating_add(pause).min(until);
        self.looks.add(look, work.job.id());
        self.parked.insert(work.job.id(), Parked::Wait { work, look });
    }

    /// What WAITs look at may have changed: those that use a backing that this job writes to. Others, which know its
    /// memory by another name, look when their time has come.
    fn look_at_what_it_writes(&mut self, job: JobId) {
        for other in self.footprints.readers_of(job) {
            if let Some(Parked::Wait { look, .. }) = self.parked.get(&other) {
                let look = (*look, other);
                self.looks.remove(look);
                self.look(BTreeSet::from([look]));
            }
        }
    }

    /// Makes jobs ready that WAIT.
    fn look(&mut self, jobs: BTreeSet<(Duration, JobId)>) {
        for (_, id) in jobs {
            if let Some(parked) = self.parked.remove(&id) {
                self.ready.push_look(parked.into_work());
            }
        }
    }

    /// One page that a parked job waits for is answered. An answer to what it asked for in an earlier wait, or one that
    /// it had already, is none.
    pub fn miss_answered(&mut self, wait: JobWait, page: MissRequest, answer: Result<(), JobError>) {
        let Some(Parked::Misses { work, unanswered }) = self.parked.get_mut(&wait.job) else { return };
        if !unanswered.answered(wait, page) {
            return;
        }
        if let Err(error) = answer {
            work.failed.get_or_insert(error);
        }
        if unanswered.pages() == 0
            && let Some(Parked::Misses { work, .. }) = self.parked.remove(&wait.job)
        {
            self.put_back(work);
        }
    }

    /// Whether what was asked for in this wait may still be wanted: the device was not stopped or reset since. Whoever
    /// asks the front-end for it otherwise asks for what perhaps nobody uses.
    pub fn is_current(&self, wait: JobWait) -> bool {
        wait.number >= self.stale_waits
    }

    /// An invalidation has ended: whoever waited for that tries again.
    pub fn invalidation_ended(&mut self) {
        self.invalidations_ended = self.invalidations_ended.wrapping_add(1);
        self.unpark(|parked| matches!(parked, Parked::Invalidation(_)));
    }

    /// Stops the engines at their next step; all jobs stay. Parked ones forget what they wait for.
    pub fn pause(&mut self, now: Duration) {
        self.set_time(now);
        self.clock.pause(self.now);
        self.paused = true;
        self.stale_waits = self.waits;
        self.looks.take_all();
        self.unpark(|_| true);
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&mut self, now: Duration) {
        self.set_time(now);
        self.clock.resume(self.now);
        self.paused = false;
    }

    /// Discards every job. What an engine has comes back as [`Disposed::Stale`], and never runs again.
    pub fn discard(&mut self) {
        self.ready.clear();
        self.parked.clear();
        self.stale_waits = self.waits;
        self.looks.take_all();
        self.footprints.clear();
        self.generation = self.generation.wrapping_add(1);
    }

    /// Whether the engines are to end.
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// Jobs that an engine would find.
    pub fn ready(&self) -> usize {
        if self.paused { 0 } else { self.ready.len() }
    }

    /// Ends the engines at their next step.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Makes the parked jobs that `which` chooses ready, oldest first.
    fn unpark(&mut self, which: impl Fn(&Parked) -> bool) {
        if !self.parked.values().any(&which) {
            return;
        }
        for (id, parked) in std::mem::take(&mut self.parked) {
            if which(&parked) {
                self.ready.push_back(parked.into_work());
            } else {
                self.parked.insert(id, parked);
            }
        }
    }
}

mod status;

pub use status::{AtRest, JobState, JobStatus};

#[cfg(test)]
mod turns;
#[cfg(test)]
mod verdicts;

#[cfg(test)]
mod tests;
