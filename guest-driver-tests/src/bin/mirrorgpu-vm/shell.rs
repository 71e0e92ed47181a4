//! `mirrorgpu-vm run`: a guest for a person.

use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::rig::options::Options;
use guest_driver_tests::rig::packages;
use guest_driver_tests::rig::run::Rig;
use guest_driver_tests::rig::shell::{self, Wish};
use guest_driver_tests::rig::topology::Topology;
use std::path::PathBuf;

/// What `run` understands.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Topology to boot: the name of a file in qemu-configs, without .cfg.
    #[arg(long, value_name = "NAME", default_value = "intel-iommu-strict")]
    topology: String,
    /// Root file system to boot: a raw ext4 image [default: a busybox shell]. Changes to it are discarded.
    #[arg(long, value_name = "IMAGE")]
    rootfs: Option<PathBuf>,
    #[command(flatten)]
    options: Options,
}

/// Boots the guest.
pub(crate) fn run(arguments: &Arguments) -> Result<u8, RigError> {
    let topology = Topology::named(&arguments.topology)?;
    let rig = Rig::prepare(&arguments.options)?;
    if let Some(reason) = rig.cannot_run(&topology) {
        return Err(RigError::Missing(format!("The topology {} cannot be run: {reason}", topology.name)));
    }
    match &arguments.rootfs {
        Some(disk) => shell::run(&rig, &topology, Wish::Root(disk))?,
        None => {
            let busybox = packages::busybox(&arguments.options)?;
            shell::run(&rig, &topology, Wish::Shell(&busybox))?;
        }
    }
    Ok(0)
}
