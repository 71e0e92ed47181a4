//! A parsed trace of the back-end (`trace_events`, as the control command `record` writes it): steps, drains, misses
//! and guest events. Times are microseconds. Knows the names in that format. The trace may come from a device under
//! test, so entries that do not fit are left out. Knows nothing of what is worth showing.

use std::collections::BTreeMap;

use serde_json::Value;

use super::text;

/// The latest time that is accepted: a hundred years.
const LATEST: f64 = 3.2e15;
/// Characters of a name that are kept.
const LONGEST: usize = 60;

/// A span of time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Span {
    /// When it began.
    pub from: f64,
    /// When it ended.
    pub to: f64,
}

impl Span {
    /// How long it took.
    pub fn length(self) -> f64 {
        self.to - self.from
    }

    /// Whether it overlaps another.
    pub fn meets(self, other: Self) -> bool {
        self.from <= other.to && other.from <= self.to
    }
}

/// A step of a job on an engine.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Which job.
    pub job: u64,
    /// When.
    pub at: Span,
    /// Its result: `done`, `more`, `spins`, …
    pub end: String,
}

/// A job on an engine, from when it was taken to when it left.
#[derive(Clone, Debug, PartialEq)]
pub struct Hold {
    /// Which job.
    pub job: u64,
    /// When.
    pub at: Span,
    /// Whether it held a pin.
    pub pinned: bool,
    /// Why it left; `None`: it has not.
    pub left: Option<String>,
}

/// What an engine did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Engine {
    /// Its name.
    pub name: String,
    /// Jobs that it had.
    pub holds: Vec<Hold>,
    /// Their steps.
    pub steps: Vec<Step>,
}

/// An invalidation, from its message to its ack.
#[derive(Clone, Debug, PartialEq)]
pub struct Drain {
    /// Its number; 0: another message that takes memory away.
    pub number: u64,
    /// The range that it unmaps.
    pub range: String,
    /// When; to the end of the trace if it was not acked.
    pub at: Span,
    /// Whether it was acked.
    pub acked: bool,
    /// Since when its ack waited, if it did.
    pub parked: Option<f64>,
    /// A job that it waited for.
    pub job: Option<u64>,
    /// When jobs were evicted, because it took too long.
    pub ladder: Option<f64>,
}

/// A miss, from the request to the answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Miss {
    /// When; to the end of the trace if it was not answered.
    pub at: Span,
    /// How it ended: `mapped`, `refused`, `timed-out`; empty: it did not.
    pub end: String,
}

/// What a mark means.
#[derive(Clone, Debug, PartialEq)]
pub enum Sign {
    /// The guest submitted a job.
    Submitted(u64),
    /// A job is over; `true`: it failed.
    Ended(u64, bool),
    /// A fence signals; `true`: with an error.
    Fence(u64, bool),
    /// What an invalidation meant to a job: `moved`, `gone`, `benign`.
    Verdict(u64, String),
    /// A job needs a page that was refused.
    Fault(u64),
    /// Guest memory was taken away.
    Revoked,
}

/// Something that happened at a moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Mark {
    /// When.
    pub at: f64,
    /// What.
    pub sign: Sign,
}

/// A trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// The engines, in their order.
    pub engines: Vec<Engine>,
    /// Invalidations and other drains.
    pub drains: Vec<Drain>,
    /// Misses.
    pub misses: Vec<Miss>,
    /// Moments.
    pub marks: Vec<Mark>,
    /// The time of each event.
    pub events: Vec<f64>,
    /// From the first to the last event.
    pub at: Span,
}

/// An event of the trace, with what is common to all.
struct Event<'a> {
    ph: &'a str,
    name: &'a str,
    tid: u64,
    at: Span,
    args: &'a Value,
    id: Option<u64>,
}

impl<'a> Event<'a> {
    fn of(value: &'a Value) -> Option<Self> {
        let from = value.get("ts")?.as_f64()?;
        let to = from + value.get("dur").map_or(Some(0.0), Value::as_f64)?;
        let believed = from >= 0.0 && to >= from && to <= LATEST;
        believed.then_some(Self {
            ph: value.get("ph")?.as_str()?,
            name: value.get("name")?.as_str()?,
            tid: value.get("tid")?.as_u64()?,
            at: Span { from, to },
            args: value.get("args").unwrap_or(&Value::Null),
            id: value.get("id").and_then(Value::as_u64),
        })
    }

    fn number(&self, key: &str) -> Option<u64> {
        self.args.get(key)?.as_u64()
    }

    fn flag(&self, key: &str) -> bool {
        self.args.get(key).and_then(Value::as_bool).unwrap_or(false)
    }

    fn word(&self, key: &str) -> String {
        let word = self.args.get(key).and_then(Value::as_str).unwrap_or_default();
        text::one_line(word).chars().take(LONGEST).collect()
    }
}

impl Trace {
    /// Takes a trace apart; `None` if nothing is in it.
    pub fn of(trace: &Value) -> Option<Self> {
        let all = trace.get("traceEvents")?.as_array()?;
        let mut events: Vec<Event<'_>> = all.iter().filter_map(Event::of).collect();
        // Arrows repeat what the other events say.
        events.retain(|event| !matches!(event.ph, "M" | "s" | "f"));
        events.sort_by(|a, b| a.at.from.total_cmp(&b.at.from));
        let from = events.first()?.at.from;
        let to = events.iter().map(|event| event.at.to).fold(from, f64::max);
        let at = Span { from, to };
        Some(Self {
            engines: engines(&names(all), &events, to),
            drains: drains(&events, to),
            misses: misses(&events, to),
            marks: events.iter().filter_map(mark).collect(),
            events: events.iter().map(|event| event.at.from).collect(),
            at,
        })
    }

    /// When the guest submitted a job.
    pub fn submitted(&self, job: u64) -> Option<f64> {
        self.marks.iter().find(|mark| mark.sign == Sign::Submitted(job)).map(|mark| mark.at)
    }

    /// When a job was over.
    pub fn ended(&self, job: u64) -> Option<f64> {
        let ended = |mark: &&Mark| matches!(mark.sign, Sign::Ended(of, _) if of == job);
        self.marks.iter().find(ended).map(|mark| mark.at)
    }

    /// Jobs whose memory was found to be moved or gone, and when.
    pub fn accused(&self) -> impl Iterator<Item = (u64, f64)> {
        self.marks.iter().filter_map(|mark| match &mark.sign {
            Sign::Verdict(job, verdict) if verdict != "benign" => Some((*job, mark.at)),
            _ => None,
        })
    }
}

/// The names of tracks.
fn names(all: &[Value]) -> BTreeMap<u64, String> {
    let named = all.iter().filter(|event| event.get("name").is_some_and(|name| name == "thread_name"));
    let name = |event: &Value| {
        let name = event.get("args")?.get("name")?.as_str()?;
        Some((event.get("tid")?.as_u64()?, text::one_line(name).chars().take(LONGEST).collect()))
    };
    named.filter_map(name).collect()
}

/// What each engine did. A job that has not left is on its engine to the end.
fn engines(names: &BTreeMap<u64, String>, events: &[Event<'_>], end: f64) -> Vec<Engine> {
    let mut engines: BTreeMap<u64, Engine> = BTreeMap::new();
    for event in events {
        let Some(job) = event.number("job") else { continue };
        let is_step = event.ph == "X" && event.args.get("bytes").is_some();
        if !is_step && !matches!(event.name, "taken" | "left") {
            continue;
        }
        let engine = engines.entry(event.tid).or_insert_with(|| Engine {
            name: names.get(&event.tid).cloned().unwrap_or_else(|| format!("track {}", event.tid)),
            ..Engine::default()
        });
        match event.name {
            "taken" => {
                let at = Span { from: event.at.from, to: end };
                engine.holds.push(Hold { job, at, pinned: event.flag("pinned"), left: None });
            }
            "left" => {
                let open = engine.holds.last_mut().filter(|hold| hold.job == job && hold.left.is_none());
                if let Some(hold) = open {
                    hold.at.to = event.at.from;
                    hold.left = Some(event.word("why"));
                }
            }
            _ => engine.steps.push(Step { job, at: event.at, end: event.word("end") }),
        }
    }
    engines.into_values().collect()
}

/// Events of drains by their kind and the number of their drain, in their order.
type Numbered<'a> = BTreeMap<(&'static str, u64), Vec<&'a Event<'a>>>;

fn numbered<'a>(events: &'a [Event<'a>]) -> Numbered<'a> {
    let mut numbered = Numbered::new();
    for event in events {
        let kind = match (event.name, event.ph) {
            ("invalidation", "i") => "invalidation",
            ("parked", _) => "parked",
            ("ladder", _) => "ladder",
            (_, "X") => "ack",
            _ => continue,
        };
        if let Some(number) = event.number("number") {
            numbered.entry((kind, number)).or_default().push(event);
        }
    }
    numbered
}

/// Drains: an event begins one, and the record of its ack is a span that begins with its message, a little before or
/// after. Numbers restart with each connection, and messages that remove memory have none.
fn drains(events: &[Event<'_>], end: f64) -> Vec<Drain> {
    let numbered = numbered(events);
    let mut drains: Vec<Drain> = Vec::new();
    for ((kind, number), begun) in &numbered {
        if *kind != "invalidation" {
            continue;
        }
        let all = |kind| numbered.get(&(kind, *number)).map_or(&[][..], Vec::as_slice);
        let mut acks = all("ack").iter().peekable();
        for (index, event) in begun.iter().enumerate() {
            let next = begun.get(index + 1).map_or(f64::MAX, |next| next.at.from);
            while acks.next_if(|ack| ack.at.to < event.at.from).is_some() {}
            let ack = acks.next_if(|ack| ack.at.from < next);
            let at = ack.map_or(Span { from: event.at.from, to: end }, |ack| ack.at);
            let at = Span { from: at.from.min(event.at.from), to: at.to };
            let parked = within(all("parked"), at);
            drains.push(Drain {
                number: *number,
                range: event.word("range"),
                at,
                acked: ack.is_some(),
                parked: parked.map(|event| event.at.from),
                job: parked.and_then(|event| event.number("job")),
                ladder: within(all("ladder"), at).map(|event| event.at.from),
            });
        }
    }
    drains.sort_by(|a, b| a.at.from.total_cmp(&b.at.from));
    drains
}

/// The first of some ordered events that lies within a time.
fn within<'a>(events: &[&'a Event<'a>], time: Span) -> Option<&'a Event<'a>> {
    let first = events.partition_point(|event| event.at.from < time.from);
    events.get(first).copied().filter(|event| event.at.from <= time.to)
}

fn misses(events: &[Event<'_>], end: f64) -> Vec<Miss> {
    let mut open: BTreeMap<u64, usize> = BTreeMap::new();
    let mut misses: Vec<Miss> = Vec::new();
    for event in events {
        let Some(id) = event.id else { continue };
        match event.ph {
            "b" => {
                open.insert(id, misses.len());
                misses.push(Miss { at: Span { from: event.at.from, to: end }, end: String::new() });
            }
            "e" => {
                let miss = open.remove(&id).and_then(|index| misses.get_mut(index));
                if let Some(miss) = miss {
                    miss.at.to = event.at.from;
                    miss.end = event.word("end");
                }
            }
            _ => {}
        }
    }
    misses
}

fn mark(event: &Event<'_>) -> Option<Mark> {
    let job = event.number("job");
    let sign = match event.name {
        "submitted" => Sign::Submitted(job?),
        "ended" => Sign::Ended(job?, event.flag("failed")),
        "answered" => Sign::Fence(event.number("fence")?, event.flag("error")),
        "judged" => Sign::Verdict(job?, event.word("verdict")),
        "fault" => Sign::Fault(job?),
        "revoked" => Sign::Revoked,
        _ => return None,
    };
    Some(Mark { at: event.at.from, sign })
}
