//! Which job an engine takes next, and where jobs wait. A parked job holds no section and no pin (I4): it is a
//! value in a map, until every page that it waits for is answered or the invalidation in its way has ended.
//!
//! A state machine of values: whoever shares it between threads puts a lock around it and wakes the engines. Knows
//! nothing of threads, of the mirror, or of how a miss is asked for.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use job_stream::Priority;

use crate::engine::{Leaves, Left};
use crate::job::{Job, JobError, JobId, JobOutcome};
use crate::mmu::Missing;

/// A job on its way through the engines.
#[derive(Debug)]
#[must_use = "somebody waits for the end of this job"]
pub struct Work {
    /// What is to be done.
    pub job: Job,
    /// How often an invalidation came between the answers to its misses and its pin.
    pub pin_attempts: u32,
    /// The answer to a miss of it was no: an engine ends the job with this.
    pub failed: Option<JobError>,
    /// How many invalidations had ended when an engine took it: before any pin of it was tried.
    seen: u64,
    /// How often its WAIT has looked in vain since it was last told to look.
    looks: u32,
}

impl Work {
    /// A job that has not started.
    pub fn new(job: Job) -> Self {
        Self { job, pin_attempts: 0, failed: None, seen: 0, looks: 0 }
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
    invalidations_ended: u64,
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
        self.ready.push_back(Work::new(job));
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
            Some(work) => Turn::Run(Work { seen: self.invalidations_ended, ..work }),
            None => Turn::Wait,
        }
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
        match leaves {
            Leaves::Finished(outcome) => {
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

    /// Discards every job that no engine has. What an engine has comes back, and is recognised as stale.
    pub fn discard(&mut self) {
        self.ready.clear();
        self.parked.clear();
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

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use job_stream::{At, Compare, Limits, Mode, Space, Stream, verify};

    use super::*;
    use crate::backing::Backing;
    use crate::job::Treatment;
    use crate::operands::{self, Operands};
    use crate::program::Execution;

    fn job(id: u64, priority: Priority) -> Job {
        let wait = Stream::new().wait(At::new(Space::resource(1), 0), Compare::Equal, 1, 0);
        let program = verify(&wait.finish(), &Limits::default()).unwrap();
        let entry = crate::request::RawEntry { at: crate::addr::Iova::new(0), len: 4096 };
        let space = |_| Ok(operands::Space { bytes: 4096, backing: Backing::new(std::iter::once(entry))? });
        let execution = Execution::new(Operands::new(program, space).unwrap(), Duration::from_secs(1));
        Job::program(JobId(id), Treatment { mode: Mode::Fault, priority }, execution)
    }

    fn turn(schedule: &mut Schedule) -> ControlFlow<Work, ()> {
        match schedule.turn() {
            Turn::Run(work) => ControlFlow::Break(work),
            Turn::Wait | Turn::Close => ControlFlow::Continue(()),
        }
    }

    fn next(schedule: &mut Schedule) -> Option<Work> {
        turn(schedule).break_value()
    }

    #[test]
    fn the_highest_priority_comes_first_and_the_lowest_comes_too() {
        let mut schedule = Schedule::new();
        schedule.resume();
        schedule.submit(job(0, Priority::Low));
        (1..40).for_each(|id| schedule.submit(job(id, Priority::High)));
        let order: Vec<u64> =
            std::iter::from_fn(|| next(&mut schedule)).map(|work| work.job.id().raw()).collect();
        assert_eq!(order[..3], [1, 2, 3]);
        assert_eq!(order.iter().position(|id| *id == 0), Some(PATIENCE as usize));
        assert_eq!(order.len(), 40);
    }

    #[test]
    fn a_job_whose_slice_is_over_comes_after_the_others() {
        let mut schedule = Schedule::new();
        schedule.resume();
        (0..2).for_each(|id| schedule.submit(job(id, Priority::Normal)));
        let work = next(&mut schedule).unwrap();
        assert!(matches!(schedule.dispose(Left { work, leaves: Leaves::SliceOver }), Disposed::Waits));
        assert_eq!(
            [next(&mut schedule), next(&mut schedule)].map(|work| work.unwrap().job.id().raw()),
            [1, 0]
        );
    }

    #[test]
    fn a_wait_looks_again_later_and_later_and_at_once_when_another_job_has_ended() {
        let mut schedule = Schedule::new();
        schedule.resume();
        (0..2).for_each(|id| schedule.submit(job(id, Priority::Normal)));
        let (mut waiting, other) = (next(&mut schedule).unwrap(), next(&mut schedule).unwrap());
        let mut now = Duration::ZERO;
        for pause in [50, 100, 200, 400, 800, 1000, 1000] {
            let leaves = Leaves::Waiting { until: Duration::from_secs(1) };
            let _ = schedule.dispose(Left { work: waiting, leaves });
            assert_eq!(schedule.next_look(), Some(now + Duration::from_micros(pause)));
            schedule.set_time(now + Duration::from_micros(pause - 1));
            assert!(next(&mut schedule).is_none());
            now += Duration::from_micros(pause);
            schedule.set_time(now);
            waiting = next(&mut schedule).unwrap();
        }
        let leaves = Leaves::Waiting { until: now + Duration::from_micros(7) };
        let _ = schedule.dispose(Left { work: waiting, leaves });
        assert_eq!(schedule.next_look(), Some(now + Duration::from_micros(7)), "no later than it gives up");
        let _ = schedule.dispose(Left { work: other, leaves: Leaves::Finished(JobOutcome::Done) });
        assert_eq!((next(&mut schedule).unwrap().job.id().raw(), schedule.next_look()), (0, None));
    }
}
