//! A finding: what a front-end did, which rule that breaks, to which addresses, and when; with its forms for people and
//! for tools. Knows nothing of how it was found, nor of where it is kept.

use std::fmt;
use std::time::Duration;

use device_model::addr::{Access, ByteRange, Iova};
use device_model::telemetry::violation::wrapped;
use serde_json::{Value, json};

use super::rules::Rule;

/// One violation of a rule by a front-end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Number of the record; assigned by the list that keeps it.
    pub id: u64,
    /// When it was found, on the device's clock.
    pub at: Duration,
    /// The rule that was broken.
    pub rule: Rule,
    /// What was observed, with its numbers: a sentence without its period.
    pub seen: String,
    /// The message concerned.
    pub message: Option<&'static str>,
    /// The addresses concerned.
    pub range: Option<ByteRange<Iova>>,
    /// The access for which they were requested.
    pub access: Option<Access>,
}

impl Finding {
    /// A finding without message and addresses.
    pub fn new(at: Duration, rule: Rule, seen: String) -> Self {
        Self { id: 0, at, rule, seen, message: None, range: None, access: None }
    }

    /// The finding as JSON, without its report.
    pub fn json(&self) -> Value {
        let row = self.rule.row();
        json!({
            "id": self.id,
            "rule": row.name,
            "severity": row.severity.name(),
            "seen": self.seen,
            "message": self.message,
            "range": self.range,
            "access": self.access,
            "at_ns": u64::try_from(self.at.as_nanos()).unwrap_or(u64::MAX),
        })
    }
}

/// Prints a finding as a report for the author of the front-end.
#[derive(Clone, Copy, Debug)]
pub struct Report<'a> {
    /// The finding itself.
    pub finding: &'a Finding,
    /// The names of the address: ring, resource, job. Lines of text, possibly none.
    pub names: &'a [String],
    /// Path of its trace, or how to get one.
    pub trace: &'a str,
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { id, at, rule, seen, message, range, access } = self.finding;
        let row = rule.row();
        let severity = row.severity;
        writeln!(f, "Finding {id}: {} ({}). {}", row.name, severity.name(), row.deed)?;
        if let Some(message) = message {
            writeln!(f, "  message       {message}")?;
        }
        if let Some(range) = range {
            write!(f, "  address       {range}")?;
            match access {
                Some(access) => writeln!(f, " for {access}")?,
                None => writeln!(f)?,
            }
            for name in self.names {
                writeln!(f, "                which is {name}")?;
            }
        }
        writeln!(f, "  seen          {}", wrapped(seen))?;
        writeln!(f, "  when          {at:?} after the start of the process")?;
        writeln!(f, "  how sure      {}: {}", severity.name(), severity.meaning())?;
        writeln!(f, "  written in    vhost-user.rst, {}", row.section)?;
        writeln!(f, "  what to do    {}", wrapped(row.advice))?;
        write!(f, "  trace         {}", self.trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding() -> Finding {
        let page = ByteRange::new(Iova::new(0x7000), 0x1000).unwrap();
        let seen =
            "the reply said success 40µs after the MISS, and the UPDATE was of 0x1000+0x1000".to_owned();
        let found = Finding::new(Duration::from_millis(1250), Rule::UpdateDoesNotCover, seen);
        Finding { message: Some("IOTLB_MSG"), range: Some(page), access: Some(Access::Read), ..found }
    }

    #[test]
    fn a_report_says_what_was_seen_where_and_what_to_do() {
        let (finding, names) = (finding(), ["used ring of control ring".to_owned()]);
        let report = Report { finding: &finding, names: &names, trace: "t.json" }.to_string();
        let lines: Vec<&str> = report.lines().collect();
        let expected = [
            "Finding 0: update-does-not-cover (certain). A MISS was answered with success, and its UPDATE does not cover \
             the page that it asked for.",
            "  message       IOTLB_MSG",
            "  address       0x7000+0x1000 for read",
            "                which is used ring of control ring",
            "  seen          the reply said success 40µs after the MISS, and the UPDATE was of 0x1000+0x1000",
            "  when          1.25s after the start of the process",
            "  how sure      certain: no correct front-end does this",
            "  written in    vhost-user.rst, IOMMU support",
        ];
        assert_eq!(lines[..8], expected);
        assert!(lines[8].starts_with("  what to do    send the part of the mapping that holds"), "{report}");
        assert_eq!(lines.last(), Some(&"  trace         t.json"));
    }

    #[test]
    fn what_is_not_known_is_not_said() {
        let bare = Finding { message: None, range: None, ..finding() };
        let report = Report { finding: &bare, names: &[], trace: "none" }.to_string();
        assert!(!report.contains("message  ") && !report.contains("  address"), "{report}");
    }

    #[test]
    fn tools_get_the_names_that_they_know() {
        let expected = json!({
            "id": 0, "rule": "update-does-not-cover", "severity": "certain", "seen": finding().seen,
            "message": "IOTLB_MSG", "range": "0x7000+0x1000", "access": "read", "at_ns": 1_250_000_000_u64,
        });
        assert_eq!(finding().json(), expected);
    }
}
