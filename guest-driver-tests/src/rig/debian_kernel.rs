//! Debian's kernels: which packages have the contents of one, and where they lie once they are unpacked. Up to 6.12 all
//! is in linux-image-R. Since then that package is empty and depends on linux-base-R, linux-binary-R and linux-modules-R,
//! which keep everything, image and configuration included, under usr/lib/modules/R. Knows names of packages and files.

use crate::rig::apt::{Apt, files};
use crate::rig::error::RigError;
use crate::rig::kernel::Kernel;
use crate::rig::options::{KernelChoice, Options};
use crate::rig::packages::{KERNEL_OLDEST, suite, two_numbers};
use crate::rig::report::say;
use crate::rig::store::{Release, Store};
use std::fs;
use std::path::{Path, PathBuf};

const META_PACKAGE: &str = "linux-image-amd64";
const IMAGE: &str = "linux-image-";
/// Ends the names of packages with a usual kernel; those of others end with it too, and have one of the words before.
const ARCHITECTURE: &str = "-amd64";
const UNUSUAL: [&str; 3] = ["cloud", "rt", "unsigned"];
const MODULE_FOLDERS: [&str; 2] = ["usr/lib/modules", "lib/modules"];

/// Which of Debian's kernels.
pub(crate) enum KernelSource {
    Newest,
    Version(u32, u32),
    Package(String),
}

impl KernelSource {
    /// The one that the user wants.
    pub(crate) fn of(options: &Options) -> Self {
        match &options.kernel {
            Some(KernelChoice::Version(major, minor)) => Self::Version(*major, *minor),
            Some(KernelChoice::Package(package)) => Self::Package(package.clone()),
            Some(KernelChoice::Image(_)) | None => Self::Newest,
        }
    }

    /// The folder that it is unpacked into.
    fn folder(&self) -> String {
        match self {
            Self::Newest => "kernel".into(),
            Self::Version(major, minor) => format!("kernel-{major}.{minor}"),
            Self::Package(package) => package.clone(),
        }
    }

    /// The kernel, if it has been fetched.
    pub(crate) fn at_hand(&self, store: &Store) -> Result<Option<Kernel>, RigError> {
        let Some(root) = store.complete(&self.folder()) else { return Ok(None) };
        let Some((image, modules)) = layout(&root)? else { return Ok(None) };
        Kernel::open(&image, modules.as_deref()).map(Some)
    }

    /// Fetches it; `None` where there is no Debian to fetch from.
    pub(crate) fn fetch(&self, store: &Store) -> Result<Option<Kernel>, RigError> {
        let Some((apt, package, suite)) = self.package(store)? else { return Ok(None) };
        let folder = self.folder();
        say(&format!(
            "Fetching the kernel for the guest, {package} of Debian {} or its backports (about 110 MB), and unpacking it into {}; it \
             is not installed",
            apt.release(),
            store.path(&folder).display()
        ));
        let contents = contents(&package, &apt.dependencies(&package)?);
        let contents: Vec<_> = contents.iter().map(String::as_str).collect();
        store.fill(&folder, |to| apt.unpack(&contents, &suite, false, to))?;
        match self.at_hand(store)? {
            Some(kernel) => Ok(Some(kernel)),
            None => Err(RigError::check(format!("The package {package} has no kernel image in it"))),
        }
    }

    /// Its package, and the release and the suite that have it.
    fn package(&self, store: &Store) -> Result<Option<(Apt, String, String)>, RigError> {
        let mut others = Vec::new();
        for release in Release::ALL {
            let Some(apt) = store.apt(release)? else { return Ok(None) };
            let suite = suite(&apt, two_numbers(&apt.version(META_PACKAGE)?) >= KERNEL_OLDEST);
            let known = || apt.named(IMAGE);
            let found = match self {
                Self::Newest => Some(apt.first_dependency(META_PACKAGE, &suite, IMAGE)?),
                Self::Version(major, minor) => newest_of(&known()?, (*major, *minor)),
                Self::Package(package) => known()?.into_iter().find(|name| name == package),
            };
            if let Some(package) = found {
                return Ok(Some((apt, package, suite)));
            }
            others.extend(usual(&known()?).map(|(_, name)| name.to_owned()));
        }
        others.sort();
        others.dedup();
        let others = others.join(", ");
        Err(RigError::Missing(format!(
            "Debian does not have the wanted kernel, only {others}: give one of these, or an image, with --kernel"
        )))
    }
}

/// The packages with the contents of the kernel in `package`: itself, and those of the same release that it depends on.
fn contents(package: &str, dependencies: &[String]) -> Vec<String> {
    let release = package.strip_prefix(IMAGE).unwrap_or(package);
    let of_the_release = |name: &&String| name.ends_with(&format!("-{release}"));
    let others = dependencies.iter().filter(of_the_release).cloned();
    std::iter::once(package.to_owned()).chain(others).collect()
}

/// The packages of usual kernels, with the numbers of their versions.
fn usual(names: &[String]) -> impl Iterator<Item = (Vec<u32>, &str)> {
    names.iter().filter_map(|name| {
        let version = name.strip_prefix(IMAGE)?.strip_suffix(ARCHITECTURE)?;
        let is_usual = !version.split(['-', '+']).any(|word| UNUSUAL.contains(&word));
        let numbers: Vec<u32> =
            version.split(|it: char| !it.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect();
        (is_usual && numbers.len() > 1).then_some((numbers, name.as_str()))
    })
}

fn newest_of(names: &[String], (major, minor): (u32, u32)) -> Option<String> {
    let fitting = usual(names).filter(|(numbers, _)| numbers.starts_with(&[major, minor]));
    fitting.max().map(|(_, name)| name.to_owned())
}

/// The image of a kernel whose packages were unpacked into `root`, and its modules.
fn layout(root: &Path) -> Result<Option<(PathBuf, Option<PathBuf>)>, RigError> {
    let folders = MODULE_FOLDERS.map(|folder| root.join(folder));
    let boot = root.join("boot");
    for image in if boot.is_dir() { files(&boot)? } else { Vec::new() } {
        let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(release) = name.strip_prefix("vmlinuz-") {
            let modules = folders.iter().map(|folder| folder.join(release)).find(|folder| folder.is_dir());
            return Ok(Some((image, modules)));
        }
    }
    let releases = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
    let mut releases = releases.map(|entry| entry.path()).filter(|folder| folder.join("vmlinuz").is_file());
    Ok(releases.next().map(|modules| (modules.join("vmlinuz"), Some(modules))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn the_newest_usual_kernel_of_a_version_is_taken() {
        let known = names(&[
            "linux-image-amd64",
            "linux-image-7.3.4+deb13-amd64",
            "linux-image-7.3.12+deb13-amd64",
            "linux-image-7.3.13+deb13-cloud-amd64",
            "linux-image-7.3.13+deb13-rt-amd64",
            "linux-image-7.3.13+deb13-amd64-dbg",
            "linux-image-7.31.1+deb13-amd64",
            "linux-image-6.1.0-47-amd64",
            "linux-image-6.1.0-50-amd64",
        ]);
        assert_eq!(newest_of(&known, (7, 3)).as_deref(), Some("linux-image-7.3.12+deb13-amd64"));
        assert_eq!(newest_of(&known, (6, 1)).as_deref(), Some("linux-image-6.1.0-50-amd64"));
        assert_eq!(newest_of(&known, (6, 12)), None);
    }

    #[test]
    fn the_contents_of_a_kernel_are_in_the_packages_of_its_release() {
        let needs = names(&[
            "dracut",
            "linux-base-7.3.4+deb13-amd64",
            "linux-binary-7.3.4+deb13-amd64",
            "linux-modules-7.3.4+deb13-amd64",
        ]);
        let found = contents("linux-image-7.3.4+deb13-amd64", &needs);
        assert_eq!((found.len(), found[0].as_str()), (4, "linux-image-7.3.4+deb13-amd64"));
        assert_eq!(found[1..], needs[1..]);
        let older = contents("linux-image-6.12.117+deb13-amd64", &names(&["kmod", "initramfs-tools"]));
        assert_eq!(older, ["linux-image-6.12.117+deb13-amd64"]);
    }

    #[test]
    fn an_unpacked_kernel_is_found_in_both_layouts() {
        let folder = tempfile::tempdir().unwrap();
        let file = |path: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            path
        };
        assert_eq!(layout(folder.path()).unwrap(), None);
        let image = file("usr/lib/modules/7.3.4/vmlinuz");
        let modules = image.parent().map(Path::to_owned);
        assert_eq!(layout(folder.path()).unwrap(), Some((image, modules)));
        file("boot/config-6.12.1");
        let image = file("boot/vmlinuz-6.12.1");
        let modules = file("lib/modules/6.12.1/modules.order").parent().map(Path::to_owned);
        assert_eq!(layout(folder.path()).unwrap(), Some((image, modules)));
    }
}
