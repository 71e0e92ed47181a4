//! The ready jobs: ordered by priority, first come first served within one, and without starvation. Knows nothing of
//! what makes a job ready.

use std::collections::VecDeque;

use job_stream::Priority;

use super::ScheduledJob;

/// After this many turns of higher priorities, a job of the lowest priority that is ready gets a turn.
pub(super) const PATIENCE: u32 = 16;

/// The ready jobs, by priority, first come first served within one.
#[derive(Debug, Default)]
pub(super) struct Ready {
    /// Low, normal, high.
    queues: [ReadyQueue; 3],
    /// Turns since a job of the lowest ready priority had one.
    passed_over: u32,
}

/// The jobs of one priority. A WAIT's poll takes almost no time, and there may be many: one poll is taken between two
/// jobs with work to do, so that a job does not wait until all of them have polled.
#[derive(Debug, Default)]
struct ReadyQueue {
    work: VecDeque<ScheduledJob>,
    polls: VecDeque<ScheduledJob>,
    /// The last job taken did not poll, so one that does is next.
    is_turn_of_polls: bool,
}

impl ReadyQueue {
    fn is_empty(&self) -> bool {
        self.work.is_empty() && self.polls.is_empty()
    }

    fn pop(&mut self) -> Option<ScheduledJob> {
        let is_turn = self.is_turn_of_polls || self.work.is_empty();
        let poll = if is_turn { self.polls.pop_front() } else { None };
        self.is_turn_of_polls = poll.is_none();
        poll.or_else(|| self.work.pop_front())
    }
}

impl Ready {
    fn queue(&mut self, work: &ScheduledJob) -> &mut ReadyQueue {
        let [low, normal, high] = &mut self.queues;
        match work.job.priority() {
            Priority::Low => low,
            Priority::Normal => normal,
            Priority::High => high,
        }
    }

    pub(super) fn push_back(&mut self, work: ScheduledJob) {
        self.queue(&work).work.push_back(work);
    }

    pub(super) fn push_front(&mut self, work: ScheduledJob) {
        self.queue(&work).work.push_front(work);
    }

    /// Adds a job whose WAIT polls.
    pub(super) fn push_poll(&mut self, work: ScheduledJob) {
        self.queue(&work).polls.push_back(work);
    }

    /// The highest priority first, but a job that was passed over [`PATIENCE`] times comes next.
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
        chosen.pop()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &ScheduledJob> {
        self.queues.iter().flat_map(|queue| queue.work.iter().chain(&queue.polls))
    }

    pub(super) fn len(&self) -> usize {
        self.queues.iter().map(|queue| queue.work.len().saturating_add(queue.polls.len())).sum()
    }

    pub(super) fn clear(&mut self) {
        self.queues = Default::default();
    }
}
