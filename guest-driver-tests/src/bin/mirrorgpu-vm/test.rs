//! `mirrorgpu-vm test`: runs scenarios, tells of each, and ends with a code that `git bisect run` understands.

use crate::output::{self, Output};
use clap::ValueEnum;
use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::options::Options;
use guest_driver_tests::rig::report::say;
use guest_driver_tests::rig::run::Rig;
use guest_driver_tests::rig::topology::Topology;
use guest_driver_tests::soft_guest::use_program;
use guest_driver_tests::suite::report::console::Teller;
use guest_driver_tests::suite::report::svg;
use guest_driver_tests::suite::report::timeline::Timeline;
use guest_driver_tests::suite::report::trace::Trace;
use guest_driver_tests::suite::results::{Case, Results, Score};
use guest_driver_tests::suite::runner::{self, Plan, Shard};
use guest_driver_tests::suite::score::{self, Breadth, Trial};
use guest_driver_tests::suite::soft::SoftPlace;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// Heading of `--help`.
const SELECTION: &str = "Scenarios";

/// What `test` understands.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Scenarios to run: a number, or a part of a name or group; with --score, a part of a bug's name [default: all].
    #[arg(value_name = "PATTERN")]
    patterns: Vec<String>,
    /// Run only in real guests of this topology: the name of a file in qemu-configs, without .cfg (repeatable).
    ///
    /// By default, scenarios run without a VM and on all topologies. A topology that is named here also runs the variations
    /// of scenarios that by default run on a few topologies only.
    #[arg(long, value_name = "NAME", help_heading = SELECTION)]
    topology: Vec<String>,
    /// Run only at this level [default: both].
    #[arg(long, value_enum, help_heading = SELECTION)]
    level: Option<LevelChoice>,
    /// Run only one part of N equal parts of the scenarios: 1/3 is the first of three.
    #[arg(long, value_name = "I/N", default_value = "1/1", value_parser = Shard::parse, help_heading = SELECTION)]
    shard: Shard,
    /// Seed of the random choices that scenarios make.
    #[arg(long, value_name = "NUMBER", default_value_t = 1, help_heading = SELECTION)]
    seed: u64,
    /// Number of guests that run at the same time [default: as many as processors and memory allow].
    #[arg(long, value_name = "COUNT", help_heading = SELECTION)]
    jobs: Option<usize>,
    /// Maximum number of times that a failed scenario is run again, in a fresh guest.
    ///
    /// This is only for scenarios that `list` marks, where a busy host or a race in the guest's kernel may be the cause. One
    /// that passes when it is run again is reported as flaky, with its first failure, and counts as passed. Memory with
    /// wrong contents is a failure at once.
    #[arg(long, value_name = "COUNT", default_value_t = 0, conflicts_with = "score", help_heading = SELECTION)]
    retries: u32,
    /// Seed each known bug, of the device and of drivers, and print which scenarios catch it.
    ///
    /// The exit code is 1 if a bug is not caught. This runs without a VM, and with --topology in real guests too.
    #[arg(long, help_heading = SELECTION)]
    score: bool,
    /// With --score: run all scenarios against each bug, not only those that are expected to catch it.
    #[arg(long, requires = "score", help_heading = SELECTION)]
    all: bool,
    #[command(flatten)]
    output: Output,
    /// Write the timeline of each case that has one to this existing folder, as SVG.
    #[arg(long, value_name = "FOLDER", help_heading = output::RESULTS)]
    timelines: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

/// The levels that can be asked for.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LevelChoice {
    /// Without a VM, in the soft guest: front-end, IOMMU and driver in one process.
    Soft,
    /// In Linux guests on QEMU.
    Real,
}

/// Runs what was asked for.
pub(crate) fn run(arguments: &Arguments) -> Result<u8, RigError> {
    let (begin, started) = (Instant::now(), SystemTime::now());
    if let Some(backend) = &arguments.options.backend {
        use_program(backend);
    }
    let topologies = match arguments.topology.as_slice() {
        [] => Topology::all()?,
        names => names.iter().map(|name| Topology::named(name)).collect::<Result<_, _>>()?,
    };
    let mut results = Results {
        started,
        took: Duration::ZERO,
        environment: Vec::new(),
        cases: Vec::new(),
        score: Vec::new(),
    };
    let teller = Teller::new();
    if arguments.score {
        results.score = score(arguments, &topologies, &mut results.environment)?;
    } else {
        results.cases = cases(arguments, topologies, &mut results.environment, &teller)?;
    }
    results.took = begin.elapsed();
    write_files(arguments, &results)?;
    if arguments.score {
        let away = results.score.iter().filter(|row| !row.is_caught()).count();
        println!("{} passed, {away} failed, 0 skipped", results.score.len() - away);
        return Ok(u8::from(away > 0));
    }
    teller.end(&results);
    Ok(results.exit_code())
}

fn cases(
    arguments: &Arguments,
    topologies: Vec<Topology>,
    environment: &mut Vec<(String, String)>,
    teller: &Teller,
) -> Result<Vec<Case>, RigError> {
    let scenarios = runner::matching(&arguments.patterns, arguments.shard);
    if scenarios.is_empty() && !arguments.patterns.is_empty() {
        let patterns = arguments.patterns.join(", ");
        return Err(RigError::Missing(format!(
            "No scenario matches {patterns}: `mirrorgpu-vm list` prints all of them"
        )));
    }
    let is_wanted = |level| arguments.level.is_none_or(|wanted| wanted == level);
    let has_real = scenarios.iter().any(|scenario| scenario.has_real_part());
    let rig =
        (is_wanted(LevelChoice::Real) && has_real).then(|| Rig::prepare(&arguments.options)).transpose()?;
    environment.push(("seed".into(), arguments.seed.to_string()));
    environment.extend(rig.as_ref().map(Rig::environment).into_iter().flatten());
    let (inject, seed, retries) = (arguments.options.inject.clone(), arguments.seed, arguments.retries);
    let soft = is_wanted(LevelChoice::Soft) && arguments.topology.is_empty();
    let plan = Plan {
        scenarios,
        soft: soft.then_some(SoftPlace { inject, seed, ..SoftPlace::default() }),
        rig: rig.as_ref(),
        topologies,
        all_variations: !arguments.topology.is_empty(),
        seed,
        side_by_side: arguments.jobs.unwrap_or_else(runner::usual_jobs),
        retries,
    };
    teller.begin(plan.cases());
    Ok(plan.run(&|case| teller.case(case)))
}

fn score(
    arguments: &Arguments,
    topologies: &[Topology],
    environment: &mut Vec<(String, String)>,
) -> Result<Vec<Score>, RigError> {
    let breadth = if arguments.all { Breadth::All } else { Breadth::Expected };
    let tell = |row: &Score| {
        let told = match (&row.cannot_show, row.caught_by.as_slice(), row.held.as_slice()) {
            (Some(reason), ..) => format!("cannot show: {reason}"),
            (None, [], _) => "GOT AWAY".to_owned(),
            (None, by, []) => format!("caught by {}", by.join(", ")),
            (None, by, held) => format!("GOT AWAY from {}, caught by {}", held.join(", "), by.join(", ")),
        };
        say(&format!("{:<7} {:<25} {:<20} {told}", row.whose, row.bug, row.place));
    };
    let trial = Trial { seed: arguments.seed, breadth, patterns: &arguments.patterns };
    let mut rows = Vec::new();
    if arguments.level != Some(LevelChoice::Real) {
        rows.extend(score::soft(&trial, &tell));
    }
    if !arguments.topology.is_empty() && arguments.level != Some(LevelChoice::Soft) {
        let rig = Rig::prepare(&arguments.options)?;
        environment.extend(rig.environment());
        for topology in topologies {
            rows.extend(score::real(&rig, topology, &trial, &tell));
        }
    }
    if rows.is_empty() {
        let patterns = arguments.patterns.join(", ");
        return Err(RigError::Missing(format!("No seeded bug matches {patterns} at this level")));
    }
    Ok(rows)
}

fn write_files(arguments: &Arguments, results: &Results) -> Result<(), RigError> {
    for case in &results.cases {
        let Some(folder) = &arguments.timelines else { break };
        if let Some(trace) = case.evidence.trace.as_ref().and_then(Trace::of) {
            let path = folder.join(format!("{}.{}.svg", case.id(), case.place()));
            output::write(&path, &svg::render(&Timeline::of(&trace)))?;
        }
    }
    arguments.output.write(results)
}
