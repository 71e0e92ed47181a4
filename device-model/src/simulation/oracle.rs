//! The invariants. Knows every command that the guest has sent and its state, and is called at every access, answer and
//! ack. Knows nothing of how the device works.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use super::follower::locate;
use super::guest::{Guest, page_at};
use super::job_oracle::ContextState;
use super::memory::Memory;
use super::submitted::{ContextKey, Stage, Submitted};
use super::trace::Counts;
use super::world::DEVICES;
use crate::addr::{Access, Iova, PAGE_SIZE};
use crate::gpu::reply::Response;
use crate::image::{Image, Rect};
use crate::jobs::job::JobId;
use crate::jobs::schedule::JobVerdict;
use crate::jobs::verdict::Verdict;

/// The kind of a broken invariant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invariant {
    /// No stale access.
    I1,
    /// Bounded ack.
    I2,
    /// A drain waits for sections and pins alone.
    I3,
    /// A parked job blocks nothing, and every job ends.
    I4,
    /// Fences tell the truth.
    I5,
    /// No panic.
    I6,
    /// Only what was proved is cached.
    I7,
    /// An image has the contents of the guest's pages.
    Data,
    /// A correct driver gets no violation.
    Verdict,
}

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The invariant.
    pub invariant: Invariant,
    /// What happened.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is broken: {}", self.invariant, self.what)
    }
}

pub(super) fn violation(invariant: Invariant, what: String) -> Violation {
    Violation { invariant, what }
}

/// The expected result of a transfer.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    pub(super) image: Option<Arc<Image>>,
    pub(super) rect: Rect,
    pub(super) offset: u64,
    pub(super) backing: Vec<(u64, u32)>,
    /// When the device received the command.
    pub(super) since: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// It was sent; the device may use its memory.
    Given,
    /// The device has answered. It uses the command's memory no longer, unless this is a job without a fence.
    Answered,
    /// The guest has seen the answer.
    Seen,
    /// A reset took it back; it is never answered.
    Dropped,
}

/// The kind of a command, as far as the oracle distinguishes it.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Transfer(Expected),
    Job(Box<Submitted>),
    /// RESOURCE_UNREF, DETACH_BACKING: answered after all earlier transfers and all jobs that name the buffer.
    Retire {
        buffer: Option<u64>,
    },
    /// Answered after all earlier jobs of the context. `ends`: it destroys the context.
    Behind {
        context: ContextKey,
        ends: bool,
    },
    Other,
}

/// The timeline of a fence: that of a ring of a context, or the device's global one.
pub(super) type Timeline = (usize, Option<(u32, u8)>);

#[derive(Clone, Debug)]
pub(super) struct Command {
    pub(super) device: usize,
    pub(super) kind: Kind,
    pub(super) fence: Option<Timeline>,
    pub(super) state: State,
    /// Its job has ended, with success or not. (The answer may wait for that of another.)
    pub(super) ended: Option<bool>,
}

/// Commands by number: the number is the device's pending command.
#[derive(Debug, Default)]
pub(super) struct Oracle {
    pub(super) commands: Vec<Command>,
    /// The commands with fences whose answers the guest has not seen, in order.
    fences: BTreeMap<Timeline, VecDeque<usize>>,
    /// The transfers that wait for their jobs, in order.
    accepted: [VecDeque<usize>; DEVICES],
    pub(super) jobs: BTreeMap<JobId, usize>,
    pub(super) contexts: BTreeMap<ContextKey, ContextState>,
    /// How many commands were sent before the last reset.
    pub(super) of_old_drivers: usize,
    /// When a miss was last refused or left unanswered without a fault of the guest.
    pub(super) excused: u64,
}

impl Oracle {
    pub(super) fn given(&mut self, device: usize, kind: Kind, fence: Option<Timeline>) -> usize {
        self.commands.push(Command { device, kind, fence, state: State::Given, ended: None });
        self.commands.len() - 1
    }

    /// The number of the next command.
    pub(super) fn next_number(&self) -> usize {
        self.commands.len()
    }

    /// The device gets a transfer: from now on it may read.
    pub(super) fn transfer_begins(&mut self, number: usize, image: Option<Arc<Image>>, stamp: u64) {
        if let Kind::Transfer(expected) = &mut self.commands[number].kind {
            expected.image = image;
            expected.since = stamp;
        }
    }

    pub(super) fn is_transfer(&self, number: usize) -> bool {
        matches!(self.commands[number].kind, Kind::Transfer(_))
    }

    pub(super) fn is_fenced(&self, number: usize) -> bool {
        self.commands[number].fence.is_some()
    }

    /// The kind of a command that the device is about to execute.
    pub(super) fn kind(&self, number: usize) -> &Kind {
        &self.commands[number].kind
    }

    pub(super) fn device_of(&self, number: usize) -> usize {
        self.commands[number].device
    }

    /// The device has put a transfer into its ring.
    pub(super) fn accepted(&mut self, number: usize) {
        self.accepted[self.commands[number].device].push_back(number);
    }

    /// The device has a job for its oldest transfer.
    pub(super) fn job_begins(&mut self, device: usize, job: JobId) -> Result<(), Violation> {
        let Some(number) = self.accepted[device].pop_front() else {
            return Err(violation(Invariant::I5, format!("Job {} is for no transfer", job.raw())));
        };
        self.jobs.insert(job, number);
        Ok(())
    }

    /// A job touches memory: it must do so before its answer, and before a reset discards it.
    pub(super) fn job_touches(&self, job: JobId) -> Result<(), Violation> {
        let Some(&number) = self.jobs.get(&job) else { return Ok(()) };
        match self.commands[number].state {
            State::Given => Ok(()),
            // The command of a job without a fence was answered before the job began.
            State::Answered | State::Seen if matches!(self.commands[number].kind, Kind::Job(_)) => Ok(()),
            State::Dropped => Err(violation(
                Invariant::I5,
                format!("Job {} works on for a driver from before a reset", job.raw()),
            )),
            State::Answered | State::Seen => Err(violation(
                Invariant::I5,
                format!("Job {} works on after command {number} was answered", job.raw()),
            )),
        }
    }

    /// The job of a transfer has ended: the data is in place, or there is a reason.
    pub(super) fn transfer_ends(
        &mut self,
        job: JobId,
        is_done: bool,
        (guest, memory): (&Guest, &Memory),
        counts: &mut Counts,
    ) -> Result<(), Violation> {
        let Some((&number, command)) =
            self.jobs.get(&job).and_then(|number| Some((number, self.commands.get_mut(*number)?)))
        else {
            return Ok(());
        };
        command.ended = Some(is_done);
        match &self.commands[number].kind {
            Kind::Transfer(expected) if is_done => compare(expected, guest, memory, counts),
            Kind::Transfer(expected) => self.check_failure(number, expected, guest),
            _ => Ok(()),
        }
    }

    /// The device has answered: it must do so once, after all that the answer has to wait for.
    pub(super) fn answered(&mut self, number: usize, response: &Response) -> Result<(), Violation> {
        let command = &self.commands[number];
        if command.state != State::Given {
            return Err(violation(
                Invariant::I5,
                format!("Command {number} is answered while {:?}", command.state),
            ));
        }
        let flags = response.as_bytes().get(4).copied().unwrap_or_default();
        if command.fence.is_some() != (flags & 1 == 1) {
            return Err(violation(
                Invariant::I5,
                format!("The answer to command {number} has flags {flags:#x}"),
            ));
        }
        match &command.kind {
            Kind::Transfer(_) if command.ended != Some(!response.is_error()) => {
                let what =
                    format!("Transfer {number} is answered, and its job has ended: {:?}", command.ended);
                return Err(violation(Invariant::I5, what));
            }
            Kind::Job(_) => self.check_job_answer(number, response.is_error(), command.fence.is_some())?,
            Kind::Retire { buffer } if !response.is_error() => {
                self.check_retired(number)?;
                self.check_jobs_before(number, |job| {
                    buffer.is_some_and(|buffer| job.buffers.contains(&buffer))
                })?;
            }
            Kind::Behind { context, .. } if !response.is_error() => {
                self.check_jobs_before(number, |job| job.context == *context)?;
            }
            _ => {}
        }
        self.commands[number].state = State::Answered;
        Ok(())
    }

    /// The front-end or the clock gives the device a reason to fail what needs a translation now.
    pub(super) fn excuse(&mut self, stamp: u64) {
        self.excused = stamp;
    }

    /// A transfer has failed: that needs a cause. A flush that unmapped nothing is none.
    fn check_failure(&self, number: usize, expected: &Expected, guest: &Guest) -> Result<(), Violation> {
        let readable = |&(at, _): &(u64, u32)| {
            page_at(Iova::new(at)).is_some_and(|page| {
                guest.allowed_since(page, Access::Read, expected.since)
                    && !guest.remapped_since(page, expected.since)
            })
        };
        if self.excused >= expected.since || !expected.backing.iter().all(readable) {
            return Ok(());
        }
        Err(violation(Invariant::I5, format!("Transfer {number} fails though all that it reads is mapped")))
    }

    /// Whether a command may use a page whose end the driver has not seen. (The end of a job without a fence is seen in
    /// another way.)
    pub(super) fn is_in_use(&self, page: usize) -> bool {
        self.commands.iter().any(|command| match &command.kind {
            Kind::Transfer(expected) if matches!(command.state, State::Given | State::Answered) => {
                expected.backing.iter().any(|(at, _)| page_at(Iova::new(*at)) == Some(page))
            }
            Kind::Job(job) if command.state != State::Dropped => {
                let goes_on = !matches!(job.stage, Stage::Ended(_)) && command.ended.is_none();
                let unseen = command.fence.is_some() && command.state != State::Seen;
                (goes_on || unseen) && job.touches(page)
            }
            _ => false,
        })
    }

    /// A verdict says that memory was taken from a job: the job must be in flight, and the guest must have done so.
    /// `careful`: no driver has done anything like it.
    pub(super) fn check_verdict(
        &self,
        job_verdict: &JobVerdict,
        guest: &Guest,
        careful: bool,
    ) -> Result<(), Violation> {
        if job_verdict.verdict == Verdict::Benign {
            return Ok(());
        }
        let wrong = |what| Err(violation(Invariant::Verdict, format!("{job_verdict:?}, but {what}")));
        let Some(command) = self.jobs.get(&job_verdict.job).and_then(|&number| self.commands.get(number))
        else {
            return wrong("there is no such job");
        };
        let (since, has_ended) = match &command.kind {
            Kind::Transfer(expected) => (expected.since, command.ended.is_some()),
            Kind::Job(job) => (job.since, job.stage != Stage::Out),
            _ => return wrong("the command has no job"),
        };
        if has_ended || command.state == State::Dropped {
            return wrong("the job had ended");
        }
        let remapped = |at| page_at(at).is_some_and(|page| guest.remapped_since(page, since));
        if self.excused < since && !job_verdict.range.pages().any(remapped) {
            return wrong("nothing was remapped since the job began");
        }
        if self.excused < since && careful {
            return wrong("the driver has waited for its fences");
        }
        Ok(())
    }

    fn check_retired(&self, number: usize) -> Result<(), Violation> {
        let device = self.commands[number].device;
        let busy = |(_, command): &(usize, &Command)| {
            command.device == device
                && command.state == State::Given
                && command.ended.is_none()
                && matches!(command.kind, Kind::Transfer(_))
        };
        match self.commands.iter().enumerate().take(number).find(busy) {
            Some((transfer, _)) => Err(violation(
                Invariant::I5,
                format!("Command {number} gives a backing back while transfer {transfer} before it goes on"),
            )),
            None => Ok(()),
        }
    }

    /// A command with a fence was put on the ring of its device: fences must be seen in this order.
    pub(super) fn fence_begins(&mut self, number: usize) {
        if let Some(timeline) = self.commands[number].fence {
            self.fences.entry(timeline).or_default().push_back(number);
        }
    }

    /// The guest sees an answer.
    pub(super) fn seen(&mut self, number: usize) -> Result<(), Violation> {
        let command = &mut self.commands[number];
        if command.state != State::Answered {
            return Err(violation(
                Invariant::I5,
                format!("The guest sees the answer to command {number}, which is {:?}", command.state),
            ));
        }
        command.state = State::Seen;
        if let Some(timeline) = command.fence {
            let next = self.fences.get_mut(&timeline).and_then(VecDeque::pop_front);
            if next != Some(number) {
                return Err(violation(
                    Invariant::I5,
                    format!("Fence {number} is seen before fence {next:?}"),
                ));
            }
        }
        Ok(())
    }

    /// The front-end has reset the device: all commands so far belong to the old driver.
    pub(super) fn reset_begins(&mut self) {
        self.of_old_drivers = self.commands.len();
    }

    /// A reset takes back everything that the guest has not seen.
    pub(super) fn reset(&mut self) {
        let old = self.of_old_drivers;
        for command in self.commands.iter_mut().take(old) {
            if command.state != State::Seen || matches!(command.kind, Kind::Job(_)) {
                command.state = State::Dropped;
            }
        }
        self.contexts.clear();
        self.fences.values_mut().for_each(|fences| fences.retain(|number| *number >= old));
        self.accepted.iter_mut().for_each(|accepted| accepted.retain(|number| *number >= old));
    }

    /// The commands whose answers the guest still waits for.
    pub(super) fn unseen(&self) -> impl Iterator<Item = usize> {
        let waits = |command: &Command| matches!(command.state, State::Given | State::Answered);
        self.commands.iter().enumerate().filter(move |(_, command)| waits(command)).map(|(number, _)| number)
    }
}

/// Compares an image with the guest's pages, as far as these have not changed since the device received the command:
/// row by row, in the simplest way.
fn compare(
    expected: &Expected,
    guest: &Guest,
    memory: &Memory,
    counts: &mut Counts,
) -> Result<(), Violation> {
    let Some(image) = &expected.image else { return Ok(()) };
    let Some(pixels) = image.try_lock() else { return Ok(()) };
    let (rect, stride) = (expected.rect, image.stride() as u64);
    counts.images_compared += 1;
    for row in 0..u64::from(rect.height) {
        let target = (u64::from(rect.y) + row) * stride + u64::from(rect.x) * 4;
        let len = u64::from(rect.width) * 4;
        let mut done = 0;
        while done < len {
            let Some((at, more)) = locate(&expected.backing, expected.offset + row * stride + done) else {
                break;
            };
            let count = more.min(len - done).min(PAGE_SIZE - at.page_offset());
            let (start, end) = ((target + done) as usize, (target + done + count) as usize);
            let page = page_at(at);
            if let Some(mapping) = page.and_then(|page| guest.unchanged_since(page, expected.since)) {
                counts.pages_compared += 1;
                let same = pixels
                    .get(start..end)
                    .is_some_and(|bytes| memory.equals(mapping.frame, at.page_offset() as usize, bytes));
                if !same {
                    return Err(violation(
                        Invariant::Data,
                        format!("Bytes {start:#x}..{end:#x} of the image are not what lay at {at}"),
                    ));
                }
            }
            done += count;
        }
    }
    Ok(())
}
