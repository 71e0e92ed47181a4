//! `cargo verify`: boots each topology and puts the guest through all scenarios. Ends with one line of counts.

use clap::Parser;
use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::options::{self, Options};
use guest_driver_tests::rig::report::say;
use guest_driver_tests::rig::run::{Rig, Run};
use guest_driver_tests::rig::scenario;
use guest_driver_tests::rig::topology::Topology;
use std::process::ExitCode;

/// Boots a Linux guest on every topology, has it draw, and compares what both sides say.
#[derive(Parser)]
#[command(name = "cargo verify", version)]
struct Arguments {
    /// Only this topology (a file's name in qemu-configs, without its ending); may be given again
    #[arg(long, value_name = "NAME")]
    topology: Vec<String>,
    /// Only this check, after the boot; may be given again
    #[arg(long, value_name = "NAME", value_parser = scenario::NAMES)]
    check: Vec<String>,
    #[command(flatten)]
    options: Options,
}

const AFTER_FAILURE: &str = "they would come after this failure";

#[derive(Default)]
struct Tally {
    passed: usize,
    failed: usize,
    skipped: usize,
}

fn main() -> ExitCode {
    let arguments: Arguments = options::parse();
    match verify(&arguments) {
        Ok(tally) => {
            println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
            ExitCode::from(u8::from(tally.failed > 0))
        }
        Err(error) => {
            eprintln!("cargo verify: {error}");
            ExitCode::FAILURE
        }
    }
}

fn verify(arguments: &Arguments) -> Result<Tally, RigError> {
    let topologies = match arguments.topology.as_slice() {
        [] => Topology::all()?,
        names => names.iter().map(|name| Topology::named(name)).collect::<Result<_, _>>()?,
    };
    let rig = Rig::prepare(&arguments.options)?;
    let mut tally = Tally::default();
    for topology in &topologies {
        verify_topology(&rig, topology, &arguments.check, &mut tally);
    }
    Ok(tally)
}

fn verify_topology(rig: &Rig, topology: &Topology, only: &[String], tally: &mut Tally) {
    let mut scenarios = scenario::of(topology);
    scenarios.retain(|scenario| only.is_empty() || only.iter().any(|name| name == scenario.name));
    if let Some(reason) = rig.cannot_run(topology) {
        return tally.skip(topology, scenarios.len() + 2, &reason);
    }
    let Some(mut run) = tally.note(topology, "boot", Run::boot(rig, topology)) else {
        return tally.skip(topology, scenarios.len() + 1, AFTER_FAILURE);
    };
    for (done, scenario) in (1..).zip(&scenarios) {
        let result = (scenario.run)(&mut run).map_err(|error| run.explain(error));
        if tally.note(topology, scenario.name, result).is_none() {
            // What state the guest is in is anybody's guess: what follows would say nothing.
            return tally.skip(topology, scenarios.len() - done + 1, AFTER_FAILURE);
        }
    }
    tally.note(topology, "clean-logs", run.end());
}

impl Tally {
    fn note<T>(&mut self, topology: &Topology, check: &str, result: Result<T, RigError>) -> Option<T> {
        match result {
            Ok(value) => {
                self.passed += 1;
                say(&format!("{} {check} ... ok", topology.name));
                Some(value)
            }
            Err(error) => {
                self.failed += 1;
                say(&format!("{} {check} ... FAILED\n{error}", topology.name));
                None
            }
        }
    }

    fn skip(&mut self, topology: &Topology, count: usize, reason: &str) {
        self.skipped += count;
        say(&format!("{}: {count} checks skipped: {reason}", topology.name));
    }
}
