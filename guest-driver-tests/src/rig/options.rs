//! The command line that `demo` and `verify` share.

use crate::rig::accel::Accel;
use crate::rig::error::RIG_FAILED;
use clap::{Args, Parser, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// What both commands understand.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// QEMU to run (10 or newer, with vhost-user-gpu-pci), or a number: that version or a newer one, fetched from the
    /// backports of Debian 13 if need be. Default: the one on the PATH if it will do, else one that is
    /// fetched from Debian and unpacked under .cache
    #[arg(long, value_name = "PROGRAM|VERSION", value_parser = qemu_choice)]
    pub qemu: Option<QemuChoice>,
    /// Kernel to boot: an image, a version (6.1, 7.3), or a package of Debian's (linux-image-…); the latter two are fetched
    /// if need be, from this system's release, the one after it, or the backports of either. Default: Debian's newest, fetched and unpacked under .cache
    #[arg(long, value_name = "IMAGE|VERSION|PACKAGE", value_parser = kernel_choice)]
    pub kernel: Option<KernelChoice>,
    /// Folder of the kernel's modules. Default: /lib/modules/RELEASE, where --kernel is given
    #[arg(long, value_name = "FOLDER", requires = "kernel")]
    pub modules: Option<PathBuf>,
    /// Your own module: loaded after the display's, with what it depends on; or in the place of a stock one that is called
    /// the same (virtio-gpu.ko). Plain or xz-compressed; may be given again
    #[arg(long, value_name = "FILE")]
    pub module: Vec<PathBuf>,
    /// Folder with the source of your own module (a Kbuild file and C), which is built for the guest's kernel with gcc and
    /// make, outside the folder, and loaded as --module is. The kernel's headers are fetched if need be. May be given again
    #[arg(long, value_name = "FOLDER")]
    pub module_source: Vec<PathBuf>,
    /// Parameters for your own modules, as NAME=VALUE words
    #[arg(long, value_name = "WORDS", default_value = "")]
    pub module_parameters: String,
    /// Your own initramfs (cpio, compressed or not), for more files: the agent's own is laid over it
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// One more argument for QEMU, behind all others; may be given again
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    pub qemu_arg: Vec<String>,
    /// Fetch nothing: say what is missing, and stop
    #[arg(long)]
    pub no_install: bool,
    /// Back-end to run. Default: the checkout's, built
    #[arg(long, value_name = "PROGRAM", conflicts_with = "reference")]
    pub backend: Option<PathBuf>,
    /// Have the back-end misbehave, to see that it is noticed, or that the guest survives it; see `mirrorgpu --help`.
    /// May be given again
    #[arg(long, value_name = "BUG", conflicts_with = "reference")]
    pub inject: Vec<String>,
    /// Run on QEMU's own virtio-gpu instead of the back-end, to compare with
    #[arg(long)]
    pub reference: bool,
    /// How the guest's CPU runs. Default: KVM where it can really run a guest, else TCG
    #[arg(long, value_enum)]
    pub accel: Option<AccelChoice>,
    /// Longest wait for the guest, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds)]
    pub timeout: Duration,
    /// Keep the logs and dumps of each run, and say where they are
    #[arg(long)]
    pub keep: bool,
}

/// The accelerators that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AccelChoice {
    /// The host's CPU.
    Kvm,
    /// QEMU's translation.
    Tcg,
}

impl Options {
    /// The accelerator to use.
    pub fn accelerator(&self) -> Accel {
        match self.accel {
            Some(AccelChoice::Kvm) => Accel::Kvm,
            Some(AccelChoice::Tcg) => Accel::Tcg,
            None => Accel::detect(),
        }
    }
}

/// Which QEMU is to be run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum QemuChoice {
    /// This one.
    Program(PathBuf),
    /// One of this major version, or a newer one.
    Version(u32),
}

fn qemu_choice(text: &str) -> Result<QemuChoice, std::convert::Infallible> {
    Ok(text.parse().map_or_else(|_| QemuChoice::Program(text.into()), QemuChoice::Version))
}

/// Which kernel is to be booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelChoice {
    /// This image.
    Image(PathBuf),
    /// Debian's of this version.
    Version(u32, u32),
    /// This package of Debian's.
    Package(String),
}

fn kernel_choice(text: &str) -> Result<KernelChoice, std::convert::Infallible> {
    let version =
        text.split_once('.').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    Ok(match version {
        Some((major, minor)) => KernelChoice::Version(major, minor),
        None if text.starts_with("linux-image-") => KernelChoice::Package(text.to_owned()),
        None => KernelChoice::Image(text.into()),
    })
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<u64>() {
        Ok(0) | Err(_) => Err("a number of seconds, 1 or more".into()),
        Ok(seconds) => Ok(Duration::from_secs(seconds)),
    }
}

/// Parses the command line. `cargo demo -- --flag` and `cargo verify -- --flag` arrive with the alias's own `--` before it,
/// which would make arguments of all flags: a `--` that comes first, or behind the alias's one word, is dropped.
/// A wrong command line ends the process with [`RIG_FAILED`].
pub fn parse<T: Parser>() -> T {
    T::try_parse_from(without_separator(std::env::args_os().collect())).unwrap_or_else(|error| {
        // If the terminal is gone, the exit code is all that is left to say.
        let _ = error.print();
        std::process::exit(if error.use_stderr() { RIG_FAILED.into() } else { 0 });
    })
}

fn without_separator<S: AsRef<std::ffi::OsStr>>(mut arguments: Vec<S>) -> Vec<S> {
    let place = [1, 2].into_iter().find(|&place| arguments.get(place).is_some_and(|it| it.as_ref() == "--"));
    if let Some(place) = place {
        arguments.remove(place);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_separator_is_dropped() {
        assert_eq!(without_separator(vec!["demo", "--", "--soft"]), ["demo", "--soft"]);
        assert_eq!(without_separator(vec!["vm", "test", "15", "--"]), ["vm", "test", "15", "--"]);
        assert_eq!(without_separator(vec!["vm", "test", "--", "--seed"]), ["vm", "test", "--seed"]);
        assert_eq!(without_separator(vec!["demo"]), ["demo"]);
    }

    #[test]
    fn a_number_is_a_version_and_anything_else_a_program() {
        assert_eq!(qemu_choice("11"), Ok(QemuChoice::Version(11)));
        assert_eq!(qemu_choice("./11"), Ok(QemuChoice::Program("./11".into())));
    }

    #[test]
    fn a_kernel_is_a_version_a_package_or_an_image() {
        assert_eq!(kernel_choice("6.1"), Ok(KernelChoice::Version(6, 1)));
        let package = "linux-image-6.1.0-30-amd64";
        assert_eq!(kernel_choice(package), Ok(KernelChoice::Package(package.into())));
        for path in ["./6.1", "/boot/vmlinuz-6.1.0", "bzImage"] {
            assert_eq!(kernel_choice(path), Ok(KernelChoice::Image(path.into())));
        }
    }

    #[test]
    fn a_timeout_of_nothing_is_refused() {
        assert_eq!(seconds("7"), Ok(Duration::from_secs(7)));
        assert!(seconds("0").is_err() && seconds("soon").is_err());
    }
}
