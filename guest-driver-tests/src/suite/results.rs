//! What a run of the suite has shown: one case for each scenario at each level and topology, with its outcome and the
//! evidence. Values only; knows neither how a scenario is run nor how a result is presented.

use crate::rig::error::RIG_FAILED;
use serde::Serialize;
use serde_json::Value;
use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, SystemTime};

/// Where a scenario runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// In the soft guest: a front-end, an IOMMU and a driver in one process, no VM.
    Soft,
    /// In a Linux guest on QEMU.
    Real,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Soft => "soft",
            Self::Real => "real",
        })
    }
}

/// How a case ended. The texts are for a person: what happened, to what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", content = "text", rename_all = "kebab-case")]
pub enum Outcome {
    /// The promise of the scenario held.
    Passed,
    /// The promise failed, with this, and held when the case was run again.
    Flaky(String),
    /// The promise failed: a violation, or a failure of the device, the driver or the kernel.
    Failed(String),
    /// It was not run, for this reason.
    Skipped(String),
    /// It could not be judged: the rig itself failed.
    Broken(String),
}

impl Outcome {
    /// Whether this is a failure, including one of the rig.
    pub fn is_bad(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::Broken(_))
    }

    /// Whether there is something to investigate.
    pub fn wants_a_look(&self) -> bool {
        self.is_bad() || matches!(self, Self::Flaky(_))
    }
}

/// The evidence that a case leaves.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Evidence {
    /// Measurements and counts, by name, as they are shown.
    pub numbers: Vec<(String, String)>,
    /// Lines that the scenario reports.
    pub notes: Vec<String>,
    /// The back-end's reports of violations and faults during the scenario, each of several lines.
    pub reports: Vec<String>,
    /// What the guest's console said during the scenario. Empty without a VM.
    pub console: String,
    /// What the back-end logged during the scenario.
    pub backend_log: String,
    /// The flight recorder's trace (`trace_events` JSON, as the control command `record` writes it), for scenarios
    /// about drains and for failures.
    pub trace: Option<Value>,
    /// The screen at the end, as a PNG.
    #[serde(skip)]
    pub screenshot: Option<Vec<u8>>,
}

impl Evidence {
    /// The evidence of another part, or another try, of the same case. Where only one fits, the later one stays.
    pub fn add(&mut self, other: Self) {
        self.numbers.extend(other.numbers);
        self.notes.extend(other.notes);
        self.reports.extend(other.reports);
        self.console.push_str(&other.console);
        self.backend_log.push_str(&other.backend_log);
        self.trace = other.trace.or(self.trace.take());
        self.screenshot = other.screenshot.or(self.screenshot.take());
    }
}

/// A scenario at one level, on one topology.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// The scenario's number; it never changes.
    pub number: u32,
    /// Its name.
    pub name: Cow<'static, str>,
    /// Its subject: the group that it belongs to.
    pub group: &'static str,
    /// What must hold, in a sentence.
    pub promise: &'static str,
    /// Where it ran.
    pub level: Level,
    /// On which machine: a file's name in qemu-configs; nothing without a VM.
    pub topology: Option<String>,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took.
    pub took: Duration,
    /// What it leaves.
    pub evidence: Evidence,
}

impl Case {
    /// `15-unmap-then-remap`: the name of a scenario on a command line.
    pub fn id(&self) -> String {
        id(self.number, &self.name)
    }

    /// Where it ran, in one word: `soft`, or the topology.
    pub fn place(&self) -> String {
        self.topology.clone().unwrap_or_else(|| self.level.to_string())
    }
}

/// The name of a scenario on a command line.
pub fn id(number: u32, name: &str) -> String {
    format!("{number:02}-{name}")
}

/// Which scenarios have caught a seeded bug.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Score {
    /// The bug, as `--inject` names it, or the driver's bug.
    pub bug: String,
    /// Whose bug it is: `device` or `driver`.
    pub whose: &'static str,
    /// Where it was seeded: `soft`, or a topology.
    pub place: String,
    /// The scenarios that failed because of it, as [`id`]s; none: it was not caught.
    pub caught_by: Vec<String>,
    /// Scenarios that were expected to fail because of it, and passed.
    pub held: Vec<String>,
    /// Why it cannot show there, if so.
    pub cannot_show: Option<String>,
}

impl Score {
    /// The row is as expected: all expected scenarios have caught the bug, or it cannot show.
    pub fn is_caught(&self) -> bool {
        self.cannot_show.is_some() || !self.caught_by.is_empty() && self.held.is_empty()
    }
}

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// When it began.
    pub started: SystemTime,
    /// How long it took.
    pub took: Duration,
    /// What it ran with, by name: QEMU, kernel, accelerator, seed, …
    pub environment: Vec<(String, String)>,
    /// The cases, in the order in which they are presented: by number, level and topology.
    pub cases: Vec<Case>,
    /// The score, if it was asked for.
    pub score: Vec<Score>,
}

/// How many cases ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(missing_docs, reason = "the names are the outcomes")]
pub struct Counts {
    pub passed: usize,
    pub flaky: usize,
    pub failed: usize,
    pub skipped: usize,
    pub broken: usize,
}

impl Results {
    /// How many cases ended how.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for case in &self.cases {
            *match case.outcome {
                Outcome::Passed => &mut counts.passed,
                Outcome::Flaky(_) => &mut counts.flaky,
                Outcome::Failed(_) => &mut counts.failed,
                Outcome::Skipped(_) => &mut counts.skipped,
                Outcome::Broken(_) => &mut counts.broken,
            } += 1;
        }
        counts
    }

    /// The exit code of the process: 1 if something failed, else [`RIG_FAILED`] if the rig did, else 125 if nothing ran,
    /// else 0. `git bisect run` takes 1 for a bad revision, skips one with 125, and ends at a code of 128 or more: for a
    /// broken rig it must blame no revision (git-bisect(1)).
    pub fn exit_code(&self) -> u8 {
        match self.counts() {
            Counts { failed: 1.., .. } => 1,
            Counts { broken: 1.., .. } => RIG_FAILED,
            Counts { passed: 0, flaky: 0, .. } => 125,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(outcomes: &[Outcome]) -> Results {
        let case = |outcome: &Outcome| Case {
            number: 7,
            name: "whole-space".into(),
            group: "Range arithmetic",
            promise: "",
            level: Level::Soft,
            topology: None,
            outcome: outcome.clone(),
            took: Duration::ZERO,
            evidence: Evidence::default(),
        };
        Results {
            started: SystemTime::UNIX_EPOCH,
            took: Duration::ZERO,
            environment: Vec::new(),
            cases: outcomes.iter().map(case).collect(),
            score: Vec::new(),
        }
    }

    #[test]
    fn the_exit_code_tells_a_failure_from_a_broken_rig_and_from_nothing() {
        let (failed, broken) = (Outcome::Failed(String::new()), Outcome::Broken(String::new()));
        let skipped = Outcome::Skipped(String::new());
        assert_eq!(results(&[Outcome::Passed, skipped.clone()]).exit_code(), 0);
        assert_eq!(results(&[Outcome::Passed, broken.clone(), failed]).exit_code(), 1);
        assert_eq!(results(&[Outcome::Passed, broken]).exit_code(), RIG_FAILED);
        assert_eq!(results(&[skipped]).exit_code(), 125);
        assert_eq!(results(&[Outcome::Flaky(String::new())]).exit_code(), 0);
        assert_eq!(results(&[]).exit_code(), 125);
    }

    #[test]
    fn a_case_is_named_by_number_and_name() {
        let results = results(&[Outcome::Passed]);
        let [case] = results.cases.as_slice() else { panic!() };
        assert_eq!((case.id(), case.place()), ("07-whole-space".to_owned(), "soft".to_owned()));
    }
}
