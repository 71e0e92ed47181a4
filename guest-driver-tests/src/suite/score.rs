//! The score: every seeded bug of the device must make a scenario fail, by name, at each level where it can show; every
//! seeded bug of a driver must be flagged. Knows which scenarios are counted on to catch what; knows nothing of how a
//! bug works.

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
    /// The scenarios that are counted on to catch it, without a VM.
    soft: &'static [u32],
    /// And in a real guest, with a driver in user space.
    real: &'static [u32],
    /// Why it cannot show in a real guest, where that is so.
    not_real: &'static str,
}

/// A device that loses answers is not waited for as long.
const PATIENCE: Duration = Duration::from_secs(3);

/// In the order of `mirrorgpu --help`.
const DEVICE_BUGS: [DeviceBug; 12] = [
    DeviceBug {
        name: "ack-before-drain",
        inject: &["ack-before-drain"],
        soft: &[2],
        real: &[2],
        not_real: "",
    },
    DeviceBug { name: "skip-section", inject: &["skip-section"], soft: &[16], real: &[16], not_real: "" },
    DeviceBug { name: "skip-pin", inject: &["skip-pin"], soft: &[2], real: &[2], not_real: "" },
    DeviceBug { name: "drop-zap", inject: &["drop-zap"], soft: &[15], real: &[15], not_real: "" },
    DeviceBug {
        name: "stale-translation",
        inject: &["stale-translation"],
        soft: &[15],
        real: &[15],
        not_real: "",
    },
    DeviceBug {
        name: "cache-claimed-permission",
        inject: &["cache-claimed-permission"],
        soft: &[19],
        real: &[19],
        not_real: "",
    },
    DeviceBug {
        name: "signal-before-write",
        inject: &["signal-before-write"],
        soft: &[94],
        real: &[94],
        not_real: "",
    },
    DeviceBug { name: "lose-fence", inject: &["lose-fence=7"], soft: &[32], real: &[32], not_real: "" },
    DeviceBug { name: "repeat-fence", inject: &["repeat-fence=7"], soft: &[32], real: &[32], not_real: "" },
    DeviceBug { name: "reorder-fence", inject: &["reorder-fence"], soft: &[32], real: &[32], not_real: "" },
    DeviceBug { name: "forget-wake", inject: &["forget-wake"], soft: &[26], real: &[16], not_real: "" },
    DeviceBug {
        name: "lose-job-over-stop",
        inject: &["lose-job-over-stop"],
        soft: &[49],
        real: &[],
        not_real: "a driver in user space cannot stop its machine; 49 does so for the stock driver",
    },
];

/// The names of the device's bugs.
pub fn device_bugs() -> impl Iterator<Item = &'static str> {
    DEVICE_BUGS.iter().map(|bug| bug.name)
}

/// What is injected for a bug of the device, and the scenarios that are counted on to catch it.
pub fn counted_on(name: &str) -> (&'static [&'static str], &'static [u32]) {
    DEVICE_BUGS.iter().find(|bug| bug.name == name).map_or((&[], &[]), |bug| (bug.inject, bug.soft))
}

/// Whether a bug of the device is caught in the soft guest by something that a real guest cannot do.
pub fn is_soft_only(name: &str) -> bool {
    DEVICE_BUGS.iter().any(|bug| bug.name == name && bug.soft != bug.real)
}

/// How much of the matrix is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Breadth {
    /// Each bug against the scenarios that are counted on.
    Expected,
    /// Each bug against all scenarios.
    All,
}

/// The matrix without a VM: device bugs, then bugs of drivers. Each row is handed out as it is known.
pub fn soft(seed: u64, breadth: Breadth, tell: &dyn Fn(&Score)) -> Vec<Score> {
    let mut rows = Vec::new();
    for bug in &DEVICE_BUGS {
        let inject = bug.inject.iter().map(|&bug| bug.to_owned()).collect();
        let place = SoftPlace { inject, seed, patience: PATIENCE, ..SoftPlace::default() };
        let cases = chosen(bug.soft, breadth).into_iter().filter_map(|scenario| place.run(scenario));
        let caught_by = cases.filter(failed).map(|case| case.id()).collect();
        let row = Score {
            bug: bug.name.into(),
            whose: "device",
            place: "soft".into(),
            caught_by,
            cannot_show: None,
        };
        tell(&row);
        rows.push(row);
    }
    let place = SoftPlace { seed, ..SoftPlace::default() };
    for bug in &driver_bugs::ALL {
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
            cannot_show: None,
        };
        tell(&row);
        rows.push(row);
    }
    rows
}

/// The matrix of device bugs in real guests on a topology: a boot for each.
pub fn real(rig: &Rig, topology: &Topology, seed: u64, tell: &dyn Fn(&Score)) -> Vec<Score> {
    let mut rows = Vec::new();
    for bug in &DEVICE_BUGS {
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
        let place = topology.name.clone();
        let row = Score { bug: bug.name.into(), whose: "device", place, caught_by, cannot_show };
        tell(&row);
        rows.push(row);
    }
    rows
}

/// The row has what it should: somebody has caught the bug, or it cannot show.
pub fn is_caught(row: &Score) -> bool {
    !row.caught_by.is_empty() || row.cannot_show.is_some()
}

fn failed(case: &Case) -> bool {
    matches!(case.outcome, Outcome::Failed(_))
}

/// By what a driver's bug was flagged, each once: `GONE (certain)`, a fault record, an audit.
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
            cannot_show: cannot_show.map(str::to_owned),
        };
        assert!(is_caught(&row(&["02-exact-range"], None)) && is_caught(&row(&[], Some("no reason"))));
        assert!(!is_caught(&row(&[], None)));
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
