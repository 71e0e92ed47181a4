//! The rig: boots a real Linux guest on stock QEMU with the back-end attached, makes it draw, and checks what both
//! sides report. Made of, from the outside in:
//!
//! - tools: `packages`, `debian_kernel`, `store` and `apt` (QEMU and a kernel, found or fetched), `cargo_build` (the agent, the back-end),
//!   `accel` (KVM or not);
//! - modules of one's own: `kbuild` (what builds them for the guest's kernel), `module_source` (a folder that is built), `selftests`
//!   (the kernel's own tests);
//! - the guest's parts: `topology` (a file of qemu-configs), `variation` (what a scenario needs beyond it), `kernel`
//!   (image and modules), `initramfs`;
//! - processes and their sockets: `process`, `json_lines`, `qmp`, `qemu`, `backend_process`, `guest`;
//! - checks: `screen` (pixels), `memory` (the guest's, from outside), `console` (its log), `stats` (the back-end's
//!   counts), `scenario`, `hot_plug`, `jobs`, `stock` (scenarios for the stock driver), `vfio`, `instruments` and
//!   `blame` (what the back-end has reported of a driver's bugs);
//! - `run`: all of these together, one boot per topology; `evidence`: what is collected after a failure; `report`:
//!   what a person reads.
//!
//! It knows nothing of the device's internals, and queries the back-end only through its sockets.

pub mod accel;
mod apt;
pub mod backend_process;
pub mod blame;
pub mod cargo_build;
pub mod console;
mod debian_kernel;
mod disk;
pub mod error;
pub mod evidence;
pub mod guest;
pub(crate) mod hot_plug;
pub mod initramfs;
pub mod instruments;
pub mod jobs;
pub mod json_lines;
pub mod kbuild;
pub mod kernel;
mod memory;
pub mod module_source;
mod modules;
pub mod options;
pub mod packages;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod report;
pub mod run;
pub mod scenario;
pub mod screen;
pub mod selftests;
pub mod shell;
pub mod stats;
pub mod stock;
mod store;
pub mod topology;
pub mod variation;
pub mod vfio;

use std::path::{Path, PathBuf};

/// The checkout's root.
pub fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}
