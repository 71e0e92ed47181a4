//! How results are presented: on the terminal as they come (`console`), to CI as JUnit XML (`junit`) and KTAP
//! (`ktap`), to a person as one page (`html`), with traces (`trace`) drawn as small pictures (`timeline`, `svg`,
//! `labels`). Knows results and traces; knows nothing of how a scenario is run, nor of where a report is put.
//!
//! Output of a guest or a back-end may contain anything: it goes through `text` before it goes anywhere.

pub mod console;
pub mod html;
pub mod junit;
pub mod ktap;
mod labels;
pub mod svg;
pub mod text;
pub mod timeline;
pub mod trace;

use super::results::{Case, Outcome, Results};

/// The places of the cases: the soft guest first, then topologies as they come.
pub fn places(results: &Results) -> Vec<String> {
    let mut places: Vec<(bool, String)> = Vec::new();
    for case in &results.cases {
        let place = case.place();
        if places.iter().all(|(_, known)| *known != place) {
            places.push((case.topology.is_some(), place));
        }
    }
    places.sort_by_key(|(is_topology, _)| *is_topology);
    places.into_iter().map(|(_, place)| place).collect()
}

/// The cases of a place, in their order.
pub fn cases_at<'a>(results: &'a Results, place: &'a str) -> impl Iterator<Item = &'a Case> {
    results.cases.iter().filter(move |case| case.place() == place)
}

/// The word and the text of an outcome.
pub fn told(outcome: &Outcome) -> (&'static str, &str) {
    match outcome {
        Outcome::Passed => ("passed", ""),
        Outcome::Flaky(text) => ("flaky", text),
        Outcome::Failed(text) => ("failed", text),
        Outcome::Skipped(text) => ("skipped", text),
        Outcome::Broken(text) => ("broken", text),
    }
}
