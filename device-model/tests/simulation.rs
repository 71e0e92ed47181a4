//! The deterministic simulation: every invariant holds in every schedule, and every seeded bug is found.
//!
//! `cargo test --release -p device-model --test simulation` plays 200,000 schedules, as CI does; a build without
//! optimisation plays 5,000. `MIRRORGPU_SCHEDULES` changes the number, `MIRRORGPU_SEED` the first seed.
//!
//! A failure prints its seed. To see all that happens in that schedule:
//! `MIRRORGPU_SEED=0x… cargo test -p device-model --test simulation replay -- --ignored --nocapture`

use std::env;
use std::time::Instant;

use device_model::simulation::{Bug, Counts, Invariant, Schedule, regressions};

/// Schedules in which each seeded bug has to be found.
const BUG_BUDGET: u64 = 20_000;

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    Some(parsed.unwrap_or_else(|error| panic!("{variable}={text} is no number: {error}")))
}

fn schedules() -> u64 {
    number("MIRRORGPU_SCHEDULES").unwrap_or(if cfg!(debug_assertions) { 5_000 } else { 200_000 })
}

#[test]
fn all_invariants_hold_in_every_schedule() {
    let (first, count) = (number("MIRRORGPU_SEED").unwrap_or(0), schedules());
    let started = Instant::now();
    let mut counts = Counts::default();
    for seed in first..first + count {
        let report = Schedule::new(seed).play(None);
        if report.violation.is_some() {
            fail(seed);
        }
        counts.add(&report.counts);
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{counts}{count} schedules in {seconds:.1} s: {:.0} a second", count as f64 / seconds);
    assert!(count < 5_000 || counts.never_hit().is_empty(), "No schedule has hit {:?}", counts.never_hit());
}

#[test]
fn schedules_that_once_failed_hold() {
    let mut counts = Counts::default();
    for (why, schedule) in regressions() {
        let report = schedule.play(None);
        assert_eq!(report.violation, None, "{why}:\n{schedule}");
        counts.add(&report.counts);
    }
    // They come to what they are kept for.
    assert!(counts.stubborn_spins > 0 && counts.resets_with_jobs > 0 && counts.stale_jobs > 0, "{counts}");
    assert!(counts.moved_fence > 0 && counts.moved_preempt > 0 && counts.incoherent_pins > 0, "{counts}");
}

fn fail(seed: u64) -> ! {
    let shrunk = Schedule::new(seed).shrunk(None);
    let violation = shrunk.play(None).violation;
    let violation = violation.map(|violation| violation.to_string()).unwrap_or_default();
    panic!(
        "Seed {seed:#x}: {violation}\n{shrunk}To watch it:\n  \
         MIRRORGPU_SEED={seed:#x} cargo test -p device-model --test simulation replay -- --ignored --nocapture"
    );
}

#[test]
fn the_same_seed_gives_the_same_events() {
    for seed in 0..300 {
        let first = Schedule::new(seed).play(None);
        assert_eq!(first, Schedule::new(seed).play(None), "seed {seed:#x}");
        assert_ne!(first.hash, Schedule::new(seed + 1_000).play(None).hash, "seed {seed:#x}");
    }
}

/// Prints all that happens in a schedule.
#[test]
#[ignore = "it replays the schedule of MIRRORGPU_SEED, for a person to read"]
fn replay() {
    let seed = number("MIRRORGPU_SEED").expect("MIRRORGPU_SEED says which schedule is to be replayed");
    let schedule = Schedule::new(seed);
    print!("{schedule}");
    let report = schedule.watch(None);
    println!("Hash of all events: {:#018x}", report.hash);
    if let Some(violation) = report.violation {
        println!("{violation}\nThe same with as little as possible:");
        schedule.shrunk(None).watch(None);
        fail(seed);
    }
}

/// Finds a bug: it breaks this invariant, or one of these, within the budget, or in a schedule that was made for it.
fn find(bug: Bug, broken: &[Invariant]) -> Schedule {
    let mut others = Vec::new();
    let made = regressions().into_iter().map(|(_, schedule)| schedule);
    for (number, schedule) in (0..BUG_BUDGET).map(Schedule::new).chain(made).enumerate() {
        match schedule.play(Some(bug)).violation {
            Some(violation) if broken.contains(&violation.invariant) => {
                println!("{bug:?}: found by schedule {}: {violation}", number + 1);
                return schedule;
            }
            Some(violation) => others.push(violation),
            None => {}
        }
    }
    panic!("{bug:?} was not found in {BUG_BUDGET} schedules; others: {others:?}");
}

macro_rules! bugs {
    ($($name:ident: $bug:ident breaks $($invariant:ident)|+;)*) => {
        $(#[test]
        fn $name() {
            find(Bug::$bug, &[$(Invariant::$invariant),+]);
        })*

        #[test]
        fn every_seeded_bug_has_a_test() {
            assert_eq!(Bug::ALL.to_vec(), [$(Bug::$bug),*]);
        }
    };
}

bugs! {
    an_ack_before_the_drain_is_found: AckBeforeDrain breaks I1;
    a_pin_that_a_drain_forgets_is_found: ForgetPins breaks I1;
    a_section_that_a_drain_forgets_is_found: ForgetSections breaks I1;
    a_zap_that_is_dropped_is_found: DropZap breaks I1;
    a_permission_that_only_the_update_claims_is_found: CacheClaimedPermission breaks I7;
    a_staged_update_that_survives_an_invalidate_is_found: KeepStagedUpdate breaks I1;
    a_drain_without_its_ladder_is_found: ForgetLadder breaks I2;
    a_job_that_holds_pins_while_it_waits_is_found: HoldAndWait breaks I2;
    a_lost_wake_up_of_a_parked_ack_is_found: LoseDrainWakeUp breaks I2;
    a_lost_end_of_an_invalidation_is_found: LoseInvalidationEnd breaks I4;
    a_lost_answer_to_a_miss_is_found: LoseMissAnswer breaks I4;
    a_job_that_fails_for_no_reason_is_found: FailWhatWasGranted breaks I5;
    a_job_lost_over_stop_and_cont_is_found: LoseJobOverStop breaks I4 | I5;
    a_stale_pin_after_its_eviction_is_found: StalePinAfterEviction breaks I1;
    a_memory_table_changed_before_its_drain_is_found: SwapMemoryBeforeDrain breaks I1;
    a_job_that_runs_on_after_a_reset_is_found: RunOnAfterReset breaks I5;
    a_job_that_is_started_into_a_reset_is_found: KeepJobsOverReset breaks I5;
    an_answer_to_a_driver_from_before_a_reset_is_found: AnswerAfterReset breaks I5;
    a_signal_before_the_write_is_found: SignalBeforeWrite breaks Data;
    a_response_written_twice_is_found: CompleteTwice breaks I5;
    a_lost_response_is_found: LoseCompletion breaks I5;
    fences_out_of_order_are_found: ReorderFences breaks I5;
    a_driver_that_is_blamed_for_a_change_of_the_memory_table_is_found: RememberWhatWasThere breaks Verdict;
    a_fence_that_is_written_with_its_spin_is_found: FenceWithSpin breaks I5;
    a_wait_whose_time_runs_on_over_a_stop_is_found: WaitOverStop breaks I5;
    a_kill_that_is_skipped_is_found: SkipKill breaks I5;
    a_context_that_is_not_lost_with_its_job_is_found: KeepLostContext breaks I5;
    a_signal_that_overtakes_its_data_is_found: SignalBeforeItsData breaks I5;
    a_stale_translation_after_a_remap_is_found: StaleTranslation breaks I1;
    a_registration_cache_that_outlives_its_memory_is_found: CacheKeepsPins breaks I1;
    a_signal_that_is_not_written_is_found: LoseStore breaks Data;
    an_atomic_that_happens_twice_is_found: RepeatAtomic breaks Data;
    a_wait_that_does_not_look_again_is_found: ForgetToLookAgain breaks I4;
    memory_that_is_given_back_under_its_jobs_is_found: GiveBackEarly breaks I5;
    suspects_that_are_noted_too_late_are_found: SuspectAfterZap breaks Verdict;
    a_wrong_verdict_is_found: CallMovedBenign breaks Verdict;
    a_fence_that_does_not_wait_for_its_verdicts_is_found: TellFenceUnchecked breaks Verdict;
}

#[test]
fn a_failing_schedule_shrinks_to_few_operations_and_still_fails() {
    let bug = Some(Bug::AckBeforeDrain);
    let schedule = find(Bug::AckBeforeDrain, &[Invariant::I1]);
    let shrunk = schedule.shrunk(bug);
    println!("{shrunk}");
    assert_eq!(shrunk.play(bug).violation.map(|violation| violation.invariant), Some(Invariant::I1));
    assert_eq!(shrunk.play(None).violation, None);
    assert!(shrunk.len() <= 30, "{} operations are left of {}", shrunk.len(), schedule.len());
}
