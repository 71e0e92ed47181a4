//! Retries failed scenarios, to tell a busy machine from a bug. Knows which failures are never retried; knows nothing
//! of places and scenarios.

use crate::suite::failure::{Failure, Result};
use crate::suite::results::Outcome;

/// Runs something once, and up to `retries` times more while it fails. If it passes only then, it is flaky, with the
/// first failure. Wrong memory contents are not explained by a busy machine: one failure is enough.
pub(crate) fn judge(retries: u32, mut once: impl FnMut() -> Result<()>) -> Outcome {
    let mut bad: Option<Failure> = None;
    for _ in 0..=retries {
        match (once(), &bad) {
            (Ok(()), None) => return Outcome::Passed,
            (Ok(()), Some(first)) => return Outcome::Flaky(first.to_string()),
            (Err(failure @ Failure::Corrupted(_)), _) | (Err(failure @ Failure::Skip(_)), None) => {
                return failure.into();
            }
            (Err(Failure::Skip(_)), Some(_)) => break,
            (Err(failure), _) => {
                bad.get_or_insert(failure);
            }
        }
    }
    bad.map_or(Outcome::Passed, Outcome::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The outcome of these results, one per try, and how many tries it took.
    fn judged(retries: u32, results: &[Result<()>]) -> (Outcome, usize) {
        let mut tries = 0;
        let outcome = judge(retries, || {
            tries += 1;
            results[tries - 1].clone()
        });
        (outcome, tries)
    }

    fn failed(text: &str) -> Result<()> {
        Err(Failure::check(text))
    }

    #[test]
    fn what_passes_at_a_second_try_is_flaky_and_says_what_failed_first() {
        assert_eq!(judged(1, &[Ok(())]), (Outcome::Passed, 1));
        assert_eq!(judged(0, &[failed("a")]), (Outcome::Failed("a".into()), 1));
        assert_eq!(judged(3, &[failed("a"), failed("b"), Ok(())]), (Outcome::Flaky("a".into()), 3));
        assert_eq!(judged(1, &[failed("a"), failed("b"), Ok(())]), (Outcome::Failed("a".into()), 2));
        let broken = || Err(Failure::Rig("c".into()));
        assert_eq!(judged(1, &[broken(), broken()]), (Outcome::Broken("c".into()), 2));
    }

    #[test]
    fn memory_that_holds_what_it_must_not_is_never_tried_again() {
        let corrupted = || Err(Failure::Corrupted("late".into()));
        assert_eq!(judged(3, &[corrupted(), Ok(())]), (Outcome::Failed("late".into()), 1));
        assert_eq!(judged(3, &[failed("a"), corrupted(), Ok(())]), (Outcome::Failed("late".into()), 2));
    }

    #[test]
    fn a_guest_that_does_not_come_up_again_hides_no_failure() {
        let skip = || Err(Failure::Skip("The guest did not boot".into()));
        assert_eq!(judged(1, &[skip(), Ok(())]), (Outcome::Skipped("The guest did not boot".into()), 1));
        assert_eq!(judged(2, &[failed("a"), skip(), Ok(())]), (Outcome::Failed("a".into()), 2));
    }
}
