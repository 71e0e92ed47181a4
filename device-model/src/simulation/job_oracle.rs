//! The invariants of job streams: which are accepted, in which order they start, what their steps may touch, how they
//! end, and what may cause a failure. The part of the oracle that knows contexts.

use job_stream::{Mode, Packet, SpinBehaviour};

use super::follower::JobEvent;
use super::guest::{Guest, page_at};
use super::memory::Memory;
use super::oracle::{Command, Invariant, Kind, Oracle, State, Violation, violation};
use super::streams::number_of;
use super::submitted::{ContextKey, Stage, Submitted};
use super::trace::Counts;
use crate::addr::Access;
use crate::jobs::job::{Job, JobError, JobId, JobOutcome};
use crate::mmu::Missing;

use std::time::Duration;

/// The state of a context.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ContextState {
    mode: Option<Mode>,
    /// A job of it has failed, or the guest has destroyed it.
    lost: bool,
}

type Checked<T = ()> = Result<T, Violation>;

fn wrong<T>(what: String) -> Checked<T> {
    Err(violation(Invariant::I5, what))
}

impl Oracle {
    /// The command of a job that was given to the engines, if it is a stream.
    pub(super) fn stream(&self, job: JobId) -> Option<&Submitted> {
        match &self.commands.get(*self.jobs.get(&job)?)?.kind {
            Kind::Job(submitted) => Some(submitted),
            _ => None,
        }
    }

    fn stream_mut(&mut self, job: JobId) -> Option<&mut Submitted> {
        match &mut self.commands.get_mut(*self.jobs.get(&job)?)?.kind {
            Kind::Job(submitted) => Some(submitted),
            _ => None,
        }
    }

    fn streams(&self) -> impl Iterator<Item = (usize, &Submitted)> {
        self.commands.iter().enumerate().filter_map(|(number, command)| match &command.kind {
            Kind::Job(submitted) if command.state != State::Dropped => Some((number, &**submitted)),
            _ => None,
        })
    }

    /// The context of a stream that was given to the engines, and whether its end is its answer.
    pub(super) fn context_of(&self, job: JobId) -> Option<(ContextKey, bool)> {
        let command = self.commands.get(*self.jobs.get(&job)?)?;
        match &command.kind {
            Kind::Job(submitted) if command.state != State::Dropped => {
                Some((submitted.context, command.fence.is_some()))
            }
            _ => None,
        }
    }

    /// Whether the context has unfinished jobs.
    pub(super) fn has_jobs(&self, context: ContextKey) -> bool {
        self.streams().any(|(_, submitted)| submitted.context == context && submitted.is_under_way())
    }

    pub(super) fn is_lost(&self, context: ContextKey) -> bool {
        self.contexts.get(&context).is_some_and(|context| context.lost)
    }

    /// Whether the end of the job is still expected. Waiting jobs of a lost context are dropped silently.
    fn is_awaited(&self, submitted: &Submitted) -> bool {
        submitted.stage == Stage::Out || submitted.stage == Stage::Queued && !self.is_lost(submitted.context)
    }

    /// The device was given a stream and accepted or refused it: it must accept it unless the context is lost.
    pub(super) fn submitted(&mut self, number: usize, taken: bool, default: Mode, stamp: u64) -> Checked {
        let Some(Command { kind: Kind::Job(submitted), .. }) = self.commands.get_mut(number) else {
            return Ok(());
        };
        let context = self.contexts.entry(submitted.context).or_default();
        if taken == context.lost {
            let how = if taken { "taken by a context that is lost" } else { "refused" };
            return wrong(format!("Job stream {number} is {how}"));
        }
        submitted.since = stamp;
        if taken {
            submitted.stage = Stage::Queued;
            submitted.mode = *context.mode.get_or_insert(submitted.asked.unwrap_or(default));
        }
        Ok(())
    }

    /// The device has a job for a stream: it must be the oldest of its queue, and no other job of the queue may run.
    pub(super) fn stream_begins(&mut self, device: usize, job: &Job) -> Checked {
        let number = job.program_of().and_then(number_of);
        let found = number.and_then(|number| Some((number, self.commands.get(number)?)));
        let Some((number, Command { kind: Kind::Job(submitted), .. })) = found else {
            return wrong(format!("Job {} is for no command", job.id().raw()));
        };
        let (context, ring) = (submitted.context, submitted.ring);
        let known = (submitted.stage, context.device, Some(context.number), submitted.mode);
        let same = job.program_of() == Some(&submitted.program);
        if !same || known != (Stage::Queued, device, job.context(), job.mode()) {
            return wrong(format!("Job {} is not what command {number} asked for", job.id().raw()));
        }
        let before = |other: &&(usize, &Submitted)| {
            other.0 < number && (other.1.context, other.1.ring) == (context, ring) && self.is_awaited(other.1)
        };
        if let Some((other, _)) = self.streams().collect::<Vec<_>>().iter().find(before) {
            return wrong(format!("Job stream {number} begins before the end of {other}, on the same ring"));
        }
        self.jobs.insert(job.id(), number);
        if let Some(submitted) = self.stream_mut(job.id()) {
            submitted.stage = Stage::Out;
        }
        Ok(())
    }

    /// An engine is about to step a job. Returns whether the job's context is lost.
    pub(super) fn step_begins(&mut self, job: JobId, guest: &Guest, memory: &Memory) -> Checked<bool> {
        let Some(submitted) = self.stream_mut(job) else {
            self.job_touches(job)?;
            return Ok(false);
        };
        submitted.steps(guest, memory);
        if submitted.stage != Stage::Out || submitted.is_done {
            let stage = submitted.stage;
            return wrong(format!("Job {} works on, and is {stage:?}", job.raw()));
        }
        let context = submitted.context;
        Ok(self.is_lost(context))
    }

    /// A job has accessed memory. `dead`: its context was lost before this step.
    pub(super) fn follow(
        &mut self,
        job: JobId,
        event: JobEvent<'_>,
        dead: bool,
        times: (Duration, Duration),
    ) -> Checked {
        // A SPIN may outlast a reset: it touches nothing.
        self.job_touches(job)?;
        let Some(submitted) = self.stream_mut(job) else { return Ok(()) };
        let followed = submitted.follow(event, times);
        followed.or_else(|what| wrong(format!("Job {}: {what}", job.raw())))?;
        if dead && !submitted.follower.has_told_failure() {
            return wrong(format!("Job {} works on though its context is lost: {event:x?}", job.raw()));
        }
        Ok(())
    }

    /// A step reports that a job is done.
    pub(super) fn step_ends(&mut self, job: JobId, memory: &Memory, counts: &mut Counts) -> Checked {
        let Some(submitted) = self.stream_mut(job) else { return Ok(()) };
        match submitted.done(memory) {
            Ok(compared) => {
                counts.streams_compared += u64::from(compared);
                Ok(())
            }
            Err(what) => Err(violation(Invariant::Data, format!("Job {}: {what}", job.raw()))),
        }
    }

    /// Something other than an engine changed a page that jobs use.
    pub(super) fn disturb_page(&mut self, page: usize) {
        self.disturb(None, |submitted| submitted.disturb_page(page));
    }

    /// A frame was written to, possibly by a job.
    pub(super) fn disturb_frame(&mut self, frame: usize, by: Option<JobId>) {
        self.disturb(by, |submitted| submitted.disturb_frame(frame));
    }

    /// The job read something that its twin did not.
    pub(super) fn disturb_job(&mut self, job: JobId) {
        if let Some(submitted) = self.stream_mut(job) {
            submitted.disturb();
        }
    }

    fn disturb(&mut self, by: Option<JobId>, disturb: impl Fn(&mut Submitted)) {
        let by = by.and_then(|job| self.jobs.get(&job)).copied();
        for (_, command) in self.commands.iter_mut().enumerate().filter(|(other, _)| Some(*other) != by) {
            if let Kind::Job(submitted) = &mut command.kind
                && submitted.stage == Stage::Out
            {
                disturb(submitted);
            }
        }
    }

    /// A fault of a job is recorded. If the job is a stream: the context and mode that the record must have.
    pub(super) fn faults(&mut self, job: JobId) -> Option<(Option<u32>, Mode)> {
        let submitted = self.stream_mut(job)?;
        submitted.has_fault = true;
        Some((Some(submitted.context.number), submitted.mode))
    }

    /// A job has left the engines for good: with success if its whole stream was seen, otherwise for a reason.
    pub(super) fn job_ended(
        &mut self,
        job: JobId,
        outcome: JobOutcome,
        guest: &Guest,
        ran: Duration,
    ) -> Checked {
        let excused = self.excused;
        let Some(submitted) = self.stream(job) else { return Ok(()) };
        let told = match outcome {
            JobOutcome::Done if !submitted.is_done => Some("it is not".into()),
            JobOutcome::Done => None,
            JobOutcome::Failed(_) if submitted.follower.has_told_success() => {
                Some("its user fence says that it is done".into())
            }
            JobOutcome::Failed(error) => self.blames_nobody(submitted, error, (excused, guest, ran)),
        };
        if let Some(submitted) = self.stream_mut(job) {
            submitted.stage = Stage::Ended(outcome);
        }
        told.map_or(Ok(()), |what: String| {
            wrong(format!("Job {} has ended as {outcome:?}, but {what}", job.raw()))
        })
    }

    /// A job has failed: its error must have a cause. `Some`: it has none.
    fn blames_nobody(
        &self,
        submitted: &Submitted,
        error: JobError,
        (excused, guest, ran): (u64, &Guest, Duration),
    ) -> Option<String> {
        let (since, is_excused) = (submitted.since, excused >= submitted.since);
        let packet = |number: usize| submitted.program.packets().get(number);
        let right = match error {
            JobError::Refused(_) if !submitted.has_fault => false,
            JobError::Refused(missing) => {
                is_excused
                    || !pages(&missing).all(|(page, access)| {
                        guest.allowed_since(page, access, since) && !guest.remapped_since(page, since)
                    })
            }
            JobError::TimedOut(_) | JobError::NoChannel(_) => is_excused,
            JobError::Moved(missing) => {
                let moved = pages(&missing).any(|(page, _)| guest.remapped_since(page, since));
                submitted.mode == Mode::Fence && (is_excused || moved)
            }
            JobError::Killed | JobError::ContextLost => self.is_lost(submitted.context),
            JobError::WaitTimedOut { packet: number } => {
                let since = submitted.follower.waits_since(number);
                match (packet(number), since) {
                    (Some(Packet::Wait(wait)), Some(since)) => {
                        ran >= since + Duration::from_nanos(wait.timeout)
                    }
                    _ => false,
                }
            }
            JobError::Wedged { packet: number } => {
                matches!(packet(number), Some(Packet::Spin(spin)) if spin.behaviour == SpinBehaviour::Wedged)
            }
            JobError::Memory(_) | JobError::OutsideImage | JobError::Translation(_) => false,
        };
        (!right).then(|| "nobody is to blame for that".into())
    }

    /// A context accepts no more jobs: the guest has destroyed it, or one of its jobs has failed.
    pub(super) fn lose_context(&mut self, context: ContextKey) {
        self.contexts.entry(context).or_default().lost = true;
    }

    /// The command is answered: a job's command not before its end, and with its outcome.
    pub(super) fn check_job_answer(&self, number: usize, is_error: bool, fence: bool) -> Checked {
        let Some(Command { kind: Kind::Job(submitted), .. }) = self.commands.get(number) else {
            return Ok(());
        };
        let right = match submitted.stage {
            Stage::Outside => is_error,
            Stage::Queued | Stage::Out if !fence => !is_error,
            Stage::Queued => is_error && self.is_lost(submitted.context),
            Stage::Out => false,
            Stage::Ended(outcome) => is_error == (outcome != JobOutcome::Done),
        };
        if right {
            Ok(())
        } else {
            wrong(format!("Job stream {number} is answered as {is_error} while {:?}", submitted.stage))
        }
    }

    /// A command is answered that has to wait for the earlier jobs which `which` selects. (If there was a reset since,
    /// the jobs are discarded, and the answer will be.)
    pub(super) fn check_jobs_before(&self, number: usize, which: impl Fn(&Submitted) -> bool) -> Checked {
        if number < self.of_old_drivers {
            return Ok(());
        }
        let goes_on = |(other, submitted): &(usize, &Submitted)| {
            *other < number && which(submitted) && self.is_awaited(submitted)
        };
        match self.streams().find(goes_on) {
            Some((other, _)) => wrong(format!("Command {number} is answered before the end of job {other}")),
            None => Ok(()),
        }
    }

    /// The unfinished jobs.
    pub(super) fn unended(&self) -> Vec<usize> {
        self.streams().filter(|(_, submitted)| self.is_awaited(submitted)).map(|(number, _)| number).collect()
    }
}

fn pages(missing: &Missing) -> impl Iterator<Item = (usize, Access)> + use<> {
    let access = missing.access;
    let found: Vec<_> = missing.pages().filter_map(page_at).collect();
    found.into_iter().map(move |page| (page, access))
}
