//! A person at the console in the place of the rig: a shell, or the init of a root file system. Knows processes and
//! mounts; knows nothing of the device.

use crate::error::{AgentError, Doing};
use crate::system::{self, End};
use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::chroot;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What the rig has packed to say so: `shell`, or `root` and the kind of its file system.
const WISH: &str = "/console";
const TERMINAL: &str = "/dev/ttyS0";
const DISK: &str = "/dev/vda";
const DISK_WAIT: Duration = Duration::from_secs(10);
/// What a root file system may begin with.
const INITS: [&str; 3] = ["/sbin/init", "/usr/lib/systemd/systemd", "/bin/sh"];

/// Gives the console to a person, if the rig wants that; returns otherwise. The machine is switched off at the end.
pub(crate) fn serve() -> Result<(), AgentError> {
    let Ok(wish) = fs::read_to_string(WISH) else { return Ok(()) };
    match wish.trim().split_once(' ') {
        Some(("root", kind)) => switch_root(kind),
        _ => {
            shell()?;
            Err(system::end(End::PowerOff))
        }
    }
}

fn shell() -> Result<(), AgentError> {
    let install = ["--install", "-s", "/bin"];
    Command::new("/bin/busybox").args(install).status().doing("install the shell's commands")?;
    let open = || File::options().read(true).write(true).open(TERMINAL).doing(format!("open {TERMINAL}"));
    let mut shell = Command::new("/bin/sh");
    shell.arg("-l").env("PATH", "/bin").env("HOME", "/").env("TERM", "linux").current_dir("/");
    shell.stdin(open()?).stdout(open()?).stderr(open()?);
    // SAFETY: between fork and exec only setsid and an ioctl without a pointer are called.
    let shell = unsafe { shell.pre_exec(take_the_terminal) };
    shell.status().doing("run the shell").map(drop)
}

/// Makes standard input the terminal of a session of its own, or the shell could not stop what it runs.
fn take_the_terminal() -> io::Result<()> {
    // SAFETY: takes no argument.
    if unsafe { libc::setsid() } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call takes a number, and no pointer.
    match unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Goes on as the init of the file system on the disk.
fn switch_root(kind: &str) -> Result<(), AgentError> {
    let (disk, end) = (Path::new(DISK), Instant::now() + DISK_WAIT);
    while !disk.exists() {
        if Instant::now() > end {
            return Err(AgentError::NoDisk { seconds: DISK_WAIT.as_secs() });
        }
        thread::sleep(Duration::from_millis(20));
    }
    fs::create_dir_all("/new-root").doing("create /new-root")?;
    system::mount_disk(kind, c"/dev/vda", c"/new-root").doing(format!("mount {DISK} as {kind}"))?;
    let moved: [(&CStr, &CStr); 3] =
        [(c"/dev", c"/new-root/dev"), (c"/proc", c"/new-root/proc"), (c"/sys", c"/new-root/sys")];
    for (from, to) in moved {
        system::move_mount(from, to).doing(format!("move {}", from.to_string_lossy()))?;
    }
    chroot("/new-root").doing("change the root")?;
    std::env::set_current_dir("/").doing("go to the new root")?;
    let Some(init) = INITS.iter().find(|path| Path::new(path).exists()) else {
        return Err(AgentError::NoInit { tried: INITS.join(", ") });
    };
    let failed = Command::new(init).stdin(Stdio::inherit()).exec();
    Err(failed).doing(format!("run {init}"))
}
