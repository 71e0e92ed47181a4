//! The score: every seeded bug of the device must make a scenario fail, by name, at each level where it can show;
//! every seeded bug of a driver must be reported. Knows which scenarios are expected to catch what; knows nothing of
//! how a bug works.

use crate::rig::run::Rig;
use crate::rig::topology::Topology;
use crate::suite::driver_bugs;
use crate::suite::real::RealPlace;
use crate::suite::results::{Case, Evidence, Level, Outcome, Score};
use crate::suite::soft::SoftPlace;
use crate::suite::table::{self, Scenario};
use std::sync::Mutex;
use std::time::Duration;

/// A seeded bug of the device.
struct DeviceBug {
    /// As `--inject` names it.
    name: &'static str,
    /// What is injected: the bug, and what makes it show more often.
    inject: &'static [&'static str],
    /// The scenarios that are expected to catch it, without a VM.
    soft: &'static [u32],
    /// The same in a real guest, with a user-space driver.
    real: &'static [u32],
    /// Why it cannot show in a real guest, if so.
    not_real: &'static str,
}

/// The shorter time limit for a device that loses answers.
const PATIENCE: Duration = Duration::from_secs(3);

/// A bug that is injected by its name, and that the same scenarios catch in a real guest as in the soft one.
const fn bug(name: &'static str, inject: &'static [&'static str], soft: &'static [u32]) -> DeviceBug {
    let real = match soft.split_at_checked(1) {
        Some((first, _)) => first,
        None => &[],
    };
    DeviceBug { name, inject, soft, real, not_real: "" }
}

/// How often an expected scenario may try to catch a bug.
const TRIES: usize = 3;

/// In the order of `mirrorgpu --help`. The scenarios listed fail each time, not only by luck.
const DEVICE_BUGS: [DeviceBug; 16] = [
    bug("ack-before-drain", &["ack-before-drain"], &[2, 3, 4]),
    bug("skip-section", &["skip-section"], &[16]),
    bug("skip-pin", &["skip-pin"], &[2, 3, 4]),
    bug("drop-zap", &["drop-zap"], &[15, 6, 7, 10, 21, 58, 59, 64]),
    bug("stale-translation", &["stale-translation"], &[15, 11, 28, 55]),
    bug("cache-claimed-permission", &["cache-claimed-permission"], &[19]),
    bug("signal-before-write", &["signal-before-write"], &[94]),
    bug("lose-fence", &["lose-fence=7"], &[32]),
    bug("repeat-fence", &["repeat-fence=7"], &[32]),
    bug("reorder-fence", &["reorder-fence"], &[32]),
    DeviceBug { real: &[16], ..bug("forget-wake", &["forget-wake"], &[26]) },
    DeviceBug {
        real: &[],
        not_real: "a driver in user space cannot stop its machine; 49 does so for the stock driver",
        ..bug("lose-job-over-stop", &["lose-job-over-stop"], &[49])
    },
    DeviceBug {
        real: &[],
        not_real: "the driver in user space keeps its device; 45 to 47, 102 and 115 reset it under the stock driver",
        ..bug("keep-jobs-over-reset", &["keep-jobs-over-reset"], &[46])
    },
    DeviceBug {
        real: &[],
        not_real: "QEMU sends UPDATE and reply under its big lock: no INVALIDATE comes between them",
        ..bug("keep-staged-update", &["keep-staged-update"], &[12])
    },
    bug("swallow-failure", &["swallow-failure"], &[34, 22, 24, 35, 62]),
    bug("drain-everything", &["drain-everything"], &[1, 5, 8]),
];

/// The names of the device's bugs.
pub fn device_bugs() -> impl Iterator<Item = &'static str> {
    DEVICE_BUGS.iter().map(|bug| bug.name)
}

/// What is injected for a bug of the device, and the first of the scenarios that are expected to catch it: at this
/// level, or where it can show.
pub fn counted_on(name: &str, level: Level) -> (&'static [&'static str], Level, Option<u32>) {
    let Some(bug) = DEVICE_BUGS.iter().find(|bug| bug.name == name) else { return (&[], level, None) };
    match (level, bug.real.first()) {
        (Level::Real, Some(first)) => (bug.inject, Level::Real, Some(*first)),
        _ => (bug.inject, Level::Soft, bug.soft.first().copied()),
    }
}

/// How much of the matrix is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breadth {
    /// Each bug against the expected scenarios.
    Expected,
    /// Each bug against all scenarios.
    All,
}

/// Which bugs are seeded, and against what.
pub struct Trial<'t> {
    /// Decides the random choices.
    pub seed: u64,
    /// How much of the matrix is run.
    pub breadth: Breadth,
    /// Only bugs whose name contains one of these; none: all.
    pub patterns: &'t [String],
}

impl Trial<'_> {
    fn has(&self, bug: &str) -> bool {
        self.patterns.is_empty() || self.patterns.iter().any(|pattern| bug.contains(pattern.as_str()))
    }
}

/// The matrix without a VM: device bugs, then driver bugs. Each row is passed on as soon as it is known.
pub fn soft(trial: &Trial<'_>, tell: &dyn Fn(&Score)) -> Vec<Score> {
    let (seed, breadth) = (trial.seed, trial.breadth);
    let mut rows = Vec::new();
    for bug in DEVICE_BUGS.iter().filter(|bug| trial.has(bug.name)) {
        let inject = bug.inject.iter().map(|&bug| bug.to_owned()).collect();
        let place = SoftPlace { inject, seed, patience: PATIENCE };
        let catches = |scenario: &&Scenario| {
            // A busy machine can hide a bug: an expected scenario may be retried until it has caught the bug once.
            let tries = if bug.soft.contains(&scenario.number) { TRIES } else { 1 };
            (0..tries).any(|_| place.run(scenario).is_some_and(|case| failed(&case)))
        };
        let caught_by: Vec<_> =
            chosen(bug.soft, breadth).into_iter().filter(catches).map(Scenario::id).collect();
        let held = held(bug.soft, &caught_by);
        let row = Score {
            bug: bug.name.into(),
            whose: "device",
            place: "soft".into(),
            caught_by,
            held,
            cannot_show: None,
        };
        tell(&row);
        rows.push(row);
    }
    let place = SoftPlace { seed, ..SoftPlace::default() };
    for bug in driver_bugs::ALL.iter().filter(|bug| trial.has(bug.name)) {
        let mut said = Vec::new();
        let made = place.on_stage(&mut Evidence::default(), |stage| {
            said = driver_bugs::make(stage, bug)?;
            Ok(())
        });
        let caught_by = if made.is_ok() { told(&said) } else { Vec::new() };
        let row = Score {
            bug: bug.name.into(),
            whose: "driver",
            place: "soft".into(),
            caught_by,
            held: Vec::new(),
            cannot_show: None,
        };
        tell(&row);
        rows.push(row);
    }
    rows
}

/// The matrix of device bugs in real guests on a topology: one boot each.
pub fn real(rig: &Rig, topology: &Topology, trial: &Trial<'_>, tell: &dyn Fn(&Score)) -> Vec<Score> {
    let seed = trial.seed;
    let mut rows = Vec::new();
    for bug in DEVICE_BUGS.iter().filter(|bug| trial.has(bug.name)) {
        let cannot_show = (!bug.not_real.is_empty()).then(|| bug.not_real.to_owned());
        let mut caught_by = Vec::new();
        if cannot_show.is_none() {
            let cases = Mutex::new(Vec::new());
            let rig = rig.misbehaving(bug.inject);
            let place = RealPlace { rig: &rig, topology, seed, stock: false, variations: false, retries: 0 };
            let keep = |case: Case| {
                if let Ok(mut cases) = cases.lock() {
                    cases.push(case);
                }
            };
            place.run(&chosen(bug.real, Breadth::Expected), &keep);
            let cases = cases.into_inner().unwrap_or_default();
            caught_by = cases.iter().filter(|case| failed(case)).map(Case::id).collect();
        }
        let (place, held) = (topology.name.clone(), held(bug.real, &caught_by));
        let row = Score { bug: bug.name.into(), whose: "device", place, caught_by, held, cannot_show };
        tell(&row);
        rows.push(row);
    }
    rows
}

/// Those of the expected scenarios that did not fail.
fn held(counted_on: &[u32], caught_by: &[String]) -> Vec<String> {
    let counted_on = table::ALL.iter().filter(|scenario| counted_on.contains(&scenario.number));
    counted_on.map(Scenario::id).filter(|id| !caught_by.contains(id)).collect()
}

fn failed(case: &Case) -> bool {
    matches!(case.outcome, Outcome::Failed(_))
}

/// By which reports a driver's bug was detected, each once: `GONE (certain)`, a fault record, an audit.
fn told(said: &[String]) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for text in said {
        let (kind, rest) = text.split_once(": ").unwrap_or((text, ""));
        let word = match kind {
            "Fault" => "a fault record",
            "Audit" => "an audit",
            _ => rest.split_once('.').map_or(rest, |(verdict, _)| verdict),
        };
        if words.iter().all(|known| known != word) {
            words.push(word.to_owned());
        }
    }
    words
}

fn chosen(numbers: &[u32], breadth: Breadth) -> Vec<&'static Scenario> {
    let wanted = |scenario: &&Scenario| match breadth {
        Breadth::All => scenario.on_stage(Level::Soft).next().is_some(),
        Breadth::Expected => numbers.contains(&scenario.number),
    };
    table::ALL.iter().filter(wanted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_without_a_catcher_or_a_reason_got_away() {
        let row = |caught_by: &[&str], cannot_show: Option<&str>| Score {
            bug: "x".into(),
            whose: "device",
            place: "soft".into(),
            caught_by: caught_by.iter().map(|&id| id.to_owned()).collect(),
            held: held(&[2], &caught_by.iter().map(|&id| id.to_owned()).collect::<Vec<_>>()),
            cannot_show: cannot_show.map(str::to_owned),
        };
        assert!(row(&["02-exact-range"], None).is_caught() && row(&[], Some("no reason")).is_caught());
        assert!(!row(&[], None).is_caught());
        // Another scenario has caught it, and the expected one has not.
        let by_luck = row(&["03-partial-overlap"], None);
        assert!(!by_luck.is_caught());
        assert_eq!(by_luck.held, ["02-exact-range"]);
    }

    #[test]
    fn a_flag_is_told_in_a_few_words_and_once() {
        let said =
            ["Violation 3: GONE (certain). The guest", "Violation 4: GONE (certain). The", "Fault: {}"];
        assert_eq!(told(&said.map(str::to_owned)), ["GONE (certain)", "a fault record"]);
    }

    #[test]
    fn who_is_counted_on_exists_at_that_level() {
        for bug in &DEVICE_BUGS {
            let rows = |numbers: &[u32], level| {
                let shown = |number| {
                    table::ALL.iter().any(|row| row.number == number && row.on_stage(level).next().is_some())
                };
                numbers.iter().all(|number| shown(*number))
            };
            assert!(rows(bug.soft, Level::Soft) && !bug.soft.is_empty(), "{}", bug.name);
            assert!(rows(bug.real, Level::Real), "{}", bug.name);
            assert_ne!(bug.real.is_empty(), bug.not_real.is_empty(), "{}", bug.name);
        }
    }
}
