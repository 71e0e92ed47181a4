//! What can be said of contexts to whoever watches the device.

use job_stream::{Mode, Priority};

use super::{Contexts, Item, Queue};
use crate::job::JobId;

/// A context and its queue of jobs.
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
    /// The job that is out at the engines.
    pub running: Option<JobId>,
    /// Jobs that wait behind it.
    pub waiting: usize,
}

impl<C> Contexts<C> {
    /// All contexts, in the order of their numbers, then those that were destroyed.
    pub(crate) fn info(&self) -> Vec<ContextInfo> {
        let mut infos = Vec::new();
        for (id, context) in &self.by_id {
            if let Some(queue) = self.queues.get(&context.queue) {
                let attached = context.attached.iter().copied().collect();
                infos.push(ContextInfo { context: Some(*id), attached, ..queue.info() });
            }
        }
        infos.extend(self.queues.values().filter(|queue| queue.orphan).map(Queue::info));
        infos
    }
}

impl<C> Queue<C> {
    fn info(&self) -> ContextInfo {
        let jobs = self.waiting.iter().filter(|item| matches!(item, Item::Job(_)));
        ContextInfo {
            context: None,
            mode: self.mode,
            priority: self.priority,
            lost: self.lost,
            attached: Vec::new(),
            running: self.running.as_ref().map(|running| running.id),
            waiting: jobs.count(),
        }
    }
}
