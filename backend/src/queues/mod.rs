//! The queue thread: both virtqueues, the device that executes their commands, and the delivery of answers to the
//! guest. It waits only for kicks and for its mailbox; it requests a missing translation, and the ring continues when
//! the answer is in the mailbox. Knows nothing of sockets.

pub mod chain;
mod held;
pub mod mailbox;
pub mod ring;
pub mod ring_event;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use device_model::gpu::device::{Device, Effect};
use device_model::gpu::reply::Response;
use device_model::jobs::job::JobOutcome;
use device_model::jobs::schedule::FinishedJob;
use device_model::jobs::scheduler::Scheduler;
use device_model::mmu::{Missing, RingMemory};
use device_model::telemetry::record::Event;
use device_model::telemetry::stats::Stats;
use device_model::telemetry::violation::Fault;
use epoll::Events;
use log::{debug, warn};

use self::chain::RingError;
use self::held::Held;
use self::mailbox::{Mailbox, QueueMessage, Side};
use self::ring::{Pending, Published, SharedRing, Taken, Virtqueue};
use crate::display::Display;
use crate::fault_injection::{Bug, Injection};
use crate::telemetry::instruments::EventSink;
use crate::thread_kind::ThreadKind;
use crate::threads::{DeviceThread, ThreadFailures};
use crate::wake::Poller;
use device_model::session::miss_port::{MissAnswer, MissPort, RingWait, Waiter};
use device_model::session::{CONTROL_QUEUE, QUEUES};

/// Maximum ring size: QEMU gives the control queue 256 entries with VIRGL, and the soft guest may ask for more.
pub const MAX_QUEUE_SIZE: u16 = 1024;
/// Maximum number of commands taken off one ring before the other gets its turn.
const TURN: usize = 64;
/// Epoll token of the mailbox; lower tokens are queue numbers.
const MAILBOX: u64 = QUEUES as u64;

/// The session's handle of the queue thread. Dropping it ends the thread and waits for its end.
pub struct QueueHandle {
    /// The parts of the rings that session and queue thread share.
    pub rings: Arc<[SharedRing; QUEUES]>,
    /// Messages to the thread.
    pub mailbox: Mailbox,
    /// The thread's epoll: kick eventfds are watched here with their queue's number as token.
    pub poller: Arc<Poller>,
    _thread: DeviceThread,
}

impl Drop for QueueHandle {
    fn drop(&mut self) {
        self.mailbox.post(QueueMessage::Close);
        // The fields join the thread when they are dropped.
    }
}

/// What the queue thread works with.
pub struct QueueThread {
    /// The device.
    pub device: Device<Pending>,
    /// Guest memory as the rings access it, one clone per ring.
    pub memory: RingMemory,
    /// The parts of the rings that session and queue thread share.
    pub rings: Arc<[SharedRing; QUEUES]>,
    /// Messages to the thread.
    pub mailbox: Mailbox,
    /// Where jobs are submitted.
    pub scheduler: Arc<Scheduler>,
    /// Where misses are sent.
    pub misses: MissPort,
    /// Where pictures are sent.
    pub display: Display,
    /// The counters.
    pub stats: Arc<Stats>,
    /// Where each ring's events are recorded.
    pub sinks: [EventSink; QUEUES],
    /// The injected faults.
    pub injection: Arc<Injection>,
}

impl QueueThread {
    /// Starts the thread.
    pub fn spawn(self, failures: &ThreadFailures) -> io::Result<QueueHandle> {
        let poller = Arc::new(Poller::new()?);
        poller.add(self.mailbox.as_raw_fd(), MAILBOX, Events::EPOLLIN | Events::EPOLLET)?;
        let (rings, mailbox, waits_at) = (Arc::clone(&self.rings), self.mailbox.clone(), Arc::clone(&poller));
        let which = (ThreadKind::Queue, ThreadKind::Queue.name());
        let thread = DeviceThread::spawn(which, failures, move || self.run(&waits_at))?;
        Ok(QueueHandle { rings, mailbox, poller, _thread: thread })
    }

    fn run(self, poller: &Poller) -> io::Result<()> {
        let shared = Arc::clone(&self.rings);
        let (max_request, injection) = (self.device.max_request_bytes(), Arc::clone(&self.injection));
        let mut rings = shared.each_ref().map(|shared| {
            let index = shared_index(&self.rings, shared);
            Virtqueue::new((index, shared), self.memory.clone(), max_request, &injection)
        });
        let mut queues = Queues {
            thread: self,
            rings: &mut rings,
            effects: Vec::new(),
            held: Held::default(),
            ready: [false; QUEUES],
            jobs: 0,
        };
        let mut tokens = Vec::new();
        loop {
            let timeout = queues.timeout();
            poller.wait(timeout, &mut tokens)?;
            queues.note_kicks(&tokens);
            queues.release_held();
            if queues.empty_mailbox().is_break() {
                return Ok(());
            }
            queues.serve();
        }
    }
}

fn shared_index(rings: &[SharedRing; QUEUES], ring: &SharedRing) -> usize {
    rings.iter().position(|other| std::ptr::eq(other, ring)).unwrap_or(0)
}

/// How long epoll may wait, in milliseconds: not at all while a ring may have commands, since a turn may have ended before
/// it was empty, and no kick comes for those; else until a held answer is due, rounded up; -1: until something happens.
fn time_to_wait(ready: [bool; QUEUES], due: Option<Instant>, now: Instant) -> i32 {
    if ready.contains(&true) {
        return 0;
    }
    let Some(due) = due else { return -1 };
    i32::try_from(due.saturating_duration_since(now).as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}

/// The rings, and everything that serves them.
struct Queues<'r, 'a> {
    thread: QueueThread,
    rings: &'r mut [Virtqueue<'a>; QUEUES],
    effects: Vec<Effect<Pending>>,
    held: Held,
    /// Rings that may have commands.
    ready: [bool; QUEUES],
    /// Jobs that the device has submitted and not got back.
    jobs: u64,
}

impl Queues<'_, '_> {
    fn timeout(&self) -> i32 {
        time_to_wait(self.ready, self.held.next_due(), Instant::now())
    }

    /// Publishes the held answers that are due.
    fn release_held(&mut self) {
        let mut answers = Vec::new();
        self.held.release(&mut answers);
        self.answer(answers);
    }

    fn answer(&mut self, answers: Vec<(Pending, Vec<u8>)>) {
        for (pending, response) in answers {
            self.rings[pending.queue].complete(pending, response);
        }
    }

    fn note_kicks(&mut self, tokens: &[u64]) {
        for token in tokens {
            let Some(ready) = usize::try_from(*token).ok().and_then(|index| self.ready.get_mut(index)) else {
                continue;
            };
            *ready = true;
            if let Some(shared) = self.thread.rings.get(*token as usize) {
                // No kick is there if the session has replaced the eventfd meanwhile: its message does the rest.
                shared.kick.clear();
            }
        }
    }

    fn empty_mailbox(&mut self) -> std::ops::ControlFlow<()> {
        self.thread.mailbox.clear_wake_up();
        while let Some(messages) = self.thread.mailbox.take() {
            match messages {
                QueueMessage::RingReady(queue) => self.ring_ready(queue),
                QueueMessage::CallReplaced(queue) => {
                    if let Some(ring) = self.rings.get_mut(queue) {
                        ring.call_replaced();
                    }
                }
                QueueMessage::JobFinished(finished) => self.job_finished(finished),
                QueueMessage::JobFaulted(faulted) => {
                    self.thread.stats.faults_raised.add(1);
                    self.thread.device.job_faulted(faulted, &mut self.effects);
                }
                QueueMessage::FlushEnded => self.thread.device.flush_ended(&mut self.effects),
                QueueMessage::DisplayAnswered { ticket, answer } => {
                    self.thread.device.display_answer(ticket, answer, &mut self.effects);
                }
                QueueMessage::MissAnswered { wait, side, answer } => self.miss_answered(wait, side, answer),
                QueueMessage::Describe(answer) => {
                    // The client may have stopped waiting.
                    let _ = answer.send(self.thread.device.contexts());
                }
                QueueMessage::Features(features) => self.thread.device.set_features(features),
                QueueMessage::Reset => self.reset(),
                QueueMessage::Close => {
                    self.thread.stats.jobs_discarded.add(self.jobs);
                    return std::ops::ControlFlow::Break(());
                }
            }
            self.carry_out();
        }
        self.publish();
        std::ops::ControlFlow::Continue(())
    }

    fn job_finished(&mut self, finished: FinishedJob) {
        let FinishedJob { job, outcome } = finished;
        let id = job.id();
        let failed = outcome != JobOutcome::Done;
        let swallowed = failed && self.thread.injection.fires(Bug::SwallowFailure);
        let fault = match outcome {
            JobOutcome::Failed(error) => Fault::of_job(self.thread.scheduler.now(), &job, error),
            JobOutcome::Done => None,
        };
        let overdue = Fault::overdue_flush(self.thread.scheduler.now(), &job);
        let told = if swallowed { JobOutcome::Done } else { outcome };
        if !self.thread.device.job_finished(job, told, &mut self.effects) {
            return;
        }
        let (sink, now) = (self.sink(CONTROL_QUEUE), self.thread.scheduler.now());
        sink.record_at(now, Event::Ended { job: id, failed });
        sink.instruments().names().job_ended(now, id);
        if let Some(fault) = fault {
            self.thread.stats.address_space_faults.add(1);
            self.sink(CONTROL_QUEUE).instruments().fault(fault);
        }
        if let Some(fault) = overdue {
            self.thread.stats.tlb_overdue.add(1);
            self.sink(CONTROL_QUEUE).instruments().fault(fault);
        }
        self.jobs = self.jobs.saturating_sub(1);
        match outcome {
            JobOutcome::Done => self.thread.stats.jobs_done.add(1),
            JobOutcome::Failed(error) => {
                self.thread.stats.jobs_failed.add(1);
                debug!("Job {} failed: {error}", id.raw());
            }
        }
    }

    fn ring_ready(&mut self, queue: usize) {
        if let (Some(ring), Some(ready)) = (self.rings.get_mut(queue), self.ready.get_mut(queue)) {
            ring.restarted();
            *ready = true;
        }
    }

    fn miss_answered(&mut self, wait: RingWait, side: Side, answer: MissAnswer) {
        let queue = wait.queue;
        if let (Some(ring), Some(ready)) = (self.rings.get_mut(queue), self.ready.get_mut(queue))
            && ring.miss_answered(wait, side, answer)
        {
            *ready = true;
        }
    }

    fn reset(&mut self) {
        let pending = self.thread.device.reset();
        // The session discarded the jobs when it got the reset; since then the old device may have run another job, or
        // a command that was taken just before the stop may have submitted one.
        if !self.thread.injection.is_on(Bug::KeepJobsOverReset) {
            self.thread.scheduler.discard();
        }
        debug!("Device reset: {} commands in flight are forgotten", pending.len());
        // Their driver no longer exists, so they get no answer.
        drop(pending);
        self.effects.clear();
        let instruments = self.sink(CONTROL_QUEUE).instruments();
        instruments.names().reset(instruments.clock().now());
        self.held.clear();
        self.thread.stats.jobs_discarded.add(std::mem::take(&mut self.jobs));
        self.thread.display.reset();
        self.rings.iter_mut().for_each(Virtqueue::reset);
        self.ready = [false; QUEUES];
    }

    /// Takes commands off the rings, in turns, until a message arrives or nothing is left.
    fn serve(&mut self) {
        for queue in 0..QUEUES {
            for _ in 0..TURN {
                if !self.ready[queue] || !self.thread.mailbox.is_empty() {
                    break;
                }
                self.ready[queue] = self.serve_one(queue);
                self.carry_out();
            }
        }
        self.publish();
    }

    /// Takes one command; `false` if there are no more for now.
    fn serve_one(&mut self, queue: usize) -> bool {
        match self.rings[queue].take() {
            Taken::Command(request, pending) => {
                self.execute(queue, &request, pending);
                true
            }
            Taken::Unreadable(pending) => {
                debug!("Queue {queue}: a request cannot be read, because it is too long or not mapped");
                self.count_error();
                self.rings[queue].complete(pending, Response::unreadable().into_bytes());
                true
            }
            Taken::Again => true,
            // The page was mapped between the two accesses.
            Taken::Missing(missing) if missing.is_empty() => true,
            Taken::Missing(missing) => {
                self.record_misses(queue, &missing);
                self.thread.misses.request(Waiter::RingInput(self.rings[queue].wait()), missing);
                false
            }
            Taken::Broke(error) => {
                self.broke(queue, &error);
                false
            }
            Taken::Empty | Taken::Idle => false,
        }
    }

    fn execute(&mut self, queue: usize, request: &[u8], pending: Pending) {
        let (stats, device) = (&self.thread.stats, &mut self.thread.device);
        if queue == CONTROL_QUEUE {
            stats.commands.add(1);
            device.control(request, pending, &mut self.effects);
        } else {
            stats.cursor_commands.add(1);
            device.cursor(request, pending, &mut self.effects);
        }
        self.note_backings();
    }

    /// Passes the command's changes to the names of addresses.
    fn note_backings(&mut self) {
        let mut changes = self.thread.device.take_backing_changes().peekable();
        if changes.peek().is_some() {
            let instruments = self.sink(CONTROL_QUEUE).instruments();
            let (now, mut names) = (instruments.clock().now(), instruments.names());
            changes.for_each(|change| names.backing_changed(now, change));
        }
    }

    fn sink(&self, queue: usize) -> &EventSink {
        // PANIC: queues are numbered from 0 to QUEUES - 1, and each has a sink.
        &self.thread.sinks[queue]
    }

    /// Carries out the device's effects.
    fn carry_out(&mut self) {
        if self.effects.is_empty() {
            return;
        }
        let now = self.thread.scheduler.now();
        for effect in std::mem::take(&mut self.effects) {
            match effect {
                Effect::Complete { pending, response } => {
                    if response.is_error() {
                        self.count_error();
                    }
                    let (fence, error) = (response.fence(), response.is_error());
                    self.sink(pending.queue).record_at(now, Event::Answered { fence, error });
                    let mut answers = Vec::new();
                    self.held.pass(&self.thread.injection, (pending, response.into_bytes()), &mut answers);
                    self.answer(answers);
                }
                Effect::Run(job) => {
                    self.thread.stats.jobs_submitted.add(1);
                    self.jobs = self.jobs.saturating_add(1);
                    let (job_id, context, mode) = (job.id(), job.context(), job.mode());
                    let sink = self.sink(CONTROL_QUEUE);
                    sink.record_at(now, Event::Submitted { job: job_id, context, mode });
                    sink.instruments().names().job_begun(job.name());
                    self.thread.scheduler.submit(job);
                }
                Effect::AnswerFault { wait, answer } => {
                    self.thread.stats.faults_replayed.add(answer.is_ok().into());
                    self.thread.scheduler.fault_answered(wait, answer);
                }
                Effect::Display(command) => self.thread.display.send(command),
                Effect::Ask { ticket, question } => self.thread.display.ask(ticket, question),
            }
        }
    }

    fn count_error(&self) {
        self.thread.stats.command_errors.add(1);
    }

    fn publish(&mut self) {
        for queue in 0..QUEUES {
            match self.rings[queue].publish() {
                Published::Nothing => {
                    if self.thread.injection.fires(Bug::SpuriousInterrupt) {
                        self.rings[queue].interrupt();
                    }
                }
                Published::Missing(missing) => self.ask_for_output(queue, missing),
                Published::Broke(error) => self.broke(queue, &error),
            }
        }
    }

    fn record_misses(&self, queue: usize, missing: &[Missing]) {
        for Missing { range, access, .. } in missing {
            self.sink(queue).record(Event::RingMiss { range: *range, access: *access });
        }
    }

    fn ask_for_output(&self, queue: usize, missing: Vec<Missing>) {
        self.record_misses(queue, &missing);
        self.thread.misses.request(Waiter::RingOutput(self.rings[queue].wait()), missing);
    }

    fn broke(&self, queue: usize, error: &RingError) {
        self.thread.stats.ring_errors.add(1);
        self.rings[queue].signal_error();
        // Logged once per start of the ring: the guest cannot repeat it without the front-end.
        warn!("Queue {queue} is broken until the driver resets it: {}", crate::error::chain(error));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn commands_that_a_turn_has_left_on_a_ring_wait_for_no_kick() {
        let now = Instant::now();
        let due = Some(now + Duration::from_micros(1500));
        assert_eq!(time_to_wait([false, true], None, now), 0);
        assert_eq!(time_to_wait([true, false], due, now), 0);
        assert_eq!(time_to_wait([false, false], due, now), 2, "a held answer is not published early");
        assert_eq!(time_to_wait([false, false], Some(now), now + Duration::from_secs(1)), 0);
        assert_eq!(time_to_wait([false, false], None, now), -1);
    }
}
