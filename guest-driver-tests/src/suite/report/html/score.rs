//! The score: which seeded bug was caught where, and by which scenarios. A bug that was not caught stands out.

use maud::{Markup, html};

use super::super::super::results::Score;
use super::super::text;
use super::{Page, matrix};

pub(super) fn section(page: &Page<'_>) -> Markup {
    let score = &page.results.score;
    if score.is_empty() {
        return html! {};
    }
    let mut places: Vec<&str> = page.places.iter().map(String::as_str).collect();
    places.extend(score.iter().map(|row| row.place.as_str()));
    places.retain(|place| score.iter().any(|row| row.place == *place));
    let mut columns: Vec<&str> = Vec::new();
    for place in places {
        if !columns.contains(&place) {
            columns.push(place);
        }
    }
    let away = score.iter().filter(|row| got_away(row)).count();
    html! {
        section #score {
            h2 { "Score: seeded bugs, and who caught them" }
            p { (score.len()) " seeded, " (score.iter().filter(|row| row.is_caught() && row.cannot_show.is_none()).count()) " caught, "
                (away) " got away." }
            div.scroll tabindex="0" role="region" aria-label="Seeded bugs and places" {
                table.score {
                    thead { tr {
                        th scope="col" { "Bug" }
                        @for place in &columns { th scope="col" { (text::one_line(place)) } }
                    } }
                    @for whose in ["device", "driver"] { (rows(page, whose, &columns)) }
                }
            }
        }
    }
}

pub(super) fn got_away(row: &Score) -> bool {
    !row.is_caught()
}

fn rows(page: &Page<'_>, whose: &str, places: &[&str]) -> Markup {
    let mut bugs: Vec<&str> = Vec::new();
    for row in page.results.score.iter().filter(|row| row.whose == whose) {
        if !bugs.contains(&row.bug.as_str()) {
            bugs.push(&row.bug);
        }
    }
    html! {
        @if !bugs.is_empty() {
            tbody {
                tr.group { th scope="rowgroup" colspan=(places.len() + 1) { span { "Bugs of the " (whose) } } }
                @for bug in bugs { tr {
                    th scope="row" { code { (text::one_line(bug)) } }
                    @for place in places {
                        @let here = |row: &&Score| row.bug == bug && row.whose == whose && row.place == **place;
                        td { @match page.results.score.iter().find(here) {
                            Some(row) => (cell(page, row)),
                            None => span.untried { "not tried" },
                        } }
                    }
                } }
            }
        }
    }
}

fn cell(page: &Page<'_>, row: &Score) -> Markup {
    let has_row = |id: &str| page.results.cases.iter().any(|case| case.id() == id);
    html! {
        @if let Some(why) = &row.cannot_show {
            div.verdict.skipped { span.sign aria-hidden="true" { "–" } " cannot show" }
            small { (text::one_line(why)) }
        } @else if row.caught_by.is_empty() {
            div.verdict.failed { span.sign aria-hidden="true" { "✗" } " got away" }
        } @else {
            div.verdict.passed { span.sign aria-hidden="true" { "✓" } " caught by" }
            @for id in &row.caught_by {
                small { @if has_row(id) { a href={ "#" (matrix::row(id)) } { (id) } } @else { (text::one_line(id)) } }
            }
            @if !row.held.is_empty() {
                div.verdict.failed { span.sign aria-hidden="true" { "✗" } " and not by" }
                @for id in &row.held { small { (text::one_line(id)) } }
            }
        }
    }
}
