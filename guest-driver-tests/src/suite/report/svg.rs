//! A timeline as a picture: a lane for each engine, one for invalidations, one for misses, one for the traffic
//! between guest and device, one for verdicts; time runs to the right. Knows where things are drawn; which part of a
//! trace they are is decided in `timeline`.

use std::fmt::Write;

use maud::{Markup, PreEscaped, html};

use super::labels::{self, Row};
use super::timeline::{Timeline, micros, name};
use super::trace::{Drain, Engine, Hold, Mark, Sign, Span};

/// The style of a timeline; a page with timelines needs it once.
pub const STYLE: &str = include_str!("timeline.css");

const WIDTH: f64 = 900.0;
const LEFT: f64 = 104.0;
const RIGHT: f64 = 892.0;
/// Height of the headline, of a lane with one row of words, of one with two, and of the axis.
const TOP: f64 = 26.0;
const LANE: f64 = 40.0;
const TALL: f64 = 48.0;
const AXIS: f64 = 26.0;
/// Maximum number of engines that are drawn.
const ENGINES: usize = 4;
/// Maximum number of labels of a lane that are tried.
const WORDS: usize = 64;
/// Spans narrower than this are drawn together, without their own outline and title.
const NARROW: f64 = 6.0;

/// A picture that stands alone, as a document.
pub fn render(line: &Timeline) -> String {
    draw(line, true).into_string()
}

/// A picture for a page that has [`STYLE`].
pub fn inline(line: &Timeline) -> Markup {
    draw(line, false)
}

fn draw(line: &Timeline, alone: bool) -> Markup {
    let canvas = Canvas { line };
    let (lanes, bottom) = canvas.lanes();
    let height = bottom + AXIS;
    let headline: String = line.headline.chars().take((WIDTH / (labels::CHARACTER + 0.2)) as usize).collect();
    html! {
        svg.timeline xmlns="http://www.w3.org/2000/svg" viewBox={ "0 0 " (WIDTH) " " (height) } role="img"
            aria-label=(line.headline) {
            title { (line.headline) }
            desc { (describe(line)) }
            @if alone { style { (PreEscaped(STYLE)) } }
            (canvas.wait(bottom))
            text.headline x="4" y="15" { (headline) }
            (lanes)
            (canvas.axis(bottom))
        }
    }
}

/// Description of the picture, for readers who do not see it.
fn describe(line: &Timeline) -> String {
    let engines =
        line.engines.iter().map(|engine| format!("{}: {} steps. ", engine.name, engine.steps.len()));
    let mut text: String = engines.collect();
    let _ = write!(text, "{} invalidations, {} misses. ", line.drains.len(), line.misses.len());
    for mark in line.marks.iter().filter(|mark| matters(line, mark)).take(12) {
        let _ = write!(text, "{} at {}. ", word(&mark.sign), labels::tick(mark.at, 1.0));
    }
    text + &line.not_shown()
}

/// Whether a mark is about the job that the timeline is about.
fn matters(line: &Timeline, mark: &Mark) -> bool {
    match &mark.sign {
        Sign::Submitted(job) | Sign::Ended(job, _) | Sign::Verdict(job, _) | Sign::Fault(job) => {
            line.job == Some(*job)
        }
        Sign::Revoked => true,
        Sign::Fence(..) => false,
    }
}

fn word(sign: &Sign) -> String {
    match sign {
        Sign::Submitted(job) => format!("job {job} submitted"),
        Sign::Ended(job, false) => format!("job {job} over"),
        Sign::Ended(job, true) => format!("job {job} failed"),
        Sign::Fence(fence, false) => format!("fence {fence}"),
        Sign::Fence(fence, true) => format!("fence {fence} with an error"),
        Sign::Verdict(job, verdict) => format!("{} for job {job}", verdict.to_uppercase()),
        Sign::Fault(job) => format!("fault of job {job}"),
        Sign::Revoked => "memory revoked".to_owned(),
    }
}

struct Canvas<'a> {
    line: &'a Timeline,
}

impl Canvas<'_> {
    fn x(&self, time: f64) -> f64 {
        let Span { from, to } = self.line.window;
        let part = (time.clamp(from, to) - from) / (to - from).max(1e-3);
        round(LEFT + part * (RIGHT - LEFT))
    }

    /// From where to where a span is drawn, at least a pixel wide.
    fn extent(&self, span: Span) -> (f64, f64) {
        let from = self.x(span.from);
        (from, self.x(span.to).max(from + 1.0))
    }

    fn row() -> Row {
        Row::new(LEFT, RIGHT)
    }

    /// All lanes, and where they end.
    fn lanes(&self) -> (Markup, f64) {
        let mut y = TOP;
        let mut lane = |name: &str, height: f64, body: &dyn Fn(f64) -> Markup| {
            let markup = html! {
                path.rule d={ "M0 " (y) "H" (WIDTH) } {}
                text.name x="4" y=(y + 28.0) { (name.chars().take(14).collect::<String>()) }
                (body(y))
            };
            y += height;
            markup
        };
        let markup = html! {
            @for engine in self.line.engines.iter().take(ENGINES) {
                (lane(&engine.name, LANE, &|y| self.engine(engine, y)))
            }
            (lane("invalidations", LANE, &|y| self.drains(y)))
            (lane("misses", LANE, &|y| self.misses(y)))
            (lane("guest", TALL, &|y| self.marks(y, |sign| !is_finding(sign))))
            @if self.line.marks.iter().any(|mark| is_finding(&mark.sign)) {
                (lane("findings", TALL, &|y| self.marks(y, is_finding)))
            }
        };
        (markup, y)
    }

    /// The time in which the ack waited, behind all lanes, and its ends.
    fn wait(&self, bottom: f64) -> Markup {
        let Some(drain) = self.line.subject.and_then(|index| self.line.drains.get(index)) else {
            return html! {};
        };
        let (from, to) = self.extent(drain.at);
        let height = bottom - TOP;
        html! {
            rect.band x=(from) y=(TOP) width=(round(to - from)) height=(height) {}
            path.guide d={ "M" (from) " " (TOP) "v" (height) } {}
            @if drain.acked { path.guide d={ "M" (to) " " (TOP) "v" (height) } {} }
        }
    }

    /// Bars for many spans in one path: those that touch are one.
    fn bars(&self, spans: impl Iterator<Item = Span>, y: f64, height: f64) -> String {
        let mut path = String::new();
        for (from, to, _) in merged(spans.map(|span| self.extent(span)), 0.6) {
            let width = round(to - from);
            let _ = write!(path, "M{from} {y}h{width}v{height}h-{width}z");
        }
        path
    }

    fn engine(&self, engine: &Engine, y: f64) -> Markup {
        let is_wide = |hold: &&Hold| {
            let (from, to) = self.extent(hold.at);
            to - from >= NARROW
        };
        let steps = |ours: bool| {
            let of = engine.steps.iter().filter(move |step| (self.line.job == Some(step.job)) == ours);
            self.bars(of.map(|step| step.at), y + 19.0, 12.0)
        };
        let narrow = engine.holds.iter().filter(|hold| !is_wide(hold)).map(|hold| hold.at);
        html! {
            path.hold d=(self.bars(narrow, y + 16.0, 18.0)) {}
            @for hold in engine.holds.iter().filter(is_wide) {
                @let (from, to) = self.extent(hold.at);
                rect.hold.job[self.line.job == Some(hold.job)].loose[!hold.pinned] x=(from) y=(y + 16.0)
                    width=(round(to - from)) height="18" { title { (told(hold)) } }
            }
            path.step d=(steps(false)) {}
            path.step.job d=(steps(true)) {}
            (self.engine_words(engine, y))
        }
    }

    fn engine_words(&self, engine: &Engine, y: f64) -> Markup {
        let mut row = Self::row();
        let mut holds: Vec<&Hold> = engine.holds.iter().collect();
        let length = |hold: &Hold| hold.at.length();
        holds.sort_by(|a, b| length(b).total_cmp(&length(a)));
        holds.sort_by_key(|hold| self.line.job != Some(hold.job));
        html! {
            @for hold in holds.into_iter().take(WORDS) {
                @let said = match hold.left.as_deref() {
                    Some("done") | None => format!("job {}", hold.job),
                    Some(why) => format!("job {} until {why}", hold.job),
                };
                (word_at(&mut row, self.x(hold.at.from), y + 12.0, &said))
            }
        }
    }

    fn drains(&self, y: f64) -> Markup {
        let mut drains: Vec<&Drain> = self.line.drains.iter().collect();
        let subject = self.line.subject.and_then(|index| self.line.drains.get(index));
        drains.sort_by(|a, b| b.at.length().total_cmp(&a.at.length()));
        drains.sort_by_key(|drain| !subject.is_some_and(|subject| std::ptr::eq(subject, *drain)));
        let (wide, narrow): (Vec<&Drain>, Vec<&Drain>) = drains.iter().partition(|drain| {
            let (from, to) = self.extent(drain.at);
            to - from >= NARROW
        });
        let mut row = Self::row();
        html! {
            path.quick d=(self.bars(narrow.iter().map(|drain| drain.at), y + 16.0, 18.0)) {}
            @for drain in &wide { (self.drain(drain, y + 16.0)) }
            @for drain in wide.iter().chain(&narrow).take(WORDS) {
                (word_at(&mut row, self.x(drain.at.from) + 4.0, y + 12.0, &self.drain_words(drain, subject)))
            }
        }
    }

    fn drain_words(&self, drain: &Drain, subject: Option<&Drain>) -> String {
        match subject.is_some_and(|subject| std::ptr::eq(subject, drain)) {
            true if drain.acked => {
                let evicted = if drain.ladder.is_some() { ", drain timeout" } else { "" };
                format!("{}{evicted}, ack after {}", name(drain), micros(drain.at.length()))
            }
            true => format!("{}, no ack", name(drain)),
            false if drain.number == 0 => "message".to_owned(),
            false => format!("{}", drain.number),
        }
    }

    /// A drain: its outline, and hatched while its ack waits.
    fn drain(&self, drain: &Drain, y: f64) -> Markup {
        let (from, to) = self.extent(drain.at);
        let waits = drain.parked.map(|parked| hatch(self.x(parked), to, y, 18.0));
        let ladder = drain.ladder.map(|ladder| self.x(ladder));
        html! {
            @if let Some(hatch) = waits { path.hatch d=(hatch) {} }
            rect.drain x=(from) y=(y) width=(round(to - from)) height="18" {
                title { (name(drain)) " of " (drain.range) ", " (micros(drain.at.length())) }
            }
            @if let Some(x) = ladder {
                path.bad d={ "M" (x) " " (y) "l5 -5h-10z" } { title { "The drain timeout: jobs are told to leave" } }
            }
        }
    }

    fn misses(&self, y: f64) -> Markup {
        let of = |mapped: bool| {
            let of = self.line.misses.iter().filter(move |miss| (miss.end == "mapped") == mapped);
            of.map(|miss| miss.at)
        };
        let mut row = Self::row();
        let mut clusters = merged(of(true).chain(of(false)).map(|span| self.extent(span)), 3.0);
        clusters.sort_by_key(|(.., count)| std::cmp::Reverse(*count));
        html! {
            path.miss d=(self.bars(of(true), y + 20.0, 10.0)) {}
            path.bad d=(self.bars(of(false), y + 17.0, 16.0)) { title { "not mapped" } }
            @for (from, _, count) in clusters.into_iter().take(32) {
                @let said = if count == 1 { "1 miss".to_owned() } else { format!("{count} misses") };
                (word_at(&mut row, from, y + 12.0, &said))
            }
        }
    }

    /// Marks of a lane, each kind in a path; words above them, and below where there is no room above.
    fn marks(&self, y: f64, wanted: fn(&Sign) -> bool) -> Markup {
        let mut marks: Vec<&Mark> = self.line.marks.iter().filter(|mark| wanted(&mark.sign)).collect();
        let draw = |shape: &str| {
            let mut xs: Vec<f64> = Vec::new();
            for mark in marks.iter().filter(|mark| shape_of(&mark.sign).1 == shape) {
                xs.push(self.x(mark.at));
            }
            xs.dedup();
            xs.iter().map(|x| format!("M{x} {}{shape}", y + 21.0)).collect::<String>()
        };
        let paths = SHAPES.map(|(class, shape)| html! { path class=(class) d=(draw(shape)) {} });
        marks.sort_by_key(|mark| !matters(self.line, mark));
        // Two pages of one job are two marks with one label.
        let mut said: Vec<&Sign> = Vec::new();
        marks.retain(|mark| {
            let is_new = !said.contains(&&mark.sign);
            if is_new && said.len() < WORDS {
                said.push(&mark.sign);
            }
            is_new
        });
        let (mut above, mut below) = (Self::row(), Self::row());
        html! {
            @for path in paths { (path) }
            @for mark in marks.iter().take(WORDS) {
                @let (x, said) = (self.x(mark.at), word(&mark.sign));
                @if let Some(x) = above.place(x - 4.0, &said) {
                    text x=(round(x)) y=(y + 12.0) { (said) }
                } @else {
                    (word_at(&mut below, x - 4.0, y + 40.0, &said))
                }
            }
        }
    }

    fn axis(&self, y: f64) -> Markup {
        let Span { from, to } = self.line.window;
        let (step, ticks) = labels::ticks(from, to);
        let mut row = Self::row();
        let zero = match self.line.zero.as_str() {
            "" => "0".to_owned(),
            what => format!("0 = {what}"),
        };
        let zero = (from <= 0.0).then(|| word_at(&mut row, self.x(0.0), y + 18.0, &zero));
        html! {
            path.rule d={ "M0 " (y) "H" (WIDTH) } {}
            text.name x="4" y=(y + 18.0) { "time" }
            (zero.unwrap_or_default())
            @for time in ticks {
                @let x = self.x(time);
                path.rule d={ "M" (x) " " (y) "v5" } {}
                @let said = labels::tick(time, step);
                @if time != 0.0 { (word_at(&mut row, x - labels::width(&said) / 2.0, y + 18.0, &said)) }
            }
        }
    }
}

/// What is in the lane of verdicts and faults.
fn is_finding(sign: &Sign) -> bool {
    matches!(sign, Sign::Verdict(..) | Sign::Fault(_) | Sign::Revoked)
}

/// Classes and shapes, each drawn from its middle: up, down, down in error, a diamond, a dot.
const SHAPES: [(&str, &str); 6] = [
    ("mark", "m-4 5h8l-4 -9z"),
    ("good", "m-4 -5h8l-4 9z"),
    ("bad", "m-5 -5h10l-5 10z"),
    ("mark", "m-1 -5h2v10h-2z"),
    ("bad", "m0 -6l6 6l-6 6l-6 -6z"),
    ("good", "m-3 -3h6v6h-6z"),
];

fn shape_of(sign: &Sign) -> (&'static str, &'static str) {
    let [up, down, error, over, diamond, dot] = SHAPES;
    match sign {
        Sign::Submitted(_) => up,
        Sign::Fence(_, false) => down,
        Sign::Fence(_, true) | Sign::Ended(_, true) => error,
        Sign::Ended(_, false) => over,
        Sign::Verdict(_, verdict) if verdict == "benign" => dot,
        Sign::Verdict(..) | Sign::Fault(_) | Sign::Revoked => diamond,
    }
}

fn told(hold: &Hold) -> String {
    let how = if hold.pinned { "with a pin" } else { "with a section a step" };
    let left = hold.left.as_ref().map_or("it has not left".to_owned(), |why| format!("left: {why}"));
    format!("Job {} {how}, {}; {left}", hold.job, micros(hold.at.length()))
}

fn round(pixels: f64) -> f64 {
    (pixels * 10.0).round() / 10.0
}

/// A word, if there is room for it.
fn word_at(row: &mut Row, x: f64, y: f64, said: &str) -> Markup {
    match row.place(x, said) {
        Some(x) => html! { text x=(round(x)) y=(y) { (said) } },
        None => html! {},
    }
}

/// Extents that are no farther from each other than `gap`, as one; with how many each is made of.
fn merged(extents: impl Iterator<Item = (f64, f64)>, gap: f64) -> Vec<(f64, f64, usize)> {
    let mut all: Vec<(f64, f64)> = extents.collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut merged: Vec<(f64, f64, usize)> = Vec::new();
    for (from, to) in all {
        match merged.last_mut() {
            Some((_, end, count)) if from <= *end + gap => {
                *end = end.max(to);
                *count += 1;
            }
            _ => merged.push((from, to, 1)),
        }
    }
    merged
}

/// Diagonal strokes in a rectangle.
fn hatch(from: f64, to: f64, y: f64, height: f64) -> String {
    let mut path = String::new();
    let mut x = from;
    while x < to {
        let width = height.min(to - x);
        let _ = write!(path, "M{} {}l{} -{}", round(x), y + height, round(width), round(width));
        x += 7.0;
    }
    path
}
