//! The trace of a run: a hash of every event, to compare two runs, lines for people who watch a run, and counts of what
//! the schedules exercised.

use std::fmt;

use job_stream::Mode;

use crate::jobs::job::JobOutcome;
use crate::jobs::verdict::{Confidence, Verdict};

/// The trace of one run.
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

    /// Records an event: its name, and two numbers that identify its subject.
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
        /// Counts of what schedules exercised.
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counts {
            /// Adds the counts of another run.
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
    /// Commands that the guest sent.
    commands,
    /// Responses that the guest saw.
    responses,
    /// Responses with a fence.
    fences,
    /// Jobs that succeeded.
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
    /// Jobs that left their engine because their pin was evicted.
    evictions,
    /// Job streams that a context accepted.
    streams,
    /// Job streams that a lost context refused.
    streams_refused,
    /// Jobs that were compared with their twin.
    streams_compared,
    /// Jobs in strict mode that succeeded.
    done_strict,
    /// Jobs in strict mode that failed.
    failed_strict,
    /// Jobs in fence mode that succeeded.
    done_fence,
    /// Jobs in fence mode that failed.
    failed_fence,
    /// Jobs in preempt mode that succeeded.
    done_preempt,
    /// Jobs in preempt mode that failed.
    failed_preempt,
    /// Jobs in fault mode that succeeded.
    done_fault,
    /// Jobs in fault mode that failed.
    failed_fault,
    /// Jobs in registration cache mode that succeeded.
    done_registration_cache,
    /// Jobs in registration cache mode that failed.
    failed_registration_cache,
    /// FILL, COPY and CHECKSUM packets that were followed to completion.
    bulk_packets,
    /// SIGNAL, ATOMIC and TIMESTAMP packets.
    value_packets,
    /// WAITs that succeeded.
    waits_that_held,
    /// WAITs that left their engine.
    waits_parked,
    /// WAITs that timed out.
    waits_in_vain,
    /// Steps of a SPIN that does not leave.
    stubborn_spins,
    /// SPINs that were removed by force.
    taken_off_by_force,
    /// Jobs whose time slice ended.
    slices_over,
    /// Jobs that a stop preempted.
    taken_off,
    /// Jobs in preempt mode that an INVALIDATE preempted.
    preempted,
    /// Jobs that were killed because their context was lost.
    kills,
    /// Steps of jobs whose context was lost.
    steps_of_the_dead,
    /// Contexts that were lost because a job failed.
    contexts_lost,
    /// Contexts that the guest destroyed.
    contexts_destroyed,
    /// Contexts that were destroyed while they had jobs.
    contexts_destroyed_with_jobs,
    /// User fences that report success.
    user_fences_done,
    /// User fences that report failure.
    user_fences_failed,
    /// Pins of registration caches that an INVALIDATE did not wait for.
    incoherent_pins,
    /// Accesses of registration caches to what the guest had unmapped.
    incoherent_accesses,
    /// Accesses that were checked, counted by page.
    accesses,
    /// Images that were compared with the guest's pages.
    images_compared,
    /// Pages that were compared.
    pages_compared,
    /// INVALIDATEs.
    invalidations,
    /// INVALIDATEs that found a pin in flight.
    invalidations_with_pins,
    /// INVALIDATEs that found a section in flight.
    invalidations_with_sections,
    /// INVALIDATEs of the whole domain.
    whole_domain,
    /// INVALIDATEs with ends within a page, up to 2^64.
    odd_ranges,
    /// Acks that were parked.
    parked_acks,
    /// Drains that had to preempt jobs.
    ladders,
    /// Drains in which a wedged engine made the session revoke memory.
    revocations,
    /// UPDATEs that were invalidated before their MISS was answered.
    staged_discarded,
    /// MISSes.
    misses,
    /// MISSes that were refused.
    misses_refused,
    /// Memory taken from a job in strict mode that was mapped again.
    benign_strict,
    /// Memory taken from a job in fence mode that was mapped again.
    benign_fence,
    /// Memory taken from a job in preempt mode that was mapped again.
    benign_preempt,
    /// Memory taken from a job in fault mode that was mapped again.
    benign_fault,
    /// Memory taken from a job in strict mode and replaced by other memory.
    moved_strict,
    /// Memory taken from a job in fence mode and replaced by other memory.
    moved_fence,
    /// Memory taken from a job in preempt mode and replaced by other memory.
    moved_preempt,
    /// Memory taken from a job in fault mode and replaced by other memory.
    moved_fault,
    /// Memory taken from a job in strict mode and not replaced.
    gone_strict,
    /// Memory taken from a job in fence mode and not replaced.
    gone_fence,
    /// Memory taken from a job in preempt mode and not replaced.
    gone_preempt,
    /// Memory taken from a job in fault mode and not replaced.
    gone_fault,
    /// Verdicts that are certain.
    verdicts_certain,
    /// Verdicts that another job's MISS revealed.
    verdicts_likely,
    /// Verdicts without a violation, because the job had signalled its progress.
    verdicts_untold,
    /// Fences that waited for answers that judge INVALIDATEs.
    fences_that_waited_for_answers,
    /// Refused accesses of jobs in fault mode.
    faults_in_fault_mode,
    /// Refused accesses of other jobs.
    faults_in_other_modes,
    /// MISSes that timed out.
    miss_timeouts,
    /// MISSes that were sent again.
    miss_retries,
    /// Answers to MISSes from before a stop.
    stale_answers,
    /// Answers that were lost deliberately.
    answers_lost,
    /// Translations that the mirror refused.
    maps_refused,
    /// Operations that a careful driver left out.
    events_left_out,
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
    /// Changes of the memory table that had to wait for a drain.
    memory_changes_with_work,
    /// Channels that were replaced.
    channels_replaced,
    /// Responses that had to wait for a MISS.
    responses_missing,
    /// Operations that happened within a step.
    within_steps,
}

impl Counts {
    /// A job stream has ended.
    pub(super) fn stream_ends(&mut self, mode: Mode, outcome: JobOutcome) {
        let [done, failed] = match mode {
            Mode::Strict => [&mut self.done_strict, &mut self.failed_strict],
            Mode::Fence => [&mut self.done_fence, &mut self.failed_fence],
            Mode::Preempt => [&mut self.done_preempt, &mut self.failed_preempt],
            Mode::Fault => [&mut self.done_fault, &mut self.failed_fault],
            Mode::RegistrationCache => {
                [&mut self.done_registration_cache, &mut self.failed_registration_cache]
            }
        };
        *(if outcome == JobOutcome::Done { done } else { failed }) += 1;
    }

    /// An INVALIDATE under a job was judged.
    pub(super) fn verdict(&mut self, mode: Mode, verdict: Verdict, confidence: Confidence) {
        let [benign, moved, gone] = match mode {
            Mode::Strict => [&mut self.benign_strict, &mut self.moved_strict, &mut self.gone_strict],
            Mode::Preempt => [&mut self.benign_preempt, &mut self.moved_preempt, &mut self.gone_preempt],
            Mode::Fault => [&mut self.benign_fault, &mut self.moved_fault, &mut self.gone_fault],
            // Registration caches are never judged.
            Mode::Fence | Mode::RegistrationCache => {
                [&mut self.benign_fence, &mut self.moved_fence, &mut self.gone_fence]
            }
        };
        *(match verdict {
            Verdict::Benign => benign,
            Verdict::Moved => moved,
            Verdict::Gone => gone,
        }) += 1;
        *(match confidence {
            Confidence::Certain => &mut self.verdicts_certain,
            Confidence::Likely => &mut self.verdicts_likely,
            Confidence::CannotTell => &mut self.verdicts_untold,
        }) += 1;
    }

    /// The counts that are still 0.
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
