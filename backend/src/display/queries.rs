//! Queries that the display has not answered yet. Each is removed exactly once: answered, or timed out. Knows
//! deadlines; knows nothing of sockets.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use device_model::gpu::scanout::{DisplayAnswer, DisplayQuery};

/// Maximum number of pending queries; further ones get an empty answer without asking the display.
const MAX_WAITING: usize = 64;

/// A query with the ticket that identifies its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueuedQuery {
    pub(super) ticket: u64,
    pub(super) what: DisplayQuery,
}

impl QueuedQuery {
    /// The empty answer for when the display has not answered.
    pub(super) fn unanswered(&self) -> DisplayAnswer {
        match self.what {
            DisplayQuery::Modes => DisplayAnswer::Modes(None),
            DisplayQuery::Edid { .. } => DisplayAnswer::Edid(None),
        }
    }
}

/// The pending queries in order of arrival, which is also that of their deadlines.
#[derive(Debug, Default)]
pub(super) struct DisplayQueries {
    waiting: VecDeque<(Instant, QueuedQuery)>,
}

impl DisplayQueries {
    /// Adds a query with this deadline; returns it as the error if too many are pending.
    pub(super) fn add(&mut self, query: QueuedQuery, deadline: Instant) -> Result<(), QueuedQuery> {
        if self.waiting.len() >= MAX_WAITING {
            return Err(query);
        }
        self.waiting.push_back((deadline, query));
        Ok(())
    }

    /// The query to send next. It stays here until it is taken or times out.
    pub(super) fn next(&self) -> Option<QueuedQuery> {
        self.waiting.front().map(|(_, query)| *query)
    }

    /// Removes `query`, which the caller answers; false if it has timed out meanwhile.
    pub(super) fn take(&mut self, query: QueuedQuery) -> bool {
        let before = self.waiting.len();
        self.waiting.retain(|(_, known)| *known != query);
        self.waiting.len() < before
    }

    /// Removes one query that has timed out.
    pub(super) fn take_expired(&mut self, now: Instant) -> Option<QueuedQuery> {
        let (deadline, _) = self.waiting.front()?;
        if *deadline > now {
            return None;
        }
        self.waiting.pop_front().map(|(_, query)| query)
    }

    /// Time until the next query times out; `None` if none is pending.
    pub(super) fn time_left(&self, now: Instant) -> Option<Duration> {
        self.waiting.front().map(|(deadline, _)| deadline.saturating_duration_since(now))
    }

    /// Drops all queries without an answer.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(ticket: u64) -> QueuedQuery {
        QueuedQuery { ticket, what: DisplayQuery::Modes }
    }

    #[test]
    fn a_question_leaves_once_by_answer_or_by_time() {
        let start = Instant::now();
        let mut queries = DisplayQueries::default();
        assert_eq!(queries.add(query(1), start + Duration::from_secs(1)), Ok(()));
        assert_eq!(queries.add(query(2), start + Duration::from_secs(2)), Ok(()));
        assert_eq!(queries.time_left(start), Some(Duration::from_secs(1)));
        assert_eq!(queries.take_expired(start), None);
        assert_eq!(queries.take_expired(start + Duration::from_secs(1)), Some(query(1)));
        assert!(!queries.take(query(1)), "it was given up");
        assert_eq!(queries.next(), Some(query(2)));
        assert!(queries.take(query(2)));
        assert!(!queries.take(query(2)));
        assert_eq!(queries.time_left(start), None);
    }

    #[test]
    fn no_more_than_the_bound_wait() {
        let now = Instant::now();
        let mut queries = DisplayQueries::default();
        for ticket in 0..MAX_WAITING as u64 {
            assert_eq!(queries.add(query(ticket), now), Ok(()));
        }
        assert_eq!(queries.add(query(1000), now), Err(query(1000)));
    }
}
