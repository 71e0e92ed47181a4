//! The state of contexts for observers of the device.

use std::collections::BTreeMap;

use job_stream::{Mode, Priority};

use super::{ContextId, Contexts, Item, JobQueue, QueueId};
use crate::jobs::job::JobId;

/// A context and its jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextInfo {
    /// Its number; `None`: it was destroyed, and its last job has not ended.
    pub context: Option<u32>,
    /// How invalidations treat its jobs; `None`: no job has set that yet.
    pub mode: Option<Mode>,
    /// Its scheduling priority.
    pub priority: Priority,
    /// A job failed: it accepts no more jobs.
    pub lost: bool,
    /// Resources that its jobs may name.
    pub attached: Vec<u32>,
    /// The rings that have jobs.
    pub rings: Vec<RingInfo>,
}

/// A ring with jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingInfo {
    /// Its number.
    pub ring: u8,
    /// The job that the engines have.
    pub running: Option<JobId>,
    /// Jobs that wait for it.
    pub waiting: usize,
}

impl<C> Contexts<C> {
    /// All contexts, oldest first.
    pub(crate) fn info(&self) -> Vec<ContextInfo> {
        let numbers: BTreeMap<_, _> = self.by_number.iter().map(|(number, id)| (*id, *number)).collect();
        let contexts = self.contexts.iter().map(|(id, context)| ContextInfo {
            context: numbers.get(id).copied(),
            mode: context.mode,
            priority: context.priority,
            lost: context.lost,
            attached: context.attached.keys().copied().collect(),
            rings: self.rings(*id),
        });
        contexts.collect()
    }

    fn rings(&self, context: ContextId) -> Vec<RingInfo> {
        let ring = |(id, queue): (&QueueId, &JobQueue<C>)| RingInfo {
            ring: id.ring,
            running: queue.running.as_ref().map(|running| running.id),
            waiting: queue.waiting.iter().filter(|item| matches!(item, Item::Job(_))).count(),
        };
        self.queues_of(context).map(ring).collect()
    }
}
