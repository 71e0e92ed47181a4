//! Debian packages, fetched and unpacked without touching the system: apt runs with its own lists, state and cache,
//! dpkg-deb unpacks into a folder, and nothing is installed or needs root. Knows nothing of QEMU and kernels.

use crate::rig::error::{Doing, RigError};
use crate::rig::process::run;
use crate::rig::report::say;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// How apt names its package lists, one per line: release, component, address of the mirror.
const TARGET_FORMAT: &str = "$(RELEASE)|$(COMPONENT)|$(REPO_URI)";

/// The release that comes after one. A mirror's alias `stable` can lag behind the release that it names, so it is not used.
const NEXT: [(&str, &str); 1] = [("bookworm", "trixie")];
/// Package lists of this age are still good: several fetches in a row read them once.
const FRESH: Duration = Duration::from_secs(600);
/// Written after the package lists were fetched.
const STAMP: &str = "updated";

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

    /// The release after this system's; on the newest one that is known, this system's own.
    pub(crate) fn newer(folder: &Path) -> Option<Self> {
        let own = Self::of_this_system(folder)?;
        Some(Self { suites: with_backports(release_after(&own.codename)), ..own })
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

    /// Fetches the package lists of the release and its backports, from the mirror that the system is configured for;
    /// unless they have just been fetched.
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
        let sources = lines.concat();
        if self.is_fresh(&sources) {
            return Ok(());
        }
        say(&format!("Fetching the package lists of Debian {}, aside from the system's own", self.release()));
        self.write("sources.list", &sources)?;
        // For this apt nothing is installed, so the dependencies are complete.
        self.write("state/status", "")?;
        run(&mut self.command("apt-get", &["update"]))?;
        self.write(STAMP, "")
    }

    fn is_fresh(&self, sources: &str) -> bool {
        let updated = fs::metadata(self.folder.join(STAMP)).and_then(|stamp| stamp.modified());
        let age = updated.ok().and_then(|time| SystemTime::now().duration_since(time).ok());
        let same = fs::read_to_string(self.folder.join("sources.list")).is_ok_and(|text| text == sources);
        same && age.is_some_and(|age| age < FRESH)
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

    /// The package that the meta package `meta` stands for: the first that it depends on whose name begins with
    /// `prefix`. Others may come before it.
    pub(crate) fn first_dependency(&self, meta: &str, suite: &str, prefix: &str) -> Result<String, RigError> {
        let name = format!("{meta}/{suite}");
        let text = run(&mut self.command("apt-cache", &["show", &name]))?;
        dependencies(&text).into_iter().find(|name| name.starts_with(prefix)).ok_or_else(|| {
            RigError::Missing(format!("The package {name} depends on no {prefix}…: give --kernel"))
        })
    }

    /// The packages that `package` depends on; of alternatives, the first.
    pub(crate) fn dependencies(&self, package: &str) -> Result<Vec<String>, RigError> {
        Ok(dependencies(&run(&mut self.command("apt-cache", &["show", package]))?))
    }

    /// The packages whose names begin with `prefix`.
    pub(crate) fn named(&self, prefix: &str) -> Result<Vec<String>, RigError> {
        let names = run(&mut self.command("apt-cache", &["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Fetches these packages, as `name` or `name=version`, and, if requested, all their dependencies, and unpacks them
    /// into `to`. The suite decides where several have a package.
    pub(crate) fn unpack(
        &self,
        packages: &[&str],
        suite: &str,
        depends: bool,
        to: &Path,
    ) -> Result<(), RigError> {
        let archives = self.folder.join("cache/archives");
        let mut fetch = if depends {
            self.command("apt-get", &["install", "--yes", "--download-only", "--no-install-recommends"])
        } else {
            self.command("apt-get", &["download"])
        };
        fetch.args(["-t", suite]).args(packages);
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

fn release_after(codename: &str) -> &str {
    NEXT.iter().find(|(release, _)| *release == codename).map_or(codename, |(_, next)| next)
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

fn dependencies(show: &str) -> Vec<String> {
    let line = show.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let names = line.split(',').filter_map(|wish| wish.split_whitespace().next());
    names.map(str::to_owned).collect()
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
    fn dependencies_are_names_without_versions_and_alternatives() {
        let show = "Package: linux-image-amd64\nDepends: linux-base-amd64 (= 7.3.4-1), dracut | initramfs-tools (>= 1), \
                    linux-image-7.3.4-amd64 (= 7.3.4-1)\nRecommends: apparmor\n\nPackage: x\nDepends: y\n";
        assert_eq!(dependencies(show), ["linux-base-amd64", "dracut", "linux-image-7.3.4-amd64"]);
        assert!(dependencies("Package: linux-headers-7.3.4-common\n").is_empty());
    }

    #[test]
    fn the_newer_release_has_a_name_of_its_own_and_is_the_same_where_none_is_known() {
        assert_eq!(with_backports(release_after("bookworm")), ["trixie", "trixie-backports"]);
        assert_eq!(release_after("trixie"), "trixie");
    }

    #[test]
    fn package_lists_are_fresh_for_a_while_and_for_the_same_sources() {
        let folder = tempfile::tempdir().unwrap();
        let (codename, suites) = ("trixie".to_owned(), with_backports("trixie"));
        let apt = Apt { folder: folder.path().to_owned(), codename, suites };
        apt.write("sources.list", "deb a\n").unwrap();
        assert!(!apt.is_fresh("deb a\n"));
        apt.write(STAMP, "").unwrap();
        assert!(apt.is_fresh("deb a\n") && !apt.is_fresh("deb b\n"));
        let stamp = fs::File::options().write(true).open(folder.path().join(STAMP)).unwrap();
        stamp.set_modified(SystemTime::now() - FRESH).unwrap();
        assert!(!apt.is_fresh("deb a\n"));
    }
}
