//! Which part of a trace shows a drain: a window around the most relevant drain, its contents, and how much is
//! outside. Knows traces; knows nothing of pictures.

use std::collections::BTreeSet;

use super::super::super::rig::report::duration;
use super::trace::{Drain, Engine, Mark, Miss, Sign, Span, Trace};

/// The part of a window that is left free on both sides of what it shows.
const MARGIN: f64 = 0.08;
/// The least margin, in microseconds.
const LEAST: f64 = 20.0;
/// How much of the end is shown where nothing had to wait.
const END: f64 = 20_000.0;

/// A part of a trace. Times are microseconds since `zero`.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    /// A sentence about what it shows.
    pub headline: String,
    /// What is at 0, in a word or two; empty: nothing, it is where the window begins.
    pub zero: String,
    /// From where to where.
    pub window: Span,
    /// The same in the trace's own time.
    pub absolute: Span,
    /// The drain that it is about: its index in `drains`.
    pub subject: Option<usize>,
    /// The job that it is about.
    pub job: Option<u64>,
    /// Engines that were active.
    pub engines: Vec<Engine>,
    /// Drains.
    pub drains: Vec<Drain>,
    /// Misses.
    pub misses: Vec<Miss>,
    /// Moments.
    pub marks: Vec<Mark>,
    /// Events in the window, and in the whole trace.
    pub events: (usize, usize),
    /// How much of the trace is in the window, and how long the whole trace is.
    pub recorded: (f64, f64),
}

/// A number of microseconds, in the unit that suits it.
pub fn micros(time: f64) -> String {
    duration((time.abs() * 1e3).round() as u64)
}

impl Timeline {
    /// The most relevant part of a trace.
    pub fn of(trace: &Trace) -> Self {
        let subject = subject(trace);
        let verdict = trace.accused().last();
        let job = subject.map_or(verdict.map(|(job, _)| job), |drain| drain.job);
        let window = match (subject, verdict) {
            (Some(drain), _) => around(trace, drain.at, drain.job),
            (None, Some((job, at))) => around(trace, Span { from: at - END / 10.0, to: at }, Some(job)),
            (None, None) => Span { from: (trace.at.to - END).max(trace.at.from), to: trace.at.to },
        };
        let (zero, name) = match (subject, verdict) {
            (Some(drain), _) => (drain.at.from, name(drain)),
            (None, Some((_, at))) => (at, "the verdict".to_owned()),
            (None, None) => (window.from, String::new()),
        };
        let headline = match (subject, verdict) {
            (Some(drain), _) => story(trace, drain),
            (None, Some((job, _))) => {
                format!("Job {job} was found to use memory that was not its own any more")
            }
            (None, None) => "No invalidation had to wait".to_owned(),
        };
        cut(trace, window, zero, Self { headline, zero: name, job, ..Self::empty(trace) }, subject)
    }

    fn empty(trace: &Trace) -> Self {
        Self {
            headline: String::new(),
            zero: String::new(),
            window: trace.at,
            absolute: trace.at,
            subject: None,
            job: None,
            engines: Vec::new(),
            drains: Vec::new(),
            misses: Vec::new(),
            marks: Vec::new(),
            events: (0, trace.events.len()),
            recorded: (0.0, trace.at.length()),
        }
    }

    /// How much is not shown.
    pub fn not_shown(&self) -> String {
        let (inside, all) = self.events;
        let (shown, recorded) = (micros(self.recorded.0), micros(self.recorded.1));
        format!("{shown} of {recorded} that were recorded; {} of {all} events are not shown.", all - inside)
    }
}

/// The most relevant drain: the longest one that waited for a job with a violation, if there is one, else the longest
/// that waited.
fn subject(trace: &Trace) -> Option<&Drain> {
    let waited = trace.drains.iter().filter(|drain| drain.parked.is_some());
    let longest = |a: &&Drain, b: &&Drain| a.at.length().total_cmp(&b.at.length());
    let accused: BTreeSet<u64> = trace.accused().map(|(job, _)| job).collect();
    let found_out = |drain: &&Drain| drain.job.is_some_and(|job| accused.contains(&job));
    waited.clone().filter(found_out).max_by(longest).or_else(|| waited.max_by(longest))
}

/// A window around a drain, with the life of its job unless that is much longer: from its submission, or at least
/// from when an engine took it, to its end and its verdict.
fn around(trace: &Trace, drain: Span, job: Option<u64>) -> Span {
    let (earliest, latest) = (drain.from - 2.0 * drain.length(), drain.to + 3.0 * drain.length());
    let before = |at: &f64| (earliest..=drain.from).contains(at);
    let taken = |job: u64| {
        let holds = trace.engines.iter().flat_map(|engine| &engine.holds).filter(move |hold| hold.job == job);
        holds.map(|hold| hold.at.from).filter(before).max_by(f64::total_cmp)
    };
    let begin = job.and_then(|job| trace.submitted(job).filter(before).or_else(|| taken(job)));
    let verdicts = trace.accused().filter(|(accused, _)| job == Some(*accused)).map(|(_, at)| at);
    let after = verdicts.chain(job.and_then(|job| trace.ended(job)));
    let end = after.filter(|at| (drain.to..=latest).contains(at)).max_by(f64::total_cmp);
    let (from, to) = (begin.unwrap_or(drain.from), end.unwrap_or(drain.to));
    let margin = ((to - from) * MARGIN).max(LEAST);
    Span { from: from - margin, to: to + margin }
}

/// The label of a drain.
pub fn name(drain: &Drain) -> String {
    match drain.number {
        0 => "A message that takes memory away".to_owned(),
        number => format!("INVALIDATE {number}"),
    }
}

/// The outcome of a drain that had to wait.
fn story(trace: &Trace, drain: &Drain) -> String {
    let who = drain.job.map_or_else(|| "a step".to_owned(), |job| format!("job {job}"));
    let how_long = micros(drain.at.length());
    let what = format!("{} of {}", name(drain), drain.range);
    let ladder = if drain.ladder.is_some() { ", which was then taken off its engine" } else { "" };
    let verdict = trace.accused().find(|(job, _)| Some(*job) == drain.job).map(|(_, at)| at);
    let verdict =
        verdict.and_then(|at| verdict_at(trace, at)).map_or(String::new(), |word| format!(": {word}"));
    match drain.acked {
        true => format!("{what}: its ack waited {how_long} for {who}{ladder}{verdict}"),
        false => format!("{what}: no ack after {how_long}; it waits for {who}{ladder}{verdict}"),
    }
}

fn verdict_at(trace: &Trace, at: f64) -> Option<String> {
    trace.marks.iter().filter(|mark| mark.at == at).find_map(|mark| match &mark.sign {
        Sign::Verdict(_, verdict) => Some(verdict.to_uppercase()),
        _ => None,
    })
}

/// What lies in a window, with times from `zero`.
fn cut(trace: &Trace, window: Span, zero: f64, mut line: Timeline, subject: Option<&Drain>) -> Timeline {
    let moved = |span: Span| Span { from: span.from - zero, to: span.to - zero };
    let inside = |at: &f64| (window.from..=window.to).contains(at);
    line.window = moved(window);
    line.absolute = window;
    line.recorded.0 = (window.to.min(trace.at.to) - window.from.max(trace.at.from)).max(0.0);
    line.events.0 = trace.events.iter().filter(|at| inside(at)).count();
    for drain in trace.drains.iter().filter(|drain| drain.at.meets(window)) {
        if subject.is_some_and(|subject| std::ptr::eq(subject, drain)) {
            line.subject = Some(line.drains.len());
        }
        let (parked, ladder) = (drain.parked.map(|at| at - zero), drain.ladder.map(|at| at - zero));
        line.drains.push(Drain { at: moved(drain.at), parked, ladder, ..drain.clone() });
    }
    let misses = trace.misses.iter().filter(|miss| miss.at.meets(window));
    line.misses = misses.map(|miss| Miss { at: moved(miss.at), ..miss.clone() }).collect();
    let marks = trace.marks.iter().filter(|mark| inside(&mark.at));
    line.marks = marks.map(|mark| Mark { at: mark.at - zero, ..mark.clone() }).collect();
    for engine in &trace.engines {
        let mut part = Engine { name: engine.name.clone(), ..Engine::default() };
        part.holds = engine.holds.iter().filter(|hold| hold.at.meets(window)).cloned().collect();
        part.steps = engine.steps.iter().filter(|step| step.at.meets(window)).cloned().collect();
        part.holds.iter_mut().for_each(|hold| hold.at = moved(hold.at));
        part.steps.iter_mut().for_each(|step| step.at = moved(step.at));
        if !part.holds.is_empty() || !part.steps.is_empty() {
            line.engines.push(part);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn instant(ts: f64, tid: u64, name: &str, args: Value) -> Value {
        json!({"ph": "i", "pid": 1, "tid": tid, "ts": ts, "s": "t", "name": name, "args": args})
    }

    /// An INVALIDATE with this number that waited for a job, as the back-end tells it.
    fn waits(number: u64, from: f64, took: f64, job: u64) -> Vec<Value> {
        let args = json!({"number": number, "took": took * 1e3});
        vec![
            instant(from, 1, "invalidation", json!({"number": number, "range": "0x1000+0x1000"})),
            instant(from + 1.0, 1, "parked", json!({"number": number, "job": job, "pins": 1, "sections": 0})),
            json!({"ph": "X", "pid": 1, "tid": 1, "ts": from + 0.5, "dur": took, "name": "any", "args": args}),
        ]
    }

    fn life(job: u64, submitted: f64, taken: f64, ended: f64) -> Vec<Value> {
        vec![
            instant(submitted, 2, "submitted", json!({"job": job, "context": 1, "mode": "fence"})),
            instant(taken, 4, "taken", json!({"job": job, "packet": 0, "pinned": true})),
            instant(ended - 1.0, 4, "left", json!({"job": job, "why": "done"})),
            instant(ended, 2, "ended", json!({"job": job, "failed": false})),
        ]
    }

    fn timeline(parts: &[Vec<Value>]) -> Timeline {
        Timeline::of(&Trace::of(&json!({"traceEvents": parts.concat()})).unwrap())
    }

    #[test]
    fn the_window_has_the_longest_wait_and_the_life_of_its_job() {
        let line = timeline(&[
            life(1, 9_500.0, 9_800.0, 11_200.0),
            waits(1, 10_000.0, 1_000.0, 1),
            life(2, 90_000.0, 90_010.0, 90_100.0),
            waits(2, 90_050.0, 40.0, 2),
        ]);
        assert_eq!((line.job, line.drains.len(), line.events), (Some(1), 1, (7, 14)));
        // From submit to end, 8 % of that on both sides, and 0 at the message.
        assert_eq!(line.window, Span { from: -500.0 - 136.0, to: 1_200.0 + 136.0 });
        assert_eq!(line.drains[0].at, Span { from: 0.0, to: 1_000.5 });
        assert_eq!(line.headline, "INVALIDATE 1 of 0x1000+0x1000: its ack waited 1.0 ms for job 1");
        assert_eq!(line.not_shown(), "1.8 ms of 80.6 ms that were recorded; 7 of 14 events are not shown.");
    }

    #[test]
    fn a_job_that_was_submitted_long_before_is_shown_from_when_it_was_taken() {
        let line = timeline(&[life(1, 10.0, 9_900.0, 11_100.0), waits(1, 10_000.0, 1_000.0, 1)]);
        assert_eq!(line.window.from, -100.0 - 96.0);
    }

    #[test]
    fn of_drains_that_waited_one_for_a_job_that_was_found_out_comes_first() {
        let found = instant(600.0, 0, "judged", json!({"job": 2, "verdict": "gone", "violation": 1}));
        let benign = instant(9_000.0, 0, "judged", json!({"job": 1, "verdict": "benign", "violation": 0}));
        let line = timeline(&[waits(1, 5_000.0, 900.0, 1), waits(2, 500.0, 50.0, 2), vec![found, benign]]);
        assert_eq!((line.job, line.zero.as_str()), (Some(2), "INVALIDATE 2"));
        assert!(line.headline.ends_with("waited 50.5 µs for job 2: GONE"), "{}", line.headline);
    }

    #[test]
    fn an_ack_that_never_came_waits_to_the_end() {
        let mut hang = waits(3, 100.0, 1.0, 1);
        hang.truncate(2);
        let line = timeline(&[hang, vec![instant(5_100.0, 1, "start", json!({}))]]);
        assert!(!line.drains[0].acked && line.drains[0].at == Span { from: 0.0, to: 5_000.0 });
        assert!(line.headline.contains("no ack after 5.0 ms"), "{}", line.headline);
    }

    #[test]
    fn where_nothing_waited_the_last_verdict_is_shown_or_else_the_end() {
        let verdict = instant(70_000.0, 0, "judged", json!({"job": 2, "verdict": "moved", "violation": 1}));
        let others = vec![instant(0.0, 1, "start", json!({})), instant(99_000.0, 1, "stop", json!({}))];
        let line = timeline(&[others.clone(), vec![verdict]]);
        assert!(line.window.from < 0.0 && line.window.to > 0.0 && line.marks.len() == 1, "{line:?}");
        let line = timeline(&[others]);
        assert_eq!((line.window, line.events), (Span { from: 0.0, to: 20_000.0 }, (1, 2)));
    }
}
