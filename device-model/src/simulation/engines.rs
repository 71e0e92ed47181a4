//! The model's engines: each has a reader and at most one job, and does one step per call. Operations within a step
//! happen at one of its accesses, with the section open or the pin held. The oracle sees every access before it is
//! made.

use std::ops::ControlFlow;
use std::time::Duration;

use job_stream::Mode;

use super::bug::Bug;
use super::checked::{Checked, Toucher};
use super::oracle::{Invariant, violation};
use super::queue::Mail;
use super::world::{Cursor, Readers, World};
use crate::addr::ByteRange;
use crate::jobs::engine::{EngineHost, Leaves, Left, Running};
use crate::jobs::job::{Job, JobError, JobOutcome, Step, StepContext};
use crate::jobs::schedule::{Disposed, ScheduledJob, Turn};
use crate::mmu::miss::MissRequest;
use crate::mmu::{JobMemory, Missing, PinRange, Reader, SeededBug};
use crate::session::miss_port::Waiter;

/// The job of an engine.
#[derive(Debug, Default)]
enum Slot {
    #[default]
    Nothing,
    Job(Box<Running>),
    /// A job in the middle of a step.
    Stepping,
}

#[derive(Debug, Default)]
pub(super) struct Engine {
    slot: Slot,
    /// What its last job lacks and has not been requested yet.
    asks: Vec<(Waiter, Missing)>,
    /// It hangs.
    wedged: bool,
    /// Completed turns.
    pub(super) turns: u64,
}

impl Engine {
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.slot, Slot::Nothing) && self.asks.is_empty()
    }

    pub(super) fn is_wedged(&self) -> bool {
        self.wedged
    }

    /// The mode of its job.
    fn mode(&self) -> Option<Mode> {
        match &self.slot {
            Slot::Job(running) => Some(running.job().mode()),
            Slot::Nothing | Slot::Stepping => None,
        }
    }

    pub(super) fn has_job(&self) -> bool {
        !matches!(self.slot, Slot::Nothing)
    }

    /// Whether it has completed a step since this number of turns, and no longer holds a pin that a drain waits for.
    pub(super) fn has_left(&self, turns: u64) -> bool {
        match &self.slot {
            Slot::Nothing => true,
            Slot::Job(running) => {
                let holds = running.is_pinned() && running.job().mode() != Mode::Preempt;
                self.turns > turns && !holds && !self.wedged
            }
            Slot::Stepping => false,
        }
    }

    /// Whether its job spins: only time advances it.
    pub(super) fn spins(&self) -> bool {
        matches!(&self.slot, Slot::Job(running) if running.job().is_spinning())
    }

    pub(super) fn wedge(&mut self) {
        self.wedged = matches!(&self.slot, Slot::Job(running) if running.is_pinned());
    }

    pub(super) fn unwedge(&mut self) {
        self.wedged = false;
    }
}

/// Operations within a step: this many, from access number `access` on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around {
    pub(super) access: u8,
    pub(super) take: u8,
}

impl World {
    pub(super) fn engines_busy(&self) -> usize {
        self.engines.iter().filter(|engine| engine.has_job()).count()
    }

    pub(super) fn is_wedged(&self) -> bool {
        self.engines.iter().any(Engine::is_wedged)
    }

    /// An engine does the next thing: it requests what its last job lacked, takes a job, or makes a step.
    pub(super) fn engine_turn(
        &mut self,
        (readers, cursor): (&Readers, &mut Cursor<'_>),
        number: usize,
        budget: usize,
        around: Option<Around>,
    ) {
        let engine = &mut self.engines[number];
        if engine.wedged {
            return;
        }
        if !engine.asks.is_empty() {
            for (waiter, missing) in engine.asks.drain(..) {
                self.session.port.request(waiter, vec![missing]);
            }
            return;
        }
        let reader = &readers.engines[number];
        if self.bug != Some(Bug::ForgetToLookAgain) {
            self.session.schedule_mut().set_time(self.now);
        }
        let flow = match std::mem::take(&mut engine.slot) {
            Slot::Stepping => {
                engine.slot = Slot::Stepping;
                return;
            }
            Slot::Nothing => match self.session.schedule_mut().turn() {
                Turn::Run(work) => {
                    self.held.remove(&work.job.id());
                    self.suspicions.begin(&work.job);
                    Running::start(reader, work)
                }
                Turn::Wait | Turn::Close => return,
            },
            Slot::Job(running) => {
                engine.slot = Slot::Stepping;
                let pinned = running.is_pinned();
                let host = Host { world: self, readers, cursor, number, budget, around, accesses: 0, pinned };
                running.step(reader, &mut { host })
            }
        };
        self.engines[number].turns += 1;
        match flow {
            ControlFlow::Continue(running) => {
                self.event("on engine", number as u64, running.job().id().raw());
                self.engines[number].slot = Slot::Job(Box::new(running));
            }
            ControlFlow::Break(left) => {
                self.engines[number].slot = Slot::Nothing;
                if self.is(Bug::HoldAndWait) {
                    self.hold(reader, &left);
                }
                self.dispose(number, left);
            }
        }
    }

    /// Whether there are jobs on engines, and all of them are in registration cache mode.
    pub(super) fn only_caches_have_pins(&self) -> bool {
        let mut modes = self.engines.iter().filter_map(Engine::mode);
        modes.all(|mode| mode == Mode::RegistrationCache)
    }

    /// The seeded bug: pins what is mapped while the rest is requested.
    fn hold(&mut self, reader: &Reader, left: &Left) {
        if matches!(left.leaves, Leaves::Missing(_) | Leaves::Faulted { .. }) {
            let wanted = left.work.job.working_set();
            let pages = wanted.iter().flat_map(|all| {
                let pin = |at| Some(PinRange { range: ByteRange::new(at, 1).ok()?, ..*all });
                all.range.pages().filter_map(pin).collect::<Vec<_>>()
            });
            let pins = pages.filter_map(|page| reader.pin(&[page]).ok()).collect();
            self.held.insert(left.work.job.id(), pins);
        }
    }

    fn dispose(&mut self, number: usize, left: Left) {
        let id = left.work.job.id();
        self.event("off engine", id.raw(), leaves_code(&left.leaves));
        self.count_leaving(&left);
        if matches!(left.leaves, Leaves::Evicted) {
            self.copies.entry(id).or_default().evicted = true;
        }
        let taken_off = matches!(left.leaves, Leaves::Preempted | Leaves::Evicted);
        if taken_off && !self.session.core.is_running() && self.is(Bug::LoseJobOverStop) {
            return;
        }
        let (is_checked, is_done) = (left.work.checked, left.leaves == Leaves::Finished(JobOutcome::Done));
        match self.session.schedule_mut().dispose(left) {
            Disposed::Finished(finished) => {
                self.copies.remove(&id);
                self.finished(&finished.job, finished.outcome, is_checked);
                self.queue.mailbox.push_back(Mail::JobFinished(finished));
            }
            Disposed::Missing { wait, missing, ahead } => {
                if is_done {
                    self.counts.fences_that_waited_for_answers += 1;
                    self.suspicions.asks(wait.job);
                }
                if is_done && self.is(Bug::TellFenceUnchecked) {
                    for (one, iova) in missing.iter().flat_map(|one| one.pages().map(move |iova| (one, iova)))
                    {
                        let page = MissRequest { space: one.space, access: one.access, iova };
                        self.session.schedule_mut().miss_answered(wait, page, Ok(()));
                    }
                    return;
                }
                let waits = missing.into_iter().map(|missing| (Waiter::Job(wait), missing));
                self.engines[number].asks =
                    waits.chain(ahead.into_iter().map(|ahead| (Waiter::Ahead(wait), ahead))).collect();
            }
            Disposed::Faulted(faulted) => self.queue.mailbox.push_back(Mail::JobFaulted(faulted)),
            Disposed::Stale => self.counts.stale_jobs += 1,
            Disposed::Waits => {}
        }
    }

    fn count_leaving(&mut self, left: &Left) {
        let counts = &mut self.counts;
        match &left.leaves {
            Leaves::Missing(_) | Leaves::Faulted { .. } => counts.parked_for_misses += 1,
            Leaves::Invalidating => counts.parked_for_invalidations += 1,
            Leaves::Evicted if left.work.job.mode() == Mode::Preempt => counts.preempted += 1,
            Leaves::Evicted => counts.evictions += 1,
            Leaves::SliceOver => counts.slices_over += 1,
            Leaves::Waiting { .. } => counts.waits_parked += 1,
            Leaves::Preempted => counts.taken_off += 1,
            Leaves::Finished(_) | Leaves::RaisedFault(_) => {}
        }
    }

    /// A job has ended.
    fn finished(&mut self, job: &Job, outcome: JobOutcome, is_checked: bool) {
        let counts = &mut self.counts;
        match outcome {
            JobOutcome::Done => counts.jobs_done += 1,
            JobOutcome::Failed(_) => counts.jobs_failed += 1,
        }
        if job.context().is_some() {
            counts.stream_ends(job.mode(), outcome);
        }
        if let Some(stream) = self.oracle.stream(job.id()) {
            let seen = stream.follower.seen;
            counts.bulk_packets += seen.bulk;
            counts.value_packets += seen.values;
            counts.waits_that_held += seen.waits;
            counts.user_fences_done += u64::from(stream.follower.has_told_success());
            counts.user_fences_failed += u64::from(stream.follower.has_told_failure());
        }
        let (is_done, there) = (outcome == JobOutcome::Done, (&self.guest, &self.memory));
        let ended = self.oracle.job_ended(job.id(), outcome, &self.guest, self.ran);
        let ended = ended.and(self.oracle.transfer_ends(job.id(), is_done, there, &mut self.counts));
        // What a stop has interrupted is not requested again.
        let is_open = self.suspicions.is_open(job.id(), is_checked) && self.session.core.is_running();
        if let Err(violation) = ended {
            self.fail(violation);
        } else if is_open && is_done {
            let what =
                format!("Job {} tells its fence before anybody knows what INVALIDATEs meant", job.id().raw());
            self.fail(violation(Invariant::Verdict, what));
        }
        self.suspicions.end(job.id());
    }
}

/// The host of an engine's steps.
pub(super) struct Host<'a, 'o> {
    pub(super) world: &'a mut World,
    pub(super) readers: &'a Readers,
    pub(super) cursor: &'a mut Cursor<'o>,
    number: usize,
    budget: usize,
    pub(super) around: Option<Around>,
    /// Accesses of this step so far.
    pub(super) accesses: u8,
    pinned: bool,
}

impl Host<'_, '_> {
    /// How long the device has been running, or, with a seeded bug, has existed.
    fn running(&self, now: Duration) -> Duration {
        if self.world.is(Bug::WaitOverStop) {
            now
        } else {
            self.world.session.schedule().clock().running(now)
        }
    }
}

impl EngineHost for Host<'_, '_> {
    fn now(&self) -> Duration {
        self.world.now
    }

    fn step(&mut self, job: &mut Job, memory: &impl JobMemory) -> Step {
        let (id, now, mode) = (job.id(), self.world.now, job.mode());
        self.world.counts.steps += 1;
        self.world.counts.section_steps += u64::from(!self.pinned);
        let World { oracle, guest, memory: frames, .. } = &mut *self.world;
        let is_dead = match oracle.step_begins(id, guest, frames) {
            Ok(is_dead) => is_dead,
            Err(violation) => {
                self.world.fail(violation);
                false
            }
        };
        self.world.counts.steps_of_the_dead += u64::from(is_dead);
        if self.world.is(Bug::SkipKill) {
            job.skip_kill(SeededBug::signal_before_write());
        }
        let toucher =
            Toucher { job: Some(id), is_dead, keeps: self.pinned && mode == Mode::RegistrationCache };
        let (budget, early) = (self.budget, self.world.is(Bug::SignalBeforeItsData));
        let goes_stale = matches!(mode, Mode::Strict | Mode::Fault);
        let running = self.running(now);
        let (was_spinning, context) = (job.is_spinning(), StepContext { now, running, budget });
        let times = (now, self.world.ran);
        let checked = Checked::new(memory, toucher, (times, goes_stale), self);
        if early {
            job.signal_early(&checked, SeededBug::signal_before_write());
        }
        let mut step = job.step(&checked, context);
        if was_spinning && step == Step::Yield && job.is_cancelled() && self.world.is(Bug::FenceWithSpin) {
            let section = self.readers.engines[self.number].enter();
            step = job.step(&Checked::new(&section, toucher, (times, goes_stale), self), context);
        }
        if step == Step::Yield && self.world.is(Bug::SignalBeforeWrite) {
            return Step::Done;
        }
        let World { oracle, memory: frames, counts, .. } = &mut *self.world;
        match step {
            Step::Done => {
                if let Err(violation) = oracle.step_ends(id, frames, counts) {
                    self.world.fail(violation);
                }
            }
            Step::Spinning { stubborn } => counts.stubborn_spins += u64::from(stubborn),
            Step::Error(JobError::Killed) => counts.kills += 1,
            Step::Error(JobError::WaitTimedOut { .. }) => counts.waits_in_vain += 1,
            Step::Error(JobError::Wedged { .. }) => counts.taken_off_by_force += 1,
            _ => {}
        }
        step
    }

    fn must_leave(&self, work: &ScheduledJob) -> bool {
        let schedule = self.world.session.schedule();
        let is_old = schedule.generation() != work.generation();
        schedule.is_stopped() || is_old && !self.world.is(Bug::RunOnAfterReset)
    }

    fn flush_ended(&mut self) {
        self.world.queue.mailbox.push_back(Mail::FlushEnded);
    }

    fn is_wanted(&self) -> bool {
        self.world.session.schedule().has_ready()
    }
}

fn leaves_code(leaves: &Leaves) -> u64 {
    match leaves {
        Leaves::Finished(JobOutcome::Done) => 0,
        Leaves::Finished(JobOutcome::Failed(_)) => 1,
        Leaves::Preempted => 2,
        Leaves::Evicted => 3,
        Leaves::Missing(_) | Leaves::Faulted { .. } => 4,
        Leaves::Invalidating => 5,
        Leaves::SliceOver => 6,
        Leaves::Waiting { .. } => 7,
        Leaves::RaisedFault(_) => 8,
    }
}
