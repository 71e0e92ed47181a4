//! What the back-end's instruments report over its control socket: verdicts on jobs that an invalidation overlapped,
//! reports of violations, and the flight recorder's trace. A back-end may be older than they are. Knows the commands;
//! knows nothing of how a verdict is found.

use crate::rig::error::{Doing, RigError};
use crate::rig::process::wait_until;
use crate::rig::run::Run;
use job_stream::{Choice, Mode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A report is written after the job has ended.
const REPORT_LIMIT: Duration = Duration::from_secs(5);

/// The verdicts of one mode, by what replaced memory that was unmapped under a job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Verdicts {
    /// The same memory.
    pub benign: u64,
    /// Other memory.
    pub moved: u64,
    /// None.
    pub gone: u64,
    /// Other memory or none, but the job may already have finished with it.
    pub untold: u64,
}

impl Verdicts {
    /// What was counted since the snapshot `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            benign: self.benign.saturating_sub(before.benign),
            moved: self.moved.saturating_sub(before.moved),
            gone: self.gone.saturating_sub(before.gone),
            untold: self.untold.saturating_sub(before.untold),
        }
    }

    /// Verdicts that accuse the driver, or nearly.
    pub fn accusations(&self) -> u64 {
        self.moved + self.gone + self.untold
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { benign, moved, gone, untold } = self;
        write!(f, "{benign} benign, {moved} moved, {gone} gone, {untold} that cannot be told")
    }
}

/// A job whose memory was unmapped while it ran.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Violation {
    /// Its number, from the first on.
    pub id: u64,
    /// `gone` or `moved`.
    pub verdict: String,
    /// `certain` or `likely`.
    pub confidence: String,
    /// The mode of the job's context.
    pub mode: String,
    /// What happened, for a person: several lines.
    pub report: String,
}

#[derive(Deserialize)]
struct Violations {
    violations: Vec<Violation>,
}

/// A trace that was written.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Trace {
    /// Where it is.
    pub path: PathBuf,
    /// How many events it has.
    pub events: u64,
}

/// The verdicts of one mode among all counts of the back-end.
pub fn verdicts(stats: &Value, mode: Mode) -> Verdicts {
    let counts = stats.get("verdicts").and_then(|modes| modes.get(mode.name())).cloned();
    counts.and_then(|counts| serde_json::from_value(counts).ok()).unwrap_or_default()
}

/// The violations that the back-end has reported so far; `None` if it has no such command.
pub fn violations(run: &mut Run<'_>) -> Result<Option<Vec<Violation>>, RigError> {
    let answer: Option<Violations> = ask(run, "violations", json!({}))?;
    Ok(answer.map(|answer| answer.violations))
}

/// The number of the last violation, if there was one.
pub fn last_violation(run: &mut Run<'_>) -> Result<Option<u64>, RigError> {
    Ok(violations(run)?.and_then(|known| known.iter().map(|violation| violation.id).max()))
}

/// The violations after the one with the number `last`: `due` of them, as soon as they are there. `None` if the
/// back-end has no such command.
pub fn violations_after(
    run: &mut Run<'_>,
    last: Option<u64>,
    due: usize,
) -> Result<Option<Vec<Violation>>, RigError> {
    let mut found = None;
    let waited = wait_until("The report of each bug", REPORT_LIMIT, || {
        let is_new = |violation: &Violation| last.is_none_or(|last| violation.id > last);
        found = violations(run)?.map(|all| all.into_iter().filter(is_new).collect::<Vec<_>>());
        Ok(found.as_ref().is_none_or(|new| new.len() >= due))
    });
    match (waited, found.as_ref().map_or(0, Vec::len)) {
        (Err(RigError::Late { .. }), count) => Err(RigError::check(format!(
            "The back-end has reported {count} violations, where the driver had {due} bugs"
        ))),
        (waited, _) => waited.map(|()| found),
    }
}

/// Writes the flight recorder's events to `path`; `None` if the back-end has no recorder.
pub fn record(run: &mut Run<'_>, path: &Path) -> Result<Option<Trace>, RigError> {
    // Its sandbox lets it write into its own folder only.
    let own = run.folder().join("recorded.json");
    let Some(trace) = ask::<Trace>(run, "record", json!({ "path": own }))? else { return Ok(None) };
    fs::copy(&own, path).doing(format!("copy a trace to {}", path.display()))?;
    Ok(Some(Trace { path: path.to_owned(), ..trace }))
}

fn ask<T: DeserializeOwned>(
    run: &mut Run<'_>,
    command: &str,
    arguments: Value,
) -> Result<Option<T>, RigError> {
    let Some(answer) = run.control(command, arguments)? else { return Ok(None) };
    let line = answer.to_string();
    let understood = serde_json::from_value(answer).map(Some);
    understood.map_err(|source| RigError::NotUnderstood {
        peer: "The back-end's control socket",
        line,
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_those_of_the_mode_and_only_what_is_new() {
        let stats = |gone| {
            let fence = json!({ "benign": 4, "moved": 0, "gone": gone, "untold": 1 });
            json!({ "misses": 7, "verdicts": { "fence": fence } })
        };
        let [before, after] = [1, 3].map(|gone| verdicts(&stats(gone), Mode::Fence));
        assert_eq!(before, Verdicts { benign: 4, moved: 0, gone: 1, untold: 1 });
        assert_eq!(after.since(&before), Verdicts { gone: 2, ..Verdicts::default() });
        assert_eq!((after.accusations(), after.since(&before).accusations()), (4, 2));
        assert_eq!(verdicts(&stats(1), Mode::Fault), Verdicts::default());
        assert_eq!(verdicts(&Value::Null, Mode::Fence), Verdicts::default());
    }

    #[test]
    fn a_violation_is_read_as_the_back_end_writes_it() {
        let text = json!({ "violations": [{
            "id": 1, "verdict": "gone", "confidence": "certain", "mode": "fence", "job": 9, "context": 2,
            "packet": null, "range": "0x1000+0x1000", "access": "write", "invalidation": 4, "report": "a\nb"
        }], "dropped": 0 });
        let read: Violations = serde_json::from_value(text).unwrap();
        let violation = read.violations.first().unwrap();
        assert_eq!((violation.id, violation.verdict.as_str(), violation.mode.as_str()), (1, "gone", "fence"));
        assert_eq!(violation.report, "a\nb");
    }
}
