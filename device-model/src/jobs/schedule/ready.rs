//! The jobs that are ready: by priority, in turn within one, and none passed over for ever. Knows nothing of what makes
//! a job ready.

use std::collections::VecDeque;

use job_stream::Priority;

use super::ScheduledJob;

/// Turns of higher priorities after which one of the lowest that is ready comes.
pub(super) const PATIENCE: u32 = 16;

/// The jobs that are ready: by priority, and in turn within one.
#[derive(Debug, Default)]
pub(super) struct Ready {
    /// Low, normal, high.
    queues: [VecDeque<ScheduledJob>; 3],
    /// Turns since one of the lowest had one.
    passed_over: u32,
}

impl Ready {
    fn queue(&mut self, work: &ScheduledJob) -> &mut VecDeque<ScheduledJob> {
        let [low, normal, high] = &mut self.queues;
        match work.job.priority() {
            Priority::Low => low,
            Priority::Normal => normal,
            Priority::High => high,
        }
    }

    pub(super) fn push_back(&mut self, work: ScheduledJob) {
        self.queue(&work).push_back(work);
    }

    pub(super) fn push_front(&mut self, work: ScheduledJob) {
        self.queue(&work).push_front(work);
    }

    /// The highest priority first; but whoever has waited long enough comes too.
    pub(super) fn pop(&mut self) -> Option<ScheduledJob> {
        let mut busy = self.queues.iter_mut().filter(|queue| !queue.is_empty());
        let (lowest, highest) = (busy.next()?, busy.next_back());
        let chosen = match highest {
            Some(highest) if self.passed_over < PATIENCE => {
                self.passed_over = self.passed_over.saturating_add(1);
                highest
            }
            _ => {
                self.passed_over = 0;
                lowest
            }
        };
        chosen.pop_front()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ScheduledJob> {
        self.queues.iter().flatten()
    }

    pub(super) fn len(&self) -> usize {
        self.queues.iter().map(VecDeque::len).sum()
    }

    pub(super) fn clear(&mut self) {
        self.queues.iter_mut().for_each(VecDeque::clear);
    }
}
