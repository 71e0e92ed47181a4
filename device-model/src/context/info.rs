//! What can be said of contexts to whoever watches the device.

use job_stream::{Mode, Priority};

use super::{Context, ContextId, Contexts, Item, Queue};
use crate::job::JobId;

/// A context and its queues of jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextInfo {
    /// Its number; `None`: it was destroyed, and its last job has not ended.
    pub context: Option<u32>,
    /// What an invalidation means to its jobs; `None`: no job has settled that yet.
    pub mode: Option<Mode>,
    /// Whose turn it is before it.
    pub priority: Priority,
    /// A job failed: it takes no more jobs.
    pub lost: bool,
    /// Resources that its jobs may name.
    pub attached: Vec<u32>,
    /// The jobs that are out at the engines: one a ring.
    pub running: Vec<JobId>,
    /// Jobs that wait behind them.
    pub waiting: usize,
}

impl<C> Contexts<C> {
    /// All contexts, in the order in which they were made.
    pub(crate) fn info(&self) -> Vec<ContextInfo> {
        let number = |id| self.by_number.iter().find(|(_, known)| **known == id).map(|(number, _)| *number);
        let info = |(id, context): (&ContextId, &Context)| {
            let queues = || self.queues_of(*id).map(|(_, queue)| queue);
            ContextInfo {
                context: number(*id),
                mode: context.mode,
                priority: context.priority,
                lost: context.lost,
                attached: context.attached.iter().copied().collect(),
                running: queues().filter_map(|queue| queue.running.as_ref()).map(|job| job.id).collect(),
                waiting: queues().map(Queue::jobs).sum(),
            }
        };
        self.contexts.iter().map(info).collect()
    }
}

impl<C> Queue<C> {
    fn jobs(&self) -> usize {
        self.waiting.iter().filter(|item| matches!(item, Item::Job(_))).count()
    }
}
