//! `mirrorgpu-vm demo --break BUG`: one bug, made on purpose, and who finds out: a report, and a page with the drain drawn.

use clap::builder::PossibleValuesParser;
use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::options::Options;
use guest_driver_tests::rig::report::say;
use guest_driver_tests::rig::run::Rig;
use guest_driver_tests::rig::topology::Topology;
use guest_driver_tests::rig::workspace;
use guest_driver_tests::suite::driver_bugs::{self, DriverBug};
use guest_driver_tests::suite::real::RealPlace;
use guest_driver_tests::suite::report::html;
use guest_driver_tests::suite::results::{Case, Evidence, Level, Outcome, Results};
use guest_driver_tests::suite::score;
use guest_driver_tests::suite::soft::SoftPlace;
use guest_driver_tests::suite::table;
use std::fs;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

const TOPOLOGY: &str = "intel-iommu-strict";
const PAGE: &str = "mirrorgpu-demo.html";
/// The scenario that makes all bugs of drivers.
const FLAGGED: u32 = 113;
/// A device that loses answers is not waited for as long.
const PATIENCE: Duration = Duration::from_secs(3);

/// The bugs that can be made.
pub(crate) fn names() -> PossibleValuesParser {
    let drivers = driver_bugs::ALL.iter().map(|bug| bug.name);
    PossibleValuesParser::new(drivers.chain(score::device_bugs()).collect::<Vec<_>>())
}

/// Makes it.
pub(crate) fn run(bug: &str, soft: bool, options: &Options) -> Result<u8, RigError> {
    let begin = Instant::now();
    let cases = match driver_bugs::ALL.iter().find(|known| known.name == bug) {
        Some(known) => vec![of_a_driver(known, soft, options)?],
        None => of_the_device(bug, if soft { Level::Soft } else { Level::Real }, options)?,
    };
    cases.iter().for_each(tell);
    let results = Results {
        started: SystemTime::now(),
        took: begin.elapsed(),
        environment: vec![("broken on purpose".into(), bug.into())],
        cases,
        score: Vec::new(),
    };
    let page = workspace().join(PAGE);
    fs::write(&page, html::render(&results))
        .map_err(|source| RigError::Io { what: format!("write {}", page.display()), source })?;
    println!("\nThe same with what the flight recorder saw, drawn: {}", page.display());
    Ok(0)
}

fn of_a_driver(bug: &DriverBug, soft: bool, options: &Options) -> Result<Case, RigError> {
    say(&format!("A driver's bug: {}", bug.what));
    let begin = Instant::now();
    let (topology, outcome, evidence) = if soft || bug.soft_only.is_some() {
        let mut evidence = Evidence::default();
        let made = SoftPlace::default().on_stage(&mut evidence, bug.alone);
        (None, made.into(), evidence)
    } else {
        let (rig, topology) = (Rig::prepare(options)?, Topology::named(TOPOLOGY)?);
        say(&format!(
            "Booting a guest with `{}`; the driver is one in its user space, through VFIO",
            topology.guest
        ));
        let place = vfio_only(&rig, &topology);
        let (outcome, evidence) = place.on_stage(bug.alone);
        (Some(topology.name.clone()), outcome, evidence)
    };
    let level = if topology.is_some() { Level::Real } else { Level::Soft };
    let (number, group, promise) = (FLAGGED, "What an invalidation meant", bug.what);
    Ok(Case {
        number,
        name: bug.name.into(),
        group,
        promise,
        level,
        topology,
        outcome,
        took: begin.elapsed(),
        evidence,
    })
}

fn of_the_device(bug: &str, level: Level, options: &Options) -> Result<Vec<Case>, RigError> {
    let (inject, level, by) = score::counted_on(bug, level);
    say(&format!("A bug of the device: mirrorgpu --inject {}", inject.join(" --inject ")));
    let scenarios: Vec<_> = table::ALL.iter().filter(|scenario| by == Some(scenario.number)).collect();
    if level == Level::Soft {
        let inject = inject.iter().map(|&bug| bug.to_owned()).collect();
        let place = SoftPlace { inject, patience: PATIENCE, ..SoftPlace::default() };
        return Ok(scenarios.into_iter().filter_map(|scenario| place.run(scenario)).collect());
    }
    let (rig, topology) = (Rig::prepare(options)?.misbehaving(inject), Topology::named(TOPOLOGY)?);
    say(&format!("Booting a guest with `{}`", topology.guest));
    let cases = Mutex::new(Vec::new());
    vfio_only(&rig, &topology).run(&scenarios, &|case| {
        if let Ok(mut cases) = cases.lock() {
            cases.push(case);
        }
    });
    Ok(cases.into_inner().unwrap_or_default())
}

fn vfio_only<'r>(rig: &'r Rig, topology: &'r Topology) -> RealPlace<'r> {
    RealPlace { rig, topology, seed: 1, stock: false, variations: false, retries: 0 }
}

fn tell(case: &Case) {
    let text = match &case.outcome {
        Outcome::Passed => "held: the device has found the driver out, and stayed right".to_owned(),
        Outcome::Failed(text) | Outcome::Flaky(text) => {
            format!("FAILED, as it should:\n    {}", text.lines().next().unwrap_or_default())
        }
        Outcome::Skipped(text) => format!("was skipped: {text}"),
        Outcome::Broken(text) => format!("could not be judged: {text}"),
    };
    println!("\n{} at {}: {text}", case.id(), case.place());
    for report in case.evidence.reports.iter().take(1) {
        println!();
        report.lines().for_each(|line| println!("    {line}"));
    }
    case.evidence.notes.iter().for_each(|note| println!("    {note}"));
}
