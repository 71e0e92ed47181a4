//! Runs again what has failed with an excuse, for those who want a bad moment of a busy machine told from a bug. Knows which
//! failures of which scenarios that are, and why. Knows nothing of places.

use crate::suite::failure::{Failure, Result};
use crate::suite::results::Outcome;

/// A failure after which a scenario may be tried again in a real guest, for something else than the device or the driver
/// may be at fault. Whatever else is wrong with it, and with any other scenario, is wrong however busy the host is.
#[derive(Debug)]
pub struct Excuse {
    /// The scenario's number.
    pub scenario: u32,
    /// What the failure says.
    words: &'static str,
    /// What may be at fault.
    pub reason: &'static str,
}

/// All of them.
pub const EXCUSES: &[Excuse] = &[
    Excuse {
        scenario: 1,
        words: "The unmap of an idle range took",
        reason: "less than 200 ms is measured in the guest: a host that emulates it may stop it for as long",
    },
    Excuse {
        scenario: 10,
        words: "The unmap waited",
        reason: "less than 200 ms is measured in the guest: a host that emulates it may stop it for as long",
    },
    Excuse {
        scenario: 45,
        words: "virtio_gpu_array_put_free_work",
        reason: "Linux 6.12 may fault where virtio_gpu is unbound with commands in flight: it frees what their answers \
                 still need, a race of its own",
    },
    Excuse {
        scenario: 110,
        words: "The unmap of an idle range took",
        reason: "less than half of a job is measured in the guest: a host that emulates it may stop it for as long",
    },
];

impl Excuse {
    /// The excuse of a scenario, if it has one.
    pub fn of(number: u32) -> Option<&'static Self> {
        EXCUSES.iter().find(|excuse| excuse.scenario == number)
    }

    /// Memory that holds what it must not is excused by nothing.
    fn covers(&self, failure: &Failure) -> bool {
        matches!(failure, Failure::Check(text) if text.contains(self.words))
    }
}

/// Does something once, and up to `retries` times more while it fails with an excuse. What passes only then is flaky, with
/// what failed first.
pub(crate) fn judge(retries: u32, excuse: Option<&Excuse>, mut once: impl FnMut() -> Result<()>) -> Outcome {
    let mut bad: Option<Failure> = None;
    for _ in 0..=retries {
        match (once(), &bad) {
            (Ok(()), None) => return Outcome::Passed,
            (Ok(()), Some(first)) => return Outcome::Flaky(first.to_string()),
            (Err(Failure::Skip(_)), Some(_)) => break,
            (Err(failure), _) if !excuse.is_some_and(|excuse| excuse.covers(&failure)) => {
                return failure.into();
            }
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
    use crate::suite::table;

    const EXCUSE: Excuse = Excuse { scenario: 1, words: "took", reason: "the host" };

    /// What comes of these results, one a try, and how many tries it took.
    fn judged(retries: u32, excuse: Option<&Excuse>, results: &[Result<()>]) -> (Outcome, usize) {
        let mut tries = 0;
        let outcome = judge(retries, excuse, || {
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
        let judged = |retries, results: &[_]| judged(retries, Some(&EXCUSE), results);
        assert_eq!(judged(1, &[Ok(())]), (Outcome::Passed, 1));
        assert_eq!(judged(0, &[failed("took a")]), (Outcome::Failed("took a".into()), 1));
        let three = [failed("took a"), failed("took b"), Ok(())];
        assert_eq!(judged(3, &three), (Outcome::Flaky("took a".into()), 3));
        assert_eq!(judged(1, &three), (Outcome::Failed("took a".into()), 2));
    }

    #[test]
    fn a_failure_without_an_excuse_is_final() {
        let late = || failed("took a");
        assert_eq!(judged(3, None, &[late(), Ok(())]), (Outcome::Failed("took a".into()), 1));
        assert_eq!(judged(3, Some(&EXCUSE), &[failed("b"), Ok(())]), (Outcome::Failed("b".into()), 1));
        assert_eq!(
            judged(3, Some(&EXCUSE), &[late(), failed("b"), Ok(())]),
            (Outcome::Failed("b".into()), 2)
        );
        let broken = || Err(Failure::Rig("took c".into()));
        assert_eq!(judged(1, Some(&EXCUSE), &[broken()]), (Outcome::Broken("took c".into()), 1));
    }

    #[test]
    fn memory_that_holds_what_it_must_not_is_never_tried_again() {
        let corrupted = || Err(Failure::Corrupted("took".into()));
        let judged = |results: &[_]| judged(3, Some(&EXCUSE), results);
        assert_eq!(judged(&[corrupted(), Ok(())]), (Outcome::Failed("took".into()), 1));
        assert_eq!(judged(&[failed("took a"), corrupted(), Ok(())]), (Outcome::Failed("took".into()), 2));
    }

    #[test]
    fn a_guest_that_does_not_come_up_again_hides_no_failure() {
        let skip = || Err(Failure::Skip("The guest did not boot".into()));
        let judged = |retries, results: &[_]| judged(retries, Some(&EXCUSE), results);
        assert_eq!(judged(1, &[skip(), Ok(())]), (Outcome::Skipped("The guest did not boot".into()), 1));
        assert_eq!(judged(2, &[failed("took a"), skip(), Ok(())]), (Outcome::Failed("took a".into()), 2));
    }

    #[test]
    fn what_has_an_excuse_is_a_scenario_of_real_guests() {
        for excuse in EXCUSES {
            let row = table::ALL.iter().find(|scenario| scenario.number == excuse.scenario).unwrap();
            assert!(row.has_real_part() && !excuse.reason.is_empty() && !excuse.words.is_empty());
        }
        assert!(EXCUSES.is_sorted_by(|a, b| a.scenario < b.scenario));
    }
}
