//! Results as one page for a person: no other file, no script, no network access. Made of `matrix` (scenarios by
//! places), `cases` (the evidence of each), `score` (bugs by places) and `page.css`. maud does the escaping; nothing
//! here writes markup by itself. The page forbids the browser to run or fetch anything, so output of a guest cannot
//! act.

mod cases;
mod matrix;
mod score;

use std::collections::BTreeMap;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::super::results::{Case, Counts, Outcome, Results};
use super::timeline::Timeline;
use super::trace::Trace;
use super::{places, svg, text, told};

const STYLE: &str = include_str!("page.css");
/// What the browser may do: show the styles and pictures that are in the page.
const POLICY: &str =
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'";

/// The results as a page.
pub fn render(results: &Results) -> String {
    page(&Page::new(results)).into_string()
}

/// What all parts of the page share.
struct Page<'a> {
    results: &'a Results,
    places: Vec<String>,
    entries: Vec<Entry<'a>>,
}

/// A case on the page.
struct Entry<'a> {
    case: &'a Case,
    /// Its name in links.
    anchor: String,
    /// Its parsed trace; parsed once, because it may be long.
    timeline: Option<Timeline>,
}

impl Entry<'_> {
    fn wants_a_look(&self) -> bool {
        self.case.outcome.wants_a_look()
    }
}

impl<'a> Page<'a> {
    fn new(results: &'a Results) -> Self {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        let mut entry = |case: &'a Case| {
            let anchor = slug(&format!("{}--{}", case.id(), case.place()));
            let times = seen.entry(anchor.clone()).and_modify(|times| *times += 1).or_insert(1);
            let anchor = if *times == 1 { anchor } else { format!("{anchor}--{times}") };
            let trace = case.evidence.trace.as_ref().and_then(Trace::of);
            Entry { case, anchor, timeline: trace.map(|trace| Timeline::of(&trace)) }
        };
        Self { results, places: places(results), entries: results.cases.iter().map(&mut entry).collect() }
    }

    fn of(&self, wanted: impl Fn(&Entry<'a>) -> bool) -> impl Iterator<Item = &Entry<'a>> {
        self.entries.iter().filter(move |entry| wanted(entry))
    }
}

/// A name as part of a link.
fn slug(name: &str) -> String {
    name.chars().map(|next| if next.is_ascii_alphanumeric() { next } else { '-' }).collect()
}

/// The name of an outcome, and a sign that distinguishes it without colour.
fn sign(outcome: &Outcome) -> (&'static str, &'static str) {
    let (word, _) = told(outcome);
    let sign = match outcome {
        Outcome::Passed => "✓",
        Outcome::Flaky(_) => "≈",
        Outcome::Failed(_) => "✗",
        Outcome::Skipped(_) => "–",
        Outcome::Broken(_) => "!",
    };
    (word, sign)
}

fn page(page: &Page<'_>) -> Markup {
    let counts = page.results.counts();
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy" content=(POLICY);
                meta name="color-scheme" content="light dark";
                title { (summary(page.results)) " · MirrorGPU guest driver tests" }
                style { (PreEscaped(STYLE)) (PreEscaped(svg::STYLE)) }
            }
            body {
                (header(page, counts))
                main {
                    @if !page.entries.is_empty() {
                        (matrix::section(page))
                        (cases::sections(page))
                    }
                    (score::section(page))
                    @if !page.entries.is_empty() {
                        (cases::skips(page))
                        (cases::passed(page))
                    }
                }
            }
        }
    }
}

/// The result in one line; a run for the score has no cases.
fn summary(results: &Results) -> String {
    let (counts, bugs) = (results.counts(), results.score.len());
    let parts = [
        (counts.failed, "failed"),
        (counts.broken, "broken"),
        (counts.flaky, "flaky"),
        (counts.passed, "passed"),
        (counts.skipped, "skipped"),
    ];
    let told = parts.iter().filter(|(count, _)| *count > 0).map(|(count, word)| format!("{count} {word}"));
    let told = told.collect::<Vec<_>>().join(", ");
    match (told.is_empty(), bugs) {
        (false, _) => told,
        (true, 0) => "Nothing ran".to_owned(),
        (true, _) => {
            let away = results.score.iter().filter(|row| score::got_away(row)).count();
            format!("{away} of {bugs} seeded bugs got away")
        }
    }
}

fn header(page: &Page<'_>, counts: Counts) -> Markup {
    let results = page.results;
    let bad: Vec<&Entry<'_>> = page.of(Entry::wants_a_look).collect();
    html! {
        header {
            p.product { "MirrorGPU guest driver tests" }
            h1 { (summary(results)) }
            div.bar aria-hidden="true" {
                @for (word, count) in [("failed", counts.failed), ("broken", counts.broken),
                    ("flaky", counts.flaky), ("passed", counts.passed), ("skipped", counts.skipped)] {
                    @if count > 0 { span class=(word) style={ "flex-grow:" (count) } {} }
                }
            }
            p.when {
                (humantime::format_rfc3339_seconds(results.started)) ", took " (text::took(results.took))
            }
            @if !bad.is_empty() {
                ul.first {
                    @for Entry { case, anchor, .. } in &bad {
                        @let (word, sign) = sign(&case.outcome);
                        li class=(word) {
                            span.sign aria-hidden="true" { (sign) } " "
                            a href={ "#" (anchor) } { (case.id()) } " " span.place { (text::one_line(&case.place())) }
                            " " span.why { (text::headline(told(&case.outcome).1)) }
                        }
                    }
                }
            }
            dl.environment {
                @for (name, value) in &results.environment {
                    div { dt { (text::one_line(name)) } dd { (text::one_line(value)) } }
                }
            }
            nav aria-label="Parts of this page" {
                @if !page.entries.is_empty() { a href="#matrix" { "Matrix" } }
                @if !bad.is_empty() { a href="#failures" { "Failures" } }
                @if !page.entries.is_empty() { a href="#timelines" { "Timelines" } }
                @if !results.score.is_empty() { a href="#score" { "Score" } }
                @if !page.entries.is_empty() {
                    a href="#skips" { "Skips" }
                    a href="#passed" { "Passed" }
                }
            }
        }
    }
}
