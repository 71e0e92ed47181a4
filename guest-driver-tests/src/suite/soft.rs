//! Runs scenarios in the soft guest, each with its own back-end and guest. Knows the back-end's command line; knows
//! nothing of what a scenario does.

use crate::soft_guest::{Backend, GuestConfig};
use crate::suite::excerpt;
use crate::suite::failure::Result;
use crate::suite::machine::soft::SoftMachine;
use crate::suite::results::{Case, Evidence, Level, Outcome};
use crate::suite::stage::{PATIENCE, Stage};
use crate::suite::table::Scenario;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How scenarios run in the soft guest.
#[derive(Clone, Debug)]
pub struct SoftPlace {
    /// Fault injection in the back-end, as `--inject` takes it.
    pub inject: Vec<String>,
    /// Decides the random choices.
    pub seed: u64,
    /// The default time limit for an expected event.
    pub patience: Duration,
}

impl Default for SoftPlace {
    fn default() -> Self {
        Self { inject: Vec::new(), seed: 1, patience: PATIENCE }
    }
}

/// One engine, so that a job that has to wait for another does so on every machine.
const ARGUMENTS: [&str; 5] = ["--allow-incoherent", "--engines", "1", "--drain-timeout", "100ms"];

/// Why a scenario is not shown without a VM, where it is not: known before it is run, so that whoever counts tests can
/// say that it was ignored.
pub fn reason_against(scenario: &Scenario) -> Option<&'static str> {
    scenario.on_stage(Level::Soft).next().is_none().then_some(scenario.elsewhere)
}

/// Whether an outcome makes a test pass. One that has shown nothing does not, whatever its reason; nor does one that held
/// only at a second try.
pub fn must_hold(outcome: Outcome) -> std::result::Result<(), String> {
    match outcome {
        Outcome::Passed => Ok(()),
        Outcome::Failed(text) | Outcome::Broken(text) | Outcome::Flaky(text) => Err(text),
        Outcome::Skipped(reason) => {
            Err(format!("The table of scenarios says that this is shown here, and it was skipped: {reason}"))
        }
    }
}

impl SoftPlace {
    /// Runs a scenario; `None` if it has no part here.
    pub fn run(&self, scenario: &Scenario) -> Option<Case> {
        let parts: Vec<_> = scenario.on_stage(Level::Soft).collect();
        if parts.is_empty() {
            return None;
        }
        let begin = Instant::now();
        let mut evidence = Evidence::default();
        let result = parts.iter().try_for_each(|(_, part)| self.on_stage(&mut evidence, *part));
        Some(Case {
            number: scenario.number,
            name: scenario.name.into(),
            group: scenario.group,
            promise: scenario.promise,
            level: Level::Soft,
            topology: None,
            outcome: result.into(),
            took: begin.elapsed(),
            evidence,
        })
    }

    /// Runs something on a new stage, which has to be empty afterwards.
    pub fn on_stage(
        &self,
        evidence: &mut Evidence,
        act: impl FnOnce(&mut Stage<'_>) -> Result<()>,
    ) -> Result<()> {
        let begin = Instant::now();
        let injected = self.inject.iter().flat_map(|bug| ["--inject", bug.as_str()]);
        let arguments: Vec<&str> = ARGUMENTS.into_iter().chain(injected).collect();
        let backend = Backend::start_recording(&arguments)?;
        let config = GuestConfig { seed: self.seed, ..GuestConfig::headless() };
        let mut machine = SoftMachine::boot(&backend, config)?;
        let mut stage = Stage::new(&mut machine, self.seed).with_patience(self.patience);
        let result = act(&mut stage).and_then(|()| stage.close());
        let (numbers, notes) = stage.take_notes();
        let (reports, trace) = (reports(&mut stage), trace(&backend, begin.elapsed()));
        let backend_log = backend.stderr();
        evidence.add(Evidence { numbers, notes, reports, trace, backend_log, ..Evidence::default() });
        result
    }
}

/// The back-end's reports; none if it has ended, which is reported elsewhere.
fn reports(stage: &mut Stage<'_>) -> Vec<String> {
    let all = stage.control("violations", json!({})).unwrap_or_default();
    let reports = all["violations"].as_array().into_iter().flatten();
    reports.filter_map(|one| one["report"].as_str().map(str::to_owned)).collect()
}

fn trace(backend: &Backend, took: Duration) -> Option<Value> {
    let path = backend.directory().join("trace.json");
    let mut control = backend.control().ok()?;
    control.execute_with("record", json!({ "path": path })).ok()?;
    excerpt::of(serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?, took)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::suite::failure::Failure;
    use crate::suite::table;

    #[test]
    fn a_scenario_that_was_skipped_has_not_passed() {
        assert_eq!(must_hold(Outcome::Passed), Ok(()));
        let skipped = must_hold(Outcome::from(Failure::Skip("it has no place for memory".into())));
        assert!(skipped.is_err_and(|text| text.ends_with("was skipped: it has no place for memory")));
        for bad in [Outcome::Failed("a".into()), Outcome::Broken("a".into()), Outcome::Flaky("a".into())] {
            assert_eq!(must_hold(bad), Err("a".into()));
        }
    }

    #[test]
    fn what_is_not_shown_here_is_known_beforehand_with_its_reason() {
        for scenario in table::ALL {
            let is_shown = scenario.on_stage(Level::Soft).next().is_some();
            assert_eq!(reason_against(scenario).is_none(), is_shown, "{}", scenario.id());
            assert_ne!(reason_against(scenario), Some(""), "{}", scenario.id());
        }
    }
}
