//! The command line that `demo` and `verify` share.

use crate::rig::accel::Accel;
use crate::rig::error::RIG_FAILED;
use clap::{Args, Parser, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Headings of `--help`.
const GUEST: &str = "Guest";
const MODULES: &str = "Your own modules and files";
const DEVICE: &str = "Device";
const RUN: &str = "Run";

/// What both commands understand.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// QEMU to run: a program, or a major version such as 11 [default: QEMU 10 or newer on the PATH, else it is fetched].
    ///
    /// A program has to be QEMU 10 or newer, with the device vhost-user-gpu-pci. A version stands for that one or a newer
    /// one. What is missing is fetched from Debian, if need be from the backports of Debian 13, and unpacked under .cache.
    #[arg(long, value_name = "PROGRAM|VERSION", value_parser = qemu_choice, help_heading = GUEST)]
    pub qemu: Option<QemuChoice>,
    /// Kernel to boot: an image, a version (6.1) or a Debian package (linux-image-…) [default: Debian's newest; `hmm`: 7.3].
    ///
    /// A version or package that is missing is fetched from this system's Debian release, the next release, or the
    /// backports of either, and unpacked under .cache.
    #[arg(long, value_name = "IMAGE|VERSION|PACKAGE", value_parser = kernel_choice, help_heading = GUEST)]
    pub kernel: Option<KernelChoice>,
    /// Folder of the modules of the --kernel image [default: /lib/modules/RELEASE].
    #[arg(long, value_name = "FOLDER", requires = "kernel", help_heading = GUEST)]
    pub modules: Option<PathBuf>,
    /// How QEMU runs the guest's CPUs [default: kvm if it can run a guest here, else tcg].
    #[arg(long, value_enum, help_heading = GUEST)]
    pub accel: Option<AccelChoice>,
    /// One more argument for QEMU, after all others (repeatable).
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true, help_heading = GUEST)]
    pub qemu_arg: Vec<String>,
    /// Your own kernel module to load after those of the display, with the modules that it depends on (repeatable).
    ///
    /// If it has the name of a stock module (virtio-gpu.ko), it replaces that one. Plain or xz-compressed.
    #[arg(long, value_name = "FILE", help_heading = MODULES)]
    pub module: Vec<PathBuf>,
    /// Folder with the source of your own kernel module (a Kbuild file and C), to build and load (repeatable).
    ///
    /// It is built for the guest's kernel with gcc and make, outside the folder, and loaded as with --module. The headers
    /// of the kernel are fetched if they are missing.
    #[arg(long, value_name = "FOLDER", help_heading = MODULES)]
    pub module_source: Vec<PathBuf>,
    /// Parameters for your own modules: words of the form NAME=VALUE, separated by spaces.
    #[arg(long, value_name = "WORDS", default_value = "", hide_default_value = true, help_heading = MODULES)]
    pub module_parameters: String,
    /// Your own initramfs (cpio, compressed or not) with more files. Files of the rig replace those of the same name.
    #[arg(long, value_name = "FILE", help_heading = MODULES)]
    pub initramfs: Option<PathBuf>,
    /// Back-end program to run [default: the one of this checkout, which is built first].
    #[arg(long, value_name = "PROGRAM", conflicts_with = "reference", help_heading = DEVICE)]
    pub backend: Option<PathBuf>,
    /// Bug or stress to inject into the back-end, such as drop-zap; `mirrorgpu --help` lists them (repeatable).
    #[arg(long, value_name = "BUG", conflicts_with = "reference", help_heading = DEVICE)]
    pub inject: Vec<String>,
    /// Run the same without MirrorGPU, to compare: on QEMU's own virtio-gpu, or, for `hmm`, on the kernel's test_hmm.
    #[arg(long, help_heading = DEVICE)]
    pub reference: bool,
    /// Fetch nothing. If something is missing, print what, and stop.
    #[arg(long, help_heading = RUN)]
    pub no_install: bool,
    /// Maximum time to wait for an answer of the guest, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = seconds, help_heading = RUN)]
    pub timeout: Duration,
    /// Keep the logs and dumps of each run, and print where they are.
    #[arg(long, help_heading = RUN)]
    pub keep: bool,
}

/// The accelerators that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AccelChoice {
    /// Hardware virtualization (/dev/kvm).
    Kvm,
    /// Emulation by QEMU, about ten times slower.
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
        Ok(0) | Err(_) => Err("must be a whole number of seconds, at least 1".into()),
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
    fn each_option_is_explained_under_a_heading() {
        let command = Options::augment_args(clap::Command::new("test"));
        assert!(command.get_arguments().count() > 10);
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{} is not explained", argument.get_id());
            assert!(argument.get_help_heading().is_some(), "{} has no heading", argument.get_id());
        }
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
