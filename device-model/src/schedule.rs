//! Which job an engine takes next, and where jobs wait. A parked job holds no section and no pin (I4): it is a
//! value in a map, until every page that it waits for is answered or the invalidation in its way has ended.
//!
//! A state machine of values: whoever shares it between threads puts a lock around it and wakes the engines. Knows
//! nothing of threads, of the mirror, or of how a miss is asked for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use job_stream::Priority;

use crate::addr::{ByteRange, Iova, SpaceId};
use crate::engine::{Leaves, Left};
use crate::job::{Job, JobError, JobId, JobOutcome};
use crate::mmu::{Missing, PinRange};

/// A job on its way through the engines.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct Work {
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
    life: u64,
    /// How often its WAIT has looked in vain since it was last told to look.
    looks: u32,
}

impl Work {
    /// A job that has not started.
    pub fn new(job: Job) -> Self {
        Self { job, pin_attempts: 0, missed: None, failed: None, seen: 0, life: 0, looks: 0 }
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
    Run(Work),
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
    /// It waits for these: they are to be asked for. It is parked already, so that the answers find it.
    Missing(JobId, Vec<Missing>),
    /// It waits for its turn, or for the end of an invalidation.
    Waits,
    /// It is from before everything was discarded: nobody waits for it any more.
    Stale,
}

#[derive(Debug)]
enum Parked {
    /// Waits for this many answers.
    Misses { work: Work, left: usize },
    /// Waits for the end of an invalidation.
    Invalidation(Work),
    /// Looks again at this time whether a value in memory is what it waits for.
    Wait { work: Work, look: Duration },
}

impl Parked {
    fn into_work(self) -> Work {
        let (Self::Misses { work, .. } | Self::Invalidation(work) | Self::Wait { work, .. }) = self;
        work
    }
}

/// How soon a WAIT looks again at first; twice as long after each time, up to [`LONGEST_LOOK`].
const FIRST_LOOK: Duration = Duration::from_micros(50);
/// How long a WAIT leaves memory unlooked at.
const LONGEST_LOOK: Duration = Duration::from_millis(1);

/// Turns of higher priorities after which one of the lowest that is ready comes.
const PATIENCE: u32 = 16;

/// The jobs that are ready: by priority, and in turn within one.
#[derive(Debug, Default)]
struct Ready {
    /// Low, normal, high.
    queues: [VecDeque<Work>; 3],
    /// Turns since one of the lowest had one.
    passed_over: u32,
}

impl Ready {
    fn queue(&mut self, work: &Work) -> &mut VecDeque<Work> {
        let [low, normal, high] = &mut self.queues;
        match work.job.priority() {
            Priority::Low => low,
            Priority::Normal => normal,
            Priority::High => high,
        }
    }

    fn push_back(&mut self, work: Work) {
        self.queue(&work).push_back(work);
    }

    fn push_front(&mut self, work: Work) {
        self.queue(&work).push_front(work);
    }

    /// The highest priority first; but whoever has waited long enough comes too.
    fn pop(&mut self) -> Option<Work> {
        let mut busy = self.queues.iter_mut().filter(|queue| !queue.is_empty());
        let (lowest, highest) = (busy.next()?, busy.next_back());
        let chosen = match highest {
            Some(highest) if self.passed_over < PATIENCE => {
                self.passed_over = self.passed_over.saturating_add(1);
                highest
            }
            _ => {
                self.passed_over = 0;
                lowest
            }
        };
        chosen.pop_front()
    }

    fn len(&self) -> usize {
        self.queues.iter().map(VecDeque::len).sum()
    }

    fn clear(&mut self) {
        self.queues.iter_mut().for_each(VecDeque::clear);
    }
}

/// The queue of work before the engines.
#[derive(Debug, Default)]
pub struct Schedule {
    ready: Ready,
    now: Duration,
    parked: BTreeMap<JobId, Parked>,
    /// What each job touches, from when an engine first took it to its end, wherever it waits in between.
    begun: BTreeMap<JobId, Vec<PinRange>>,
    invalidations_ended: u64,
    /// How often everything was discarded.
    life: u64,
    paused: bool,
    closing: bool,
}

impl Schedule {
    /// A schedule without work, paused until the device starts.
    pub fn new() -> Self {
        Self { paused: true, ..Self::default() }
    }

    /// Takes a new job.
    pub fn submit(&mut self, job: Job) {
        self.ready.push_back(Work { life: self.life, ..Work::new(job) });
    }

    /// Sets the time. WAITs whose time it is to look again are ready.
    pub fn set_time(&mut self, now: Duration) {
        self.now = self.now.max(now);
        let now = self.now;
        self.unpark(|parked| matches!(parked, Parked::Wait { look, .. } if *look <= now));
    }

    /// When the time is to be set next, if there is nothing else to do.
    pub fn next_look(&self) -> Option<Duration> {
        let look = |parked: &Parked| match parked {
            Parked::Wait { look, .. } => Some(*look),
            Parked::Misses { .. } | Parked::Invalidation(_) => None,
        };
        self.parked.values().filter_map(look).min().filter(|_| !self.paused)
    }

    /// What an engine does next.
    pub fn turn(&mut self) -> Turn {
        if self.closing {
            return Turn::Close;
        }
        let work = if self.paused { None } else { self.ready.pop() };
        match work {
            Some(work) => {
                self.begun.entry(work.job.id()).or_insert_with(|| work.job.working_set());
                Turn::Run(Work { seen: self.invalidations_ended, ..work })
            }
            None => Turn::Wait,
        }
    }

    /// Whether a job that has begun and not ended touches any of the range. Unlike a pin, which a job loses and takes
    /// anew, and a section, which has no range, this says what the guest took away under a job.
    pub fn touches(&self, space: SpaceId, range: ByteRange<Iova>) -> bool {
        let overlaps = |used: &PinRange| used.space == space && used.range.page_aligned().overlaps(range);
        self.begun.values().flatten().any(overlaps)
    }

    /// Whether an engine has to put its job back at the next step.
    pub fn must_leave(&self) -> bool {
        self.paused || self.closing
    }

    /// Whether an engine would find work.
    pub fn has_ready(&self) -> bool {
        !self.paused && self.ready.len() > 0
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
        if work.life != self.life {
            return Disposed::Stale;
        }
        match leaves {
            Leaves::Finished(outcome) => {
                // Before its answer can reach the guest, who may take the memory away then.
                self.begun.remove(&work.job.id());
                self.look_now();
                return Disposed::Finished(FinishedJob { job: work.job, outcome });
            }
            Leaves::SliceOver => {
                // It may have signalled meanwhile.
                self.look_now();
                self.ready.push_back(work);
            }
            Leaves::Waiting { until } => self.park_for_wait(work, until),
            Leaves::TakenOff | Leaves::Evicted => self.put_back(work),
            Leaves::Invalidating => self.park_for_invalidation(work),
            Leaves::Missing(missing) => {
                let id = work.job.id();
                self.park_for_misses(work, pages_of(&missing));
                return Disposed::Missing(id, missing);
            }
        }
        Disposed::Waits
    }

    /// Puts a job back that was taken off its engine: it is the next to go on.
    fn put_back(&mut self, work: Work) {
        self.ready.push_front(work);
    }

    /// Parks a job until `pages` answers have come.
    fn park_for_misses(&mut self, work: Work, pages: usize) {
        // A pause answers nothing any more: whatever was asked for is forgotten, and asked again.
        if pages == 0 || self.paused {
            self.put_back(work);
        } else {
            self.parked.insert(work.job.id(), Parked::Misses { work, left: pages });
        }
    }

    /// Parks a job until an invalidation ends, if none has since an engine took the job.
    fn park_for_invalidation(&mut self, work: Work) {
        if self.invalidations_ended == work.seen {
            self.parked.insert(work.job.id(), Parked::Invalidation(work));
        } else {
            self.put_back(work);
        }
    }

    /// Parks a job until it looks again, or gives up.
    fn park_for_wait(&mut self, mut work: Work, until: Duration) {
        let pause = FIRST_LOOK.saturating_mul(1 << work.looks.min(8)).min(LONGEST_LOOK);
        work.looks = work.looks.saturating_add(1);
        let look = self.now.saturating_add(pause).min(until);
        self.parked.insert(work.job.id(), Parked::Wait { work, look });
    }

    /// What WAITs look at may have changed.
    fn look_now(&mut self) {
        self.unpark(|parked| matches!(parked, Parked::Wait { .. }));
    }

    /// One page that a parked job waits for is answered.
    pub fn miss_answered(&mut self, id: JobId, answer: Result<(), JobError>) {
        let Some(Parked::Misses { work, left }) = self.parked.get_mut(&id) else { return };
        *left = left.saturating_sub(1);
        if let Err(error) = answer {
            work.failed.get_or_insert(error);
        }
        if *left == 0
            && let Some(Parked::Misses { work, .. }) = self.parked.remove(&id)
        {
            self.put_back(work);
        }
    }

    /// An invalidation has ended: whoever waited for that tries again.
    pub fn invalidation_ended(&mut self) {
        self.invalidations_ended = self.invalidations_ended.wrapping_add(1);
        self.unpark(|parked| matches!(parked, Parked::Invalidation(_)));
    }

    /// Stops the engines at their next step; all jobs stay. Parked ones forget what they wait for.
    pub fn pause(&mut self) {
        self.paused = true;
        self.unpark(|_| true);
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&mut self) {
        self.paused = false;
    }

    /// Discards every job. What an engine has comes back as [`Disposed::Stale`], and never runs again.
    pub fn discard(&mut self) {
        self.ready.clear();
        self.parked.clear();
        self.begun.clear();
        self.life = self.life.wrapping_add(1);
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

/// How many answers a request for all of `missing` brings: one for every page and access, however often it is named.
pub fn pages_of(missing: &[Missing]) -> usize {
    let pages =
        missing.iter().flat_map(|missing| missing.pages().map(|page| (missing.space, missing.access, page)));
    pages.collect::<BTreeSet<_>>().len()
}

mod status;

pub use status::{AtRest, JobState, JobStatus};

#[cfg(test)]
mod turns;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Access;
    use crate::device::{Device, DeviceConfig, Effect};
    use crate::scanout::Rect;
    use crate::testing::requests::{attach_backing, create_2d, transfer_to_host_2d};

    const BACKING: u64 = 0x10_0000;

    /// A transfer of one page at [`BACKING`].
    fn job() -> Job {
        let mut device = Device::new(DeviceConfig::default());
        let mut effects = Vec::new();
        let all = Rect { x: 0, y: 0, width: 32, height: 32 };
        for request in
            [create_2d(1, 1, 32, 32), attach_backing(1, &[(BACKING, 4096)]), transfer_to_host_2d(1, all, 0)]
        {
            device.control(&request, (), &mut effects);
        }
        let run = effects.into_iter().find_map(|effect| match effect {
            Effect::Run(job) => Some(job),
            _ => None,
        });
        run.unwrap()
    }

    fn schedule() -> Schedule {
        let mut schedule = Schedule::new();
        schedule.resume();
        schedule.submit(job());
        schedule
    }

    fn take(schedule: &mut Schedule) -> Work {
        match schedule.turn() {
            Turn::Run(work) => work,
            other => panic!("{other:?}"),
        }
    }

    fn page(start: u64) -> ByteRange<Iova> {
        ByteRange::new(Iova::new(start), 4096).unwrap()
    }

    fn missing(starts: &[u64]) -> Leaves {
        let one = |start: &u64| Missing { space: SpaceId::DEVICE, range: page(*start), access: Access::Read };
        Leaves::Missing(starts.iter().map(one).collect())
    }

    #[test]
    fn a_job_is_in_flight_from_its_first_turn_to_its_end_wherever_it_waits() {
        let mut schedule = schedule();
        assert!(!schedule.touches(SpaceId::DEVICE, page(BACKING)));
        let work = take(&mut schedule);
        let id = work.job.id();
        assert!(matches!(
            schedule.dispose(Left { work, leaves: missing(&[BACKING]) }),
            Disposed::Missing(..)
        ));
        assert!(schedule.touches(SpaceId::DEVICE, page(BACKING)));
        assert!(!schedule.touches(SpaceId::DEVICE, page(BACKING + 4096)));
        schedule.miss_answered(id, Ok(()));
        let work = take(&mut schedule);
        let left = Left { work, leaves: Leaves::Finished(JobOutcome::Done) };
        assert!(matches!(schedule.dispose(left), Disposed::Finished(_)));
        assert!(!schedule.touches(SpaceId::DEVICE, page(BACKING)));
    }

    #[test]
    fn a_job_goes_on_when_every_page_is_answered_and_a_page_named_twice_is_one() {
        let mut schedule = schedule();
        let work = take(&mut schedule);
        let id = work.job.id();
        let leaves = missing(&[BACKING, BACKING + 4096, BACKING]);
        assert!(matches!(schedule.dispose(Left { work, leaves }), Disposed::Missing(..)));
        schedule.miss_answered(id, Ok(()));
        assert!(matches!(schedule.turn(), Turn::Wait));
        schedule.miss_answered(id, Err(JobError::Killed));
        assert_eq!(take(&mut schedule).failed, Some(JobError::Killed));
    }

    #[test]
    fn an_invalidation_that_ended_before_the_job_was_parked_does_not_park_it() {
        let mut schedule = schedule();
        let work = take(&mut schedule);
        schedule.invalidation_ended();
        let left = Left { work, leaves: Leaves::Invalidating };
        assert!(matches!(schedule.dispose(left), Disposed::Waits));
        let work = take(&mut schedule);
        let left = Left { work, leaves: Leaves::Invalidating };
        assert!(matches!(schedule.dispose(left), Disposed::Waits));
        assert!(matches!(schedule.turn(), Turn::Wait));
        schedule.invalidation_ended();
        drop(take(&mut schedule));
    }

    /// A reset comes while an engine has the job, and the engine puts it back only then.
    #[test]
    fn a_job_from_before_a_discard_never_runs_again() {
        let ways = [Leaves::TakenOff, Leaves::Evicted, Leaves::Invalidating, missing(&[BACKING])];
        for leaves in ways.into_iter().chain([Leaves::Finished(JobOutcome::Done)]) {
            let mut schedule = schedule();
            let work = take(&mut schedule);
            schedule.pause();
            schedule.discard();
            assert!(matches!(schedule.dispose(Left { work, leaves }), Disposed::Stale));
            schedule.resume();
            assert!(matches!(schedule.turn(), Turn::Wait));
            assert!(!schedule.touches(SpaceId::DEVICE, page(BACKING)));
        }
    }

    #[test]
    fn a_pause_keeps_every_job_and_forgets_what_it_waits_for() {
        let mut schedule = schedule();
        let work = take(&mut schedule);
        assert!(matches!(
            schedule.dispose(Left { work, leaves: missing(&[BACKING]) }),
            Disposed::Missing(..)
        ));
        schedule.pause();
        assert!(matches!(schedule.turn(), Turn::Wait) && schedule.must_leave());
        schedule.resume();
        drop(take(&mut schedule));
    }
}
