//! What an init does: mounts, modules, driver binding, reboot. Knows nothing of what the drivers do.

use crate::error::{AgentError, Doing};
use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// The kernel's module loader decompresses (linux/module.h: MODULE_INIT_COMPRESSED_FILE).
const COMPRESSED: libc::c_int = 4;
/// How the numbers of virtio-gpu stand in sysfs (virtio 1.3, 4.1.2.1).
const VIRTIO: &str = "0x1af4";
const VIRTIO_GPU: &str = "0x1050";
/// In a guest with this file no driver of a display is loaded.
const NO_DISPLAY: &str = "/no-display";
const CARD_WAIT: Duration = Duration::from_secs(20);

/// Mounts what the agent looks at.
pub(crate) fn mount_all() -> Result<(), AgentError> {
    for (kind, at) in [(c"proc", c"/proc"), (c"sysfs", c"/sys"), (c"devtmpfs", c"/dev")] {
        let at_path = at.to_string_lossy();
        fs::create_dir_all(&*at_path).doing(format!("create {at_path}"))?;
        mount(kind, at).doing(format!("mount {at_path}"))?;
    }
    Ok(())
}

/// Mounts the kernel's tracing.
pub(crate) fn mount_tracing() -> Result<(), AgentError> {
    mount(c"tracefs", c"/sys/kernel/tracing").doing("mount the kernel's tracing")
}

/// Mounts a file system in memory on /tmp.
pub(crate) fn mount_memory() -> io::Result<()> {
    mount(c"tmpfs", c"/tmp")
}

fn mount(kind: &CStr, at: &CStr) -> io::Result<()> {
    // SAFETY: all strings end with a NUL and outlive the call; these kinds take no data.
    let result = unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Mounts a disk with a file system of this kind, to read and write.
pub(crate) fn mount_disk(kind: &str, disk: &CStr, at: &CStr) -> io::Result<()> {
    let kind = CString::new(kind).unwrap_or_default();
    // SAFETY: all strings end with a NUL and outlive the call; no data is passed.
    let result = unsafe { libc::mount(disk.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Moves a mount to another place.
pub(crate) fn move_mount(from: &CStr, to: &CStr) -> io::Result<()> {
    let none = std::ptr::null();
    // SAFETY: both strings end with a NUL and outlive the call; a move has neither a kind nor data.
    let result = unsafe { libc::mount(from.as_ptr(), to.as_ptr(), none, libc::MS_MOVE, none.cast()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Loads the modules that the file `list` of `folder` names, in its order: a file name and parameters a line.
pub(crate) fn load_modules(folder: &str) -> Result<(), AgentError> {
    let list = Path::new(folder).join("list");
    for line in fs::read_to_string(&list).doing(format!("read {}", list.display()))?.lines() {
        let (name, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let path = Path::new(folder).join(name);
        let file = File::open(&path).doing(format!("open {}", path.display()))?;
        let flags = if name.ends_with(".ko") { 0 } else { COMPRESSED };
        let parameters = CString::new(parameters).unwrap_or_default();
        load_module(&file, &parameters, flags).doing(format!("load the module {name}"))?;
    }
    Ok(())
}

fn load_module(file: &File, parameters: &CStr, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open and the parameters end with a NUL, both for the time of the call.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), flags) };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            error => Err(error),
        },
    }
}

/// Waits for the display, unless the guest was packed without a driver for it.
pub(crate) fn wait_for_display() -> Result<(), AgentError> {
    if Path::new(NO_DISPLAY).exists() { Ok(()) } else { wait_for_card().map(drop) }
}

/// The first display device, as soon as the driver has made it.
pub(crate) fn wait_for_card() -> Result<PathBuf, AgentError> {
    let end = Instant::now() + CARD_WAIT;
    loop {
        if let Some(card) = find_card() {
            return Ok(card);
        }
        if Instant::now() > end {
            return Err(AgentError::NoCard { seconds: CARD_WAIT.as_secs() });
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn find_card() -> Option<PathBuf> {
    let entries = fs::read_dir("/dev/dri").ok()?;
    let mut cards: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    cards.retain(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("card")));
    cards.sort();
    cards.into_iter().next()
}

/// The kernel's release.
pub(crate) fn kernel_release() -> Result<String, AgentError> {
    let path = "/proc/sys/kernel/osrelease";
    Ok(fs::read_to_string(path).doing(format!("read {path}"))?.trim().to_owned())
}

/// Takes a device from its driver, the folder `driver` under /sys/bus, and gives it back.
pub(crate) fn rebind(driver: &Path, is_ours: impl Fn(&Path) -> bool) -> Result<(), AgentError> {
    let entries = fs::read_dir(driver).doing(format!("read {}", driver.display()))?;
    let device = entries
        .flatten()
        .find(|entry| entry.path().is_symlink() && is_ours(&entry.path()))
        .ok_or_else(|| AgentError::NotBound(driver.to_owned()))?
        .file_name();
    for verb in ["unbind", "bind"] {
        let what = format!("{verb} {} at {}", device.to_string_lossy(), driver.display());
        fs::write(driver.join(verb), device.as_encoded_bytes()).doing(what)?;
    }
    Ok(())
}

/// The kernel forgets a module, unless somebody uses it.
pub(crate) fn unload_module(name: &CStr) -> io::Result<()> {
    // SAFETY: the name ends with a NUL, and outlives the call.
    match unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The PCI function that is a virtio-gpu, in sysfs.
pub(crate) fn find_gpu() -> Result<PathBuf, AgentError> {
    const DEVICES: &str = "/sys/bus/pci/devices";
    let entries = fs::read_dir(DEVICES).doing(format!("read {DEVICES}"))?;
    let device = entries.flatten().map(|entry| entry.path()).find(|path| is_gpu(path));
    device.ok_or_else(|| AgentError::NotBound(DEVICES.into()))
}

/// Whether a PCI function is a virtio-gpu: its class does not say so on every machine.
pub(crate) fn is_gpu(device: &Path) -> bool {
    let is = |name: &str, id: &str| fs::read_to_string(device.join(name)).is_ok_and(|text| text.trim() == id);
    is("vendor", VIRTIO) && is("device", VIRTIO_GPU)
}

/// How the machine ends.
#[derive(Clone, Copy)]
pub(crate) enum End {
    Reboot,
    PowerOff,
    /// By a jump into the kernel that was loaded.
    Kexec,
}

/// Reboots the machine or switches it off; returns only if the kernel refused.
pub(crate) fn end(how: End) -> AgentError {
    let (command, what) = match how {
        End::Reboot => (libc::LINUX_REBOOT_CMD_RESTART, "reboot"),
        End::PowerOff => (libc::LINUX_REBOOT_CMD_POWER_OFF, "power off"),
        End::Kexec => (libc::LINUX_REBOOT_CMD_KEXEC, "jump into the second kernel"),
    };
    // SAFETY: takes no pointer; there is no file system that could lose anything.
    unsafe { libc::reboot(command) };
    AgentError::System { what: what.to_owned(), source: io::Error::last_os_error() }
}
