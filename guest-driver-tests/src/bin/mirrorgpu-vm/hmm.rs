//! `mirrorgpu-vm hmm`: the kernel's own tests of drivers that mirror a process, against the device.

use crate::output::Output;
use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::options::{KernelChoice, Options};
use guest_driver_tests::rig::report::say;
use guest_driver_tests::rig::run::Rig;
use guest_driver_tests::rig::selftests::Selftests;
use guest_driver_tests::rig::topology::Topology;
use guest_driver_tests::rig::workspace;
use guest_driver_tests::suite::hmm::HmmTests;
use guest_driver_tests::suite::report::console::Teller;
use guest_driver_tests::suite::results::Results;
use std::path::PathBuf;
use std::time::{Instant, SystemTime};

/// The project's own driver.
const MODULE: &str = "guest-driver-tests/kernel";
/// The oldest of Debian's kernels that has memory of devices.
const KERNEL: KernelChoice = KernelChoice::Version(7, 3);

/// What `hmm` understands.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Run only the tests whose name contains this (repeatable) [default: all].
    #[arg(long, value_name = "PATTERN")]
    test: Vec<String>,
    /// Topology to boot: the name of a file in qemu-configs, without .cfg.
    #[arg(long, value_name = "NAME", default_value = "intel-iommu-strict")]
    topology: String,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    options: Options,
}

/// Runs the tests.
pub(crate) fn run(arguments: &Arguments) -> Result<u8, RigError> {
    let (begin, started) = (Instant::now(), SystemTime::now());
    let mut options = arguments.options.clone();
    options.kernel.get_or_insert(KERNEL);
    let topology = Topology::named(&arguments.topology)?;
    let own = own_module(&options)?;
    let rig = Rig::prepare(&options)?;
    if let Some(reason) = rig.cannot_run(&topology) {
        return Err(RigError::Missing(format!("The topology {} cannot be run: {reason}", topology.name)));
    }
    if rig.kernel().option("DEVICE_PRIVATE").is_none() {
        say(
            "This kernel has no memory of devices: tests that need it fail, or are skipped. Debian's 7.3 has it",
        );
    }
    let selftests = Selftests::of(rig.kernel(), options.no_install)?;
    let sources = if options.reference { vec![selftests.module()] } else { own };
    let rig = rig.equipped(selftests.program()?, &sources, &options)?;
    say(&format!("Booting a guest with `{}`, 2 CPUs and 2 GiB", topology.guest));
    let teller = Teller::new();
    let tests =
        HmmTests { rig: &rig, topology: &topology, patterns: &arguments.test, limit: options.timeout };
    let cases = tests.run(&|count| teller.begin(count), &|case| teller.case(case))?;
    let driver = if options.reference { "lib/test_hmm.c, without a device" } else { "for MirrorGPU" };
    let mut environment = rig.environment();
    environment.push(("driver".into(), driver.into()));
    let results = Results { started, took: begin.elapsed(), environment, cases, score: Vec::new() };
    arguments.output.write(&results)?;
    teller.end(&results);
    Ok(results.exit_code())
}

/// The sources of the driver to test, unless the options name one.
fn own_module(options: &Options) -> Result<Vec<PathBuf>, RigError> {
    if options.reference || !options.module.is_empty() || !options.module_source.is_empty() {
        return Ok(Vec::new());
    }
    let folder = workspace().join(MODULE);
    if !folder.join("Kbuild").is_file() {
        let text = "There is no driver in {}: give one that makes /dev/hmm_dmirror0 with --module-source or --module, or \
                    run the kernel's own module with --reference";
        return Err(RigError::Missing(text.replace("{}", &folder.display().to_string())));
    }
    Ok(vec![folder])
}
