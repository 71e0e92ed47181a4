//! Contexts, and the queues of their jobs: one for each ring (`ring_idx`; ring 0 for jobs that name none). A queue is a
//! separate object: it outlives the guest's context until the running job has ended. Jobs of a queue run one after the
//! other; the schedule arbitrates between queues, also between those of one context. Knows the order, modes and
//! amounts; knows nothing of commands or of what jobs do.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use job_stream::{Mode, Priority};

use crate::gpu::error::CommandError;
use crate::gpu::quota::{Budget, Quota, Quotas, SharedBudget};
use crate::jobs::job::{JobError, JobId, Treatment};
use crate::jobs::program::Execution;

mod info;

pub use info::{ContextInfo, RingInfo};

/// The most packets of all unfinished jobs: a few hundred bytes each.
const MAX_PACKETS: u64 = 1 << 18;

/// A context's identity: never reused, unlike the numbers that the guest assigns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ContextId(u64);

/// A queue of jobs: a ring of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct QueueId {
    pub(crate) context: ContextId,
    pub(crate) ring: u8,
}

#[derive(Debug)]
struct Context {
    /// Resources, with how often each is attached: Linux attaches and detaches once per GEM handle (linux:
    /// drivers/gpu/drm/virtio/virtgpu_gem.c, virtio_gpu_gem_object_open).
    attached: BTreeMap<u32, u32>,
    /// Set by the first job.
    mode: Option<Mode>,
    priority: Priority,
    /// A job failed, or the context is destroyed: waiting jobs fail too.
    lost: bool,
    /// The guest has destroyed it: it is removed when its queues are empty.
    orphan: bool,
    /// Its unfinished jobs.
    jobs: u64,
    /// The packets of these jobs.
    packets: u64,
}

/// An unfinished job.
#[derive(Debug)]
pub(crate) struct Submission<C> {
    /// The call that its end answers; without a fence it was answered at once.
    pub(crate) call: Option<C>,
    pub(crate) execution: Execution,
    pub(crate) treatment: Treatment,
    pub(crate) packets: u64,
}

/// An item of a queue.
#[derive(Debug)]
enum Item<C> {
    Job(Box<Submission<C>>),
    /// A barrier: counted when the queue reaches it.
    Barrier(u64),
}

/// A call that is answered when all queues that its context had have reached it.
#[derive(Debug)]
struct Barrier<C> {
    call: C,
    queues: usize,
}

/// What has to be done for a queue.
#[derive(Debug)]
pub(crate) enum Next<C> {
    /// Run this, as the job whose number was given.
    Start(Treatment, Box<Execution>),
    /// Answer this call.
    Answer(C, Result<(), JobError>),
    /// Nothing; ask again.
    Nothing,
}

#[derive(Debug)]
struct Running<C> {
    id: JobId,
    call: Option<C>,
    packets: u64,
    cancellation: Arc<AtomicBool>,
}

/// Jobs that run one after the other. An empty queue is not kept.
#[derive(Debug)]
struct JobQueue<C> {
    waiting: VecDeque<Item<C>>,
    running: Option<Running<C>>,
}

/// All contexts. `C` is the call that a job or a command answers.
#[derive(Debug)]
pub(crate) struct Contexts<C> {
    by_number: BTreeMap<u32, ContextId>,
    contexts: BTreeMap<ContextId, Context>,
    queues: BTreeMap<QueueId, JobQueue<C>>,
    running: BTreeMap<JobId, QueueId>,
    barriers: BTreeMap<u64, Barrier<C>>,
    next_context: u64,
    next_barrier: u64,
    limit: u64,
    jobs: SharedBudget,
    packets: SharedBudget,
}

impl<C> Contexts<C> {
    pub(crate) fn new(quotas: &Quotas) -> Self {
        Self {
            by_number: BTreeMap::new(),
            contexts: BTreeMap::new(),
            queues: BTreeMap::new(),
            running: BTreeMap::new(),
            barriers: BTreeMap::new(),
            next_context: 0,
            next_barrier: 0,
            limit: quotas.contexts,
            jobs: SharedBudget::new(Quota::QueuedJobs, quotas.queued_jobs, quotas.contexts),
            packets: SharedBudget::new(Quota::Packets, MAX_PACKETS, quotas.contexts),
        }
    }

    /// Creates a context. A destroyed one counts against the quota until its last job has ended.
    pub(crate) fn create(&mut self, ctx: u32) -> Result<(), CommandError> {
        if ctx == 0 {
            return Err(CommandError::ContextZero);
        }
        if self.by_number.contains_key(&ctx) {
            return Err(CommandError::ContextExists { ctx });
        }
        let mut contexts = Budget::new(Quota::Contexts, self.limit);
        contexts.take(self.contexts.len() as u64)?;
        contexts.take(1)?;
        let id = ContextId(self.next_context);
        self.next_context = self.next_context.wrapping_add(1);
        let (attached, priority) = (BTreeMap::new(), Priority::Normal);
        self.contexts.insert(
            id,
            Context { attached, mode: None, priority, lost: false, orphan: false, jobs: 0, packets: 0 },
        );
        self.by_number.insert(ctx, id);
        Ok(())
    }

    /// Ends a context: its running jobs are told to stop at their next step, those that wait fail, and a call can be
    /// queued after them.
    pub(crate) fn destroy(&mut self, ctx: u32) -> Result<ContextId, CommandError> {
        let id = self.by_number.remove(&ctx).ok_or(CommandError::NoSuchContext { ctx })?;
        if let Some(context) = self.contexts.get_mut(&id) {
            context.orphan = true;
        }
        self.lose(id);
        self.forget_if_over(id);
        Ok(id)
    }

    /// Makes all jobs of the context fail.
    fn lose(&mut self, id: ContextId) {
        if let Some(context) = self.contexts.get_mut(&id) {
            context.lost = true;
        }
        for running in self.queues_of(id).filter_map(|(_, queue)| queue.running.as_ref()) {
            // ORDERING: a request; each step reads it again.
            running.cancellation.store(true, Ordering::Relaxed);
        }
    }

    fn queues_of(&self, context: ContextId) -> impl Iterator<Item = (&QueueId, &JobQueue<C>)> {
        self.queues.range(QueueId { context, ring: 0 }..=QueueId { context, ring: u8::MAX })
    }

    /// The non-empty queues of a context.
    pub(crate) fn queue_ids(&self, context: ContextId) -> Vec<QueueId> {
        self.queues_of(context).map(|(id, _)| *id).collect()
    }

    fn context(&self, ctx: u32) -> Result<(ContextId, &Context), CommandError> {
        let found = self.by_number.get(&ctx).and_then(|id| Some((*id, self.contexts.get(id)?)));
        found.ok_or(CommandError::NoSuchContext { ctx })
    }

    fn context_mut(&mut self, ctx: u32) -> Result<(ContextId, &mut Context), CommandError> {
        let id = self.by_number.get(&ctx).copied();
        let found = id.and_then(|id| Some((id, self.contexts.get_mut(&id)?)));
        found.ok_or(CommandError::NoSuchContext { ctx })
    }

    pub(crate) fn attach(&mut self, ctx: u32, resource: u32) -> Result<(), CommandError> {
        let count = self.context_mut(ctx)?.1.attached.entry(resource).or_default();
        *count = count.saturating_add(1);
        Ok(())
    }

    pub(crate) fn detach(&mut self, ctx: u32, id: u32) -> Result<ContextId, CommandError> {
        let (found, context) = self.context_mut(ctx)?;
        let count = context.attached.get_mut(&id).ok_or(CommandError::NotAttached { id, ctx })?;
        *count = count.saturating_sub(1);
        if *count == 0 {
            context.attached.remove(&id);
        }
        Ok(found)
    }

    /// The resource is gone; a new one may get its id.
    pub(crate) fn forget(&mut self, resource: u32) {
        for context in self.contexts.values_mut() {
            context.attached.remove(&resource);
        }
    }

    /// The context of this number.
    pub(crate) fn id(&self, ctx: u32) -> Result<ContextId, CommandError> {
        self.context(ctx).map(|(id, _)| id)
    }

    /// Whether a job that is not over has to stop: its context is lost or destroyed. A job from before a reset has, too.
    pub(crate) fn is_killed(&self, job: JobId) -> bool {
        let context = self.running.get(&job).and_then(|queue| self.contexts.get(&queue.context));
        context.is_none_or(|context| context.lost)
    }

    /// The context of this number, if it still accepts jobs.
    pub(crate) fn open(&self, ctx: u32) -> Result<ContextId, CommandError> {
        match self.context(ctx)? {
            (id, context) if !context.lost => Ok(id),
            _ => Err(CommandError::ContextLost { ctx }),
        }
    }

    pub(crate) fn check_attached(&self, ctx: u32, id: u32) -> Result<(), CommandError> {
        let attached = self.context(ctx)?.1.attached.contains_key(&id);
        if attached { Ok(()) } else { Err(CommandError::NotAttached { id, ctx }) }
    }

    /// The mode and priority of a job that asks for these, if its context permits them. Sets nothing yet.
    pub(crate) fn treatment(
        &self,
        ctx: u32,
        asked: (Option<Mode>, Option<Priority>),
        default: Mode,
    ) -> Result<Treatment, CommandError> {
        let (_, context) = self.context(ctx)?;
        let mode = match (context.mode, asked.0) {
            (Some(settled), Some(wanted)) if settled != wanted => {
                return Err(CommandError::ModeSettled { ctx, settled, wanted });
            }
            (settled, asked) => settled.or(asked).unwrap_or(default),
        };
        Ok(Treatment { context: Some(ctx), mode, priority: asked.1.unwrap_or(context.priority) })
    }

    /// Reserves room for a job of this context, or nothing.
    pub(crate) fn take_room(&mut self, id: ContextId, packets: u64) -> Result<(), CommandError> {
        let contexts = self.contexts.len() as u64;
        let Some(context) = self.contexts.get_mut(&id) else { return Ok(()) };
        self.jobs.take(&mut context.jobs, 1, contexts)?;
        if let Err(refusal) = self.packets.take(&mut context.packets, packets, contexts) {
            self.jobs.give_back(&mut context.jobs, 1);
            return Err(refusal.into());
        }
        Ok(())
    }

    /// Queues a job for which room was reserved, and fixes the mode of its context.
    pub(crate) fn submit(&mut self, queue: QueueId, submission: Box<Submission<C>>) {
        if let Some(context) = self.contexts.get_mut(&queue.context) {
            context.mode = Some(submission.treatment.mode);
            context.priority = submission.treatment.priority;
        }
        let empty = || JobQueue { waiting: VecDeque::new(), running: None };
        self.queues.entry(queue).or_insert_with(empty).waiting.push_back(Item::Job(submission));
    }

    /// Answers `call` after all jobs of the context. It is returned if there are none.
    pub(crate) fn answer_behind(&mut self, context: ContextId, call: C) -> Option<C> {
        let number = self.next_barrier;
        let all = QueueId { context, ring: 0 }..=QueueId { context, ring: u8::MAX };
        let mut queues = 0_usize;
        for (_, queue) in self.queues.range_mut(all) {
            queue.waiting.push_back(Item::Barrier(number));
            queues = queues.saturating_add(1);
        }
        if queues == 0 {
            return Some(call);
        }
        self.next_barrier = number.wrapping_add(1);
        self.barriers.insert(number, Barrier { call, queues });
        None
    }

    /// The next item of the queue, unless one of its jobs runs. If it is a job, `job` becomes its number.
    pub(crate) fn next(&mut self, id: QueueId, job: JobId) -> Option<Next<C>> {
        let queue = self.queues.get_mut(&id)?;
        let item = if queue.running.is_some() { None } else { queue.waiting.pop_front() };
        let lost = self.contexts.get(&id.context).is_none_or(|context| context.lost);
        let next = match item {
            None => None,
            Some(Item::Barrier(number)) => Some(self.come_to(number)),
            Some(Item::Job(mut submission)) => {
                match lost.then(|| submission.execution.fail(JobError::ContextLost)) {
                    Some(Err(error)) => {
                        self.give_room_back(id.context, submission.packets);
                        Some(submission.call.map_or(Next::Nothing, |call| Next::Answer(call, Err(error))))
                    }
                    // A job of a lost context still runs if it has a user fence to write.
                    None | Some(Ok(())) => Some(self.start(id, job, *submission)),
                }
            }
        };
        if self.queues.get(&id).is_some_and(|queue| queue.waiting.is_empty() && queue.running.is_none()) {
            self.queues.remove(&id);
            self.forget_if_over(id.context);
        }
        next
    }

    /// A queue has reached a barrier.
    fn come_to(&mut self, number: u64) -> Next<C> {
        let Some(barrier) = self.barriers.get_mut(&number) else { return Next::Nothing };
        barrier.queues = barrier.queues.saturating_sub(1);
        if barrier.queues > 0 {
            return Next::Nothing;
        }
        self.barriers.remove(&number).map_or(Next::Nothing, |barrier| Next::Answer(barrier.call, Ok(())))
    }

    fn start(&mut self, id: QueueId, job: JobId, submission: Submission<C>) -> Next<C> {
        let Submission { call, execution, treatment, packets } = submission;
        if let Some(queue) = self.queues.get_mut(&id) {
            queue.running = Some(Running { id: job, call, packets, cancellation: execution.cancellation() });
        }
        self.running.insert(job, id);
        Next::Start(treatment, Box::new(execution))
    }

    /// Removes a destroyed context when its last job has ended.
    fn forget_if_over(&mut self, id: ContextId) {
        let over = self.contexts.get(&id).is_some_and(|context| context.orphan);
        if over && self.queues_of(id).next().is_none() {
            self.contexts.remove(&id);
        }
    }

    /// A job ended. `None`: it is from before a reset. A failed job makes its context lost.
    pub(crate) fn finish(&mut self, job: JobId, failed: bool) -> Option<(ContextId, Option<C>)> {
        let id = self.running.remove(&job)?;
        let queue = self.queues.get_mut(&id)?;
        let running = queue.running.take_if(|running| running.id == job)?;
        self.give_room_back(id.context, running.packets);
        if failed {
            self.lose(id.context);
        }
        Some((id.context, running.call))
    }

    /// Ends everything and returns the calls.
    pub(crate) fn clear(&mut self) -> Vec<C> {
        let mut calls = Vec::new();
        for queue in std::mem::take(&mut self.queues).into_values() {
            calls.extend(queue.running.and_then(|running| running.call));
            calls.extend(queue.waiting.into_iter().filter_map(|item| match item {
                Item::Job(job) => job.call,
                Item::Barrier(_) => None,
            }));
        }
        calls.extend(std::mem::take(&mut self.barriers).into_values().map(|barrier| barrier.call));
        self.by_number.clear();
        self.contexts.clear();
        self.running.clear();
        self.jobs.clear();
        self.packets.clear();
        calls
    }

    fn give_room_back(&mut self, id: ContextId, packets: u64) {
        if let Some(context) = self.contexts.get_mut(&id) {
            self.jobs.give_back(&mut context.jobs, 1);
            self.packets.give_back(&mut context.packets, packets);
        }
    }

    /// The numbers of contexts and jobs.
    pub(crate) fn usage(&self) -> (u64, u64) {
        (self.contexts.len() as u64, self.jobs.used())
    }
}
