//! How a record is kept, named, reported and traced.

use std::sync::Arc;

use device_model::addr::{Access, ByteRange, Iova};
use device_model::jobs::verdict::{Confidence, InvalidationInfo, Verdict};
use device_model::telemetry::names::BackingChange;
use device_model::telemetry::violation::FaultCause;
use job_stream::Mode;
use serde_json::Value;

use super::*;

fn page() -> ByteRange<Iova> {
    ByteRange::new(Iova::new(0x7000), 0x1000).unwrap()
}

fn violation(verdict: Verdict) -> Violation {
    let at = Duration::from_millis(20);
    let begun = Duration::from_millis(10);
    Violation {
        id: 0,
        at,
        verdict,
        confidence: Confidence::Certain,
        mode: Mode::Strict,
        job: JobId::new(12),
        context: Some(3),
        packet: Some(2),
        range: page(),
        access: Access::Write,
        invalidation: InvalidationInfo { number: 41, range: page(), begun, acked: None },
    }
}

/// Instruments in which the page has a name.
fn instruments(record_dir: Option<PathBuf>) -> Arc<Instruments> {
    let instruments = Instruments::start(1, record_dir, Arc::default()).unwrap();
    instruments.outbox.open();
    let attached = BackingChange::Attached { resource: 7, entries: vec![page()] };
    instruments.names().backing_changed(Duration::ZERO, attached);
    instruments
}

fn events(instruments: &Instruments) -> Vec<Value> {
    instruments.flush();
    instruments.outbox.take().iter().map(|event| serde_json::from_str(event).unwrap()).collect()
}

#[test]
fn a_violation_is_told_with_its_names_and_leaves_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let instruments = instruments(Some(folder.path().to_owned()));
    assert_eq!(instruments.violation(violation(Verdict::Gone)), 1);
    let events = events(&instruments);
    assert_eq!(events.len(), 1);
    assert_eq!((&events[0]["event"], &events[0]["data"]["id"]), (&"VIOLATION".into(), &1.into()));
    let report = events[0]["data"]["report"].as_str().unwrap();
    assert!(report.contains("which is resource 7 (backing entry 0, offset 0x0)"), "{report}");
    let kept = instruments.reports.get(1).unwrap();
    assert!(report.contains(&kept.trace), "{report}");
    let trace: Value = serde_json::from_slice(&std::fs::read(&kept.trace).unwrap()).unwrap();
    let judged = trace["traceEvents"].as_array().unwrap().iter().find(|event| event["name"] == "judged");
    assert_eq!(judged.unwrap()["args"]["verdict"], "gone");
}

#[test]
fn without_a_folder_no_trace_is_written_and_the_report_says_how_to_get_one() {
    let instruments = instruments(None);
    instruments.violation(violation(Verdict::Moved));
    instruments.violation(violation(Verdict::Benign));
    let events = events(&instruments);
    assert_eq!(events.len(), 2);
    let report = events[0]["data"]["report"].as_str().unwrap();
    assert!(report.ends_with(HOW_TO_TRACE), "{report}");
}

#[test]
fn a_process_writes_a_bounded_number_of_traces_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let instruments = instruments(Some(folder.path().to_owned()));
    for _ in 0..40 {
        instruments.incident("test");
    }
    instruments.flush();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 32);
}

#[test]
fn a_fault_is_told_with_its_names() {
    let instruments = instruments(None);
    let (job, context, packet, mode) = (JobId::new(12), Some(3), Some(2), Mode::Fault);
    let at = Duration::from_millis(1);
    let cause = FaultCause::Refused { range: page(), access: Access::Read };
    instruments.fault(Fault { at, job, context, packet, mode, cause });
    let events = events(&instruments);
    assert_eq!(events[0]["event"], "FAULT");
    assert_eq!(events[0]["data"]["names"][0], "resource 7 (backing entry 0, offset 0x0)");
    assert_eq!(instruments.reports.faults().records.len(), 1);
}
