//! One boot: back-end, QEMU and agent together, on one topology, in a folder of its own. Knows how to bring them up,
//! take the screen, and end them; what is to be done in between is a scenario's business.

use crate::rig::accel::Accel;
use crate::rig::backend_process::Backend;
use crate::rig::cargo_build;
use crate::rig::console;
use crate::rig::error::{Doing, RigError};
use crate::rig::guest::Guest;
use crate::rig::initramfs::Initramfs;
use crate::rig::instruments::{self, Verdicts};
use crate::rig::options::Options;
use crate::rig::packages::Tools;
use crate::rig::process::wait_until;
use crate::rig::qemu::{Device, QemuProcess, RunFiles};
use crate::rig::report::say;
use crate::rig::screen::Screen;
use crate::rig::stats::Stats;
use crate::rig::topology::Topology;
use guest_agent::protocol::{Command, Drawn, Event};
use job_stream::Mode;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const DISPLAY_MODULE: &str = "virtio-gpu";
/// What a driver in user space needs where there is an IOMMU.
const VFIO_MODULES: [&str; 2] = ["vfio-pci", "vfio_iommu_type1"];
/// The console of the kernel's own would draw beside the agent. And not every IOMMU here can remap interrupts, but the
/// agent's driver uses none.
const MODULE_PARAMETERS: [(&str, &str); 2] =
    [("drm_kms_helper", "fbdev_emulation=0"), ("vfio_iommu_type1", "allow_unsafe_interrupts=1")];
/// How long the screen may lag behind the guest's fences: the display is a peer of its own.
const SCREEN_LIMIT: Duration = Duration::from_secs(10);
const LINES_OF_EVIDENCE: usize = 25;

/// All that runs have in common.
pub struct Rig {
    tools: Tools,
    accel: Accel,
    agent: Vec<u8>,
    /// Our back-end; none where QEMU's own device is to be tested.
    backend: Option<PathBuf>,
    /// How it is to misbehave.
    inject: Vec<String>,
    /// Whether it judges QEMU: it does, unless it misbehaves, or is another than the checkout's, which may not know how.
    judges: bool,
    timeout: Duration,
    keep: bool,
}

impl Rig {
    /// Finds and builds all that is needed.
    pub fn prepare(options: &Options) -> Result<Self, RigError> {
        let tools = Tools::find(options)?;
        say("Building the guest's agent and the back-end");
        let agent = cargo_build::agent()?;
        let backend = match (&options.backend, options.reference) {
            (_, true) => None,
            (Some(program), false) => Some(program.clone()),
            (None, false) => Some(cargo_build::backend()?),
        };
        let accel = options.accelerator();
        let (version, release) = (&tools.qemu.version, &tools.kernel.release);
        say(&format!("QEMU {version} ({}), guest kernel {release}", accel.name()));
        if !options.inject.is_empty() {
            say(&format!("The back-end is told to misbehave: {}", options.inject.join(", ")));
        }
        let judges = options.inject.is_empty() && options.backend.is_none();
        let (inject, timeout, keep) = (options.inject.clone(), options.timeout, options.keep);
        Ok(Self { tools, accel, agent, backend, inject, judges, timeout, keep })
    }

    /// Why a topology cannot be run, if so.
    pub fn cannot_run(&self, topology: &Topology) -> Option<String> {
        let (found, needed) = (&self.tools.qemu.version, topology.qemu);
        if self.tools.qemu.major() < needed {
            return Some(format!("it needs QEMU {needed}, and this is {found}. Give --qemu {needed}"));
        }
        let stands_in = self.backend.is_some() || topology.has_display;
        (!stands_in).then(|| "QEMU's own device cannot stand in for its test device".to_owned())
    }

    /// The agent as /init, with the modules that it loads and their order.
    fn initramfs(&self, topology: &Topology) -> Result<Vec<u8>, RigError> {
        let mut archive = Initramfs::new();
        archive.program("init", &self.agent);
        archive.folder("modules");
        let mut list = String::new();
        let vfio = VFIO_MODULES.iter().copied().filter(|_| topology.has_iommu());
        let wanted = topology.modules.iter().map(String::as_str).chain(vfio).chain([DISPLAY_MODULE]);
        for module in wanted {
            for path in self.tools.kernel.module_with_dependencies(module)? {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let bytes = fs::read(&path).doing(format!("read {}", path.display()))?;
                let stem = name.split('.').next().unwrap_or_default().replace('-', "_");
                let parameters = MODULE_PARAMETERS.iter().find(|(module, _)| *module == stem);
                list.push_str(&format!("{name} {}\n", parameters.map_or("", |(_, words)| words)));
                archive.file(&format!("modules/{name}"), &bytes);
            }
        }
        archive.file("modules/list", list.as_bytes());
        Ok(archive.finish())
    }
}

/// A guest that is up, with all that belongs to it.
pub struct Run<'a> {
    /// What it runs on.
    pub topology: &'a Topology,
    /// The kernel's release, as the guest says it.
    pub kernel: String,
    files: RunFiles,
    qemu: QemuProcess,
    guest: Guest,
    backend: Option<Backend>,
    /// From where on the guest's console may tell of faults that the IOMMU has stopped: the driver makes them.
    faults_from: Option<usize>,
    /// Dropped last: it removes the files.
    _folder: Option<TempDir>,
}

impl<'a> Run<'a> {
    /// Boots the guest and waits for its agent. A failure shows the ends of the logs.
    pub fn boot(rig: &Rig, topology: &'a Topology) -> Result<Self, RigError> {
        let folder = TempDir::with_prefix("mirrorgpu-").doing("create a folder for the run")?;
        let files = RunFiles { folder: folder.path().to_owned() };
        let kept = if rig.keep {
            say(&format!("The files of {} stay in {}", topology.name, folder.keep().display()));
            None
        } else {
            Some(folder)
        };
        let started = start(rig, topology, &files).map_err(|error| with_evidence(error, &files));
        let (qemu, guest, backend, kernel) = started?;
        Ok(Self { topology, kernel, files, qemu, guest, backend, faults_from: None, _folder: kept })
    }

    /// Makes a request of the agent and waits for its answer.
    pub fn ask(&mut self, what: &str, command: Command) -> Result<Event, RigError> {
        self.guest.send(command)?;
        let (qemu, backend) = (&mut self.qemu, &mut self.backend);
        self.guest.event(what, || check_alive(qemu, backend))
    }

    /// Has the agent draw, and waits for its counts.
    pub fn draw(&mut self, command: Command) -> Result<Drawn, RigError> {
        self.guest.send(command)?;
        let (qemu, backend) = (&mut self.qemu, &mut self.backend);
        self.guest.drawn(|| check_alive(qemu, backend))
    }

    /// Has the guest reboot, and waits until it is back.
    pub fn reboot(&mut self) -> Result<(), RigError> {
        self.qemu.qmp().allow_reboot(true)?;
        self.guest.send(Command::Reboot)?;
        let (qemu, backend) = (&mut self.qemu, &mut self.backend);
        self.guest.ready(|| check_alive(qemu, backend))?;
        self.qemu.qmp().allow_reboot(false)
    }

    /// QEMU itself.
    pub fn qemu(&mut self) -> &mut QemuProcess {
        &mut self.qemu
    }

    /// The back-end's counts; none with QEMU's own device.
    pub fn stats(&mut self) -> Result<Option<Stats>, RigError> {
        self.backend.as_mut().map(Backend::stats).transpose()
    }

    /// The back-end's verdicts so far on jobs of `mode`; none with QEMU's own device, or with a back-end that gives
    /// none.
    pub fn verdicts(&mut self, mode: Mode) -> Result<Verdicts, RigError> {
        let stats = self.backend.as_mut().map(Backend::raw_stats).transpose()?;
        Ok(stats.map(|stats| instruments::verdicts(&stats, mode)).unwrap_or_default())
    }

    /// Makes a request of the back-end's control socket; nothing if it does not know the command, or is not there.
    pub fn control(&mut self, command: &str, arguments: Value) -> Result<Option<Value>, RigError> {
        match &mut self.backend {
            Some(backend) => backend.control(command, arguments),
            None => Ok(None),
        }
    }

    /// Waits until the screen shows what the guest says it has drawn, byte for byte.
    pub fn wait_for_picture(&mut self, drawn: &Drawn) -> Result<(), RigError> {
        let dump = self.files.folder.join("screen.ppm");
        let expected = Screen::expected(drawn);
        let mut difference = None;
        let waited = wait_until("The picture on the screen", SCREEN_LIMIT, || {
            self.qemu.qmp().screendump(&dump, "ppm")?;
            difference = Screen::read(&dump)?.difference(&expected);
            Ok(difference.is_none())
        });
        match (waited, difference) {
            (Err(RigError::Late { .. }), Some(text)) => Err(RigError::check(format!(
                "The screen is not the picture of frame {}: {text}",
                drawn.frame
            ))),
            (waited, _) => waited,
        }
    }

    /// Writes the screen to `path` as a PNG.
    pub fn save_picture(&mut self, path: &Path) -> Result<(), RigError> {
        self.qemu.qmp().screendump(path, "png")
    }

    /// Adds the ends of the logs to an error.
    pub fn explain(&self, error: RigError) -> RigError {
        with_evidence(error, &self.files)
    }

    /// From here on the guest's driver makes mistakes, and the IOMMU may stop the device where it is sent astray.
    pub fn expect_faults(&mut self) {
        self.faults_from = Some(RunFiles::text(&self.files.console()).len());
    }

    /// Ends the guest, QEMU and the back-end, and judges their logs.
    pub fn end(self) -> Result<(), RigError> {
        self.qemu.end()?;
        self.backend.map(Backend::end).transpose()?;
        let log = RunFiles::text(&self.files.console());
        let (before, after) =
            log.split_at_checked(self.faults_from.unwrap_or(log.len())).unwrap_or((&log, ""));
        let mut troubles = console::troubles(before);
        troubles.extend(console::troubles_but_faults(after));
        troubles.extend(console::qemu_troubles(&RunFiles::text(&self.files.qemu_output())));
        if troubles.is_empty() { Ok(()) } else { Err(RigError::check(troubles.join("\n"))) }
    }
}

type Started = (QemuProcess, Guest, Option<Backend>, String);

fn start(rig: &Rig, topology: &Topology, files: &RunFiles) -> Result<Started, RigError> {
    let initramfs = rig.initramfs(topology)?;
    let program = rig.backend.as_deref();
    let mut backend =
        program.map(|program| Backend::start(program, &files.folder, &rig.inject, rig.judges)).transpose()?;
    let device = backend.as_ref().map_or(Device::Reference, |backend| Device::MirrorGpu(backend.socket()));
    let mut qemu = QemuProcess::start(&rig.tools, rig.accel, topology, &device, files, &initramfs)?;
    let mut guest = Guest::connect(&files.agent_port(), rig.timeout, || qemu.check_alive())?;
    let kernel = guest.ready(|| check_alive(&mut qemu, &mut backend))?;
    Ok((qemu, guest, backend, kernel))
}

fn check_alive(qemu: &mut QemuProcess, backend: &mut Option<Backend>) -> Result<(), RigError> {
    // The back-end first: when it dies, QEMU may follow, and the cause is what is to be named.
    backend.as_mut().map_or(Ok(()), Backend::check_alive)?;
    qemu.check_alive()
}

fn with_evidence(error: RigError, files: &RunFiles) -> RigError {
    let logs = [
        ("The guest's console", files.console()),
        ("QEMU's output", files.qemu_output()),
        ("The back-end's log", files.backend_log()),
    ];
    let mut text = error.to_string();
    for (name, path) in logs {
        let log = RunFiles::text(&path);
        if log.trim().is_empty() {
            text.push_str(&format!("\n--- {name} is empty"));
        } else {
            text.push_str(&format!("\n--- {name} ends with:\n{}", console::end(&log, LINES_OF_EVIDENCE)));
        }
    }
    RigError::Check(text)
}
