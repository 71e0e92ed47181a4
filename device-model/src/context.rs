//! Contexts, and the queues of their jobs. A queue is an object of its own: it outlives its context until the job that
//! runs has ended. Jobs of a queue run one after the other; whose turn it is among queues, the schedule says. Knows the
//! order, modes and amounts; knows nothing of commands or of what jobs do.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::unwrap_used
    )
)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use job_stream::{Mode, Priority};

use crate::error::CommandError;
use crate::job::{JobError, JobId, Treatment};
use crate::program::Execution;
use crate::quota::{Budget, Quota, Quotas};

mod info;

pub use info::ContextInfo;

/// Packets of all jobs that are not done: a few hundred bytes each, at the most.
const MAX_PACKETS: u64 = 1 << 18;

/// Which queue of jobs: never the same twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct QueueId(u64);

#[derive(Debug)]
struct Context {
    queue: QueueId,
    attached: BTreeSet<u32>,
}

/// A job on its way.
#[derive(Debug)]
pub(crate) struct Submission<C> {
    /// What its end answers; without a fence it was answered at once.
    pub(crate) call: Option<C>,
    pub(crate) execution: Execution,
    pub(crate) treatment: Treatment,
    pub(crate) packets: u64,
}

/// What waits in a queue.
#[derive(Debug)]
enum Item<C> {
    Job(Box<Submission<C>>),
    /// Answered when everything before it is done.
    Answer(C),
}

/// What is to be done for a queue.
#[derive(Debug)]
pub(crate) enum Next<C> {
    /// This job runs now.
    Start(Box<Submission<C>>),
    /// This is answered.
    Answer(Option<C>, Result<(), JobError>),
}

#[derive(Debug)]
struct Running<C> {
    id: JobId,
    call: Option<C>,
    packets: u64,
    cancellation: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Queue<C> {
    /// Settled by the first job.
    mode: Option<Mode>,
    priority: Priority,
    /// A job failed, or the context is destroyed: what waits fails too.
    lost: bool,
    /// The context is gone: the queue goes when it is empty.
    orphan: bool,
    waiting: VecDeque<Item<C>>,
    running: Option<Running<C>>,
}

impl<C> Queue<C> {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.running.is_none()
    }
}

/// All contexts. `C` is the call that a job or a command answers.
#[derive(Debug)]
pub(crate) struct Contexts<C> {
    by_id: BTreeMap<u32, Context>,
    queues: BTreeMap<QueueId, Queue<C>>,
    running: BTreeMap<JobId, QueueId>,
    next_queue: u64,
    limit: u64,
    jobs: Budget,
    packets: Budget,
}

impl<C> Contexts<C> {
    pub(crate) fn new(quotas: &Quotas) -> Self {
        Self {
            by_id: BTreeMap::new(),
            queues: BTreeMap::new(),
            running: BTreeMap::new(),
            next_queue: 0,
            limit: quotas.contexts,
            jobs: Budget::new(Quota::QueuedJobs, quotas.queued_jobs),
            packets: Budget::new(Quota::Packets, MAX_PACKETS),
        }
    }

    /// Makes a context. One that was destroyed counts until its last job has ended.
    pub(crate) fn create(&mut self, ctx: u32) -> Result<(), CommandError> {
        if ctx == 0 {
            return Err(CommandError::ContextZero);
        }
        if self.by_id.contains_key(&ctx) {
            return Err(CommandError::ContextExists { ctx });
        }
        let mut contexts = Budget::new(Quota::Contexts, self.limit);
        contexts.take(self.queues.len() as u64)?;
        contexts.take(1)?;
        let queue = QueueId(self.next_queue);
        self.next_queue = self.next_queue.wrapping_add(1);
        let empty = Queue {
            mode: None,
            priority: Priority::Normal,
            lost: false,
            orphan: false,
            waiting: VecDeque::new(),
            running: None,
        };
        self.queues.insert(queue, empty);
        self.by_id.insert(ctx, Context { queue, attached: BTreeSet::new() });
        Ok(())
    }

    /// Ends a context: its running job is told to stop at its next step, those that wait fail, and `C` can be put
    /// behind them.
    pub(crate) fn destroy(&mut self, ctx: u32) -> Result<QueueId, CommandError> {
        let context = self.by_id.remove(&ctx).ok_or(CommandError::NoSuchContext { ctx })?;
        if let Some(queue) = self.queues.get_mut(&context.queue) {
            (queue.lost, queue.orphan) = (true, true);
            if let Some(running) = &queue.running {
                // ORDERING: a request, looked at again at every step.
                running.cancellation.store(true, Ordering::Relaxed);
            }
        }
        Ok(context.queue)
    }

    pub(crate) fn attach(&mut self, ctx: u32, resource: u32) -> Result<(), CommandError> {
        let context = self.by_id.get_mut(&ctx).ok_or(CommandError::NoSuchContext { ctx })?;
        context.attached.insert(resource);
        Ok(())
    }

    pub(crate) fn detach(&mut self, ctx: u32, id: u32) -> Result<QueueId, CommandError> {
        let context = self.by_id.get_mut(&ctx).ok_or(CommandError::NoSuchContext { ctx })?;
        if context.attached.remove(&id) {
            Ok(context.queue)
        } else {
            Err(CommandError::NotAttached { id, ctx })
        }
    }

    /// The resource is gone: another one may get its id.
    pub(crate) fn forget(&mut self, resource: u32) {
        for context in self.by_id.values_mut() {
            context.attached.remove(&resource);
        }
    }

    /// The queue of the context.
    pub(crate) fn queue(&self, ctx: u32) -> Result<QueueId, CommandError> {
        self.by_id.get(&ctx).map(|context| context.queue).ok_or(CommandError::NoSuchContext { ctx })
    }

    /// The queue of the context, if it still takes jobs.
    pub(crate) fn open_queue(&self, ctx: u32) -> Result<QueueId, CommandError> {
        let queue = self.queue(ctx)?;
        match self.queues.get(&queue) {
            Some(open) if !open.lost => Ok(queue),
            _ => Err(CommandError::ContextLost { ctx }),
        }
    }

    pub(crate) fn check_attached(&self, ctx: u32, id: u32) -> Result<(), CommandError> {
        let context = self.by_id.get(&ctx).ok_or(CommandError::NoSuchContext { ctx })?;
        if context.attached.contains(&id) { Ok(()) } else { Err(CommandError::NotAttached { id, ctx }) }
    }

    /// How a job of the context is treated that asks for this, if it may. Nothing is settled yet.
    pub(crate) fn treatment(
        &self,
        ctx: u32,
        asked: (Option<Mode>, Option<Priority>),
        default: Mode,
    ) -> Result<Treatment, CommandError> {
        let queue = self.queues.get(&self.queue(ctx)?).ok_or(CommandError::NoSuchContext { ctx })?;
        let mode = match (queue.mode, asked.0) {
            (Some(settled), Some(wanted)) if settled != wanted => {
                return Err(CommandError::ModeSettled { ctx, settled, wanted });
            }
            (settled, asked) => settled.or(asked).unwrap_or(default),
        };
        Ok(Treatment { context: Some(ctx), mode, priority: asked.1.unwrap_or(queue.priority) })
    }

    /// Takes the room for a job, or nothing.
    pub(crate) fn take_room(&mut self, packets: u64) -> Result<(), CommandError> {
        self.jobs.take(1)?;
        if let Err(refusal) = self.packets.take(packets) {
            self.jobs.give_back(1);
            return Err(refusal.into());
        }
        Ok(())
    }

    /// Queues a job for which there is room, and settles how its context is treated.
    pub(crate) fn submit(&mut self, queue: QueueId, submission: Box<Submission<C>>) {
        if let Some(queue) = self.queues.get_mut(&queue) {
            queue.mode = Some(submission.treatment.mode);
            queue.priority = submission.treatment.priority;
            queue.waiting.push_back(Item::Job(submission));
        }
    }

    /// Has `call` answered behind all jobs of the queue. It comes back if there is no such queue.
    pub(crate) fn answer_behind(&mut self, queue: QueueId, call: C) -> Option<C> {
        match self.queues.get_mut(&queue) {
            Some(queue) => queue.waiting.push_back(Item::Answer(call)),
            None => return Some(call),
        }
        None
    }

    /// What comes next in the queue, unless a job of it runs.
    pub(crate) fn next(&mut self, id: QueueId) -> Option<Next<C>> {
        let queue = self.queues.get_mut(&id)?;
        let item = if queue.running.is_some() { None } else { queue.waiting.pop_front() };
        let lost = queue.lost;
        if queue.orphan && queue.is_empty() {
            self.queues.remove(&id);
        }
        match item? {
            Item::Answer(call) => Some(Next::Answer(Some(call), Ok(()))),
            Item::Job(mut job) => {
                if lost && let Err(error) = job.execution.fail(JobError::ContextLost) {
                    self.give_room_back(job.packets);
                    return Some(Next::Answer(job.call, Err(error)));
                }
                Some(Next::Start(job))
            }
        }
    }

    /// The job of this queue runs now. What an engine needs of it is handed back.
    pub(crate) fn start(
        &mut self,
        id: QueueId,
        job: JobId,
        submission: Submission<C>,
    ) -> (Treatment, Execution) {
        let Submission { call, execution, treatment, packets } = submission;
        let running = Running { id: job, call, packets, cancellation: execution.cancellation() };
        // A queue whose last job this is was removed with its context: it is there again until the job ends.
        let queue = self.queues.entry(id).or_insert_with(|| Queue {
            mode: Some(treatment.mode),
            priority: treatment.priority,
            lost: true,
            orphan: true,
            waiting: VecDeque::new(),
            running: None,
        });
        queue.running = Some(running);
        self.running.insert(job, id);
        (treatment, execution)
    }

    /// A job ended. `None`: it is from before a reset. A job that failed takes its context with it.
    pub(crate) fn finish(&mut self, job: JobId, failed: bool) -> Option<(QueueId, Option<C>)> {
        let id = self.running.remove(&job)?;
        let queue = self.queues.get_mut(&id)?;
        queue.lost |= failed;
        let running = queue.running.take_if(|running| running.id == job)?;
        self.give_room_back(running.packets);
        Some((id, running.call))
    }

    /// Ends everything; the calls are handed back.
    pub(crate) fn clear(&mut self) -> Vec<C> {
        let mut calls = Vec::new();
        for queue in std::mem::take(&mut self.queues).into_values() {
            calls.extend(queue.running.and_then(|running| running.call));
            calls.extend(queue.waiting.into_iter().filter_map(|item| match item {
                Item::Job(job) => job.call,
                Item::Answer(call) => Some(call),
            }));
        }
        self.by_id.clear();
        self.running.clear();
        self.jobs.give_back(self.jobs.used());
        self.packets.give_back(self.packets.used());
        calls
    }

    fn give_room_back(&mut self, packets: u64) {
        self.jobs.give_back(1);
        self.packets.give_back(packets);
    }

    /// Contexts and jobs that there are.
    pub(crate) fn usage(&self) -> (u64, u64) {
        (self.queues.len() as u64, self.jobs.used())
    }
}
