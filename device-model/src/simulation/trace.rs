//! What happened: a hash of every event, so that two runs can be compared, lines for people when a run is watched,
//! and counts of what the schedules really hit.

use std::fmt;

/// Everything that happened in one run.
#[derive(Debug)]
pub(super) struct Trace {
    hash: u64,
    watched: bool,
}

impl Trace {
    pub(super) fn new(watched: bool) -> Self {
        Self { hash: 0xcbf2_9ce4_8422_2325, watched }
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    pub(super) fn is_watched(&self) -> bool {
        self.watched
    }

    /// Takes note of an event: what happened, and two numbers that say to what.
    pub(super) fn event(&mut self, micros: u128, what: &str, a: u64, b: u64) {
        // FNV-1a, over words.
        let mut add = |word: u64| self.hash = (self.hash ^ word).wrapping_mul(0x0000_0100_0000_01b3);
        what.bytes().for_each(|byte| add(byte.into()));
        add(a);
        add(b);
        if self.watched {
            println!("{micros:>9} µs  {what} {a:#x} {b:#x}");
        }
    }
}

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What schedules hit.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counts {
            /// Adds those of another run.
            pub fn add(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
            }

            /// All counts, with their names.
            pub fn all(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

counts! {
    /// Schedules that were played.
    schedules,
    /// Operations of them.
    operations,
    /// Commands that the guest gave.
    commands,
    /// Responses that the guest saw.
    responses,
    /// Responses with a fence.
    fences,
    /// Jobs that came to their end.
    jobs_done,
    /// Jobs that ended in an error: a refused or unanswered miss.
    jobs_failed,
    /// Steps of jobs.
    steps,
    /// Steps over a section of their own.
    section_steps,
    /// Jobs that were parked for misses.
    parked_for_misses,
    /// Jobs that were parked for the end of an invalidation.
    parked_for_invalidations,
    /// Jobs that an evicted pin took off.
    evictions,
    /// Accesses that were checked, a page each.
    accesses,
    /// Images that were compared with what the guest's pages held, and pages of them.
    images_compared,
    /// Pages that were compared.
    pages_compared,
    /// INVALIDATEs.
    invalidations,
    /// Those that found a pin in flight.
    invalidations_with_pins,
    /// Those that found a section in flight.
    invalidations_with_sections,
    /// Those of the whole domain.
    whole_domain,
    /// Those with ends within a page, up to 2^64.
    odd_ranges,
    /// Acks that were parked.
    parked_acks,
    /// Drains that had to evict.
    ladders,
    /// Drains that a wedged engine made revoke memory.
    revocations,
    /// UPDATEs that an INVALIDATE overtook before their MISS was answered.
    staged_discarded,
    /// MISSes.
    misses,
    /// MISSes that were refused.
    misses_refused,
    /// Memory taken from under a job that was there again.
    verdicts_benign,
    /// Memory taken from under a job in whose place there was other memory.
    verdicts_moved,
    /// Memory taken from under a job in whose place there was none.
    verdicts_gone,
    /// MISSes that were given up.
    miss_timeouts,
    /// MISSes that were asked again.
    miss_retries,
    /// Answers to MISSes from before a stop.
    stale_answers,
    /// Answers that were lost on purpose.
    answers_lost,
    /// Translations that the mirror did not take.
    maps_refused,
    /// Pages that the guest mapped to another frame at once.
    remaps,
    /// Pages that the guest mapped to another frame and back.
    remaps_and_back,
    /// Stops.
    stops,
    /// Stops that found a job on an engine.
    stops_with_running_jobs,
    /// Stops that found a job parked or ready.
    stops_with_waiting_jobs,
    /// Resets that found jobs.
    resets_with_jobs,
    /// Jobs that came back after a reset.
    stale_jobs,
    /// Changes of the memory table.
    memory_changes,
    /// Those that had to wait for a drain.
    memory_changes_with_work,
    /// Channels that were replaced.
    channels_replaced,
    /// Responses that had to wait for a MISS.
    responses_missing,
    /// Operations that took place within a step.
    within_steps,
}

impl Counts {
    /// What no schedule has hit.
    pub fn never_hit(&self) -> Vec<&'static str> {
        self.all().into_iter().filter(|(_, count)| *count == 0).map(|(name, _)| name).collect()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.all()
            .into_iter()
            .try_for_each(|(name, count)| writeln!(f, "{count:>12}  {}", name.replace('_', " ")))
    }
}
