//! QEMU as a process: its command line for one topology, its sockets and logs, and its end. Knows nothing of what the
//! guest does.

use crate::rig::accel::Accel;
use crate::rig::error::{Doing, RigError};
use crate::rig::packages::Tools;
use crate::rig::process::OwnedProcess;
use crate::rig::qmp::Qmp;
use crate::rig::topology::Topology;
use crate::rig::variation::Variation;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const END_LIMIT: Duration = Duration::from_secs(20);
/// Virtual consoles would draw and blink beside the agent, and its counts could not be compared. And the kernel's
/// check of its timer interrupt panics where a busy host stops the guest for ten ticks.
const GUEST_WORDS: &str = "console=ttyS0 panic=-1 vt.global_cursor_default=0 no_timer_check";

/// Where the files of a run are.
pub struct RunFiles {
    /// The folder of all of them.
    pub folder: PathBuf,
}

impl RunFiles {
    /// The guest's console.
    pub fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// What QEMU printed.
    pub fn qemu_output(&self) -> PathBuf {
        self.folder.join("qemu.log")
    }

    /// What the back-end logged.
    pub fn backend_log(&self) -> PathBuf {
        self.folder.join("backend.log")
    }

    /// The guest's second serial port.
    pub fn agent_port(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// A file's text, if it exists.
    pub fn text(path: &Path) -> String {
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }
}

/// A running QEMU.
pub struct QemuProcess {
    process: OwnedProcess,
    qmp: Qmp,
}

/// The device that the guest draws on.
pub enum Device<'a> {
    /// MirrorGPU, behind this socket.
    MirrorGpu(&'a Path),
    /// QEMU's own.
    Reference,
}

impl QemuProcess {
    /// Starts QEMU, and connects to its control socket.
    pub fn start(
        tools: &Tools,
        accel: Accel,
        machine: (&Topology, &Variation),
        device: &Device<'_>,
        files: &RunFiles,
        initramfs: &[u8],
    ) -> Result<Self, RigError> {
        let mut command = command(tools, accel, machine, device, files, initramfs)?;
        command.args(["-display", "none"]);
        add_ports(&mut command, files);
        command.args(machine.1.qemu).args(&tools.qemu.arguments);
        let output = files.qemu_output();
        let file = File::create(&output).doing(format!("create {}", output.display()))?;
        let second = file.try_clone().doing("duplicate a descriptor")?;
        command.stdin(Stdio::null()).stdout(file).stderr(second);
        let mut process = OwnedProcess::spawn("QEMU", &mut command)?;
        let qmp = Qmp::connect(&files.folder.join("qmp.sock"), || process.check_alive())?;
        Ok(Self { process, qmp })
    }

    /// Fails if it has ended.
    pub fn check_alive(&mut self) -> Result<(), RigError> {
        self.process.check_alive()
    }

    /// Its control socket.
    pub fn qmp(&mut self) -> &mut Qmp {
        &mut self.qmp
    }

    /// Stops the process itself, as a host does that is busy with other work.
    pub fn freeze(&self) -> Result<(), RigError> {
        self.process.signal(libc::SIGSTOP)
    }

    /// Lets it continue.
    pub fn thaw(&self) -> Result<(), RigError> {
        self.process.signal(libc::SIGCONT)
    }

    /// Ends it, and waits for its end.
    pub fn end(mut self) -> Result<(), RigError> {
        self.qmp.quit()?;
        let status = self.process.wait(END_LIMIT)?;
        if status.success() {
            Ok(())
        } else {
            Err(RigError::Ended { name: "QEMU", status: status.to_string() })
        }
    }
}

/// QEMU with the machine, the device, the kernel and its files; without ports, and without the user's arguments.
pub(crate) fn command(
    tools: &Tools,
    accel: Accel,
    machine: (&Topology, &Variation),
    device: &Device<'_>,
    files: &RunFiles,
    initramfs: &[u8],
) -> Result<Command, RigError> {
    let write = |name: &str, bytes: &[u8]| {
        let path = files.folder.join(name);
        fs::write(&path, bytes).doing(format!("write {}", path.display())).map(|()| path)
    };
    let (topology, variation) = machine;
    let topology = variation.memory.map_or_else(|| topology.clone(), |mib| topology.with_memory(mib));
    let topology = if variation.has_nodes { topology.without_memory() } else { topology };
    let config = match device {
        Device::MirrorGpu(_) => topology.config.clone(),
        Device::Reference => topology.reference_config(),
    };
    let (config, initramfs) = (write("topology.cfg", config.as_bytes())?, write("initramfs", initramfs)?);
    let mut command = tools.qemu.command();
    command.args(["-nodefaults", "-no-user-config", "-no-reboot"]);
    command.args(accel.arguments()).arg("-readconfig").arg(config);
    if let Device::MirrorGpu(socket) = device {
        command.arg("-set").arg(format!("chardev.gpu.path={}", socket.display()));
    }
    command.arg("-kernel").arg(&tools.kernel.image).arg("-initrd").arg(initramfs);
    command.arg("-append").arg(format!("{GUEST_WORDS} {} {}", topology.guest, variation.guest));
    Ok(command)
}

/// The console, the agent's port and the control socket.
fn add_ports(command: &mut Command, files: &RunFiles) {
    let socket = |path: PathBuf| format!("path={},server=on,wait=off", path.display());
    command.arg("-chardev").arg(format!("file,id=console,path={}", files.console().display()));
    command.arg("-chardev").arg(format!("socket,id=agent,{}", socket(files.agent_port())));
    command.args(["-serial", "chardev:console", "-serial", "chardev:agent"]);
    command.arg("-chardev").arg(format!("socket,id=qmp,{}", socket(files.folder.join("qmp.sock"))));
    command.args(["-mon", "chardev=qmp,mode=control"]);
}
