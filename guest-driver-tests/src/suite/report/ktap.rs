//! Results as KTAP, version 1 (Documentation/dev-tools/ktap.rst of Linux): the format of the kernel's own tools. A
//! subtest per place, indented by two spaces; diagnostics of a test come before its result. Knows that format only.

use std::fmt::Write;
use std::iter;

use super::super::results::{Case, Outcome, Results};
use super::{cases_at, places, text};

/// Lines of a console or a log that are printed for a case that did not pass.
const MOST: usize = 8 << 10;

/// The results as KTAP.
pub fn render(results: &Results) -> String {
    let places = places(results);
    let mut out = format!("KTAP version 1\n1..{}\n", places.len());
    for (name, value) in &results.environment {
        say(&mut out, "", &text::one_line(&format!("{name}: {value}")));
    }
    for (index, place) in places.iter().enumerate() {
        subtest(&mut out, index + 1, place, &cases_at(results, place).collect::<Vec<_>>());
    }
    out
}

fn subtest(out: &mut String, number: usize, place: &str, cases: &[&Case]) {
    let place = name(place);
    put(out, &format!("  KTAP version 1\n  # Subtest: {place}\n  1..{}", cases.len()));
    for (index, case) in cases.iter().enumerate() {
        test(out, index + 1, case);
    }
    let failed = cases.iter().any(|case| case.outcome.is_bad());
    let ran = cases.iter().any(|case| !matches!(case.outcome, Outcome::Skipped(_)));
    put(
        out,
        &match (failed, ran) {
            (true, _) => format!("not ok {number} {place}"),
            (false, true) => format!("ok {number} {place}"),
            (false, false) => format!("ok {number} {place} # SKIP Nothing ran here"),
        },
    );
}

fn test(out: &mut String, number: usize, case: &Case) {
    let id = name(&case.id());
    let evidence = &case.evidence;
    let about = |what: &str| format!("{id}: {what}");
    for (what, value) in &evidence.numbers {
        say(out, "  ", &about(&format!("{what}: {value}")));
    }
    for note in &evidence.notes {
        say(out, "  ", &about(note));
    }
    let took = format!("{:.3} s", case.took.as_secs_f64());
    let result = match &case.outcome {
        Outcome::Passed => format!("ok {number} {id}"),
        Outcome::Skipped(reason) => format!("ok {number} {id} # SKIP {}", text::one_line(reason)),
        Outcome::Flaky(told) => {
            say(out, "  ", &about("flaky: it passed when it was run again"));
            explain(out, case, told);
            format!("ok {number} {id}")
        }
        Outcome::Failed(told) => {
            explain(out, case, told);
            format!("not ok {number} {id}")
        }
        Outcome::Broken(told) => {
            explain(out, case, told);
            format!("not ok {number} {id} # ERROR {}", text::headline(told))
        }
    };
    if !matches!(case.outcome, Outcome::Skipped(_)) {
        say(out, "  ", &about(&format!("took {took}")));
    }
    put(out, &format!("  {}", result.trim_end()));
}

/// The evidence of a test that did not pass, or not at once.
fn explain(out: &mut String, case: &Case, told: &str) {
    let evidence = &case.evidence;
    for part in iter::once(told).chain(evidence.reports.iter().map(String::as_str)) {
        say(out, "  ", &text::clean(part));
    }
    for (whose, said) in [("console", &evidence.console), ("back-end", &evidence.backend_log)] {
        if !said.is_empty() {
            let lines = text::excerpt(said, MOST);
            for line in lines.lines() {
                say(out, "  ", &format!("{whose}: {line}"));
            }
        }
    }
}

/// A name: anything but `#` and a line end.
fn name(name: &str) -> String {
    text::one_line(name).replace('#', "_")
}

/// Diagnostic lines.
fn say(out: &mut String, indent: &str, what: &str) {
    for line in text::clean(what).lines() {
        put(out, format!("{indent}# {line}").trim_end());
    }
}

fn put(out: &mut String, line: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{line}");
}
