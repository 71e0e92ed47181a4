//! The records of violations and faults, the newest of each, and their JSON form. A violation may also be printed, as a
//! report for the author of the driver; a guest cannot cause unbounded output. Knows nothing of verdicts, nor of who
//! reads or prints the records.
//!
//! LOCKING: one leaf mutex, held while one record is added or all are copied.

use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use device_model::jobs::verdict::Verdict;
use device_model::locking::lock;
use device_model::telemetry::violation::{Fault, FaultCause, Violation};
use job_stream::Choice;
use serde_json::{Value, json};

use crate::records::{Newest, Print, Rate};

/// A violation, and what the reporter has found out about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reported {
    /// The violation itself.
    pub violation: Violation,
    /// The names of its address; `None` until they are looked up.
    pub names: Option<Vec<String>>,
    /// Path of its trace, or how to get one.
    pub trace: String,
}

#[derive(Debug)]
struct Inner {
    violations: Newest<Reported>,
    faults: Newest<Fault>,
    next_id: u64,
    rate: Rate,
    unprinted: u64,
}

/// All violations and faults so far; shared by all threads.
#[derive(Debug)]
pub struct Reports(Mutex<Inner>);

impl Default for Reports {
    fn default() -> Self {
        let rate = Rate::default();
        let (violations, faults) = (Newest::default(), Newest::default());
        Self(Mutex::new(Inner { violations, faults, next_id: 1, rate, unprinted: 0 }))
    }
}

impl Reports {
    /// Adds a violation, numbers it, and returns whether to print it. Benign ones are kept but not printed.
    pub fn violation(&self, mut violation: Violation) -> (u64, Print) {
        let mut inner = self.lock();
        let id = inner.next_id;
        violation.id = id;
        inner.next_id = id.saturating_add(1);
        let (verdict, at) = (violation.verdict, violation.at);
        inner.violations.push(Reported { violation, names: None, trace: String::new() });
        let print = match verdict {
            Verdict::Benign => Print::Nothing,
            Verdict::Moved | Verdict::Gone if inner.rate.take(at) => {
                Print::Report { unprinted: std::mem::take(&mut inner.unprinted) }
            }
            Verdict::Moved | Verdict::Gone => {
                inner.unprinted = inner.unprinted.saturating_add(1);
                Print::Nothing
            }
        };
        (id, print)
    }

    /// The violation with this number, if it is still kept.
    pub fn get(&self, id: u64) -> Option<Reported> {
        self.lock().violations.records.iter().find(|reported| reported.violation.id == id).cloned()
    }

    /// Adds the names and the trace of a violation.
    pub fn named(&self, id: u64, names: Vec<String>, trace: String) {
        let mut inner = self.lock();
        if let Some(reported) = inner.violations.records.iter_mut().find(|one| one.violation.id == id) {
            (reported.names, reported.trace) = (Some(names), trace);
        }
    }

    /// Adds a fault.
    pub fn fault(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// The violations that are still kept.
    pub fn violations(&self) -> Newest<Reported> {
        self.lock().violations.clone()
    }

    /// The faults that are still kept.
    pub fn faults(&self) -> Newest<Fault> {
        self.lock().faults.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

/// A violation as JSON, without its report.
pub fn violation_json(violation: &Violation) -> Value {
    json!({
        "id": violation.id,
        "verdict": violation.verdict,
        "confidence": violation.confidence,
        "mode": violation.mode.name(),
        "job": violation.job,
        "context": violation.context,
        "packet": violation.packet,
        "range": violation.range,
        "access": violation.access,
        "invalidation": violation.invalidation.number,
        "at_ns": nanoseconds(violation.at),
    })
}

/// A fault as JSON, with the `names` of its address and advice for the author of the driver.
pub fn fault_json(fault: &Fault, names: &[String]) -> Value {
    let mut json = json!({
        "mode": fault.mode.name(),
        "job": fault.job,
        "context": fault.context,
        "packet": fault.packet,
        "at_ns": nanoseconds(fault.at),
        "names": names,
        "advice": fault.advice(),
    });
    let cause = match fault.cause {
        FaultCause::Refused { range, access } => json!({ "range": range, "access": access }),
        FaultCause::Translation(fault) => json!({
            "asid": fault.asid,
            "gva": fault.gva.to_string(),
            "access": fault.access,
            "kind": fault.kind,
            "level": fault.level,
            "pte": format!("{:#x}", fault.pte),
            "cached": fault.cached,
        }),
    };
    if let (Some(all), Value::Object(cause)) = (json.as_object_mut(), cause) {
        all.extend(cause);
    }
    json
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use device_model::addr::{Access, ByteRange, Iova};
    use device_model::jobs::job::JobId;
    use device_model::jobs::verdict::{Confidence, InvalidationInfo};
    use job_stream::Mode;

    use super::*;
    use crate::records::{BURST, KEPT};

    /// A violation at this second.
    fn violation(second: u64, verdict: Verdict) -> Violation {
        let range = ByteRange::new(Iova::new(0x1000), 0x1000).unwrap();
        let at = Duration::from_secs(second);
        Violation {
            id: 0,
            at,
            verdict,
            confidence: Confidence::Certain,
            mode: Mode::Fence,
            job: JobId::new(12),
            context: Some(3),
            packet: None,
            range,
            access: Access::Read,
            invalidation: InvalidationInfo { number: 41, range, begun: at, acked: Some(at) },
        }
    }

    #[test]
    fn the_newest_records_are_kept_and_the_others_counted() {
        let reports = Reports::default();
        for second in 0..300 {
            assert_eq!(reports.violation(violation(second, Verdict::Gone)).0, second + 1);
        }
        let kept = reports.violations();
        assert_eq!((kept.records.len(), kept.dropped), (KEPT, 44));
        assert_eq!(kept.records[0].violation.id, 45);
        assert_eq!(kept.records[KEPT - 1].violation.id, 300);
        reports.named(45, vec!["a".to_owned()], "t".to_owned());
        assert_eq!(reports.get(45).unwrap().names, Some(vec!["a".to_owned()]));
        assert_eq!(reports.get(44), None);
    }

    #[test]
    fn a_guest_cannot_make_us_print_without_bound() {
        let reports = Reports::default();
        let print = |second| reports.violation(violation(second, Verdict::Moved)).1;
        for _ in 0..BURST {
            assert_eq!(print(0), Print::Report { unprinted: 0 });
        }
        for _ in 0..3 {
            assert_eq!(print(9), Print::Nothing);
        }
        assert_eq!(print(10), Print::Report { unprinted: 3 });
        assert_eq!(print(10), Print::Nothing);
        let printed = (0..1000).filter(|_| print(1_000_000) != Print::Nothing).count();
        assert_eq!(printed, 8);
    }

    #[test]
    fn a_benign_overlap_is_kept_and_not_printed() {
        let reports = Reports::default();
        assert_eq!(reports.violation(violation(0, Verdict::Benign)).1, Print::Nothing);
        assert_eq!(reports.violations().records.len(), 1);
        assert_eq!(reports.violation(violation(0, Verdict::Gone)).1, Print::Report { unprinted: 0 });
    }

    #[test]
    fn tools_get_the_names_that_they_know() {
        let expected = json!({
            "id": 0, "verdict": "gone", "confidence": "certain", "mode": "fence", "job": 12, "context": 3,
            "packet": null, "range": "0x1000+0x1000", "access": "read", "invalidation": 41, "at_ns": 1_000_000_000_u64,
        });
        assert_eq!(violation_json(&violation(1, Verdict::Gone)), expected);
    }
}
