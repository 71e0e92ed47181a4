//! `cargo speed`: how fast the device is, each figure beside a limit or a peer that is measured in the same run.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use guest_driver_tests::bench::{self, Figure};
use guest_driver_tests::soft_guest::Result;
use job_stream::Mode;

/// Measures MirrorGPU in the soft guest, without a virtual machine. Takes about a minute.
///
/// The figures are medians and percentiles of this machine at this time: compare ratios, not absolute numbers. A missed
/// target is printed, and is not a failure (exit code 0).
#[derive(Parser)]
#[command(name = "cargo speed", bin_name = "cargo speed", version)]
struct Arguments {
    /// Command line of another vhost-user GPU to measure too; SOCKET in it stands for the path of the socket to listen on.
    ///
    /// It takes part in the fenced transfers (--only rates).
    #[arg(long, value_name = "COMMAND LINE")]
    backend_cmd: Option<String>,
    /// Measure only this part (repeatable) [default: all].
    #[arg(long, value_name = "PART", value_enum)]
    only: Vec<Part>,
    /// Write the figures to this file too, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is measured together.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Acks of INVALIDATEs on an idle device.
    Acks,
    /// Acks of INVALIDATEs while a COPY keeps an engine busy.
    Load,
    /// Commands and jobs per second.
    Rates,
    /// Bytes per second of a COPY.
    Copy,
    /// Jobs on a buffer of which no translation is cached yet.
    Cold,
    /// INVALIDATEs and other jobs while many jobs WAIT.
    Waits,
    /// Memory and CPU time of an idle device.
    Idle,
}

fn main() -> ExitCode {
    bench::serve_if_asked();
    let arguments = Arguments::parse();
    let figures = match measure(arguments.backend_cmd.as_deref(), &arguments.only) {
        Ok(figures) => figures,
        Err(error) => {
            eprintln!("cargo speed: {error}");
            return ExitCode::FAILURE;
        }
    };
    let Some(path) = arguments.json else { return ExitCode::SUCCESS };
    let written = serde_json::to_string_pretty(&figures).map_err(std::io::Error::other);
    match written.and_then(|text| std::fs::write(&path, text)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cargo speed: Cannot write {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}

/// Measures one after the other, and prints each figure when it is there.
fn measure(peer: Option<&str>, only: &[Part]) -> Result<Vec<Figure>> {
    let is_wanted = |part| only.is_empty() || only.contains(&part);
    let mut figures = Vec::new();
    let mut note = |figure: Figure| {
        println!("{}", figure.row());
        figures.push(figure);
    };
    if is_wanted(Part::Acks) {
        bench::invalidations()?.into_iter().for_each(&mut note);
    }
    if is_wanted(Part::Load) {
        for mode in [Mode::Strict, Mode::Fault, Mode::Preempt, Mode::Fence] {
            note(bench::invalidations_under_load(mode)?);
        }
    }
    if is_wanted(Part::Rates) {
        note(bench::no_op_jobs()?);
        note(bench::transfers(peer)?);
    }
    if is_wanted(Part::Copy) {
        bench::copy()?.into_iter().for_each(&mut note);
    }
    if is_wanted(Part::Cold) {
        for mode in [Mode::Fence, Mode::Strict] {
            note(bench::cold_buffer(mode)?);
        }
    }
    if is_wanted(Part::Waits) {
        bench::invalidations_beside_waits(&mut note)?;
        bench::small_jobs_beside_waits(&mut note)?;
    }
    if is_wanted(Part::Idle) {
        bench::idle()?.into_iter().for_each(&mut note);
    }
    Ok(figures)
}
