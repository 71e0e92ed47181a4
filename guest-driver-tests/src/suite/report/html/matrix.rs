//! The matrix: a row per scenario, by groups, and a column per place; each cell links to the evidence of the case.

use maud::{Markup, html};

use super::super::super::results::Case;
use super::super::text;
use super::{Entry, Page, sign, slug};

pub(super) fn section(page: &Page<'_>) -> Markup {
    html! {
        section #matrix {
            h2 { "Scenarios and places" }
            p.legend {
                span.passed { span.sign { "✓" } " passed" } span.failed { span.sign { "✗" } " failed" }
                span.flaky { span.sign { "≈" } " flaky: passed when run again" }
                span.broken { span.sign { "!" } " broken: the rig itself failed" }
                span.skipped { span.sign { "–" } " skipped" }
            }
            div.scroll tabindex="0" role="region" aria-label="Scenarios and places" {
                table.matrix {
                    thead { tr {
                        th scope="col" { "Scenario" }
                        @for place in &page.places { th scope="col" { (text::one_line(place)) } }
                    } }
                    @for group in groups(page) { (rows(page, group)) }
                }
            }
        }
    }
}

/// The groups in the order of their first scenario.
fn groups<'a>(page: &Page<'a>) -> Vec<&'a str> {
    let mut groups: Vec<&str> = Vec::new();
    for case in &page.results.cases {
        if !groups.contains(&case.group) {
            groups.push(case.group);
        }
    }
    groups
}

fn rows(page: &Page<'_>, group: &str) -> Markup {
    let mut scenarios: Vec<&Case> = Vec::new();
    for Entry { case, .. } in page.of(|entry| entry.case.group == group) {
        if scenarios.iter().all(|known| known.id() != case.id()) {
            scenarios.push(case);
        }
    }
    html! {
        tbody {
            tr.group { th scope="rowgroup" colspan=(page.places.len() + 1) { span { (group) } } }
            @for scenario in scenarios {
                tr id=(row(&scenario.id())) {
                    th scope="row" {
                        span.number { (format!("{:02}", scenario.number)) } " " span.title { (scenario.name) }
                        span.promise { (scenario.promise) }
                    }
                    @for place in &page.places { td { (cells(page, scenario, place)) } }
                }
            }
        }
    }
}

/// The link target of a scenario's row.
pub(super) fn row(id: &str) -> String {
    format!("scenario-{}", slug(id))
}

fn cells(page: &Page<'_>, scenario: &Case, place: &str) -> Markup {
    let here = |Entry { case, .. }: &Entry<'_>| {
        case.number == scenario.number && case.name == scenario.name && case.place() == place
    };
    html! {
        @for Entry { case, anchor, .. } in page.of(here) {
            @let (word, sign) = sign(&case.outcome);
            a class={ "cell " (word) } href={ "#" (anchor) } title={ (case.id()) " at " (text::one_line(place)) ": " (word) } {
                span.sign aria-hidden="true" { (sign) } span.unseen { (word) }
            }
        }
    }
}
