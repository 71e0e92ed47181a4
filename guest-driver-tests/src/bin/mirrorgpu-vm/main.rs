//! `mirrorgpu-vm`: boots guests against MirrorGPU and puts their drivers through the scenarios.

mod break_bug;
mod demo;
mod doctor;
mod hmm;
mod list;
mod output;
mod qemu_args;
mod shell;
mod test;

use clap::{Parser, Subcommand};
use guest_driver_tests::rig::error::{RIG_FAILED, RigError};
use guest_driver_tests::rig::options;
use std::process::ExitCode;

/// Boots guests against MirrorGPU, and puts their drivers through numbered scenarios.
///
/// Nothing needs root. What is missing, QEMU or a guest kernel, is fetched from Debian and unpacked beside the checkout,
/// unless --no-install forbids it; once it is there, no network is needed.
#[derive(Parser)]
#[command(name = "mirrorgpu-vm", version)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run scenarios; ends with 0 if all held, 1 if one failed, 125 if none could be run, 128 if the rig failed
    Test(Box<test::Arguments>),
    /// List the scenarios, and where each is shown
    List(list::Arguments),
    /// Boot a guest with the device, and give its console to you: a shell, or a root file system of your own
    Run(Box<shell::Arguments>),
    /// Show it: a picture from a guest behind an IOMMU, jobs in every mode, and bugs that are found
    Demo(Box<demo::Arguments>),
    /// Run the kernel's own tests of drivers that mirror a process (hmm-tests) against a driver for the device; with
    /// --reference, against the kernel's own module. Both are built from the kernel's source, outside the checkout
    Hmm(Box<hmm::Arguments>),
    /// Say what is here, what is missing, and what will be skipped because of it
    Doctor(Box<doctor::Arguments>),
    /// Print what your own launcher (virtme-ng, syzkaller, LAVA, …) has to give QEMU and the back-end
    QemuArgs(qemu_args::Arguments),
}

fn main() -> ExitCode {
    let arguments: Arguments = options::parse();
    let done = match arguments.command {
        Verb::Test(arguments) => test::run(&arguments),
        Verb::List(arguments) => list::run(&arguments),
        Verb::Run(arguments) => shell::run(&arguments),
        Verb::Demo(arguments) => demo::run(&arguments),
        Verb::Hmm(arguments) => hmm::run(&arguments),
        Verb::Doctor(arguments) => doctor::run(&arguments),
        Verb::QemuArgs(arguments) => qemu_args::run(&arguments),
    };
    done.map_or_else(|error| failed(&error), ExitCode::from)
}

fn failed(error: &RigError) -> ExitCode {
    eprintln!("mirrorgpu-vm: {error}");
    ExitCode::from(RIG_FAILED)
}
