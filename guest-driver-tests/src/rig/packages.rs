//! Where QEMU and the guest's kernel come from: the command line, the PATH, a folder of unpacked packages under
//! .cache, or Debian, in this order. It prints each action before it starts it, and installs nothing.

use crate::rig::apt::Apt;
use crate::rig::debian_kernel::KernelSource;
use crate::rig::error::{Doing, RigError};
use crate::rig::kernel::Kernel;
use crate::rig::options::{KernelChoice, Options, QemuChoice};
use crate::rig::process::run;
use crate::rig::report::say;
use crate::rig::store::{Release, Store};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const QEMU_OLDEST: u32 = 10;
const QEMU_PROGRAM: &str = "qemu-system-x86_64";
const QEMU_PACKAGE: &str = "qemu-system-x86";
const QEMU_DEVICE: &str = "vhost-user-gpu-pci";
const KERNEL_PACKAGE: &str = "linux-image-amd64";
/// The oldest kernel that is taken without being asked for.
pub(crate) const KERNEL_OLDEST: (u32, u32) = (6, 12);
/// Where unpacked packages have their libraries.
pub(crate) const LIBRARIES: [&str; 2] = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"];
const LOADER: &str = "ld-linux-x86-64.so.2";

/// A QEMU that can be run.
#[derive(Clone, Debug)]
pub struct Qemu {
    /// Version, as it reports it.
    pub version: String,
    program: PathBuf,
    /// Where its packages were unpacked, if they are not installed.
    unpacked: Option<PathBuf>,
    /// The user's arguments for it, after all others.
    pub arguments: Vec<String>,
}

impl Qemu {
    /// A command that runs it.
    pub fn command(&self) -> Command {
        command(&self.program, self.unpacked.as_deref())
    }

    /// The first number of its version.
    pub fn major(&self) -> u32 {
        first_number(&self.version)
    }

    /// The QEMU `program`, if it is new enough and has the device.
    fn check(program: &Path, unpacked: Option<&Path>, oldest: u32) -> Result<Self, RigError> {
        let text = run(command(program, unpacked).arg("--version"))?;
        let version = text.split_whitespace().nth(3).unwrap_or("of an unknown version").to_owned();
        if first_number(&version) < oldest {
            return Err(RigError::QemuTooOld { path: program.to_owned(), found: version, oldest });
        }
        let devices = run(command(program, unpacked).args(["-device", "help"]))?;
        if !devices.contains(&format!("\"{QEMU_DEVICE}\"")) {
            return Err(RigError::QemuWithoutDevice(program.to_owned()));
        }
        Ok(Self {
            version,
            program: program.to_owned(),
            unpacked: unpacked.map(Path::to_owned),
            arguments: Vec::new(),
        })
    }
}

/// The loader of the C library among packages that were unpacked into `root`.
pub(crate) fn loader(root: &Path) -> PathBuf {
    let places = LIBRARIES.map(|folder| root.join(folder).join(LOADER));
    places.into_iter().find(|path| path.is_file()).unwrap_or_else(|| root.join(LOADER))
}

/// An unpacked program runs with the libraries of its own release, through their loader.
fn command(program: &Path, unpacked: Option<&Path>) -> Command {
    let Some(root) = unpacked else { return Command::new(program) };
    let paths = LIBRARIES.map(|folder| root.join(folder).to_string_lossy().into_owned()).join(":");
    let mut command = Command::new(loader(root));
    command.arg("--library-path").arg(paths).arg(program);
    for data in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(root.join(data));
    }
    command.env("QEMU_MODULE_DIR", root.join("usr/lib/x86_64-linux-gnu/qemu"));
    command
}

/// What the rig runs the guest with.
#[derive(Clone)]
pub struct Tools {
    /// QEMU.
    pub qemu: Qemu,
    /// The guest's kernel.
    pub kernel: Kernel,
}

impl Tools {
    /// Finds both, and fetches what is missing unless that is forbidden.
    pub fn find(options: &Options) -> Result<Self, RigError> {
        let store = Store::of_this_checkout();
        let source = match options.qemu {
            Some(QemuChoice::Version(oldest)) if oldest > QEMU_OLDEST => Source::newer(oldest),
            _ => Source::USUAL,
        };
        let qemu = find_qemu(options, &store, &source)?;
        let kernel = find_kernel(options, &store)?;
        if options.no_install && (qemu.is_none() || kernel.is_none()) {
            return Err(missing(qemu.is_none().then_some(source.oldest), kernel.is_none()));
        }
        let mut qemu = qemu.map_or_else(|| fetch_qemu(&store, &source), Ok)?;
        qemu.arguments.clone_from(&options.qemu_arg);
        let kernel = kernel.map_or_else(|| fetch_kernel(&store, &KernelSource::of(options)), Ok)?;
        Ok(Self { qemu, kernel })
    }

    /// What is present, without fetching anything: QEMU of this major version or a newer one, and the kernel.
    pub fn at_hand(
        options: &Options,
        qemu: u32,
    ) -> (Result<Option<Qemu>, RigError>, Result<Option<Kernel>, RigError>) {
        let store = Store::of_this_checkout();
        let source = if qemu > QEMU_OLDEST { Source::newer(qemu) } else { Source::USUAL };
        (find_qemu(options, &store, &source), find_kernel(options, &store))
    }
}

/// A static busybox, for a guest with a shell: from the PATH, or fetched.
pub fn busybox(options: &Options) -> Result<Vec<u8>, RigError> {
    let store = Store::of_this_checkout();
    let paths = ["bin/busybox", "usr/bin/busybox"].map(|path| store.path(BUSYBOX.1).join(path));
    let find = || paths.iter().find(|path| path.is_file());
    if find().is_none() {
        if options.no_install {
            let text = "A shell in the guest needs Debian's busybox-static, which is not here, and --no-install forbids \
                        to fetch it";
            return Err(RigError::Missing(text.into()));
        }
        let apt = store.apt(Release::Own)?;
        let apt = apt.ok_or_else(|| {
            RigError::Missing(
                "A shell in the guest needs Debian's busybox-static, which is fetched on Debian".into(),
            )
        })?;
        say("Fetching busybox-static (about 1 MB), and unpacking it; it is not installed");
        store.fill(BUSYBOX.1, |to| apt.unpack(&[BUSYBOX.0], apt.release(), false, to))?;
    }
    let path = find().ok_or_else(|| RigError::check("The package busybox-static has no busybox in it"))?;
    fs::read(path).doing(format!("read {}", path.display()))
}

/// The package, and the folder that it is unpacked into.
const BUSYBOX: (&str, &str) = ("busybox-static", "busybox");

/// Where a fetched QEMU comes from, and how old it may be.
struct Source {
    oldest: u32,
    /// The folder that it is unpacked into.
    folder: &'static str,
    release: Release,
}

impl Source {
    const USUAL: Self = Self { oldest: QEMU_OLDEST, folder: "qemu", release: Release::Own };

    fn newer(oldest: u32) -> Self {
        Self { oldest, folder: "qemu-stable", release: Release::Newer }
    }
}

fn find_qemu(options: &Options, store: &Store, source: &Source) -> Result<Option<Qemu>, RigError> {
    if let Some(QemuChoice::Program(program)) = &options.qemu {
        return Qemu::check(program, None, QEMU_OLDEST).map(Some);
    }
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let on_path =
        std::env::split_paths(&paths).map(|folder| folder.join(QEMU_PROGRAM)).find(|path| path.is_file());
    match on_path.map(|program| Qemu::check(&program, None, source.oldest)) {
        Some(Ok(qemu)) => return Ok(Some(qemu)),
        Some(Err(error)) => say(&format!("Passing over the QEMU on the PATH: {error}")),
        None => {}
    }
    qemu_at_hand(store, source)
}

fn find_kernel(options: &Options, store: &Store) -> Result<Option<Kernel>, RigError> {
    match &options.kernel {
        Some(KernelChoice::Image(image)) => Kernel::open(image, options.modules.as_deref()).map(Some),
        _ => KernelSource::of(options).at_hand(store),
    }
}

fn qemu_at_hand(store: &Store, source: &Source) -> Result<Option<Qemu>, RigError> {
    let Some(root) = store.complete(source.folder) else { return Ok(None) };
    let program = root.join("usr/bin").join(QEMU_PROGRAM);
    Qemu::check(&program, Some(&root), source.oldest).map(Some)
}

fn fetch_qemu(store: &Store, source: &Source) -> Result<Qemu, RigError> {
    let apt = store.apt(source.release)?.ok_or_else(|| missing(Some(source.oldest), false))?;
    let suite = suite(&apt, first_number(&apt.version(QEMU_PACKAGE)?) >= source.oldest);
    say(&format!(
        "QEMU {} or newer is not here: fetching {QEMU_PACKAGE} of {suite} with what it depends on (about 40 MB), and \
         unpacking it into {}; nothing is installed",
        source.oldest,
        store.path(source.folder).display()
    ));
    store.fill(source.folder, |to| apt.unpack(&[QEMU_PACKAGE], &suite, true, to))?;
    qemu_at_hand(store, source)?
        .ok_or_else(|| RigError::check("The unpacked packages of QEMU have no QEMU in them"))
}

fn fetch_kernel(store: &Store, source: &KernelSource) -> Result<Kernel, RigError> {
    source.fetch(store)?.ok_or_else(|| missing(None, true))
}

/// The suite of a release to fetch from: its backports, unless its own package will do.
pub(crate) fn suite(apt: &Apt, release_will_do: bool) -> String {
    if release_will_do { apt.release().to_owned() } else { apt.backports().to_owned() }
}

/// What to install, exactly: QEMU from this major version on, a kernel.
fn missing(qemu: Option<u32>, kernel: bool) -> RigError {
    let mut text = String::from("Something is missing that is not to be, or cannot be, fetched here.\n");
    if let Some(oldest) = qemu {
        let suites = if oldest > QEMU_OLDEST {
            "Debian 13: `apt-get install --no-install-recommends -t trixie-backports {QEMU_PACKAGE}`; elsewhere"
        } else {
            "Debian 13: `apt-get install --no-install-recommends {QEMU_PACKAGE}`; Debian 12: the same with \
             `-t bookworm-backports`; Fedora: qemu-system-x86 and qemu-device-display-vhost-user-gpu; Arch: \
             qemu-system-x86 and qemu-hw-display-virtio-gpu-pci. One that is not on the PATH"
        };
        let suites = suites.replace("{QEMU_PACKAGE}", QEMU_PACKAGE);
        text.push_str(&format!(
            "- QEMU {oldest} or newer for x86-64, with the device {QEMU_DEVICE}. {suites}: --qemu PROGRAM\n"
        ));
    }
    if kernel {
        text.push_str(&format!(
            "- A stock Linux kernel for x86-64, {}.{} or newer, with virtio-gpu (and virtio-iommu, for that topology) \
             as modules, plain or xz-compressed: --kernel IMAGE, and --modules FOLDER if they are not in \
             /lib/modules. Debian: `apt-get download` the package that {KERNEL_PACKAGE} depends on, and \
             `dpkg-deb -x` it\n",
            KERNEL_OLDEST.0, KERNEL_OLDEST.1
        ));
    }
    text.push_str(
        "On Debian 12 and 13, `cargo demo` without --no-install fetches both, and installs nothing",
    );
    RigError::Missing(text)
}

/// The first number of a version, without its epoch.
fn first_number(version: &str) -> u32 {
    two_numbers(version).0
}

/// The first two.
pub(crate) fn two_numbers(version: &str) -> (u32, u32) {
    let version = version.split_once(':').map_or(version, |(_epoch, rest)| rest);
    let mut numbers = version.split(|character: char| !character.is_ascii_digit());
    let mut next = || numbers.next().and_then(|number| number.parse().ok()).unwrap_or(0);
    (next(), next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers_without_their_epoch() {
        assert_eq!(first_number("1:7.2+dfsg-7+deb12u18"), 7);
        assert_eq!(first_number("10.0.2"), 10);
        assert!(two_numbers("6.1.176-1") < KERNEL_OLDEST);
        assert!(two_numbers("6.12.95-1~bpo12+1") >= KERNEL_OLDEST);
        assert_eq!(first_number("of an unknown version"), 0);
    }

    #[test]
    fn an_old_qemu_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("qemu");
        fs::write(&program, "#!/bin/sh\necho QEMU emulator version 7.2.22 '(Debian 1:7.2)'\n").unwrap();
        run(Command::new("chmod").arg("+x").arg(&program)).unwrap();
        let error = Qemu::check(&program, None, QEMU_OLDEST).unwrap_err();
        assert!(matches!(error, RigError::QemuTooOld { found, .. } if found == "7.2.22"));
    }

    #[test]
    fn what_is_missing_is_listed_exactly() {
        let text = missing(Some(10), false).to_string();
        assert!(text.contains("-t bookworm-backports") && !text.contains("--kernel IMAGE"), "{text}");
        let text = missing(Some(11), false).to_string();
        assert!(text.contains("QEMU 11") && text.contains("-t trixie-backports qemu-system-x86`"), "{text}");
        assert!(missing(None, true).to_string().contains("--kernel IMAGE"));
    }
}
