//! What is counted, under the names that the control socket, the exit line and the tests use. One table makes the
//! counters, their snapshot and its JSON. Knows numbers and durations; knows nothing of who counts or who reads.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use hdrhistogram::Histogram;
use job_stream::{Choice, Mode};
use serde::Serialize;

use crate::locking::lock;
use crate::telemetry::violation::{Confidence, Verdict};

/// Longest latency that is told apart from longer ones.
const LONGEST: Duration = Duration::from_secs(60);
/// Significant decimal digits of a recorded latency.
const DIGITS: u8 = 2;

/// A number that any thread may raise or set.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Raises it by `amount`; wraps at 2^64.
    pub fn add(&self, amount: u64) {
        // ORDERING: Relaxed. A counter publishes nothing but itself; readers want totals, not an order.
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// Sets it: for amounts that go down too, such as [`Stats::mapped_bytes`].
    pub fn set(&self, value: u64) {
        // ORDERING: Relaxed, as in `add`.
        self.0.store(value, Ordering::Relaxed);
    }

    /// What it says now.
    pub fn get(&self) -> u64 {
        // ORDERING: Relaxed, as in `add`.
        self.0.load(Ordering::Relaxed)
    }
}

/// How long something took, as a distribution of bounded size (about 30 KiB).
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
    /// Adds one latency; one beyond a minute counts as a minute.
    pub fn record(&self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.lock().saturating_record(nanoseconds);
    }

    /// The distribution so far.
    pub fn snapshot(&self) -> LatencySnapshot {
        // Copied first, so that nobody who records waits for the arithmetic.
        let histogram = self.lock().clone();
        LatencySnapshot {
            count: histogram.len(),
            p50: histogram.value_at_quantile(0.5),
            p99: histogram.value_at_quantile(0.99),
            max: histogram.max(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Histogram<u64>> {
        // A panic between two counts leaves a histogram that is short of one: good enough to go on with.
        lock(&self.0)
    }
}

/// Figures of a [`LatencyHistogram`], in nanoseconds; all 0 while nothing was recorded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LatencySnapshot {
    /// How many latencies.
    pub count: u64,
    /// Half of them took no longer.
    pub p50: u64,
    /// 99 of 100 took no longer.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

/// Verdicts of one mode; a verdict is about memory that one INVALIDATE took from one job, in one piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerdictCounts {
    /// The same memory was there again.
    pub benign: u64,
    /// Other memory was there.
    pub moved: u64,
    /// None was there.
    pub gone: u64,
    /// It was other memory or none, and the job may have been done with it.
    pub untold: u64,
}

/// Counts verdicts, mode by mode.
///
/// LOCKING: the lock is a leaf, held for one count or one snapshot.
#[derive(Debug, Default)]
pub struct VerdictCounters(Mutex<BTreeMap<&'static str, VerdictCounts>>);

impl VerdictCounters {
    /// Counts a verdict about a job in this mode.
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

    /// The counts so far, of each mode.
    pub fn snapshot(&self) -> BTreeMap<&'static str, VerdictCounts> {
        let counts = lock(&self.0);
        let of = |mode: &Mode| (mode.name(), counts.get(mode.name()).copied().unwrap_or_default());
        Mode::ALL.iter().map(of).collect()
    }
}

/// The table of all counters and histograms: from it come [`Stats`], [`StatsSnapshot`] and the JSON names.
macro_rules! stats {
    (
        counters { $($(#[doc = $doc:literal])+ $counter:ident,)+ }
        latencies { $($(#[doc = $latency_doc:literal])+ $latency:ident,)+ }
    ) => {
        /// All that one back-end process counts; shared by its threads.
        #[derive(Debug, Default)]
        pub struct Stats {
            $($(#[doc = $doc])+ pub $counter: Counter,)+
            $($(#[doc = $latency_doc])+ pub $latency: LatencyHistogram,)+
            /// What INVALIDATE messages turned out to mean for memory of jobs that had begun, by their modes.
            pub verdicts: VerdictCounters,
        }

        /// [`Stats`] at one moment; as JSON, an object with these fields.
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct StatsSnapshot {
            $($(#[doc = $doc])+ pub $counter: u64,)+
            $($(#[doc = $latency_doc])+ pub $latency: LatencySnapshot,)+
            /// What INVALIDATE messages turned out to mean for memory of jobs that had begun, by their modes.
            pub verdicts: BTreeMap<&'static str, VerdictCounts>,
        }

        impl Stats {
            /// All figures; each is exact, but they are read one after the other while the device runs.
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
        /// MISS messages sent, retries included.
        misses,
        /// Misses that the front-end refused.
        miss_refused,
        /// Misses that were not answered within the miss timeout.
        miss_timeouts,
        /// Misses sent again, because the answer did not cover the page.
        miss_retries,
        /// UPDATE messages that were accepted, unsolicited ones included.
        updates,
        /// UPDATE messages that no miss had asked for: checked, acked and not cached.
        updates_unsolicited,
        /// UPDATE messages that were answered with an error.
        updates_rejected,
        /// INVALIDATE messages.
        invalidations,
        /// INVALIDATE messages that hit memory of a job that has begun and not ended.
        invalidations_with_work_in_flight,
        /// Pins of registration caches that INVALIDATE messages did not wait for.
        incoherent_pins,
        /// Jobs, and ranges that INVALIDATE messages took from jobs, that are too many to be judged: no verdict is given.
        unjudged,
        /// Acks that had to wait for a drain.
        acks_parked,
        /// Pins dropped because a drain reached its timeout.
        ladder_evictions,
        /// Times that all of the guest's memory was taken away from an engine that did not stop.
        revocations,
        /// Nanoseconds for which INVALIDATE messages kept the VM waiting, all together.
        frozen_ns,
        /// Commands taken from the control queue.
        commands,
        /// Commands taken from the cursor queue.
        cursor_commands,
        /// Commands of either queue that were answered with an error.
        command_errors,
        /// Jobs given to the engines.
        jobs_submitted,
        /// Jobs that ended well.
        jobs_done,
        /// Jobs that ended with an error.
        jobs_failed,
        /// Jobs that a reset of the device discarded.
        jobs_discarded,
        /// Steps of all jobs.
        job_steps,
        /// Times that a job was put aside to wait for a translation.
        job_parks,
        /// Bytes that jobs copied from or to the guest's memory.
        bytes_moved,
        /// Flushes of a scanout given to the display, with or without a display to show them.
        flushes,
        /// Flushes that joined one which a connected display had not yet been sent.
        flushes_coalesced,
        /// UPDATE messages sent to the display.
        display_updates,
        /// Cursor images given to the display, and cursors taken away.
        cursor_updates,
        /// Cursor moves given to the display.
        cursor_moves,
        /// Times that a ring was marked broken.
        ring_errors,
        /// Events that a client of the control socket did not get, because it did not read.
        events_dropped,
        /// Findings about the front-end that are certain (`--check-front-end`), each once for a message or page.
        findings_certain,
        /// The same that are likely.
        findings_likely,
        /// What is known of the front-end and not held against it.
        findings_noted,
        /// Bytes of the mirror's page tables now.
        mapped_bytes,
    }
    latencies {
        /// From an INVALIDATE message to its ack, in nanoseconds.
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
