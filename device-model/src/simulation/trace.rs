//! What happened: a hash of every event, so that two runs can be compared, lines for people when a run is watched,
//! and counts of what the schedules really hit.

use std::fmt;

use job_stream::Mode;

use crate::jobs::job::JobOutcome;
use crate::telemetry::violation::{Confidence, Verdict};

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
    /// Job streams that a context took.
    streams,
    /// Job streams that a lost context refused.
    streams_refused,
    /// Jobs that were compared with their twin.
    streams_compared,
    /// Jobs in strict mode that were done.
    done_strict,
    /// Jobs in strict mode that failed.
    failed_strict,
    /// Jobs in fence mode that were done.
    done_fence,
    /// Jobs in fence mode that failed.
    failed_fence,
    /// Jobs in preempt mode that were done.
    done_preempt,
    /// Jobs in preempt mode that failed.
    failed_preempt,
    /// Jobs in fault mode that were done.
    done_fault,
    /// Jobs in fault mode that failed.
    failed_fault,
    /// Jobs in registration cache mode that were done.
    done_registration_cache,
    /// Jobs in registration cache mode that failed.
    failed_registration_cache,
    /// FILL, COPY and CHECKSUM packets that were followed to their end.
    bulk_packets,
    /// SIGNAL, ATOMIC and TIMESTAMP packets.
    value_packets,
    /// WAITs whose value came.
    waits_that_held,
    /// WAITs that left their engine.
    waits_parked,
    /// WAITs whose value did not come in time.
    waits_in_vain,
    /// Steps of a SPIN that does not leave.
    stubborn_spins,
    /// SPINs that were taken off by force.
    taken_off_by_force,
    /// Jobs whose time slice was over.
    slices_over,
    /// Jobs that a stop took off.
    taken_off,
    /// Jobs in preempt mode that an INVALIDATE took off.
    preempted,
    /// Jobs that were killed, for their context was lost.
    kills,
    /// Steps of jobs whose context was lost.
    steps_of_the_dead,
    /// Contexts that a failed job took with it.
    contexts_lost,
    /// Contexts that the guest destroyed.
    contexts_destroyed,
    /// Those that had jobs.
    contexts_destroyed_with_jobs,
    /// User fences that say that all is done.
    user_fences_done,
    /// User fences that say that it is not.
    user_fences_failed,
    /// Pins of registration caches that an INVALIDATE did not wait for.
    incoherent_pins,
    /// Accesses of registration caches to what the guest had taken away.
    incoherent_accesses,
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
    /// Memory taken from under a job in strict mode that was there again.
    benign_strict,
    /// Memory taken from under a job in fence mode that was there again.
    benign_fence,
    /// Memory taken from under a job in preempt mode that was there again.
    benign_preempt,
    /// Memory taken from under a job in fault mode that was there again.
    benign_fault,
    /// Memory taken from under a job in strict mode in whose place there was other memory.
    moved_strict,
    /// Memory taken from under a job in fence mode in whose place there was other memory.
    moved_fence,
    /// Memory taken from under a job in preempt mode in whose place there was other memory.
    moved_preempt,
    /// Memory taken from under a job in fault mode in whose place there was other memory.
    moved_fault,
    /// Memory taken from under a job in strict mode in whose place there was none.
    gone_strict,
    /// Memory taken from under a job in fence mode in whose place there was none.
    gone_fence,
    /// Memory taken from under a job in preempt mode in whose place there was none.
    gone_preempt,
    /// Memory taken from under a job in fault mode in whose place there was none.
    gone_fault,
    /// Verdicts that are certain.
    verdicts_certain,
    /// Verdicts that another job's MISS showed.
    verdicts_likely,
    /// Verdicts that accuse nobody, for the job has told others how far it is.
    verdicts_untold,
    /// Fences that waited for answers, to know what INVALIDATEs meant.
    fences_that_waited_for_answers,
    /// Refused accesses of jobs in fault mode.
    faults_in_fault_mode,
    /// Refused accesses of other jobs.
    faults_in_other_modes,
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
    /// Deeds that a careful driver has left out.
    deeds_left_out,
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
    /// A job stream has come to its end.
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

    /// It was found out what an INVALIDATE under a job meant.
    pub(super) fn verdict(&mut self, mode: Mode, verdict: Verdict, confidence: Confidence) {
        let [benign, moved, gone] = match mode {
            Mode::Strict => [&mut self.benign_strict, &mut self.moved_strict, &mut self.gone_strict],
            Mode::Preempt => [&mut self.benign_preempt, &mut self.moved_preempt, &mut self.gone_preempt],
            Mode::Fault => [&mut self.benign_fault, &mut self.moved_fault, &mut self.gone_fault],
            // A registration cache is never judged.
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
