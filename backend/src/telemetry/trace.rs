//! Renders the flight recorder as a trace in the JSON format of Chrome and Perfetto (`traceEvents`), with a track for
//! each engine, ring and session. Steps, and drains from message to ack, are spans; misses are asynchronous spans,
//! because many are in flight at once; an arrow leads from a drain that had to wait to the last step of the job that it
//! waited for. Knows events; knows nothing of who requests the trace.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::time::Duration;

use device_model::addr::{Access, Iova};
use device_model::jobs::job::JobId;
use device_model::telemetry::record::{Event, Nanoseconds, Recorded, Snapshot};
use serde_json::{Value, json};

/// All tracks belong to one process.
const PID: u32 = 1;

/// Writes the trace to a file.
pub fn write(file: File, tracks: &[Snapshot]) -> io::Result<()> {
    let mut file = BufWriter::new(file);
    serde_json::to_writer(&mut file, &render(tracks))?;
    file.flush()
}

/// The trace as JSON.
pub fn render(tracks: &[Snapshot]) -> Value {
    let mut events = vec![meta("process_name", 0, "mirrorgpu")];
    for (tid, track) in tracks.iter().enumerate() {
        events.push(meta("thread_name", tid, &track.track));
        events.push(json!({
            "ph": "M", "pid": PID, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid},
        }));
        let mut misses = Misses::default();
        events.extend(track.events.iter().flat_map(|event| of_event(tid, event, &mut misses)));
    }
    events.extend(arrows(tracks));
    json!({ "displayTimeUnit": "ns", "traceEvents": events })
}

fn meta(name: &str, tid: usize, value: &str) -> Value {
    json!({"ph": "M", "pid": PID, "tid": tid, "name": name, "args": {"name": value}})
}

/// The format counts in microseconds; nanoseconds are decimals.
fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

/// The outstanding misses, with the number of their asynchronous span.
#[derive(Default)]
struct Misses {
    open: BTreeMap<(Iova, Access), u64>,
    next: u64,
}

/// The trace entries for an event.
fn of_event(tid: usize, recorded: &Recorded, misses: &mut Misses) -> Vec<Value> {
    let Recorded { at, event, .. } = *recorded;
    let (name, args) = name_and_args(&event);
    let base =
        |ph: &str, at: Duration| json!({"ph": ph, "pid": PID, "tid": tid, "ts": micros(at), "name": name});
    let with = |mut value: Value, more: &[(&str, Value)]| {
        if let Some(object) = value.as_object_mut() {
            object.insert("args".to_owned(), args.clone());
            object.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        }
        value
    };
    let span =
        |begin: Duration, took: Nanoseconds| with(base("X", begin), &[("dur", json!(micros(took.into())))]);
    match event {
        Event::Step { took, .. } => vec![span(at, took)],
        Event::Acked { took, .. } => vec![span(at.saturating_sub(took.into()), took)],
        Event::Miss { range, access } => {
            misses.next += 1;
            let id = misses.next;
            let old = misses.open.insert((range.first(), access), id);
            // The page is requested again: the open span ends here.
            let old = old.map(|id| with(base("e", at), &[("cat", json!("miss")), ("id", json!(id))]));
            let new = with(base("b", at), &[("cat", json!("miss")), ("id", json!(id))]);
            old.into_iter().chain([new]).collect()
        }
        Event::MissSettled { range, access, .. } => match misses.open.remove(&(range.first(), access)) {
            Some(id) => vec![with(base("e", at), &[("cat", json!("miss")), ("id", json!(id))])],
            None => vec![with(base("i", at), &[("s", json!("t"))])],
        },
        _ => vec![with(base("i", at), &[("s", json!("t"))])],
    }
}

/// The name of an event, and its arguments.
fn name_and_args(event: &Event) -> (String, Value) {
    let mut args = serde_json::to_value(event).unwrap_or_default();
    let kind = args.as_object_mut().and_then(|object| object.remove("event"));
    let kind = kind.as_ref().and_then(Value::as_str).unwrap_or("event").to_owned();
    let name = match event {
        Event::Step { job, packet: Some(packet), .. } => format!("job {} packet {packet}", job.raw()),
        Event::Step { job, .. } => format!("job {}", job.raw()),
        Event::Acked { number: 0, .. } => "drain for a message".to_owned(),
        Event::Acked { number, .. } => format!("invalidation {number}"),
        // Both ends of a miss have the same name.
        Event::Miss { range, access } | Event::MissSettled { range, access, .. } => {
            format!("miss {} for {access}", range.first())
        }
        _ => kind,
    };
    (name, args)
}

/// A drain that had to wait, as the session recorded it.
#[derive(Default)]
struct Parked {
    at: Duration,
    job: Option<JobId>,
}

/// An arrow for each drain that waited for a job: from the time at which it was parked to the end of the job's last
/// step before the ack.
fn arrows(tracks: &[Snapshot]) -> Vec<Value> {
    let mut arrows = Vec::new();
    for (tid, track) in tracks.iter().enumerate() {
        let mut parked = BTreeMap::new();
        for Recorded { at, event, .. } in &track.events {
            match event {
                Event::Parked { number, job, .. } => {
                    parked.insert(*number, Parked { at: *at, job: *job });
                }
                Event::Acked { number, .. } => {
                    let Some(Parked { at: begun, job: Some(job) }) = parked.remove(number) else { continue };
                    let Some((engine, end)) = last_step(tracks, job, begun, *at) else { continue };
                    let id = arrows.len() / 2;
                    arrows.push(arrow("s", tid, begun, id));
                    arrows.push(arrow("f", engine, end, id));
                }
                _ => {}
            }
        }
    }
    arrows
}

fn arrow(ph: &str, tid: usize, at: Duration, id: usize) -> Value {
    // "bp": the arrow binds to the enclosing span, not to the next one.
    json!({
        "ph": ph, "pid": PID, "tid": tid, "ts": micros(at), "cat": "drain", "name": "waits for", "id": id, "bp": "e",
    })
}

/// The track of the job's last step that ended in this time, and a time within that step.
fn last_step(tracks: &[Snapshot], wanted: JobId, from: Duration, to: Duration) -> Option<(usize, Duration)> {
    let steps = tracks.iter().enumerate().flat_map(|(tid, track)| {
        track.events.iter().filter_map(move |recorded| match recorded.event {
            Event::Step { job, took, .. } if job == wanted => Some((tid, recorded.at, Duration::from(took))),
            _ => None,
        })
    });
    let ended = steps.filter(|(_, begun, took)| {
        let end = begun.saturating_add(*took);
        from <= end && end <= to
    });
    let (tid, begun, took) = ended.max_by_key(|(_, begun, _)| *begun)?;
    Some((tid, begun.saturating_add(took / 2)))
}

#[cfg(test)]
mod tests {
    use device_model::addr::ByteRange;
    use device_model::telemetry::record::{MissEnd, Recorder, StepEnd};

    use super::*;

    fn us(count: u64) -> Duration {
        Duration::from_micros(count)
    }

    fn step(job: u64, took: Duration, end: StepEnd) -> Event {
        Event::Step { job: JobId::new(job), packet: Some(1), bytes: 64, took: took.into(), end }
    }

    /// A trace in which a drain waits for the second step of job 7.
    fn scene() -> Value {
        let recorder = Recorder::new(["session".to_owned(), "engine 0".to_owned()]);
        let (session, engine) = (recorder.writer(0).unwrap(), recorder.writer(1).unwrap());
        let page = ByteRange::new(Iova::new(0x1000), 4096).unwrap();
        session.record(us(1), Event::Miss { range: page, access: Access::Read });
        session.record(us(3), Event::MissSettled { range: page, access: Access::Read, end: MissEnd::Mapped });
        engine.record(us(5), step(7, us(10), StepEnd::More));
        session.record(us(12), Event::Invalidation { number: 4, range: page });
        session.record(us(13), Event::Parked { number: 4, sections: 0, pins: 1, job: Some(JobId::new(7)) });
        engine.record(us(16), step(7, us(10), StepEnd::Done));
        engine.record(us(30), step(8, us(1), StepEnd::Done));
        session.record(us(28), Event::Acked { number: 4, took: us(16).into() });
        render(&recorder.snapshot())
    }

    fn of<'a>(trace: &'a Value, ph: &str) -> Vec<&'a Value> {
        trace["traceEvents"].as_array().unwrap().iter().filter(|event| event["ph"] == ph).collect()
    }

    #[test]
    fn a_drain_is_a_span_to_its_ack_with_an_arrow_to_the_step_that_it_waited_for() {
        let trace = scene();
        let drain = *of(&trace, "X").iter().find(|span| span["name"] == "invalidation 4").unwrap();
        assert_eq!((&drain["ts"], &drain["dur"], &drain["tid"]), (&json!(12.0), &json!(16.0), &json!(0)));
        let (from, to) = (of(&trace, "s"), of(&trace, "f"));
        assert_eq!((from.len(), to.len()), (1, 1));
        assert_eq!((&from[0]["ts"], &from[0]["tid"]), (&json!(13.0), &json!(0)));
        assert_eq!((&to[0]["ts"], &to[0]["tid"]), (&json!(21.0), &json!(1)));
        assert_eq!(from[0]["id"], to[0]["id"]);
    }

    #[test]
    fn a_miss_begins_and_ends_under_one_name_and_number() {
        let trace = scene();
        let (begin, end) = (of(&trace, "b"), of(&trace, "e"));
        assert_eq!((begin.len(), end.len()), (1, 1));
        for key in ["name", "id", "cat"] {
            assert_eq!(begin[0][key], end[0][key]);
        }
        assert_eq!(end[0]["args"]["end"], "mapped");
    }

    #[test]
    fn every_track_has_its_name_and_its_spans_nest() {
        let text = scene().to_string();
        let trace: Value = serde_json::from_str(&text).unwrap();
        let names = of(&trace, "M");
        for name in ["session", "engine 0"] {
            assert!(names.iter().any(|meta| meta["args"]["name"] == name));
        }
        assert_nests(&trace);
    }

    /// Two spans of a track are nested or disjoint.
    fn assert_nests(trace: &Value) {
        let mut tracks: BTreeMap<u64, Vec<(f64, f64)>> = BTreeMap::new();
        for span in of(trace, "X") {
            let (ts, dur) = (span["ts"].as_f64().unwrap(), span["dur"].as_f64().unwrap());
            tracks.entry(span["tid"].as_u64().unwrap()).or_default().push((ts, ts + dur));
        }
        assert_eq!(tracks.len(), 2);
        for mut spans in tracks.into_values() {
            spans.sort_by(|a, b| a.0.total_cmp(&b.0).then(b.1.total_cmp(&a.1)));
            let mut open: Vec<f64> = Vec::new();
            for (begin, end) in spans {
                open.retain(|outer| *outer > begin);
                assert!(open.last().is_none_or(|outer| end <= *outer), "{begin}..{end} in {open:?}");
                open.push(end);
            }
        }
    }
}
