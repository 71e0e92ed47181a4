//! What keeps records bounded: the newest of a kind, and a limit on how often one is printed. Knows nothing of what the
//! records are about.

use std::collections::VecDeque;
use std::time::Duration;

/// Maximum number of records of each kind.
pub(crate) const KEPT: usize = 256;

/// Number of reports that may be printed in a burst, and the time after which one more is allowed.
pub(crate) const BURST: u32 = 8;
const ONE_MORE: Duration = Duration::from_secs(10);

/// The newest records of one kind, up to [`KEPT`].
#[derive(Clone, Debug)]
pub struct Newest<T> {
    /// Oldest first.
    pub records: VecDeque<T>,
    /// Number of older records that were dropped.
    pub dropped: u64,
}

impl<T> Default for Newest<T> {
    fn default() -> Self {
        Self { records: VecDeque::new(), dropped: 0 }
    }
}

impl<T> Newest<T> {
    /// Adds a record, and drops the oldest if there are too many.
    pub(crate) fn push(&mut self, record: T) {
        if self.records.len() >= KEPT {
            self.records.pop_front();
            self.dropped = self.dropped.saturating_add(1);
        }
        self.records.push_back(record);
    }
}

/// Limits how often something is printed.
#[derive(Debug)]
pub(crate) struct Rate {
    left: u32,
    since: Duration,
}

impl Default for Rate {
    fn default() -> Self {
        Self { left: BURST, since: Duration::ZERO }
    }
}

impl Rate {
    /// Whether a report may be printed now.
    pub(crate) fn take(&mut self, now: Duration) -> bool {
        let earned = now.saturating_sub(self.since).as_secs() / ONE_MORE.as_secs();
        if let Ok(earned) = u32::try_from(earned)
            && earned > 0
        {
            self.left = self.left.saturating_add(earned).min(BURST);
            self.since = now;
        }
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

/// What to print for a violation or a finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Print {
    /// The report, and the number of reports before it that were suppressed.
    Report {
        /// Number of suppressed reports.
        unprinted: u64,
    },
    /// Nothing: the limit is reached.
    Nothing,
}
