//! `mirrorgpu-vm demo`: a picture from a real guest behind a vIOMMU, in strict and in lazy mode, with jobs beside it in every
//! mode of the device; then a driver's bugs, made on purpose, and the report that catches them.

use crate::break_bug;
use guest_agent::protocol::{Amount, Drawn};
use guest_driver_tests::rig::blame::{self, Blame};
use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::jobs::{self, ModeRun};
use guest_driver_tests::rig::options::Options;
use guest_driver_tests::rig::report::{self, say};
use guest_driver_tests::rig::run::{Rig, Run};
use guest_driver_tests::rig::scenario;
use guest_driver_tests::rig::stats::Stats;
use guest_driver_tests::rig::topology::Topology;
use guest_driver_tests::rig::workspace;
use guest_driver_tests::soft_guest::{self, demo};
use std::path::PathBuf;

/// The topologies to show, with the name of each column.
const MODES: [(&str, &str); 2] = [("strict", "intel-iommu-strict"), ("lazy", "intel-iommu-lazy")];
/// Where the guest breaks something on purpose, in the end.
const BREAKS: &str = "lazy";
const TRACE: &str = "mirrorgpu-trace.json";
const AMOUNT: Amount = Amount { page_flips: 40, dirty_flushes: 10, cursor_moves: 60 };

/// What `demo` understands.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Run without QEMU, in the soft guest: front-end, IOMMU and driver in one process.
    #[arg(long)]
    soft: bool,
    /// Only seed this bug, of a driver (reuse-in-flight, …) or of the device (drop-zap, …), and show what detects it.
    #[arg(long = "break", value_name = "BUG", value_parser = break_bug::names())]
    breaks: Option<String>,
    #[command(flatten)]
    options: Options,
}

/// What one mode has shown.
struct Shown {
    mode: &'static str,
    picture: PathBuf,
    /// None with QEMU's own device.
    stats: Option<Stats>,
    /// Jobs in each mode of the device.
    jobs: Vec<ModeRun>,
    /// What came of a driver's bugs, where they were made.
    blame: Option<Blame>,
}

/// Shows it.
pub(crate) fn run(arguments: &Arguments) -> Result<u8, RigError> {
    if let Some(backend) = &arguments.options.backend {
        soft_guest::use_program(backend);
    }
    if let Some(bug) = &arguments.breaks {
        return break_bug::run(bug, arguments.soft, &arguments.options);
    }
    let shown = if arguments.soft { soft_guest()? } else { real_guests(&arguments.options)? };
    conclude(&shown)?;
    Ok(0)
}

/// The same without a virtual machine.
fn soft_guest() -> Result<Vec<Shown>, RigError> {
    let soft = |error: soft_guest::Error| RigError::check(format!("The soft guest: {error}"));
    let report = demo::run(&workspace(), &say).map_err(soft)?;
    report
        .modes
        .into_iter()
        .map(|shown| {
            let stats = serde_json::from_value(shown.stats.0).map_err(|error| {
                RigError::check(format!("The back-end's counts are not understood: {error}"))
            })?;
            let (mode, picture) = (shown.mode, shown.picture);
            Ok(Shown { mode, picture, stats: Some(stats), jobs: Vec::new(), blame: None })
        })
        .collect()
}

fn real_guests(options: &Options) -> Result<Vec<Shown>, RigError> {
    let rig = Rig::prepare(options)?;
    MODES.iter().map(|&(mode, topology)| show(&rig, mode, &Topology::named(topology)?)).collect()
}

fn show(rig: &Rig, mode: &'static str, topology: &Topology) -> Result<Shown, RigError> {
    say(&format!("{mode}: booting a guest with `{}`", topology.guest));
    let mut run = Run::boot(rig, topology)?;
    say(&format!("{mode}: Linux {} is up, and draws", run.kernel));
    let shown = draw(&mut run, mode).map_err(|error| run.explain(error))?;
    run.end()?;
    Ok(shown)
}

fn draw(run: &mut Run<'_>, mode: &'static str) -> Result<Shown, RigError> {
    let Drawn { page_flips, dirty_flushes, cursor_moves, .. } = scenario::picture(run, AMOUNT)?;
    say(&format!(
        "{mode}: the guest counted {page_flips} page flips, {dirty_flushes} dirty flushes, {cursor_moves} cursor moves"
    ));
    if run.stats()?.is_some() {
        say(&format!(
            "{mode}: the back-end counted the same; the guest draws on while buffers come and go beside it"
        ));
    }
    let drawn = scenario::draw_under_invalidations(run)?;
    let picture = workspace().join(format!("mirrorgpu-{mode}.png"));
    run.save_picture(&picture)?;
    say(&format!(
        "{mode}: every pixel of the screen is right at frame {}: {}",
        drawn.frame,
        picture.display()
    ));
    let jobs = jobs::through_the_driver(run)?;
    if let [first, ..] = jobs.as_slice() {
        say(&format!(
            "{mode}: {} jobs in each of {} modes, while the guest maps and unmaps beside them: every byte is right",
            first.guest.jobs,
            jobs.len()
        ));
    }
    let stats = run.stats()?;
    let blame = if mode == BREAKS && stats.is_some() {
        say(&format!("{mode}: and now a driver in the guest takes memory away from under its jobs"));
        Some(blame::break_and_ask(run, &workspace().join(TRACE))?)
    } else {
        None
    };
    Ok(Shown { mode, picture, stats, jobs, blame })
}

fn conclude(shown: &[Shown]) -> Result<(), RigError> {
    let with_stats: Vec<_> =
        shown.iter().filter_map(|shown| Some((shown.mode.to_owned(), shown.stats?))).collect();
    if with_stats.is_empty() {
        println!("\nQEMU's own device has no counts to show.");
        return Ok(());
    }
    println!("\n{}\n", table(&with_stats, &OF_ALL));
    for Shown { mode, picture, .. } in shown {
        println!("The screen in {mode} mode: {}", picture.display());
    }
    let strict = with_stats.iter().find(|(mode, _)| *mode == "strict");
    match strict.map_or(0, |(_, stats)| stats.invalidations_with_work_in_flight) {
        0 => println!(
            "In strict mode 0 is the right figure: the driver unmaps a buffer only after the device has answered\n\
             that it is done with it. In lazy mode the guest flushes its whole domain up to 10 ms after an unmap,\n\
             and hits transfers in progress: each of those was drained before its ack."
        ),
        hits => {
            let text = "In strict mode {hits} invalidations found work in flight: a correct driver leaves none. \
                        Either the driver unmaps too early, or the device answers too early";
            return Err(RigError::check(text.replace("{hits}", &hits.to_string())));
        }
    }
    for shown in shown {
        if !shown.jobs.is_empty() {
            println!("\nJobs in {} mode of the guest's IOMMU, mode by mode of the device:\n", shown.mode);
            let columns: Vec<_> = shown.jobs.iter().map(|run| (run.mode.to_string(), *run)).collect();
            println!("{}", table(&columns, &OF_JOBS));
        }
    }
    shown.iter().filter_map(|shown| shown.blame.as_ref()).for_each(Blame::print);
    Ok(())
}

type Figure<T> = (&'static str, fn(&T) -> String);

const OF_ALL: [Figure<Stats>; 9] = [
    ("misses", |stats| stats.misses.to_string()),
    ("updates", |stats| stats.updates.to_string()),
    ("invalidations", |stats| stats.invalidations.to_string()),
    ("  that found work in flight", |stats| stats.invalidations_with_work_in_flight.to_string()),
    ("  ack latency, p50", |stats| report::duration(stats.ack_latency_ns.p50)),
    ("  ack latency, p99", |stats| report::duration(stats.ack_latency_ns.p99)),
    ("  ack latency, maximum", |stats| report::duration(stats.ack_latency_ns.max)),
    ("bytes moved", |stats| report::bytes(stats.bytes_moved)),
    ("guest frozen, in all", |stats| report::duration(stats.frozen_ns)),
];

const OF_JOBS: [Figure<ModeRun>; 12] = [
    ("jobs", |run| run.guest.jobs.to_string()),
    ("buffers that came and went", |run| run.guest.buffers_churned.to_string()),
    ("invalidations", |run| run.backend.invalidations.to_string()),
    ("  that found work in flight", |run| run.backend.invalidations_with_work_in_flight.to_string()),
    ("  acks parked", |run| run.backend.acks_parked.to_string()),
    ("  jobs taken off their engine", |run| run.backend.ladder_evictions.to_string()),
    ("  pins not waited for", |run| run.backend.incoherent_pins.to_string()),
    ("guest frozen", |run| report::duration(run.backend.frozen_ns)),
    ("verdicts: benign", |run| run.verdicts.benign.to_string()),
    ("  moved", |run| run.verdicts.moved.to_string()),
    ("  gone", |run| run.verdicts.gone.to_string()),
    ("  cannot tell", |run| run.verdicts.untold.to_string()),
];

/// A column for each of `columns`, a row for each of `figures`.
fn table<T>(columns: &[(String, T)], figures: &[Figure<T>]) -> String {
    let row = |name: &str, cell: &dyn Fn(&(String, T)) -> String| {
        std::iter::once(name.to_owned()).chain(columns.iter().map(cell)).collect::<Vec<_>>()
    };
    let mut rows = vec![row("", &|(title, _)| title.clone())];
    rows.extend(figures.iter().map(|(name, figure)| row(name, &|(_, column)| figure(column))));
    report::table(&rows)
}
