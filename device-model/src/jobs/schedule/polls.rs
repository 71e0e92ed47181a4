//! When WAITs poll memory again, ordered by time, so that waiting jobs cost the others nothing. Knows numbers of jobs;
//! knows nothing of what they wait for.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::jobs::job::JobId;

/// How much earlier than planned a poll may run when another one is due: one wake-up serves both.
const TOGETHER: Duration = Duration::from_micros(250);

/// The polls to come, by time.
#[derive(Debug, Default)]
pub(super) struct Polls(BTreeSet<(Duration, JobId)>);

impl Polls {
    /// The job polls again at this time.
    pub(super) fn add(&mut self, at: Duration, job: JobId) {
        self.0.insert((at, job));
    }

    /// The job polls earlier, or no longer.
    pub(super) fn remove(&mut self, poll: (Duration, JobId)) {
        self.0.remove(&poll);
    }

    /// When the first poll is due.
    pub(super) fn next(&self) -> Option<Duration> {
        self.0.first().map(|(at, _)| *at)
    }

    /// Takes the polls that are due, in order, and with them those that soon would be.
    pub(super) fn take_due(&mut self, now: Duration) -> BTreeSet<(Duration, JobId)> {
        if self.next().is_none_or(|next| next > now) {
            return BTreeSet::new();
        }
        let Some(end) = now.checked_add(TOGETHER) else { return self.take_all() };
        let later = self.0.split_off(&(end, JobId(0)));
        std::mem::replace(&mut self.0, later)
    }

    /// Takes all polls, in order.
    pub(super) fn take_all(&mut self) -> BTreeSet<(Duration, JobId)> {
        std::mem::take(&mut self.0)
    }
}
