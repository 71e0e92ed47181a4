//! One boot: back-end, QEMU and agent together, on one topology, in its own folder. Knows how to start them, take the
//! screen, and end them; what happens in between is up to the scenario.

use crate::rig::accel::Accel;
use crate::rig::backend_process::Backend;
use crate::rig::cargo_build;
use crate::rig::console::{self, Forgiven, KernelFault};
use crate::rig::disk;
use crate::rig::error::{Doing, RigError};
use crate::rig::evidence;
use crate::rig::guest::Guest;
use crate::rig::initramfs::Initramfs;
use crate::rig::instruments::{self, Verdicts};
use crate::rig::kernel::Kernel;
use crate::rig::modules::{Modules, Own};
use crate::rig::options::Options;
use crate::rig::packages::Tools;
use crate::rig::process::wait_until;
use crate::rig::qemu::{Device, QemuProcess, RunFiles};
use crate::rig::report::say;
use crate::rig::screen::Screen;
use crate::rig::stats::Stats;
use crate::rig::topology::Topology;
use crate::rig::variation::Variation;
use guest_agent::protocol::{Command, Drawn, Event};
use job_stream::Mode;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;

/// Built in, or a module that nothing names as a dependency (Linux 6.1 of Debian).
const BUS_MODULE: &str = "virtio-pci";
const DISPLAY_MODULE: &str = "virtio-gpu";
/// What a user-space driver needs where there is an IOMMU.
const VFIO_MODULES: [&str; 2] = ["vfio-pci", "vfio_iommu_type1"];
/// How long the screen may lag behind the guest's fences: the display is a separate peer.
const SCREEN_LIMIT: Duration = Duration::from_secs(10);

/// All that runs have in common.
#[derive(Clone)]
pub struct Rig {
    pub(super) tools: Tools,
    pub(super) accel: Accel,
    agent: Vec<u8>,
    /// MirrorGPU's back-end; `None` where QEMU's own device is tested.
    pub(super) backend: Option<PathBuf>,
    /// Its fault injection.
    pub(super) inject: Vec<String>,
    /// The user's own modules.
    modules: Own,
    /// The user's own files.
    initramfs: Option<PathBuf>,
    /// Programs for the guest's folder `programs`, by name.
    programs: Arc<Vec<(String, Vec<u8>)>>,
    /// Whether it can check QEMU: a back-end other than the checkout's may not.
    pub(super) judges: bool,
    timeout: Duration,
    keep: bool,
}

impl Rig {
    /// Finds and builds everything that is needed.
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
        let (inject, judges) = (options.inject.clone(), options.backend.is_none());
        let (modules, initramfs) = (Own::of(options, &tools.kernel)?, options.initramfs.clone());
        let (timeout, keep) = (options.timeout, options.keep);
        Ok(Self {
            tools,
            accel,
            agent,
            backend,
            inject,
            modules,
            initramfs,
            programs: Arc::default(),
            judges,
            timeout,
            keep,
        })
    }

    /// What runs use, by name.
    pub fn environment(&self) -> Vec<(String, String)> {
        let mut all = vec![
            ("QEMU".to_owned(), self.tools.qemu.version.clone()),
            ("accelerator".to_owned(), self.accel.name().to_owned()),
            ("guest kernel".to_owned(), self.tools.kernel.release.clone()),
        ];
        if !self.inject.is_empty() {
            all.push(("injected".to_owned(), self.inject.join(", ")));
        }
        all
    }

    /// The same with a back-end that has this fault injection too.
    #[must_use]
    pub fn misbehaving(&self, inject: &[&str]) -> Self {
        let mut other = self.clone();
        other.inject.extend(inject.iter().map(|&bug| bug.to_owned()));
        other
    }

    /// The same with a program in the guest's folder `programs`, and with modules that are built from source.
    pub fn equipped(
        &self,
        program: (String, Vec<u8>),
        sources: &[PathBuf],
        options: &Options,
    ) -> Result<Self, RigError> {
        let mut other = self.clone();
        other.modules.build(sources, &self.tools.kernel, options)?;
        Arc::make_mut(&mut other.programs).push(program);
        Ok(other)
    }

    /// The guest's kernel.
    pub fn kernel(&self) -> &Kernel {
        &self.tools.kernel
    }

    /// Whether the device is MirrorGPU, and not QEMU's own.
    pub fn has_backend(&self) -> bool {
        self.backend.is_some()
    }

    /// Why a topology cannot be run, if so.
    pub fn cannot_run(&self, topology: &Topology) -> Option<String> {
        let (found, needed) = (&self.tools.qemu.version, topology.qemu);
        if self.tools.qemu.major() < needed {
            return Some(format!("it needs QEMU {needed}, and this is {found}. Give --qemu {needed}"));
        }
        if self.backend.is_none() && !topology.has_display {
            return Some("QEMU's own device cannot stand in for its test device".to_owned());
        }
        let kernel = &self.tools.kernel;
        let missing = topology.modules.iter().find(|module| !kernel.has_module(module))?;
        Some(format!("the kernel {} has no module `{missing}`. Give another with --kernel", kernel.release))
    }

    /// The agent as /init, with the modules that it loads and their order, over the user's own files.
    fn initramfs(&self, topology: &Topology, variation: &Variation) -> Result<Vec<u8>, RigError> {
        let alone = self.initramfs_with(topology, variation, |_| ())?;
        if !variation.second_kernel {
            return Ok(alone);
        }
        let image = &self.tools.kernel.image;
        let kernel = fs::read(image).doing(format!("read {}", image.display()))?;
        self.initramfs_with(topology, variation, |archive| {
            archive.folder("second");
            archive.file("second/kernel", &kernel);
            archive.file("second/initramfs", &alone);
        })
    }

    /// The same with additional files.
    pub(super) fn initramfs_with(
        &self,
        topology: &Topology,
        variation: &Variation,
        more: impl FnOnce(&mut Initramfs),
    ) -> Result<Vec<u8>, RigError> {
        let drivers: &[&str] = if variation.no_driver { &[] } else { &[DISPLAY_MODULE] };
        let vfio = VFIO_MODULES.iter().filter(|_| topology.has_iommu() && !variation.no_driver);
        let others = vfio.chain([&BUS_MODULE]).chain(drivers).chain(variation.modules).copied();
        let wanted: Vec<_> = topology.modules.iter().map(String::as_str).chain(others).collect();
        let modules = Modules::of(&self.tools.kernel, &wanted, &self.modules)?;
        let mut archive = Initramfs::new();
        archive.program("init", &self.agent);
        modules.pack(&mut archive)?;
        if variation.no_driver {
            archive.file("no-display", b"");
        }
        if !self.programs.is_empty() {
            archive.folder("programs");
        }
        for (name, bytes) in &*self.programs {
            archive.program(&format!("programs/{name}"), bytes);
        }
        more(&mut archive);
        let mut bytes = match &self.initramfs {
            Some(path) => fs::read(path).doing(format!("read {}", path.display()))?,
            None => Vec::new(),
        };
        // The kernel unpacks consecutive archives, each starting at a multiple of four bytes.
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(archive.finish());
        Ok(bytes)
    }
}

/// A running guest, with everything that belongs to it.
pub struct Run<'a> {
    /// What it runs on.
    pub topology: &'a Topology,
    /// The kernel's release, as the guest says it.
    pub kernel: String,
    files: RunFiles,
    qemu: QemuProcess,
    guest: Guest,
    backend: Option<Backend>,
    /// How the machine differs from its topology.
    pub variation: Variation,
    /// What in the guest's console was provoked.
    forgiven: Forgiven,
    /// The back-end was killed: its end is no failure.
    backend_is_gone: bool,
    /// Nor are QEMU's complaints about that.
    was_killed: bool,
    /// Dropped last: it removes the files.
    _folder: Option<TempDir>,
}

impl<'a> Run<'a> {
    /// Boots the guest and waits for its agent. A failure shows the ends of the logs.
    pub fn boot(rig: &Rig, topology: &'a Topology) -> Result<Self, RigError> {
        Self::boot_varied(rig, topology, Variation::NONE)
    }

    /// The same on a machine that differs from the topology's.
    pub fn boot_varied(rig: &Rig, topology: &'a Topology, variation: Variation) -> Result<Self, RigError> {
        let folder = TempDir::with_prefix("mirrorgpu-").doing("create a folder for the run")?;
        let files = RunFiles { folder: folder.path().to_owned() };
        let kept = if rig.keep {
            say(&format!("The files of {} stay in {}", topology.name, folder.keep().display()));
            None
        } else {
            Some(folder)
        };
        let started =
            start(rig, (topology, &variation), &files).map_err(|error| evidence::of_logs(error, &files));
        let (qemu, guest, backend, kernel) = started?;
        Ok(Self {
            topology,
            kernel,
            files,
            qemu,
            guest,
            backend,
            variation,
            forgiven: Forgiven::default(),
            backend_is_gone: false,
            was_killed: false,
            _folder: kept,
        })
    }

    /// Sends a request to the agent and waits for its answer.
    pub fn ask(&mut self, what: &str, command: Command) -> Result<Event, RigError> {
        self.guest.send(command)?;
        self.hear(what)
    }

    /// Waits for the agent's answer to an earlier request.
    pub fn hear(&mut self, what: &str) -> Result<Event, RigError> {
        let gone = self.backend_is_gone;
        let (qemu, mut backend) = (&mut self.qemu, self.backend.as_mut().filter(|_| !gone));
        self.guest.event(what, || {
            backend.as_mut().map_or(Ok(()), |backend| backend.check_alive())?;
            qemu.check_alive()
        })
    }

    /// Sends a request to the agent; [`Self::hear`] waits for the answer.
    pub fn tell(&mut self, command: Command) -> Result<(), RigError> {
        self.guest.send(command)
    }

    /// Makes the agent draw, and waits for its counts.
    pub fn draw(&mut self, command: Command) -> Result<Drawn, RigError> {
        self.guest.send(command)?;
        let (qemu, backend) = (&mut self.qemu, &mut self.backend);
        self.guest.drawn(|| check_alive(qemu, backend))
    }

    /// Reboots the guest, and waits until it is back.
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

    /// Sends a command to the back-end's control socket; `None` if it does not know the command, or does not run.
    pub fn control(&mut self, command: &str, arguments: Value) -> Result<Option<Value>, RigError> {
        match &mut self.backend {
            Some(backend) => backend.control(command, arguments),
            None => Ok(None),
        }
    }

    /// Waits until the screen shows what the guest reports to have drawn, byte for byte.
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

    /// Adds the evidence to an error: the logs, a whole oops, the back-end's current work, and a trace.
    pub fn explain(&mut self, error: RigError) -> RigError {
        // A frozen QEMU would keep the rig from ending it.
        let _ = self.qemu.thaw();
        let backend = self.backend.as_mut().filter(|_| !self.backend_is_gone);
        evidence::of_run(error, &self.files, &self.forgiven, backend)
    }

    /// What the back-end has logged so far.
    pub fn backend_log(&self) -> String {
        RunFiles::text(&self.files.backend_log())
    }

    /// Where the files of the run are.
    pub fn folder(&self) -> &Path {
        &self.files.folder
    }

    /// How many accesses of the device the guest's kernel reports as blocked by the IOMMU.
    pub fn faults_logged(&self) -> u64 {
        console::faults(&RunFiles::text(&self.files.console()))
    }

    /// From here on the guest's driver makes mistakes, and the IOMMU may block accesses of the device.
    pub fn expect_faults(&mut self) {
        self.forgiven.faults(self.console().len());
    }

    /// From here on the IOMMU has no reason to stop the device any more.
    pub fn expect_no_more_faults(&mut self) {
        self.forgiven.no_more_faults(self.console().len());
    }

    /// This place of the guest's console, for [`Self::no_troubles_since`] and [`Self::forgive`].
    pub fn console_mark(&self) -> Mark {
        Mark(self.console().len())
    }

    /// The guest's kernel has reported no trouble since `mark`, and there was room to report it.
    pub fn no_troubles_since(&self, mark: Mark) -> Result<(), RigError> {
        disk::has_room(&self.files.folder)?;
        match self.forgiven.troubles(&self.console(), mark.0).as_slice() {
            [] => Ok(()),
            troubles => Err(RigError::check(troubles.join("\n"))),
        }
    }

    /// Lines with `words` that the guest's kernel has written since `mark` were provoked, and are ignored. Returns
    /// how many there are.
    pub fn forgive(&mut self, mark: Mark, words: &'static str) -> usize {
        let log = self.console();
        self.forgiven.lines(&log, mark.0..log.len(), words)
    }

    /// What is done since `mark` provokes a fault of the guest's kernel: its lines are no troubles there.
    pub fn forgive_kernel(&mut self, mark: Mark, fault: &KernelFault) {
        let log = self.console();
        self.forgiven.kernel_fault(&log, &(mark.0..log.len()), fault);
    }

    /// What the guest's kernel has written since `mark`.
    pub fn console_since(&self, mark: Mark) -> String {
        self.console().get(mark.0..).unwrap_or_default().to_owned()
    }

    /// Stops QEMU itself, as a busy host does. Call [`Self::thaw`] before any other request to it.
    pub fn freeze(&mut self) -> Result<(), RigError> {
        self.qemu.freeze()
    }

    /// Lets QEMU continue.
    pub fn thaw(&mut self) -> Result<(), RigError> {
        self.qemu.thaw()
    }

    /// Kills the back-end. From here on its absence is no failure, until it is restarted.
    pub fn kill_backend(&mut self) -> Result<(), RigError> {
        (self.backend_is_gone, self.was_killed) = (true, true);
        self.backend.as_mut().map_or(Ok(()), Backend::kill)
    }

    /// Starts the back-end again where it was; its counts restart.
    pub fn restart_backend(&mut self) -> Result<(), RigError> {
        self.backend.as_mut().map_or(Ok(()), Backend::restart)?;
        self.backend_is_gone = false;
        Ok(())
    }

    fn console(&self) -> String {
        RunFiles::text(&self.files.console())
    }

    /// Ends the guest, QEMU and the back-end, and checks their logs.
    pub fn end(self) -> Result<(), RigError> {
        self.qemu.end()?;
        if !self.backend_is_gone {
            self.backend.map(Backend::end).transpose()?;
        }
        disk::has_room(&self.files.folder)?;
        let log = RunFiles::text(&self.files.console());
        let mut troubles = self.forgiven.troubles(&log, 0);
        if !self.was_killed {
            troubles.extend(console::qemu_troubles(&RunFiles::text(&self.files.qemu_output())));
        }
        if troubles.is_empty() { Ok(()) } else { Err(RigError::check(troubles.join("\n"))) }
    }
}

/// A place of the guest's console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(usize);

type Started = (QemuProcess, Guest, Option<Backend>, String);

fn start(rig: &Rig, machine: (&Topology, &Variation), files: &RunFiles) -> Result<Started, RigError> {
    let initramfs = rig.initramfs(machine.0, machine.1)?;
    let program = rig.backend.as_deref();
    // A device that misbehaves would judge wrongly.
    let judges = rig.judges && rig.inject.is_empty();
    let mut backend = program
        .map(|program| Backend::start(program, &files.folder, &rig.inject, machine.1.backend, judges))
        .transpose()?;
    let device = backend.as_ref().map_or(Device::Reference, |backend| Device::MirrorGpu(backend.socket()));
    let mut qemu = QemuProcess::start(&rig.tools, rig.accel, machine, &device, files, &initramfs)?;
    let mut guest = Guest::connect(&files.agent_port(), rig.timeout, || qemu.check_alive())?;
    let kernel = guest.ready(|| check_alive(&mut qemu, &mut backend))?;
    Ok((qemu, guest, backend, kernel))
}

fn check_alive(qemu: &mut QemuProcess, backend: &mut Option<Backend>) -> Result<(), RigError> {
    // The back-end first: when it dies, QEMU may follow, and the error has to name the cause.
    backend.as_mut().map_or(Ok(()), Backend::check_alive)?;
    qemu.check_alive()
}
