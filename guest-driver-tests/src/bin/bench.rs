//! `cargo speed`: how fast the device is, each figure beside a limit or a peer that is measured in the same run.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
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
    /// Write the figures to this file, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    bench::serve_if_asked();
    let arguments = Arguments::parse();
    let figures = match measure(arguments.backend_cmd.as_deref()) {
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
fn measure(peer: Option<&str>) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    let mut note = |figure: Figure| {
        println!("{}", figure.row());
        figures.push(figure);
    };
    bench::invalidations()?.into_iter().for_each(&mut note);
    for mode in [Mode::Strict, Mode::Fault, Mode::Preempt, Mode::Fence] {
        note(bench::invalidations_under_load(mode)?);
    }
    note(bench::no_op_jobs()?);
    note(bench::transfers(peer)?);
    note(bench::copy()?);
    for mode in [Mode::Fence, Mode::Strict] {
        note(bench::cold_buffer(mode)?);
    }
    bench::idle()?.into_iter().for_each(&mut note);
    Ok(figures)
}
