//! `cargo speed`: how fast the device is, each figure beside a limit or a peer that is measured in the same run.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use guest_driver_tests::bench::{self, Figure};
use guest_driver_tests::soft_guest::Result;
use job_stream::Mode;

/// Measures MirrorGPU in the soft guest, without a virtual machine; takes about a minute.
///
/// These are medians and percentiles of one machine at one time: quote ratios. A target that is missed is said so, and
/// is no failure.
#[derive(Parser)]
#[command(name = "cargo speed", version)]
struct Arguments {
    /// Another vhost-user GPU to compare with, where it can take part; SOCKET stands for the path at which it is to listen
    #[arg(long, value_name = "COMMAND LINE")]
    backend_cmd: Option<String>,
    /// Only figures of these parts. Default: all
    #[arg(long, value_name = "PART", value_enum)]
    only: Vec<Part>,
    /// Write the figures to this file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What is measured together.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Acks of an idle device.
    Acks,
    /// Acks beside a COPY that fills an engine.
    Load,
    /// Commands and jobs a second.
    Rates,
    /// Bytes a second.
    Copy,
    /// A buffer that the device has not seen yet.
    Cold,
    /// INVALIDATEs and other jobs beside many jobs that WAIT.
    Waits,
    /// Memory and time of a device that has nothing to do.
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
