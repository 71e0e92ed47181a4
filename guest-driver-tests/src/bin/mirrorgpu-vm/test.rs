//! `mirrorgpu-vm test`: runs scenarios, tells of each, and ends with a code that `git bisect run` understands.

use clap::ValueEnum;
use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::options::Options;
use guest_driver_tests::rig::report::say;
use guest_driver_tests::rig::run::Rig;
use guest_driver_tests::rig::topology::Topology;
use guest_driver_tests::suite::results::{Case, Outcome, Results};
use guest_driver_tests::suite::runner::{self, Plan, Shard};
use guest_driver_tests::suite::soft::SoftPlace;
use std::time::{Instant, SystemTime};

/// What `test` understands.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only scenarios with this number, or whose name or group has this in it
    #[arg(value_name = "PATTERN")]
    patterns: Vec<String>,
    /// Only on this machine (a file's name in qemu-configs, without its ending); may be given again. Default: all
    #[arg(long, value_name = "NAME")]
    topology: Vec<String>,
    /// Only without a VM, or only in real guests. Default: both
    #[arg(long, value_enum)]
    level: Option<LevelChoice>,
    /// Only the i-th of n equal parts of the scenarios, as 1/3
    #[arg(long, value_name = "I/N", default_value = "1/1", value_parser = Shard::parse)]
    shard: Shard,
    /// Decides what is left to chance
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Guests side by side. Default: as many as there are processors and memory for
    #[arg(long, value_name = "COUNT")]
    jobs: Option<usize>,
    #[command(flatten)]
    options: Options,
}

/// The levels that can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LevelChoice {
    /// Without a VM.
    Soft,
    /// In Linux guests.
    Real,
}

/// Runs what was asked for.
pub(crate) fn run(arguments: &Arguments) -> Result<u8, RigError> {
    let (begin, started) = (Instant::now(), SystemTime::now());
    let scenarios = runner::matching(&arguments.patterns, arguments.shard);
    if scenarios.is_empty() {
        let patterns = arguments.patterns.join(", ");
        return Err(RigError::Missing(format!(
            "No scenario is named by {patterns}: see `mirrorgpu-vm list`"
        )));
    }
    let topologies = match arguments.topology.as_slice() {
        [] => Topology::all()?,
        names => names.iter().map(|name| Topology::named(name)).collect::<Result<_, _>>()?,
    };
    let is_wanted = |level| arguments.level.is_none_or(|wanted| wanted == level);
    let rig = if is_wanted(LevelChoice::Real) && scenarios.iter().any(|scenario| scenario.has_real_part()) {
        Some(Rig::prepare(&arguments.options)?)
    } else {
        None
    };
    let (inject, seed) = (arguments.options.inject.clone(), arguments.seed);
    let soft = is_wanted(LevelChoice::Soft) && arguments.topology.is_empty();
    let plan = Plan {
        scenarios,
        soft: soft.then_some(SoftPlace { inject, seed, ..SoftPlace::default() }),
        rig: rig.as_ref(),
        topologies,
        seed,
        side_by_side: arguments.jobs.unwrap_or_else(usual_jobs),
    };
    let cases = plan.run(&tell);
    let results =
        Results { started, took: begin.elapsed(), environment: Vec::new(), cases, score: Vec::new() };
    let counts = results.counts();
    println!(
        "{} passed, {} failed, {} skipped",
        counts.passed,
        counts.failed + counts.broken,
        counts.skipped
    );
    Ok(results.exit_code())
}

fn tell(case: &Case) {
    let (word, text) = match &case.outcome {
        Outcome::Passed => ("ok", ""),
        Outcome::Failed(text) => ("FAILED", text.as_str()),
        Outcome::Skipped(text) => ("skipped", text.as_str()),
        Outcome::Broken(text) => ("BROKEN", text.as_str()),
    };
    say(&format!("{:<26} {:<20} {word} {:.1} s {text}", case.id(), case.place(), case.took.as_secs_f64()));
}

/// As many guests as there are processors, and 1 GiB of memory each.
fn usual_jobs() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
