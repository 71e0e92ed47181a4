//! What the back-end's instruments say over its control socket: verdicts on jobs that an invalidation overtook, reports
//! of violations, and the flight recorder's trace. A back-end may be older than they are. Knows the words of the
//! commands; knows nothing of how a verdict comes about.

use crate::rig::error::RigError;
use crate::rig::run::Run;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Counts that begin like this are of verdicts.
const VERDICTS: &str = "verdicts_";

/// How many verdicts of each kind, by the kind's name.
pub type Verdicts = BTreeMap<String, u64>;

/// A job whose memory was taken from under it.
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

/// The counts of verdicts among all counts of the back-end.
pub fn verdicts(stats: &Value) -> Verdicts {
    let counts = stats.as_object().into_iter().flatten();
    let of = |(name, count): (&String, &Value)| {
        Some((name.strip_prefix(VERDICTS)?.replace('_', " "), count.as_u64()?))
    };
    counts.filter_map(of).collect()
}

/// What was counted between two looks.
pub fn verdicts_since(after: &Verdicts, before: &Verdicts) -> Verdicts {
    let rise = |(kind, count): (&String, &u64)| {
        (kind.clone(), count.saturating_sub(before.get(kind).copied().unwrap_or(0)))
    };
    after.iter().map(rise).collect()
}

/// The violations that the back-end has reported so far; nothing if it cannot say.
pub fn violations(run: &mut Run<'_>) -> Result<Option<Vec<Violation>>, RigError> {
    let answer: Option<Violations> = ask(run, "violations", json!({}))?;
    Ok(answer.map(|answer| answer.violations))
}

/// Has the flight recorder's events written to `path`; nothing if the back-end has no recorder.
pub fn record(run: &mut Run<'_>, path: &Path) -> Result<Option<Trace>, RigError> {
    ask(run, "record", json!({ "path": path }))
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
    fn only_verdicts_are_taken_from_the_counts_and_only_what_is_new() {
        let before = verdicts(&json!({ "verdicts_gone": 1, "misses": 7 }));
        let after = verdicts(&json!({ "verdicts_gone": 3, "verdicts_cannot_tell": 1, "misses": 9 }));
        assert_eq!(before, Verdicts::from([("gone".to_owned(), 1)]));
        let rise = Verdicts::from([("gone".to_owned(), 2), ("cannot tell".to_owned(), 1)]);
        assert_eq!(verdicts_since(&after, &before), rise);
        assert_eq!(verdicts(&Value::Null), Verdicts::new());
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
