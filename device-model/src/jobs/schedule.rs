//! Which job an engine takes next, and where jobs wait. A parked job holds no section and no pin (I4): it is a value in
//! a map until every page that it waits for is answered, or the invalidation in its way has ended.
//!
//! A state machine of values. A caller that shares it between threads puts a lock around it and wakes the engines.
//! Knows nothing of threads, of the mirror, or of how a miss is requested.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use job_stream::Mode;

mod footprints;
mod polls;
mod ready;
mod suspects;
mod wait;

use crate::addr::{Access, ByteRange, DomainId, Iova};
use crate::jobs::address_space::{AddressSpace, TranslationFault};
use crate::jobs::engine::{Leaves, Left};
use crate::jobs::job::{Job, JobError, JobId, JobOutcome};
use crate::jobs::verdict::{InvalidationInfo, Verdict};
use crate::mmu::miss::MissRequest;
use crate::mmu::{MappedRange, Missing};
use crate::running_clock::RunningClock;
use footprints::Footprints;
use polls::Polls;
use ready::Ready;
use suspects::Stands;
pub use suspects::{Found, JobVerdict, Revealed, mapped_of};
use wait::Unanswered;
pub use wait::{JobWait, pages_of};

/// A job on its way through the engines.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct ScheduledJob {
    /// The work.
    pub job: Job,
    /// How often an invalidation came between the answers to its misses and its pin.
    pub pin_attempts: u32,
    /// The first page that was missing at its last pin.
    pub missed: Option<Iova>,
    /// A miss of it was refused: an engine ends the job with this error.
    pub failed: Option<JobError>,
    /// How many invalidations had ended when an engine took it, before any attempt to pin.
    seen: u64,
    /// The schedule's generation when it was submitted.
    generation: u64,
    /// How often its current WAIT has polled in vain: the interval between polls grows with it.
    polls: u32,
    /// When its current WAIT times out, which tells one WAIT from the next.
    wait_ends: Duration,
    /// This page was refused, and the job uses an address space: the next walk shows whether it still needs it.
    pub(crate) refused: Option<RefusedPage>,
    /// The last fault that the driver has answered, and how often in turn it was raised.
    raised: Option<(TranslationFault, u32)>,
    /// It has executed something.
    pub(crate) stepped: bool,
    /// It is done, and was parked once more to check whether its memory was unmapped under it.
    pub(crate) checked: bool,
}

/// A page that a walk came to, and that the front-end has refused, in turn without another page in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RefusedPage {
    pub(crate) page: Iova,
    pub(crate) access: Access,
    pub(crate) times: u8,
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
            polls: 0,
            wait_ends: Duration::ZERO,
            refused: None,
            raised: None,
            stepped: false,
            checked: false,
        }
    }

    /// The schedule's generation when it was submitted (see [`Schedule::generation`]).
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// A job that has ended.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct FinishedJob {
    /// The job.
    pub job: Job,
    /// How it ended.
    pub outcome: JobOutcome,
}

/// A job that is parked until the driver has answered its fault.
#[derive(Debug)]
#[must_use = "the job waits for an answer"]
pub struct FaultedJob {
    /// The job, and which of its waits this is.
    pub wait: JobWait,
    /// The fault.
    pub fault: TranslationFault,
    /// The packet that the job has reached.
    pub packet: Option<usize>,
    /// How often it has raised a fault for this page and access before, in turn.
    pub repeats: u32,
    /// The address space, which may have lost its number.
    pub(crate) space: Weak<AddressSpace>,
}

/// What an engine tells the device about a job that has left it.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub enum JobReport {
    /// It has ended.
    Finished(FinishedJob),
    /// It has raised a fault.
    Faulted(FaultedJob),
}

/// What an engine does next.
#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "an engine takes it out at once; a box would be an allocation a turn"
)]
pub enum Turn {
    /// Run this job.
    Run(ScheduledJob),
    /// Sleep until something changes: nothing is ready, or the device is paused.
    Wait,
    /// End the thread: the device closes.
    Close,
}

/// What follows for a job that has left an engine.
#[derive(Debug)]
pub enum Disposed {
    /// It has ended: tell the device.
    Finished(FinishedJob),
    /// It waits for translations: request them. It is parked already, so that the answers find it.
    Missing {
        /// The job, and which of its waits this is.
        wait: JobWait,
        /// What it waits for.
        missing: Vec<Missing>,
        /// To be requested after that (prefetch); it does not wait for these.
        ahead: Vec<Missing>,
    },
    /// It waits for the driver's answer to a fault: tell the device. It is parked already.
    Faulted(FaultedJob),
    /// It waits for its turn, for a value in memory, or for the end of an invalidation. Nothing has to be done.
    Waits,
    /// It was discarded by a reset: drop it.
    Stale,
}

#[derive(Debug)]
enum Parked {
    /// Waits for the answers to these pages. Holds no section and no pin, as in the other states.
    Misses { work: ScheduledJob, unanswered: Unanswered },
    /// Waits for the end of an invalidation.
    Invalidation(ScheduledJob),
    /// Waits for the driver's answer to a fault, over a stop too.
    Fault { work: ScheduledJob, wait: JobWait },
    /// Waits for a value in memory, and polls it again at this running time; [`Polls`] has the poll.
    Wait { work: ScheduledJob, poll: Duration },
}

impl Parked {
    fn into_work(self) -> ScheduledJob {
        let (Self::Misses { work, .. }
        | Self::Invalidation(work)
        | Self::Fault { work, .. }
        | Self::Wait { work, .. }) = self;
        work
    }

    fn work(&self) -> &ScheduledJob {
        let (Self::Misses { work, .. }
        | Self::Invalidation(work)
        | Self::Fault { work, .. }
        | Self::Wait { work, .. }) = self;
        work
    }

    fn work_mut(&mut self) -> &mut ScheduledJob {
        let (Self::Misses { work, .. }
        | Self::Invalidation(work)
        | Self::Fault { work, .. }
        | Self::Wait { work, .. }) = self;
        work
    }
}

/// How soon a WAIT polls again at first; the interval doubles after each poll, up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_micros(50);
/// The longest interval between two polls of a WAIT.
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// The queue of jobs for the engines.
#[derive(Debug, Default)]
pub struct Schedule {
    ready: Ready,
    /// The device's time, and how much of it the device has been running.
    now: Duration,
    clock: RunningClock,
    parked: BTreeMap<JobId, Parked>,
    /// INVARIANT: the polls of the jobs that are parked for a WAIT, and of no others.
    polls: Polls,
    /// Every job from its first turn to its end, wherever it waits in between.
    footprints: Footprints,
    invalidations_ended: u64,
    /// How many waits for translations there have been, and how many at the last stop or reset: requests of those
    /// earlier waits are void.
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

    /// Adds a new job.
    pub fn submit(&mut self, job: Job) {
        self.ready.push_back(ScheduledJob { generation: self.generation, ..ScheduledJob::new(job) });
    }

    /// Sets the time. WAITs whose next poll is due become ready.
    pub fn set_time(&mut self, now: Duration) {
        self.now = self.now.max(now);
        let due = self.polls.take_due(self.running());
        self.poll(due);
    }

    /// When the time has to be set next if nothing else happens.
    pub fn next_poll(&self) -> Option<Duration> {
        self.clock.when(self.polls.next()?)
    }

    /// How long the device has been running. WAITs and SPINs are measured in it, so that a stop costs them no time.
    pub fn running(&self) -> Duration {
        self.clock.running(self.now)
    }

    /// The clock behind [`Self::running`], for engines that read it without the lock.
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

    /// Whether any job that has begun and not ended touches the range. Unlike a pin, which a job may lose and take
    /// again, and a section, which has no range, this says what the guest unmapped under a job.
    pub fn touches(&mut self, space: DomainId, range: ByteRange<Iova>) -> bool {
        self.footprints.touches(space, range)
    }

    /// What those jobs touch of the range, as far as an invalidation of it will be judged. No two ranges share a page,
    /// so each mapping there is named once, and whole.
    pub fn judged(&mut self, space: DomainId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        self.footprints.judged(space, range)
    }

    /// An invalidation removes these mappings.
    pub fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]) {
        self.footprints.suspect(by, mapped);
    }

    /// The front-end has answered a MISS that these jobs wait for or will need soon: judges earlier invalidations by
    /// it. A job in *fence* mode that has worked on memory, needs more of it, and finds it moved, fails: what it has
    /// done so far was on other memory.
    pub fn reveal(&mut self, revealed: &Revealed, asked: &[JobId]) -> Vec<JobVerdict> {
        let Self { footprints, parked, .. } = self;
        let asked: BTreeSet<JobId> = asked.iter().copied().collect();
        let job_verdicts = footprints.judge(revealed, |id| {
            let work = parked.get(&id).map(Parked::work);
            let stands = match work {
                Some(work) if work.checked => Stands::Checks,
                _ if asked.contains(&id) => Stands::Needs,
                _ => Stands::Apart,
            };
            (stands, work.and_then(|work| work.job.packet()))
        });
        let moved = |job_verdict: &&JobVerdict| {
            (job_verdict.verdict, job_verdict.mode) == (Verdict::Moved, Mode::Fence)
                && asked.contains(&job_verdict.job)
        };
        for JobVerdict { job, range, access, .. } in job_verdicts.iter().filter(moved) {
            let work = parked.get_mut(job).map(Parked::work_mut);
            if let Some(work) = work.filter(|work| work.stepped && !work.checked) {
                let range = Missing { space: revealed.space, range: *range, access: *access };
                work.failed.get_or_insert(JobError::Moved(range));
            }
        }
        job_verdicts
    }

    /// Earlier mappings become meaningless: the memory table changes, or the device stops.
    pub fn forget_suspects(&mut self) {
        self.footprints.forget();
    }

    /// How much was too much to be judged since the last call: jobs, and ranges that an invalidation removed. None of
    /// these becomes a violation.
    pub fn take_unjudged(&mut self) -> u64 {
        self.footprints.take_unjudged()
    }

    /// Whether engines have to give their jobs back: the device is stopped, or closes.
    pub fn is_stopped(&self) -> bool {
        self.paused || self.closing
    }

    /// How often everything was discarded. A job of an earlier generation has to leave its engine.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether an engine would find work.
    pub fn has_ready(&self) -> bool {
        self.ready() > 0
    }

    /// Jobs that wait for an answer, for a value in memory, or for the end of an invalidation.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Jobs that are not on an engine.
    pub fn waiting(&self) -> usize {
        self.ready.len().saturating_add(self.parked.len())
    }

    /// Takes back a job that has left its engine.
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
                self.poll_what_it_writes(work.job.id());
                // Before the response can reach the guest, which may then unmap the memory.
                self.footprints.end(work.job.id());
                return Disposed::Finished(FinishedJob { job: work.job, outcome });
            }
            Leaves::SliceOver => {
                // The job may have signalled meanwhile.
                self.poll_what_it_writes(work.job.id());
                self.ready.push_back(work);
            }
            Leaves::Waiting { until } => self.park_for_wait(work, until),
            Leaves::Preempted | Leaves::Evicted => self.put_back(work),
            Leaves::Invalidating => self.park_for_invalidation(work),
            Leaves::Missing(missing) => return self.park_for_misses(work, missing, Vec::new()),
            Leaves::Faulted { missing, ahead } => return self.park_for_misses(work, vec![missing], ahead),
            Leaves::RaisedFault(fault) => return self.park_for_fault(work, fault),
        }
        Disposed::Waits
    }

    /// What has to be requested for a job that is done: pages that an invalidation took and no answer has judged yet.
    /// The job's fence waits for that, so that a driver that unmaps after the fence is never mistaken for one that
    /// unmaps before it.
    fn to_check(&self, work: &ScheduledJob) -> Vec<Missing> {
        if work.checked || self.paused {
            return Vec::new();
        }
        self.footprints.to_check(work.job.id())
    }

    /// Puts back a job that was preempted: it is the next to run.
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
        // A pause drops all requests, so the job becomes ready and requests its pages again.
        if unanswered.pages() == 0 || self.paused {
            self.put_back(work);
            return Disposed::Waits;
        }
        self.waits = self.waits.wrapping_add(1);
        self.parked.insert(wait.job, Parked::Misses { work, unanswered });
        Disposed::Missing { wait, missing, ahead }
    }

    /// Parks a job until the driver has answered its fault.
    fn park_for_fault(&mut self, mut work: ScheduledJob, fault: TranslationFault) -> Disposed {
        let wait = JobWait { job: work.job.id(), number: self.waits };
        self.waits = self.waits.wrapping_add(1);
        let before = work.raised.take().filter(|(before, _)| before.repeats(&fault));
        let repeats = before.map_or(0, |(_, repeats)| repeats.saturating_add(1));
        work.raised = Some((fault, repeats));
        let space = work.job.space_of(&fault).map(Arc::downgrade).unwrap_or_default();
        let packet = work.job.packet();
        self.parked.insert(wait.job, Parked::Fault { work, wait });
        Disposed::Faulted(FaultedJob { wait, fault, packet, repeats, space })
    }

    /// The driver has answered a fault: the job tries again, or fails. Answers to another wait are ignored.
    pub fn fault_answered(&mut self, wait: JobWait, answer: Result<(), JobError>) {
        let waits = |parked: &Parked| matches!(parked, Parked::Fault { wait: other, .. } if *other == wait);
        if !self.parked.get(&wait.job).is_some_and(waits) {
            return;
        }
        if let Some(parked) = self.parked.remove(&wait.job) {
            let mut work = parked.into_work();
            work.failed = work.failed.or(answer.err());
            self.put_back(work);
        }
    }

    /// Parks a job until an invalidation ends, unless one has ended since an engine took the job.
    fn park_for_invalidation(&mut self, work: ScheduledJob) {
        if self.invalidations_ended == work.seen {
            self.parked.insert(work.job.id(), Parked::Invalidation(work));
        } else {
            self.put_back(work);
        }
    }

    /// Parks a job until its WAIT polls again, or times out.
    fn park_for_wait(&mut self, mut work: ScheduledJob, until: Duration) {
        if std::mem::replace(&mut work.wait_ends, until) != until {
            work.polls = 0;
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << work.polls.min(8)).min(LONGEST_PAUSE);
        work.polls = work.polls.saturating_add(1);
        let poll = self.running().saturating_add(pause).min(until);
        self.polls.add(poll, work.job.id());
        self.parked.insert(work.job.id(), Parked::Wait { work, poll });
    }

    /// What WAITs poll may have changed: those that share a backing to which this job writes poll now. Others, which
    /// reach its memory through another resource, poll when their time comes.
    fn poll_what_it_writes(&mut self, job: JobId) {
        for other in self.footprints.readers_of(job) {
            if let Some(Parked::Wait { poll, .. }) = self.parked.get(&other) {
                let poll = (*poll, other);
                self.polls.remove(poll);
                self.poll(BTreeSet::from([poll]));
            }
        }
    }

    /// Makes these waiting jobs ready to poll.
    fn poll(&mut self, jobs: BTreeSet<(Duration, JobId)>) {
        for (_, id) in jobs {
            if let Some(parked) = self.parked.remove(&id) {
                self.ready.push_poll(parked.into_work());
            }
        }
    }

    /// One page that a parked job waits for is answered. Answers to an earlier wait, and repeated ones, are ignored.
    pub fn miss_answered(&mut self, wait: JobWait, page: MissRequest, answer: Result<(), JobError>) {
        let Some(Parked::Misses { work, unanswered }) = self.parked.get_mut(&wait.job) else { return };
        if !unanswered.answered(wait, page) {
            return;
        }
        match answer {
            Ok(()) => {}
            // Perhaps the guest has changed the page tables meanwhile, and rightly unmapped what they named before.
            Err(JobError::Refused(Missing { range, access, .. })) if work.job.is_translated() => {
                let (page, before) = (range.first(), work.refused.take());
                let times =
                    before.filter(|it| (it.page, it.access) == (page, access)).map_or(0, |it| it.times);
                work.refused = Some(RefusedPage { page, access, times: times.saturating_add(1) });
            }
            Err(error) => _ = work.failed.get_or_insert(error),
        }
        if unanswered.pages() == 0
            && let Some(Parked::Misses { work, .. }) = self.parked.remove(&wait.job)
        {
            self.put_back(work);
        }
    }

    /// Whether requests of this wait are still valid: the device was not stopped or reset since. Requests of other
    /// waits must not be sent to the front-end, since perhaps no job uses their pages.
    pub fn is_current(&self, wait: JobWait) -> bool {
        wait.number >= self.stale_waits
    }

    /// An invalidation has ended: jobs that waited for that try again.
    pub fn invalidation_ended(&mut self) {
        self.invalidations_ended = self.invalidations_ended.wrapping_add(1);
        self.unpark(|parked| matches!(parked, Parked::Invalidation(_)));
    }

    /// Stops the engines at their next step; all jobs stay. Parked ones forget what they wait for, unless it is the driver's
    /// answer to a fault.
    pub fn pause(&mut self, now: Duration) {
        self.set_time(now);
        self.clock.pause(self.now);
        self.paused = true;
        self.stale_waits = self.waits;
        self.polls.take_all();
        self.unpark(|parked| !matches!(parked, Parked::Fault { .. }));
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&mut self, now: Duration) {
        self.set_time(now);
        self.clock.resume(self.now);
        self.paused = false;
    }

    /// Discards every job. One that is on an engine comes back as [`Disposed::Stale`], and never runs again.
    pub fn discard(&mut self) {
        self.ready.clear();
        self.parked.clear();
        self.stale_waits = self.waits;
        self.polls.take_all();
        self.footprints.clear();
        self.generation = self.generation.wrapping_add(1);
    }

    /// Whether the engines have to end.
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// Jobs that are ready.
    pub fn ready(&self) -> usize {
        if self.paused { 0 } else { self.ready.len() }
    }

    /// Ends the engines at their next step.
    pub fn close(&mut self) {
        self.closing = true;
    }

    /// Makes those parked jobs ready that `which` selects, oldest first.
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
mod turn_tests;
#[cfg(test)]
mod verdict_tests;

#[cfg(test)]
mod tests;
