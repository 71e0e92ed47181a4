//! What is counted, under the names that the control socket, the exit line and the tests use. One table generates the
//! counters, their snapshot and its JSON. Knows numbers and durations; knows nothing of who counts or who reads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use hdrhistogram::Histogram;
use job_stream::{Choice, Mode};
use serde::Serialize;

use crate::jobs::verdict::{Confidence, Verdict};
use crate::locking::lock;

/// Longer latencies are recorded as this one.
const LONGEST: Duration = Duration::from_secs(60);
/// Significant decimal digits of a recorded latency.
const DIGITS: u8 = 2;

/// A number that any thread may increase or set.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Raises it by `amount`; wraps at 2^64.
    pub fn add(&self, amount: u64) {
        // ORDERING: Relaxed. A counter publishes nothing but itself; readers want totals, not an order.
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Sets it: for amounts that can also decrease, such as [`Stats::mapped_bytes`].
    pub fn set(&self, value: u64) {
        // ORDERING: Relaxed, as in `add`.
        self.0.store(value, Ordering::Relaxed);
    }

    /// The current value.
    pub fn get(&self) -> u64 {
        // ORDERING: Relaxed, as in `add`.
        self.0.load(Ordering::Relaxed)
    }
}

/// A distribution of durations, of bounded size (about 30 KiB).
///
/// LOCKING: the lock is a leaf, held for one record or one snapshot.
#[derive(Debug)]
pub struct LatencyHistogram(Mutex<Histogram<u64>>);

impl Default for LatencyHistogram {
    fn default() -> Self {
        // PANIC: the bounds are constants, and correct: low ≥ 1, high ≥ 2 × low, digits ≤ 5.
        let histogram = Histogram::new_with_bounds(1, LONGEST.as_nanos() as u64, DIGITS)
            .expect("constant histogram bounds are valid");
        Self(Mutex::new(histogram))
    }
}

impl LatencyHistogram {
    /// Adds one latency; one longer than a minute counts as a minute.
    pub fn record(&self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.lock().saturating_record(nanoseconds);
    }

    /// The distribution so far.
    pub fn snapshot(&self) -> LatencySnapshot {
        // Copied first, so that threads that record do not wait for the arithmetic.
        let histogram = self.lock().clone();
        LatencySnapshot {
            count: histogram.len(),
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
            max: histogram.max(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Histogram<u64>> {
        // A panic between two counts loses one count: the histogram can still be used.
        lock(&self.0)
    }
}

/// Summary of a [`LatencyHistogram`], in nanoseconds; all 0 while nothing was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LatencySnapshot {
    /// The number of latencies.
    pub count: u64,
    /// The median.
    pub p50: u64,
    /// The 99th percentile.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

/// Verdicts on jobs of one mode. A verdict is about one contiguous range that one INVALIDATE took from one job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerdictCounts {
    /// The same memory was mapped again.
    pub benign: u64,
    /// Other memory was mapped.
    pub moved: u64,
    /// Nothing was mapped.
    pub gone: u64,
    /// Other memory or none was mapped, and the job may already have been done with it.
    pub untold: u64,
}

/// Counts verdicts, mode by mode.
///
/// LOCKING: the lock is a leaf, held for one count or one snapshot.
#[derive(Debug, Default)]
pub struct VerdictCounters(Mutex<BTreeMap<&'static str, VerdictCounts>>);

impl VerdictCounters {
    /// Counts a verdict on a job of this mode.
    pub fn count(&self, mode: Mode, verdict: Verdict, confidence: Confidence) {
        let mut counts = lock(&self.0);
        let counts = counts.entry(mode.name()).or_default();
        let count = match (verdict, confidence) {
            (Verdict::Benign, _) => &mut counts.benign,
            (_, Confidence::CannotTell) => &mut counts.untold,
            (Verdict::Moved, _) => &mut counts.moved,
            (Verdict::Gone, _) => &mut counts.gone,
        };
        *count = count.wrapping_add(1);
    }

    /// The counts so far, by mode.
    pub fn snapshot(&self) -> BTreeMap<&'static str, VerdictCounts> {
        let counts = lock(&self.0);
        let of = |mode: &Mode| (mode.name(), counts.get(mode.name()).copied().unwrap_or_default());
        Mode::ALL.iter().map(of).collect()
    }
}

/// The table of all counters and histograms: generates [`Stats`], [`StatsSnapshot`] and the JSON names.
macro_rules! stats {
    (
        counters { $($(#[doc = $doc:literal])+ $counter:ident,)+ }
        latencies { $($(#[doc = $latency_doc:literal])+ $latency:ident,)+ }
    ) => {
        /// All counters of one back-end process; shared by its threads.
        #[derive(Debug, Default)]
        pub struct Stats {
            $($(#[doc = $doc])+ pub $counter: Counter,)+
            $($(#[doc = $latency_doc])+ pub $latency: LatencyHistogram,)+
            /// Verdicts on INVALIDATE messages for memory of jobs that had begun, by mode.
            pub verdicts: VerdictCounters,
        }

        /// A snapshot of [`Stats`]; as JSON, an object with these fields.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct StatsSnapshot {
            $($(#[doc = $doc])+ pub $counter: u64,)+
            $($(#[doc = $latency_doc])+ pub $latency: LatencySnapshot,)+
            /// Verdicts on INVALIDATE messages for memory of jobs that had begun, by mode.
            pub verdicts: BTreeMap<&'static str, VerdictCounts>,
        }

        impl Stats {
            /// A snapshot. Each value is exact, but they are read one after the other while the device runs.
            pub fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot {
                    $($counter: self.$counter.get(),)+
                    $($latency: self.$latency.snapshot(),)+
                    verdicts: self.verdicts.snapshot(),
                }
            }
        }
    };
}

stats! {
    counters {
        /// Front-ends that connected.
        connections,
        /// MISS messages sent, including retries.
        misses,
        /// Misses that the front-end refused.
        miss_refused,
        /// Misses that were not answered within the miss timeout.
        miss_timeouts,
        /// Misses sent again, because the answer did not cover the page.
        miss_retries,
        /// UPDATE messages that were accepted, including unsolicited ones.
        updates,
        /// UPDATE messages that answered no miss: checked, acked and not cached.
        updates_unsolicited,
        /// UPDATE messages that were answered with an error.
        updates_rejected,
        /// INVALIDATE messages.
        invalidations,
        /// INVALIDATE messages that hit memory of a job that has begun and not ended.
        invalidations_with_work_in_flight,
        /// Pins of registration caches that INVALIDATE messages did not wait for.
        incoherent_pins,
        /// Jobs, and ranges that INVALIDATE messages took from jobs, that got no verdict because they were too many.
        unjudged,
        /// Acks that had to wait for a drain.
        acks_parked,
        /// Pins dropped because a drain reached its timeout.
        ladder_evictions,
        /// Revocations of all guest memory because an engine did not stop.
        revocations,
        /// Total nanoseconds for which INVALIDATE messages kept the VM waiting.
        frozen_ns,
        /// Commands taken from the control queue.
        commands,
        /// Commands taken from the cursor queue.
        cursor_commands,
        /// Commands of either queue that were answered with an error.
        command_errors,
        /// Jobs given to the engines.
        jobs_submitted,
        /// Jobs that succeeded.
        jobs_done,
        /// Jobs that failed.
        jobs_failed,
        /// Jobs that failed because the page tables of an address space did not permit an access, or named a page that
        /// the front-end refused.
        address_space_faults,
        /// Faults that jobs have raised for their driver to answer.
        faults_raised,
        /// Of those, the ones after which the job tried again.
        faults_replayed,
        /// Lookups of address spaces that the TLB answered. A step looks up a page once.
        tlb_hits,
        /// Lookups of address spaces that led to a walk of the page tables.
        tlb_misses,
        /// Uses of TLB entries that the page tables had contradicted for a second: a flush is likely missing.
        tlb_overdue,
        /// Jobs that a reset of the device discarded.
        jobs_discarded,
        /// Steps of jobs.
        job_steps,
        /// Times that a job was parked for translations.
        job_parks,
        /// Bytes that jobs copied from or to the guest's memory.
        bytes_moved,
        /// Scanout flushes sent to the display, with or without a display to show them.
        flushes,
        /// Flushes merged into one that a connected display had not been sent yet.
        flushes_coalesced,
        /// UPDATE messages sent to the display.
        display_updates,
        /// Cursor images sent to the display, and cursors hidden.
        cursor_updates,
        /// Cursor moves sent to the display.
        cursor_moves,
        /// Times that a ring was marked broken.
        ring_errors,
        /// Events that a client of the control socket missed because it did not read.
        events_dropped,
        /// Certain findings about the front-end (`--check-front-end`), each counted once for a message or page.
        findings_certain,
        /// Likely findings about the front-end.
        findings_likely,
        /// Findings about the front-end that are known and tolerated.
        findings_noted,
        /// Current bytes of the mirror's page tables.
        mapped_bytes,
    }
    latencies {
        /// Time from an INVALIDATE message to its ack, in nanoseconds.
        ack_latency_ns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_shows_each_counter_under_its_own_name() {
        let stats = Stats::default();
        stats.misses.add(2);
        stats.misses.add(3);
        stats.mapped_bytes.set(8192);
        stats.mapped_bytes.set(4096);
        let verdicts = stats.verdicts.snapshot();
        let expected = StatsSnapshot { misses: 5, mapped_bytes: 4096, verdicts, ..StatsSnapshot::default() };
        assert_eq!(stats.snapshot(), expected);
    }

    #[test]
    fn percentiles_are_right_to_two_digits_and_an_endless_latency_is_a_minute() {
        let histogram = LatencyHistogram::default();
        assert_eq!(histogram.snapshot(), LatencySnapshot::default());
        for microseconds in 1..=100 {
            histogram.record(Duration::from_micros(microseconds));
        }
        let snapshot = histogram.snapshot();
        assert_eq!(snapshot.count, 100);
        for (found, expected) in [(snapshot.p50, 50_000), (snapshot.p99, 99_000), (snapshot.max, 100_000)] {
            assert!(found.abs_diff(expected) <= expected / 100, "{found} is not about {expected}");
        }
        histogram.record(Duration::MAX);
        let longest = histogram.snapshot().max;
        assert!(longest.abs_diff(60_000_000_000) <= 600_000_000, "{longest} is not about a minute");
    }

    #[test]
    fn verdicts_are_counted_by_mode_and_what_cannot_be_told_accuses_nobody() {
        let stats = Stats::default();
        let count = |mode, verdict, confidence| stats.verdicts.count(mode, verdict, confidence);
        count(Mode::Fence, Verdict::Benign, Confidence::CannotTell);
        count(Mode::Fence, Verdict::Gone, Confidence::Certain);
        count(Mode::Strict, Verdict::Moved, Confidence::Likely);
        count(Mode::Strict, Verdict::Moved, Confidence::CannotTell);
        let none = serde_json::json!({"benign": 0, "moved": 0, "gone": 0, "untold": 0});
        let expected = serde_json::json!({
            "fence": {"benign": 1, "moved": 0, "gone": 1, "untold": 0},
            "strict": {"benign": 0, "moved": 1, "gone": 0, "untold": 1},
            "preempt": none, "fault": none, "registration-cache": none,
        });
        assert_eq!(serde_json::to_value(stats.snapshot().verdicts).unwrap(), expected);
    }

    /// The names are an interface: the rig, the demo and users' scripts read them.
    #[test]
    fn json_names_are_those_that_users_know() {
        let json = serde_json::to_value(Stats::default().snapshot()).unwrap();
        let names: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
        let mut expected = vec![
            "connections",
            "misses",
            "miss_refused",
            "miss_timeouts",
            "miss_retries",
            "updates",
            "updates_unsolicited",
            "updates_rejected",
            "invalidations",
            "invalidations_with_work_in_flight",
            "acks_parked",
            "ladder_evictions",
            "revocations",
            "frozen_ns",
            "incoherent_pins",
            "unjudged",
            "ack_latency_ns",
            "commands",
            "cursor_commands",
            "command_errors",
            "jobs_submitted",
            "jobs_done",
            "jobs_failed",
            "address_space_faults",
            "faults_raised",
            "faults_replayed",
            "tlb_hits",
            "tlb_misses",
            "tlb_overdue",
            "jobs_discarded",
            "job_steps",
            "job_parks",
            "bytes_moved",
            "flushes",
            "flushes_coalesced",
            "display_updates",
            "cursor_updates",
            "cursor_moves",
            "ring_errors",
            "events_dropped",
            "findings_certain",
            "findings_likely",
            "findings_noted",
            "mapped_bytes",
            "verdicts",
        ];
        expected.sort_unstable();
        assert_eq!(names, expected);
        let latency = json.get("ack_latency_ns").unwrap().as_object().unwrap();
        assert_eq!(latency.keys().collect::<Vec<_>>(), ["count", "max", "p50", "p99"]);
    }
}
