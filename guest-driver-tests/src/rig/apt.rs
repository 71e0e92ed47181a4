//! Debian packages, fetched and unpacked without touching the system: apt runs with its own lists, state and cache,
//! dpkg-deb unpacks into a folder, and nothing is installed or needs root. Knows nothing of QEMU and kernels.

use crate::rig::error::{Doing, RigError};
use crate::rig::process::run;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// How apt names its package lists, one per line: release, component, address of the mirror.
const TARGET_FORMAT: &str = "$(RELEASE)|$(COMPONENT)|$(REPO_URI)";

/// A Debian release with its backports, from which packages come.
pub(crate) struct Apt {
    folder: PathBuf,
    /// Of this system: its mirror is the one to use.
    codename: String,
    /// The release itself, and its backports.
    suites: [String; 2],
}

impl Apt {
    /// The release that this system runs, or nothing where it is not Debian.
    pub(crate) fn of_this_system(folder: &Path) -> Option<Self> {
        let release = fs::read_to_string("/etc/os-release").ok()?;
        let codename = debian_codename(&release)?;
        let has_tools = ["apt-get", "apt-cache", "dpkg-deb"].iter().all(|tool| {
            Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success())
        });
        let suites = with_backports(&codename);
        has_tools.then(|| Self { folder: folder.to_owned(), codename, suites })
    }

    /// The release that is called stable today, which may be newer than this system.
    pub(crate) fn stable(folder: &Path) -> Option<Self> {
        Some(Self { suites: with_backports("stable"), ..Self::of_this_system(folder)? })
    }

    /// The release itself.
    pub(crate) fn release(&self) -> &str {
        let [release, _] = &self.suites;
        release
    }

    /// The suite of newer packages for the release.
    pub(crate) fn backports(&self) -> &str {
        let [_, backports] = &self.suites;
        backports
    }

    /// Fetches the package lists of the release and its backports, from the mirror that the system is configured for.
    pub(crate) fn update(&self) -> Result<(), RigError> {
        let targets = run(Command::new("apt-get").args([
            "indextargets",
            "--no-release-info",
            "--format",
            TARGET_FORMAT,
            "Created-By: Packages",
        ]))?;
        let mirror = mirror_of(&targets, &self.codename).ok_or_else(|| {
            let text = "apt's sources name no mirror with the component `main` of {codename}: \
                        complete them, or give --qemu and --kernel";
            RigError::Missing(text.replace("{codename}", &self.codename))
        })?;
        for part in ["state/lists/partial", "cache/archives/partial"] {
            let path = self.folder.join(part);
            fs::create_dir_all(&path).doing(format!("create {}", path.display()))?;
        }
        let signed =
            if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
        let lines = self.suites.each_ref().map(|suite| format!("deb {signed}{mirror} {suite} main\n"));
        self.write("sources.list", &lines.concat())?;
        // For this apt nothing is installed, so the dependencies are complete.
        self.write("state/status", "")?;
        run(&mut self.command("apt-get", &["update"])).map(drop)
    }

    /// The version of `package` in the release itself.
    pub(crate) fn version(&self, package: &str) -> Result<String, RigError> {
        let policy = run(&mut self.command("apt-cache", &["policy", package]))?;
        candidate(&policy).ok_or_else(|| {
            RigError::Missing(format!(
                "{} has no package {package}: give --qemu and --kernel",
                self.release()
            ))
        })
    }

    /// The package that the meta package `meta` stands for.
    pub(crate) fn first_dependency(&self, meta: &str, suite: &str) -> Result<String, RigError> {
        let name = format!("{meta}/{suite}");
        let text = run(&mut self.command("apt-cache", &["show", &name]))?;
        first_dependency(&text)
            .ok_or_else(|| RigError::Missing(format!("The package {name} depends on nothing: give --kernel")))
    }

    /// Fetches `package` and, if requested, all its dependencies, and unpacks them into `to`.
    pub(crate) fn unpack(
        &self,
        package: &str,
        suite: &str,
        depends: bool,
        to: &Path,
    ) -> Result<(), RigError> {
        let archives = self.folder.join("cache/archives");
        let mut fetch = if depends {
            let verb =
                ["install", "--yes", "--download-only", "--no-install-recommends", "-t", suite, package];
            self.command("apt-get", &verb)
        } else {
            self.command("apt-get", &["download", "-t", suite, package])
        };
        run(fetch.current_dir(&archives))?;
        fs::create_dir_all(to).doing(format!("create {}", to.display()))?;
        for archive in files(&archives)?.iter().filter(|path| path.extension().is_some_and(|it| it == "deb"))
        {
            run(Command::new("dpkg-deb").arg("--extract").arg(archive).arg(to))?;
            fs::remove_file(archive).doing(format!("remove {}", archive.display()))?;
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> Result<(), RigError> {
        let path = self.folder.join(name);
        fs::write(&path, text).doing(format!("write {}", path.display()))
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        let folder = self.folder.display();
        for option in [
            format!("Dir::State={folder}/state"),
            format!("Dir::State::status={folder}/state/status"),
            format!("Dir::Cache={folder}/cache"),
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".into(),
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".into(),
            // Otherwise root's apt would fetch as a user who may not be able to write here.
            "APT::Sandbox::User=root".into(),
        ] {
            command.args(["-o", &option]);
        }
        command.args(arguments).env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

/// The files of a folder.
pub(crate) fn files(folder: &Path) -> Result<Vec<PathBuf>, RigError> {
    let entries = fs::read_dir(folder).doing(format!("read {}", folder.display()))?;
    let mut paths: Vec<_> =
        entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    paths.sort();
    Ok(paths)
}

fn with_backports(release: &str) -> [String; 2] {
    [release.to_owned(), format!("{release}-backports")]
}

fn debian_codename(os_release: &str) -> Option<String> {
    let value = |key: &str| {
        let mut lines = os_release.lines();
        lines.find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).map(|text| text.trim_matches('"'))
    };
    (value("ID")? == "debian").then(|| value("VERSION_CODENAME").map(str::to_owned))?
}

/// The mirror of the release: the one whose list is named by its codename, or by its current role.
fn mirror_of<'a>(targets: &'a str, codename: &str) -> Option<&'a str> {
    let entry = |wanted: &str| {
        targets.lines().find_map(|line| {
            let mut fields = line.splitn(3, '|');
            let (release, component) = (fields.next()?, fields.next()?);
            (release == wanted && component == "main").then(|| fields.next())?
        })
    };
    [codename, "stable", "oldstable"].into_iter().find_map(entry)
}

fn candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.to_owned())
}

fn first_dependency(show: &str) -> Option<String> {
    let line = show.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    line.split([' ', ',']).next().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_has_debians_codename() {
        let debian = "PRETTY_NAME=\"Debian\"\nVERSION_CODENAME=trixie\nID=debian\n";
        assert_eq!(debian_codename(debian).as_deref(), Some("trixie"));
        assert_eq!(debian_codename("ID=ubuntu\nVERSION_CODENAME=noble\nID_LIKE=debian\n"), None);
    }

    #[test]
    fn the_mirror_is_the_releases_own_not_the_one_of_its_updates() {
        let targets = "trixie-security|main|http://a/\ntrixie|contrib|http://b/\ntrixie|main|http://c/\n";
        assert_eq!(mirror_of(targets, "trixie"), Some("http://c/"));
        assert_eq!(mirror_of("stable|main|http://d/\n", "trixie"), Some("http://d/"));
        assert_eq!(mirror_of("nodistro|main|http://e/\n", "trixie"), None);
    }

    #[test]
    fn a_package_without_a_candidate_has_no_version() {
        let policy = "qemu:\n  Installed: (none)\n  Candidate: 1:10.0.2+ds-2\n";
        assert_eq!(candidate(policy).as_deref(), Some("1:10.0.2+ds-2"));
        assert_eq!(candidate("qemu:\n  Candidate: (none)\n"), None);
        assert_eq!(candidate(""), None);
    }

    #[test]
    fn a_meta_package_stands_for_the_first_that_it_depends_on() {
        let show = "Package: linux-image-amd64\nDepends: linux-image-6.12-amd64 (= 6.12.1)\n";
        assert_eq!(first_dependency(show).as_deref(), Some("linux-image-6.12-amd64"));
    }
}
