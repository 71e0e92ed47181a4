//! A guest for a person: a shell on the console, or the person's own root file system. Knows how it is booted; knows
//! nothing of what is done in it.

use crate::rig::backend_process::Backend;
use crate::rig::error::{Doing, RigError};
use crate::rig::qemu::{self, Device, RunFiles};
use crate::rig::report::say;
use crate::rig::run::Rig;
use crate::rig::topology::Topology;
use crate::rig::variation::Variation;
use std::path::Path;
use tempfile::TempDir;

/// What a guest with its root on a disk needs.
const DISK_MODULES: [&str; 2] = ["virtio_blk", "ext4"];
/// The same where ext4 requests its checksum by name, as it does until Linux 6.14.
const OLDER_DISK_MODULES: [&str; 3] = ["virtio_blk", CHECKSUM_MODULE, "ext4"];
const CHECKSUM_MODULE: &str = "crc32c_generic";

/// What the person gets.
#[derive(Clone, Copy)]
pub enum Wish<'a> {
    /// A shell, out of this busybox.
    Shell(&'a [u8]),
    /// The system on this disk, a raw image of an ext4 file system. Writes to it are discarded.
    Root(&'a Path),
}

/// Boots it on this terminal, and waits until it is switched off.
pub fn run(rig: &Rig, topology: &Topology, wish: Wish<'_>) -> Result<(), RigError> {
    let folder = TempDir::with_prefix("mirrorgpu-").doing("create a folder for the run")?;
    let files = RunFiles { folder: folder.path().to_owned() };
    let asks_by_name = rig.tools.kernel.module_with_dependencies(CHECKSUM_MODULE).is_ok();
    let modules: &[&str] = match wish {
        Wish::Shell(_) => &[],
        Wish::Root(_) if asks_by_name => &OLDER_DISK_MODULES,
        Wish::Root(_) => &DISK_MODULES,
    };
    let variation = Variation { modules, ..Variation::NONE };
    let initramfs = rig.initramfs_with(topology, &variation, |archive| match wish {
        Wish::Shell(busybox) => {
            archive.folder("bin");
            archive.program("bin/busybox", busybox);
            archive.program("bin/sh", busybox);
            archive.file("console", b"shell");
        }
        Wish::Root(_) => archive.file("console", b"root ext4"),
    })?;
    let program = rig.backend.as_deref();
    let backend =
        program.map(|program| Backend::start(program, &files.folder, &rig.inject, &[], false)).transpose()?;
    let device = backend.as_ref().map_or(Device::Reference, |backend| Device::MirrorGpu(backend.socket()));
    let mut command =
        qemu::command(&rig.tools, rig.accel, (topology, &variation), &device, &files, &initramfs)?;
    command.args(["-display", "none", "-serial", "mon:stdio"]);
    if let Wish::Root(disk) = wish {
        let drive = format!("file={},if=virtio,format=raw,snapshot=on", disk.display());
        command.arg("-drive").arg(drive);
    }
    command.args(&rig.tools.qemu.arguments);
    say(&format!(
        "The guest's console follows; `exit` or `poweroff` ends it, Ctrl-A X ends QEMU. The back-end's log and control \
         socket are in {}",
        files.folder.display()
    ));
    let status = command.status().doing("run QEMU")?;
    backend.map(Backend::end).transpose()?;
    if status.success() { Ok(()) } else { Err(RigError::Ended { name: "QEMU", status: status.to_string() }) }
}
