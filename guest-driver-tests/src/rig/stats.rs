//! The back-end's counts, as its control socket returns them, and what changed between two snapshots. Knows the names
//! that the rig uses; there may be more.

use serde::Deserialize;

/// The table of counts: it generates the struct and the difference of two snapshots.
macro_rules! counts {
    ($($count:ident,)+) => {
        /// What the back-end has counted since it started.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
        #[expect(missing_docs, reason = "the back-end documents its counts; these are their names")]
        pub struct Stats {
            pub ack_latency_ns: Latency,
            $(pub $count: u64,)+
        }

        impl Stats {
            /// What was counted since the snapshot `before`. Latencies are not counts: they stay as they are.
            #[must_use]
            pub fn since(&self, before: &Self) -> Self {
                Self {
                    ack_latency_ns: self.ack_latency_ns,
                    $($count: self.$count.saturating_sub(before.$count),)+
                }
            }
        }
    };
}

counts! {
    connections,
    misses,
    miss_refused,
    miss_timeouts,
    updates,
    updates_rejected,
    invalidations,
    invalidations_with_work_in_flight,
    incoherent_pins,
    acks_parked,
    ladder_evictions,
    revocations,
    frozen_ns,
    commands,
    cursor_commands,
    command_errors,
    jobs_submitted,
    jobs_done,
    jobs_failed,
    jobs_discarded,
    bytes_moved,
    flushes,
    cursor_updates,
    cursor_moves,
    ring_errors,
}

/// Latencies in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[expect(missing_docs, reason = "count, two percentiles and the maximum, as their names say")]
pub struct Latency {
    pub count: u64,
    pub p50: u64,
    pub p99: u64,
    pub max: u64,
}

type Count = fn(&Stats) -> u64;

/// Counts of trouble that the back-end reported between two snapshots; with a correct, undisturbed driver all are 0.
pub fn troubles(before: &Stats, after: &Stats) -> Vec<(&'static str, u64)> {
    let rises = after.since(before);
    let counts: [(&str, Count); 7] = [
        ("miss_refused", |stats| stats.miss_refused),
        ("miss_timeouts", |stats| stats.miss_timeouts),
        ("updates_rejected", |stats| stats.updates_rejected),
        ("revocations", |stats| stats.revocations),
        ("command_errors", |stats| stats.command_errors),
        ("jobs_failed", |stats| stats.jobs_failed),
        ("ring_errors", |stats| stats.ring_errors),
    ];
    counts.map(|(name, count)| (name, count(&rises))).into_iter().filter(|(_, rise)| *rise > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_troubles_that_are_new_are_told() {
        let before = Stats { misses: 5, miss_refused: 1, ..Stats::default() };
        let after = Stats { misses: 9, jobs_failed: 2, ..before };
        assert_eq!(troubles(&before, &after), [("jobs_failed", 2)]);
    }
}
