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

/// Boots guests with MirrorGPU as their GPU, and tests their drivers in numbered scenarios.
///
/// Nothing needs root. If QEMU or a guest kernel is missing, it is fetched from Debian and unpacked under .cache in the
/// checkout; nothing is installed. --no-install forbids the fetching. Afterwards no network is needed.
#[derive(Parser)]
#[command(name = "mirrorgpu-vm", version)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run scenarios, without a VM and in real guests.
    ///
    /// The exit code is 0 if all passed, 1 if one failed, 125 if none could be run, and 128 if the rig itself failed or the
    /// command line was wrong. `git bisect run` understands these codes.
    Test(Box<test::Arguments>),
    /// List the scenarios: number, name, promise, and whether each runs without a VM, in real guests, or both.
    List(list::Arguments),
    /// Boot a guest with the device, with its console on this terminal: a shell, or your own root file system.
    Run(Box<shell::Arguments>),
    /// Demonstrate the device: a picture from a guest behind an IOMMU, jobs in every mode, and driver bugs that it reports.
    Demo(Box<demo::Arguments>),
    /// Run the kernel's HMM tests (hmm-tests) on the device.
    ///
    /// They test drivers that mirror the memory of a process. The driver is MirrorGPU's own module, or yours (--module,
    /// --module-source). With --reference it is the kernel's test_hmm, without a device. Modules and tests are built from
    /// source, outside the checkout.
    Hmm(Box<hmm::Arguments>),
    /// Report what this machine has, what is missing, and which scenarios will be skipped because of that.
    Doctor(Box<doctor::Arguments>),
    /// Print the arguments of QEMU and of the back-end, for your own launcher (virtme-ng, syzkaller, LAVA, …).
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
