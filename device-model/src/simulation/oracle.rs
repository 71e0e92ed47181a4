//! What has to be true. Knows every command that the guest has given and what became of it, and is asked at every
//! access, answer and ack. Knows nothing of how the device does it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::sync::Arc;

use super::guest::{Guest, page_at};
use super::memory::Memory;
use super::trace::Counts;
use super::world::DEVICES;
use crate::addr::{Iova, PAGE_SIZE};
use crate::job::JobId;
use crate::reply::Response;
use crate::scanout::{Image, Rect};
use crate::schedule::Judgement;
use crate::violation::Verdict;

/// What was broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invariant {
    /// No stale access.
    I1,
    /// Bounded ack.
    I2,
    /// A drain waits for sections and pins alone.
    I3,
    /// A parked job blocks nobody, and every job ends.
    I4,
    /// Fences tell the truth.
    I5,
    /// No panic.
    I6,
    /// Only what was proven is cached.
    I7,
    /// An image holds what the guest's pages held.
    Data,
    /// No driver is accused of what it did not do.
    Verdict,
}

/// A broken invariant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub invariant: Invariant,
    /// How.
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

/// What a transfer has to bring.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    pub(super) image: Option<Arc<Image>>,
    pub(super) rect: Rect,
    pub(super) offset: u64,
    pub(super) backing: Vec<(u64, u32)>,
    /// When the device got the command.
    pub(super) since: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// On its way.
    Given,
    /// The device has answered.
    Answered,
    /// The guest has seen the answer.
    Seen,
    /// A reset took it back.
    Dropped,
}

/// What kind of command it is, as far as that matters here.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    Transfer(Expected),
    /// RESOURCE_UNREF, DETACH_BACKING: all transfers before it are at their end.
    Retire,
    Other,
}

#[derive(Clone, Debug)]
struct Command {
    device: usize,
    kind: Kind,
    fence: bool,
    state: State,
}

/// Commands by number: the number is what the device is given as the pending command.
#[derive(Debug, Default)]
pub(super) struct Oracle {
    commands: Vec<Command>,
    /// The commands with fences that the guest has not seen answered, in order.
    fences: [VecDeque<usize>; DEVICES],
    /// The transfers that wait for their jobs, in order.
    accepted: [VecDeque<usize>; DEVICES],
    jobs: BTreeMap<JobId, usize>,
    /// When a miss was last refused or not answered for no fault of the guest's.
    excused: u64,
}

impl Oracle {
    pub(super) fn given(&mut self, device: usize, kind: Kind, fence: bool) -> usize {
        self.commands.push(Command { device, kind, fence, state: State::Given });
        self.commands.len() - 1
    }

    /// The device is given a transfer: from now on it may read.
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
        self.commands[number].fence
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

    /// A job touches memory: that has to be before its answer, and before a reset forgets it.
    pub(super) fn job_touches(&self, job: JobId) -> Result<(), Violation> {
        let Some(&number) = self.jobs.get(&job) else { return Ok(()) };
        match self.commands[number].state {
            State::Given => Ok(()),
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

    /// The device has answered: once, after all that it has to wait for, and with the data in place.
    pub(super) fn answered(
        &mut self,
        number: usize,
        response: &Response,
        (guest, memory): (&Guest, &Memory),
        counts: &mut Counts,
    ) -> Result<(), Violation> {
        let command = &self.commands[number];
        if command.state != State::Given {
            return Err(violation(
                Invariant::I5,
                format!("Command {number} is answered while {:?}", command.state),
            ));
        }
        let flags = response.as_bytes().get(4).copied().unwrap_or_default();
        if command.fence != (flags & 1 == 1) {
            return Err(violation(
                Invariant::I5,
                format!("The answer to command {number} has flags {flags:#x}"),
            ));
        }
        match &command.kind {
            Kind::Transfer(expected) if !response.is_error() => compare(expected, guest, memory, counts)?,
            Kind::Transfer(expected) => self.check_failure(number, expected, guest)?,
            Kind::Retire if !response.is_error() => self.check_retired(number)?,
            _ => {}
        }
        self.commands[number].state = State::Answered;
        Ok(())
    }

    /// The front-end, or the clock, has given the device a reason to fail what needs a translation now.
    pub(super) fn excuse(&mut self, stamp: u64) {
        self.excused = stamp;
    }

    /// A transfer has failed: somebody has to be to blame for it, a flush that took nothing away is not.
    fn check_failure(&self, number: usize, expected: &Expected, guest: &Guest) -> Result<(), Violation> {
        let readable = |&(at, _): &(u64, u32)| {
            page_at(Iova::new(at)).is_some_and(|page| {
                guest.readable_since(page, expected.since) && !guest.remapped_since(page, expected.since)
            })
        };
        if self.excused >= expected.since || !expected.backing.iter().all(readable) {
            return Ok(());
        }
        Err(violation(Invariant::I5, format!("Transfer {number} fails though all that it reads is mapped")))
    }

    /// Memory is said to have been taken from under a job: it has to be in flight, and the guest has to have done so.
    pub(super) fn check_verdict(&self, judgement: &Judgement, guest: &Guest) -> Result<(), Violation> {
        if judgement.verdict == Verdict::Benign {
            return Ok(());
        }
        let wrong = |what| Err(violation(Invariant::Verdict, format!("{judgement:?}, but {what}")));
        let Some(command) = self.jobs.get(&judgement.job).and_then(|&number| self.commands.get(number))
        else {
            return wrong("there is no such job");
        };
        let Kind::Transfer(expected) = &command.kind else { return wrong("the job is no transfer") };
        if command.state != State::Given {
            return wrong("the job had ended");
        }
        let remapped = |at| page_at(at).is_some_and(|page| guest.remapped_since(page, expected.since));
        if self.excused < expected.since && !judgement.range.pages().any(remapped) {
            return wrong("nothing was remapped since the job began");
        }
        Ok(())
    }

    fn check_retired(&self, number: usize) -> Result<(), Violation> {
        let device = self.commands[number].device;
        let busy = |(_, command): &(usize, &Command)| {
            command.device == device
                && command.state == State::Given
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

    /// A command with a fence was put on the ring of its device: fences are seen in this order.
    pub(super) fn fence_begins(&mut self, number: usize) {
        self.fences[self.commands[number].device].push_back(number);
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
        if command.fence {
            let next = self.fences[command.device].pop_front();
            if next != Some(number) {
                return Err(violation(
                    Invariant::I5,
                    format!("Fence {number} is seen before fence {next:?}"),
                ));
            }
        }
        Ok(())
    }

    /// A reset takes everything back that is not seen.
    pub(super) fn reset(&mut self) {
        for command in &mut self.commands {
            if command.state != State::Seen {
                command.state = State::Dropped;
            }
        }
        self.fences = Default::default();
        self.accepted = Default::default();
    }

    /// Which commands the guest still waits for.
    pub(super) fn unseen(&self) -> impl Iterator<Item = usize> {
        let waits = |command: &Command| matches!(command.state, State::Given | State::Answered);
        self.commands.iter().enumerate().filter(move |(_, command)| waits(command)).map(|(number, _)| number)
    }
}

/// Compares an image with what the guest's pages hold, where that has not changed since the device got the command:
/// row by row, in the most stupid way.
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

/// The address at an offset of a backing, and how much follows there.
fn locate(backing: &[(u64, u32)], mut offset: u64) -> Option<(Iova, u64)> {
    for &(at, len) in backing {
        match offset.checked_sub(len.into()) {
            Some(rest) => offset = rest,
            None => return Some((Iova::new(at + offset), u64::from(len) - offset)),
        }
    }
    None
}
