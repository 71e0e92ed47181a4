//! The evidence of each case: message, reports, timeline, numbers, the ends of console and log, the screen. Those
//! that did not pass come first and open; the size of the page is limited, and it says what it leaves out for that
//! reason.

use std::cell::Cell;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use maud::{Markup, html};

use super::super::super::results::{Case, Outcome};
use super::super::timeline::Timeline;
use super::super::{svg, text, told};
use super::{Entry, Page, matrix, sign};

/// Bytes of a message or a report, of a console or a log of a case that did not pass, and of one that did.
const MESSAGE: usize = 16 << 10;
const LONG: usize = 32 << 10;
const SHORT: usize = 2 << 10;
/// Bytes of consoles, logs and pictures in each part of the page.
const MOST: usize = 3 << 19;
/// Bytes of one screen.
const SCREEN: usize = 512 << 10;

/// How a timeline is read.
const HOW: &str = "A timeline shows the drain that mattered most, and time runs to the right from its INVALIDATE. \
    In blue is the job that it waited for: light while the job is on an engine, solid in each of its steps. The hatched \
    bar is the ack that waits; it may end only when the last solid piece has. Below are the misses, what the guest was \
    told (▲ submit, ▼ fence), and what was found (◆).";

/// The size budget that is left for evidence in a part of the page.
struct Room(Cell<usize>);

impl Room {
    fn new() -> Self {
        Self(Cell::new(MOST))
    }

    fn take(&self, bytes: usize) -> bool {
        let left = self.0.get().checked_sub(bytes);
        self.0.set(left.unwrap_or(self.0.get()));
        left.is_some()
    }
}

/// Cases that did not pass, and those that did and have a trace.
pub(super) fn sections(page: &Page<'_>) -> Markup {
    let bad: Vec<&Entry<'_>> = page.of(Entry::wants_a_look).collect();
    let traced = |entry: &Entry<'_>| entry.case.outcome == Outcome::Passed && entry.timeline.is_some();
    let traced: Vec<&Entry<'_>> = page.of(traced).collect();
    let room = Room::new();
    html! {
        @if !bad.is_empty() {
            section #failures {
                h2 { "What did not pass, or not at once" }
                @for entry in bad {
                    article class={ "case " (sign(&entry.case.outcome).0) } id=(entry.anchor) {
                        h3 { (heading(entry.case)) }
                        (evidence(entry, LONG, &room))
                    }
                }
            }
        }
        section #timelines {
            h2 { "Timelines of what passed" }
            p #how { (HOW) }
            @let room = Room::new();
            @if traced.is_empty() { p { "No case that passed has a trace." } }
            @for entry in traced {
                article.case.passed id=(entry.anchor) {
                    h3 { (heading(entry.case)) }
                    (evidence(entry, SHORT, &room))
                }
            }
        }
    }
}

/// Cases that passed and have no trace.
pub(super) fn passed(page: &Page<'_>) -> Markup {
    let room = Room::new();
    let plain = |entry: &Entry<'_>| entry.case.outcome == Outcome::Passed && entry.timeline.is_none();
    html! {
        section #passed {
            h2 { "Passed" }
            @for entry in page.of(plain) {
                details.case.passed id=(entry.anchor) {
                    summary { (heading(entry.case)) }
                    (evidence(entry, SHORT, &room))
                }
            }
        }
    }
}

/// Cases that were not run, by reason.
pub(super) fn skips(page: &Page<'_>) -> Markup {
    let mut reasons: Vec<&str> = Vec::new();
    for case in &page.results.cases {
        if let Outcome::Skipped(reason) = &case.outcome
            && !reasons.contains(&reason.as_str())
        {
            reasons.push(reason);
        }
    }
    html! {
        section #skips {
            h2 { "Skipped, and why" }
            @if reasons.is_empty() { p { "Nothing was skipped." } }
            @for reason in reasons {
                @let same = |entry: &Entry<'_>| told(&entry.case.outcome) == ("skipped", reason);
                div.skip {
                    p { (text::beginning(reason, MESSAGE)) }
                    ul { @for Entry { case, anchor, .. } in page.of(same) {
                        li id=(anchor) { (case.id()) " " span.place { (text::one_line(&case.place())) } }
                    } }
                }
            }
        }
    }
}

fn heading(case: &Case) -> Markup {
    let (word, sign) = sign(&case.outcome);
    html! {
        span.sign aria-hidden="true" { (sign) } span.unseen { (word) ": " }
        span.id { (case.id()) } " " span.place { (text::one_line(&case.place())) } " "
        span.took { (text::took(case.took)) }
    }
}

fn evidence(entry: &Entry<'_>, most: usize, room: &Room) -> Markup {
    let Entry { case, timeline, .. } = entry;
    let evidence = &case.evidence;
    let (_, message) = told(&case.outcome);
    let bad = entry.wants_a_look();
    html! {
        p.promise { (case.promise) " " a.back href={ "#" (matrix::row(&case.id())) } { "to the matrix" } }
        @if !message.is_empty() { (self::message(message, room)) }
        @if let Some(line) = timeline { (figure(line, &timeline_of(case), room)) }
        (reports(&evidence.reports, bad, room))
        @if !evidence.numbers.is_empty() {
            dl.numbers { @for (name, value) in &evidence.numbers {
                div { dt { (text::one_line(name)) } dd { (text::one_line(value)) } }
            } }
        }
        @if !evidence.notes.is_empty() {
            ul.notes { @for note in &evidence.notes { li { (text::headline(note)) } } }
        }
        (said("Console", &evidence.console, most, bad, room))
        (said("Back-end log", &evidence.backend_log, most, bad, room))
        @if let Some(screen) = &evidence.screenshot { (screenshot(case, screen, room)) }
    }
}

fn message(message: &str, room: &Room) -> Markup {
    let whole = text::beginning(message, MESSAGE);
    let fits = room.take(whole.len());
    html! {
        pre.message { (if fits { whole } else { text::headline(message) }) }
        @if !fits { (left_out("The rest of the message")) }
    }
}

fn reports(reports: &[String], open: bool, room: &Room) -> Markup {
    html! {
        @if !reports.is_empty() {
            details.said open[open] {
                summary { "Reports of the back-end: " (reports.len()) }
                @for report in reports {
                    @if room.take(report.len().min(MESSAGE)) {
                        pre.report tabindex="0" { (text::beginning(report, MESSAGE)) }
                    } @else { (left_out("A report")) }
                }
            }
        }
    }
}

fn timeline_of(case: &Case) -> String {
    format!("Timeline of {} at {}", case.id(), text::one_line(&case.place()))
}

fn figure(line: &Timeline, label: &str, room: &Room) -> Markup {
    let picture = svg::inline(line);
    html! {
        @if room.take(picture.0.len()) {
            figure {
                div.scroll tabindex="0" role="region" aria-label=(label) { (picture) }
                figcaption { (line.not_shown()) " " a href="#how" { "How to read this" } }
            }
        } @else { (left_out("The timeline")) }
    }
}

fn said(whose: &str, what: &str, most: usize, open: bool, room: &Room) -> Markup {
    let end = text::excerpt(what, most);
    html! {
        @if what.is_empty() {} @else if room.take(end.len()) {
            details.said open[open] {
                summary { (whose) }
                pre tabindex="0" { (end) }
            }
        } @else { (left_out(whose)) }
    }
}

fn screenshot(case: &Case, screen: &[u8], room: &Room) -> Markup {
    html! {
        @if screen.len() <= SCREEN && room.take(screen.len() / 3 * 4) {
            details.said open {
                summary { "Screen" }
                img src={ "data:image/png;base64," (STANDARD.encode(screen)) }
                    alt={ "The screen at the end of " (case.id()) };
            }
        } @else { (left_out("The screen")) }
    }
}

fn left_out(what: &str) -> Markup {
    html! { p.left-out { (what) " is left out: the page would become too large." } }
}
