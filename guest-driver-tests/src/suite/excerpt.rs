//! The part of a flight recorder's trace that a case keeps: the events during the case, around the most relevant
//! drain. The recorder holds 64 k events, and hundreds of cases are kept in memory. Knows the format of a trace;
//! knows nothing of the threads that recorded it.

use crate::suite::report::timeline::Timeline;
use crate::suite::report::trace::Trace;
use serde_json::Value;
use std::time::Duration;

/// Events that name tracks have no time.
const NAMES: &str = "M";

/// The most relevant part of the last `took` of a trace.
pub(crate) fn of(mut trace: Value, took: Duration) -> Option<Value> {
    let last = events(&mut trace)?.iter().filter_map(end_of).fold(0.0, f64::max);
    let from = last - took.as_secs_f64() * 1e6;
    keep(&mut trace, from, last)?;
    let window = Timeline::of(&Trace::of(&trace)?).absolute;
    keep(&mut trace, window.from, window.to)?;
    Some(trace)
}

fn events(trace: &mut Value) -> Option<&mut Vec<Value>> {
    trace.get_mut("traceEvents")?.as_array_mut()
}

fn end_of(event: &Value) -> Option<f64> {
    Some(event.get("ts")?.as_f64()? + event.get("dur").and_then(Value::as_f64).unwrap_or(0.0))
}

/// Keeps events that overlap a span of time, in microseconds, and those that name tracks.
fn keep(trace: &mut Value, from: f64, to: f64) -> Option<()> {
    events(trace)?.retain(|event| {
        let begin = event.get("ts").and_then(Value::as_f64).unwrap_or(f64::INFINITY);
        event.get("ph").is_some_and(|kind| kind == NAMES)
            || begin <= to && end_of(event).is_some_and(|end| end >= from)
    });
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_kept_is_of_the_case_and_has_its_names() {
        let event = |ts: u64| json!({ "ph": "i", "name": "ack", "ts": ts, "tid": 1, "args": {} });
        let name = json!({ "ph": "M", "name": "thread_name", "tid": 1, "args": { "name": "engine 0" } });
        let mut all = vec![name.clone()];
        all.extend((0..1_000).map(|at| event(at * 1_000)));
        let kept = of(json!({ "traceEvents": all }), Duration::from_millis(5)).unwrap();
        let kept = kept["traceEvents"].as_array().unwrap();
        assert_eq!(kept.first(), Some(&name));
        assert!((2..=8).contains(&kept.len()), "{} events", kept.len());
        assert_eq!(kept.last(), Some(&event(999_000)));
    }

    #[test]
    fn what_is_no_trace_is_not_kept() {
        assert_eq!(of(json!({ "a": 1 }), Duration::ZERO), None);
    }
}
