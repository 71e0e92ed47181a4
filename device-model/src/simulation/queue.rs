//! The model's queue thread: takes commands from the guest's rings, has the devices execute them, and writes the
//! answers where the guest will see them: through the mirror, in a section, which may itself need a MISS.
//!
//! There are two devices, so that two jobs can run at a time; their jobs share engines and mirror.

use std::collections::VecDeque;

use job_stream::Mode;

use super::bug::Bug;
use super::checked::Toucher;
use super::guest::iova;
use super::oracle::{Invariant, Kind, violation};
use super::streams::config;
use super::world::{DEVICES, ENGINES, PAGES, Readers, World};
use crate::addr::{Access, DomainId, Iova};
use crate::gpu::device::{Device, DeviceConfig, Effect, features};
use crate::gpu::reply::{Reply, Response};
use crate::gpu::scanout::{DisplayAnswer, DisplayQuery};
use crate::jobs::job::{JobId, JobOutcome};
use crate::jobs::schedule::{FaultedJob, FinishedJob};
use crate::mmu::{JobMemory, MemoryError};
use crate::session::miss_port::{RingWait, Waiter};

/// Commands that one turn takes.
const COMMANDS_A_TURN: usize = 3;
/// Bytes of an answer that are written: the header.
const ANSWER: usize = 24;

/// Mail for the queue thread.
#[derive(Debug)]
pub(super) enum Mail {
    RingReady,
    JobFinished(FinishedJob),
    FlushEnded,
    JobFaulted(FaultedJob),
    MissAnswered,
    Reset,
}

/// A command of the guest, not yet taken.
#[derive(Debug)]
pub(super) struct Given {
    pub(super) number: usize,
    pub(super) bytes: Vec<u8>,
    /// The resource of a transfer.
    pub(super) resource: u32,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) devices: [Device<usize>; DEVICES],
    pub(super) ring: VecDeque<Given>,
    pub(super) mailbox: VecDeque<Mail>,
    outbox: VecDeque<(usize, Response)>,
    /// How many answers to misses it waits for.
    waits_for: usize,
}

impl Queue {
    pub(super) fn new(default_mode: Mode) -> Self {
        let config = DeviceConfig { scanouts: 4, jobs: config(default_mode), ..DeviceConfig::default() };
        let mut devices = [(); DEVICES].map(|()| Device::new(config.clone()));
        for (device, number) in devices.iter_mut().zip(0_u64..) {
            device.set_features(features());
            device.number_jobs_from(JobId(number << 32));
        }
        Self {
            devices,
            ring: VecDeque::new(),
            mailbox: VecDeque::new(),
            outbox: VecDeque::new(),
            waits_for: 0,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.ring.is_empty() && self.mailbox.is_empty() && self.outbox.is_empty()
    }
}

/// The page to which a device's answers are written.
pub(super) fn answers_page(device: usize) -> usize {
    PAGES - 5 - device
}

fn answer_at(device: usize, number: usize) -> Iova {
    Iova::new(iova(answers_page(device)).raw() + (number as u64 % 64) * 64)
}

impl World {
    /// Like the back-end's queue thread: mail, commands, answers.
    pub(super) fn queue_turn(&mut self, readers: &Readers) {
        while let Some(mail) = self.queue.mailbox.pop_front() {
            self.mail(mail);
        }
        for _ in 0..COMMANDS_A_TURN {
            if !self.session.core.is_running() {
                break;
            }
            let Some(given) = self.queue.ring.pop_front() else { break };
            self.execute(&given);
        }
        self.publish(readers);
    }

    fn mail(&mut self, mail: Mail) {
        match mail {
            Mail::RingReady => self.queue.waits_for = 0,
            Mail::MissAnswered => self.queue.waits_for = self.queue.waits_for.saturating_sub(1),
            Mail::JobFinished(finished) => self.job_finished(finished),
            Mail::JobFaulted(faulted) => {
                let device = (faulted.wait.job.raw() >> 32) as usize;
                let mut effects = Vec::new();
                self.queue.devices[device].job_faulted(faulted, &mut effects);
                self.carry_out(device, effects);
            }
            Mail::FlushEnded => {
                for device in 0..self.queue.devices.len() {
                    let mut effects = Vec::new();
                    self.queue.devices[device].flush_ended(&mut effects);
                    self.carry_out(device, effects);
                }
            }
            Mail::Reset => {
                for device in &mut self.queue.devices {
                    drop(device.reset());
                    // The new driver accepts the same features as the old one.
                    device.set_features(features());
                }
                self.suspicions.clear();
                if !self.is(Bug::KeepJobsOverReset) {
                    self.session.schedule_mut().discard();
                }
                if !self.is(Bug::AnswerAfterReset) {
                    self.queue.outbox.clear();
                }
                self.queue.waits_for = 0;
                self.oracle.reset();
            }
        }
    }

    fn job_finished(&mut self, FinishedJob { job, outcome }: FinishedJob) {
        let device = (job.id().raw() >> 32) as usize;
        let mut told = outcome;
        if let Some((context, fenced)) = self.oracle.context_of(job.id())
            && outcome != JobOutcome::Done
        {
            self.counts.contexts_lost += u64::from(!self.oracle.is_lost(context));
            self.oracle.lose_context(context);
            if self.is(Bug::KeepLostContext) && !fenced {
                told = JobOutcome::Done;
            }
        }
        let mut effects = Vec::new();
        self.queue.devices[device].job_finished(job, told, &mut effects);
        self.carry_out(device, effects);
    }

    fn execute(&mut self, given: &Given) {
        let device = self.oracle.device_of(given.number);
        self.event("executes", given.number as u64, device as u64);
        let image = self.queue.devices[device].image(given.resource);
        self.oracle.transfer_begins(given.number, image, self.stamp);
        let (mut effects, jobs) = (Vec::new(), self.queue.devices[device].usage().jobs);
        if let Kind::Behind { context, ends: true } = *self.oracle.kind(given.number) {
            self.counts.contexts_destroyed += 1;
            self.counts.contexts_destroyed_with_jobs += u64::from(self.oracle.has_jobs(context));
            self.oracle.lose_context(context);
        }
        self.queue.devices[device].control(&given.bytes, given.number, &mut effects);
        let taken = self.queue.devices[device].usage().jobs > jobs;
        let default = self.flavor.default_mode;
        if let Err(violation) = self.oracle.submitted(given.number, taken, default, self.stamp) {
            self.fail(violation);
        }
        let is_stream = matches!(self.oracle.kind(given.number), Kind::Job(_));
        self.counts.streams += u64::from(is_stream && taken);
        self.counts.streams_refused += u64::from(is_stream && !taken);
        self.answer_early(given.number, &effects);
        let answered = |effect: &Effect<usize>| matches!(effect, Effect::Complete { pending, .. } if *pending == given.number);
        if self.oracle.is_transfer(given.number) && !effects.iter().any(answered) {
            self.oracle.accepted(given.number);
        }
        self.carry_out(device, effects);
    }

    fn carry_out(&mut self, device: usize, effects: Vec<Effect<usize>>) {
        for effect in effects {
            match effect {
                Effect::Complete { pending, response } => self.answer(pending, response),
                Effect::Run(job) => {
                    let begun = match job.context() {
                        Some(_) => self.oracle.stream_begins(device, &job),
                        None => self.oracle.job_begins(device, job.id()),
                    };
                    if let Err(violation) = begun {
                        self.fail(violation);
                    }
                    self.session.schedule_mut().submit(job);
                }
                Effect::AnswerFault { wait, answer } => {
                    self.session.schedule_mut().fault_answered(wait, answer);
                }
                Effect::Display(_) => {}
                Effect::Ask { ticket, question } => {
                    let answer = match question {
                        DisplayQuery::Modes => DisplayAnswer::Modes(None),
                        DisplayQuery::Edid { .. } => DisplayAnswer::Edid(None),
                    };
                    let mut effects = Vec::new();
                    self.queue.devices[device].display_answer(ticket, answer, &mut effects);
                    self.carry_out(device, effects);
                }
            }
        }
    }

    /// The seeded bug: answers at once what has to wait for jobs.
    fn answer_early(&mut self, number: usize, effects: &[Effect<usize>]) {
        let waits =
            matches!(self.oracle.kind(number), Kind::Behind { .. } | Kind::Retire { buffer: Some(_) });
        if self.is(Bug::GiveBackEarly) && waits && effects.is_empty() && !self.oracle.is_fenced(number) {
            self.answer(number, Response::new(&Ok(Reply::NoData), None));
        }
    }

    fn answer(&mut self, number: usize, response: Response) {
        self.event("answers", number as u64, response.kind().into());
        if let Err(violation) = self.oracle.answered(number, &response) {
            self.fail(violation);
        }
        let again = self.is(Bug::CompleteTwice).then(|| response.clone());
        if !self.is(Bug::LoseCompletion) {
            self.queue.outbox.push_back((number, response));
        }
        self.queue.outbox.extend(again.map(|again| (number, again)));
        let last = self.queue.outbox.len();
        if self.is(Bug::ReorderFences) && last >= 2 {
            let fenced = |index: usize| self.oracle.is_fenced(self.queue.outbox[index].0);
            if fenced(last - 1) && fenced(last - 2) {
                self.queue.outbox.swap(last - 1, last - 2);
            }
        }
    }

    /// Writes answers, as far as the guest's pages are mapped.
    fn publish(&mut self, readers: &Readers) {
        while self.session.core.is_running() && self.queue.waits_for == 0 {
            let Some((number, response)) = self.queue.outbox.front() else { return };
            let (number, at) = (*number, answer_at(self.oracle.device_of(*number), *number));
            let bytes = response.as_bytes()[..ANSWER].to_vec();
            let section = readers.queue.enter();
            self.check_access(&section, (at, bytes.len(), Access::Write), Toucher::default());
            let written = section.write(DomainId::DEVICE, at, &bytes);
            drop(section);
            match written {
                Ok(()) => self.seen(number),
                Err(MemoryError::Missing(missing)) => {
                    self.counts.responses_missing += 1;
                    self.queue.waits_for = missing.pages().count();
                    let waiter = Waiter::RingOutput(RingWait { queue: 0, start: 0 });
                    return self.session.port.request(waiter, vec![missing]);
                }
                Err(error) => {
                    return self
                        .fail(violation(Invariant::I5, format!("An answer cannot be written: {error}")));
                }
            }
        }
    }

    fn seen(&mut self, number: usize) {
        self.queue.outbox.pop_front();
        self.counts.responses += 1;
        self.counts.fences += u64::from(self.oracle.is_fenced(number));
        self.event("seen", number as u64, 0);
        if let Err(violation) = self.oracle.seen(number) {
            self.fail(violation);
        }
    }

    /// Whether engines and queue thread have nothing to do without new input.
    pub(super) fn is_quiet(&self) -> bool {
        let engines = self.engines.iter().take(ENGINES).all(super::engines::Engine::is_idle);
        engines
            && self.queue.is_idle()
            && self.session.core.is_idle()
            && self.session.schedule().waiting() == 0
    }
}
