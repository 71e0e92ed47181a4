//! `mirrorgpu-vm doctor`: what is here, what is missing, and what will be skipped because of it.

use guest_driver_tests::rig::accel::Accel;
use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::kbuild::Kbuild;
use guest_driver_tests::rig::kernel::Kernel;
use guest_driver_tests::rig::module_source;
use guest_driver_tests::rig::options::Options;
use guest_driver_tests::rig::packages::Tools;
use guest_driver_tests::rig::selftests::Selftests;
use guest_driver_tests::rig::topology::Topology;
use guest_driver_tests::suite::real;
use guest_driver_tests::suite::runner::{self, Shard};
use std::collections::BTreeMap;
use std::process::Command;

/// What `doctor` understands.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    options: Options,
}

/// What the modules of the guest's kernel are for.
const MODULES: [(&str, &str); 6] = [
    ("virtio-gpu", "the stock driver"),
    ("virtio-iommu", "the topology virtio-iommu"),
    ("vfio-pci", "a driver in user space"),
    ("vfio_iommu_type1", "a driver in user space"),
    ("vgem", "fences and buffers of another driver"),
    ("udmabuf", "buffers out of user memory"),
];
/// Where the topology with contexts and rings needs a newer QEMU.
const NEWER_QEMU: u32 = 11;

/// Looks around, and prints what is found. 0: all of the default run can be run.
pub(crate) fn run(arguments: &Arguments) -> Result<u8, RigError> {
    let options = &arguments.options;
    let accel = options.accelerator();
    let kvm = match (accel, std::path::Path::new("/dev/kvm").exists()) {
        (Accel::Kvm, _) => "/dev/kvm can be used".to_owned(),
        (Accel::Tcg, true) => {
            "/dev/kvm is there, but not for us, or cannot run a guest: TCG, about ten times slower".to_owned()
        }
        (Accel::Tcg, false) => "no /dev/kvm: TCG, about ten times slower".to_owned(),
    };
    line(true, "accelerator", &kvm);
    let fetches = !options.no_install && has("apt-get") && has("dpkg-deb");
    line(
        fetches,
        "fetching",
        if fetches {
            "Debian's packages can be fetched and unpacked; nothing is installed"
        } else {
            "not possible, or not wanted: QEMU and the kernel have to be here"
        },
    );
    let (qemu, kernel) = Tools::at_hand(options, 10);
    let newer = Tools::at_hand(options, NEWER_QEMU).0;
    let mut well = match &qemu {
        Ok(Some(qemu)) => line(true, "QEMU", &format!("{} with vhost-user-gpu-pci", qemu.version)),
        Ok(None) => line(fetches, "QEMU", "10 or newer is not here; it would be fetched"),
        Err(error) => line(false, "QEMU", &error.to_string()),
    };
    match newer {
        Ok(Some(qemu)) => {
            line(true, "QEMU 11", &format!("{}: --qemu 11, for contexts, rings and blobs", qemu.version))
        }
        _ => line(fetches, "QEMU 11", "not here; --qemu 11 would fetch it, for contexts, rings and blobs"),
    };
    well &= match &kernel {
        Ok(Some(kernel)) => tell_kernel(kernel),
        Ok(None) => line(fetches, "guest kernel", "not here; Debian's would be fetched"),
        Err(error) => line(false, "guest kernel", &error.to_string()),
    };
    tell_modules(kernel.as_ref().ok().and_then(Option::as_ref), fetches);
    let (cores, memory) = (runner::processors(), runner::memory_mib());
    line(
        true,
        "side by side",
        &format!("{} guests ({cores} processors, {memory} MiB available)", runner::usual_jobs()),
    );
    let found = qemu.ok().flatten().map(|qemu| qemu.major());
    println!();
    for topology in Topology::all()? {
        tell_topology(&topology, found);
    }
    Ok(if well { 0 } else { 2 })
}

fn tell_kernel(kernel: &Kernel) -> bool {
    for (module, what) in MODULES {
        let found = kernel.module_with_dependencies(module).is_ok();
        let text = if found { what } else { "not there: what needs it fails, or is skipped" };
        line(found, &format!("  {module}"), text);
    }
    line(true, "guest kernel", &kernel.release)
}

/// What there is to build modules for the guest's kernel, and the kernel's own tests. Scenarios do without.
fn tell_modules(kernel: Option<&Kernel>, fetches: bool) {
    let lacking = module_source::lacking();
    let with_what = if lacking.is_empty() {
        "gcc and make are here: --module-source, and `hmm`, can build modules".to_owned()
    } else {
        format!("{} not here: --module-source and `hmm` need gcc and make", lacking.join(" and "))
    };
    line(lacking.is_empty(), "module builds", &with_what);
    let Some(kernel) = kernel else { return };
    let release = &kernel.release;
    match Kbuild::at_hand(kernel) {
        Ok(Some(kbuild)) => line(true, "  headers", &kbuild.folder.display().to_string()),
        Ok(None) => line(fetches, "  headers", &format!("of {release} are not here; they would be fetched")),
        Err(error) => line(false, "  headers", &error.to_string()),
    };
    match Selftests::at_hand(kernel) {
        true => line(true, "  hmm-tests", &format!("of {release} are built")),
        false => line(
            fetches,
            "  hmm-tests",
            "not here; `hmm` would fetch the kernel's source (160 MB) and build them",
        ),
    };
    let private = kernel.option("DEVICE_PRIVATE").is_some();
    let text = if private {
        "for `hmm`"
    } else {
        "not in this kernel: `hmm` boots Debian's 7.3 unless told otherwise"
    };
    line(private, "  DEVICE_PRIVATE", text);
}

/// What will be skipped on a machine, and why.
fn tell_topology(topology: &Topology, qemu: Option<u32>) {
    let scenarios = runner::matching(&[], Shard::WHOLE);
    let real: Vec<_> = scenarios.iter().filter(|scenario| scenario.has_real_part()).collect();
    if qemu.is_some_and(|found| found < topology.qemu) {
        println!("{}: all {} scenarios skipped: it needs QEMU {}", topology.name, real.len(), topology.qemu);
        return;
    }
    let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for scenario in &real {
        if let Some(reason) = real::reason_against(scenario, topology) {
            reasons.entry(reason).or_default().push(scenario.number.to_string());
        }
    }
    let skipped: usize = reasons.values().map(Vec::len).sum();
    println!("{}: {} scenarios, {skipped} skipped", topology.name, real.len() - skipped);
    for (reason, numbers) in reasons {
        println!("    {}: {reason}", numbers.join(", "));
    }
}

fn line(fine: bool, what: &str, text: &str) -> bool {
    println!("{} {what:<18} {text}", if fine { "ok     " } else { "missing" });
    fine
}

fn has(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}
