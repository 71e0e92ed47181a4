//! The back-end's counts, as its control socket gives them, and what changed between two looks. Knows the names that
//! the rig uses; there may be more.

use serde::Deserialize;

/// What the back-end has counted since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[expect(missing_docs, reason = "the back-end documents its counts; these are their names")]
pub struct Stats {
    pub connections: u64,
    pub misses: u64,
    pub miss_refused: u64,
    pub miss_timeouts: u64,
    pub updates: u64,
    pub updates_rejected: u64,
    pub invalidations: u64,
    pub invalidations_with_work_in_flight: u64,
    pub acks_parked: u64,
    pub ladder_evictions: u64,
    pub revocations: u64,
    pub frozen_ns: u64,
    pub ack_latency_ns: Latency,
    pub commands: u64,
    pub cursor_commands: u64,
    pub command_errors: u64,
    pub jobs_submitted: u64,
    pub jobs_done: u64,
    pub jobs_failed: u64,
    pub jobs_discarded: u64,
    pub bytes_moved: u64,
    pub flushes: u64,
    pub cursor_updates: u64,
    pub cursor_moves: u64,
    pub ring_errors: u64,
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

/// Counts by which the back-end owned up to trouble between two looks; with a good driver, left in peace, all are 0.
pub fn troubles(before: &Stats, after: &Stats) -> Vec<(&'static str, u64)> {
    let counts: [(&str, Count); 7] = [
        ("miss_refused", |stats| stats.miss_refused),
        ("miss_timeouts", |stats| stats.miss_timeouts),
        ("updates_rejected", |stats| stats.updates_rejected),
        ("revocations", |stats| stats.revocations),
        ("command_errors", |stats| stats.command_errors),
        ("jobs_failed", |stats| stats.jobs_failed),
        ("ring_errors", |stats| stats.ring_errors),
    ];
    let rises = counts.map(|(name, count)| (name, count(after).saturating_sub(count(before))));
    rises.into_iter().filter(|(_, rise)| *rise > 0).collect()
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
