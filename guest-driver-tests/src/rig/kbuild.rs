//! What builds modules for the guest's kernel: its headers and the programs of its build system, installed or fetched. The
//! programs are of another release of Debian, perhaps, so each runs through the loader of its own C library. Knows the
//! packages and their files; knows nothing of modules.

use crate::rig::error::{Doing, RigError};
use crate::rig::kernel::Kernel;
use crate::rig::packages::{LIBRARIES, loader};
use crate::rig::report::say;
use crate::rig::store::Store;
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

const SOURCES: &str = "/usr/src/";
const PACKAGE: &str = "linux-headers-";
/// Other packages that belong to it.
const PARTS: &str = "linux-headers-";
const PROGRAMS: &str = "linux-kbuild-";
/// Beside each program's wrapper there is a folder of this name with the program itself.
const WRAPPED: &str = ".elf";
const ELF: &[u8] = b"\x7fELF";

/// The build system of one kernel.
#[derive(Clone, Debug)]
pub struct Kbuild {
    /// Where `make` runs.
    pub folder: PathBuf,
    /// Its kernel.
    pub release: String,
}

impl Kbuild {
    /// That of this kernel, fetched if need be and allowed.
    pub fn of(kernel: &Kernel, no_install: bool) -> Result<Self, RigError> {
        match Self::at_hand(kernel)? {
            Some(found) => Ok(found),
            None if no_install => Err(RigError::Missing(format!(
                "To build modules for it, the headers of the kernel {} are needed, which are not here, and --no-install \
                 forbids to fetch them",
                kernel.release
            ))),
            None => Self::fetch(kernel),
        }
    }

    /// The same if it is installed, or has been fetched.
    pub fn at_hand(kernel: &Kernel) -> Result<Option<Self>, RigError> {
        let release = kernel.release.clone();
        let installed = kernel.modules().join("build");
        if installed.join("Makefile").is_file() {
            return Ok(Some(Self { folder: installed, release }));
        }
        match Store::of_this_checkout().complete(&format!("headers-{release}")) {
            Some(root) => Self::prepare(&root, release).map(Some),
            None => Ok(None),
        }
    }

    fn fetch(kernel: &Kernel) -> Result<Self, RigError> {
        let (store, release) = (Store::of_this_checkout(), kernel.release.clone());
        let package = format!("{PACKAGE}{release}");
        let apt = store.apt_with(&package)?.ok_or_else(|| {
            RigError::Missing(format!(
                "The headers of the kernel {release} are neither under {} nor (any longer) among Debian's packages: \
                 remove .cache/rig/kernel* to have a newer kernel fetched, or install the headers",
                kernel.modules().join("build").display()
            ))
        })?;
        say(&format!(
            "Fetching {package} with what builds modules (about 30 MB), and unpacking it; nothing is installed"
        ));
        let parts = apt.dependencies(&package)?;
        let parts_with = |prefix: &str| {
            parts.iter().map(String::as_str).filter(|part| part.starts_with(prefix)).collect::<Vec<_>>()
        };
        let (mut headers, programs) = (parts_with(PARTS), parts_with(PROGRAMS));
        headers.push(&package);
        let root = store.fill(&format!("headers-{release}"), |to| {
            apt.unpack(&headers, apt.release(), false, to)?;
            apt.unpack(&programs, apt.release(), true, to)
        })?;
        Self::prepare(&root, release)
    }

    /// Makes unpacked packages run where they are. Everything in them that has a path is written again each time, because the
    /// checkout may have moved.
    fn prepare(root: &Path, release: String) -> Result<Self, RigError> {
        let folder = root.join(SOURCES.trim_matches('/')).join(format!("{PACKAGE}{release}"));
        let (makefile, packed) = (folder.join("Makefile"), folder.join("Makefile.packed"));
        if !packed.is_file() {
            fs::rename(&makefile, &packed).doing(format!("rename {}", makefile.display()))?;
        }
        let text = fs::read_to_string(&packed).doing(format!("read {}", packed.display()))?;
        let text = text.replace(SOURCES, &format!("{}{SOURCES}", root.display()));
        fs::write(&makefile, text).doing(format!("write {}", makefile.display()))?;
        let libraries = root.join("usr/lib");
        for entry in fs::read_dir(&libraries).doing(format!("read {}", libraries.display()))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(PROGRAMS) {
                wrap_all(root, &entry.path())?;
            }
        }
        Ok(Self { folder, release })
    }
}

/// Wraps each program in a folder.
fn wrap_all(root: &Path, folder: &Path) -> Result<(), RigError> {
    for entry in fs::read_dir(folder).doing(format!("read {}", folder.display()))?.flatten() {
        let (path, kind) = (entry.path(), entry.file_type().doing("look at a file")?);
        if entry.file_name() == WRAPPED {
            for program in fs::read_dir(&path).doing(format!("read {}", path.display()))?.flatten() {
                wrap(root, &folder.join(program.file_name()), &program.path())?;
            }
        } else if kind.is_dir() {
            wrap_all(root, &path)?;
        } else if kind.is_file() && is_program(&path) {
            let wrapped = folder.join(WRAPPED).join(entry.file_name());
            fs::create_dir_all(folder.join(WRAPPED)).doing(format!("create {}", wrapped.display()))?;
            fs::rename(&path, &wrapped).doing(format!("rename {}", path.display()))?;
            wrap(root, &path, &wrapped)?;
        }
    }
    Ok(())
}

fn is_program(path: &Path) -> bool {
    let mut start = [0; 4];
    fs::File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == ELF
}

/// Writes a script that runs `program` with the libraries under `root`.
fn wrap(root: &Path, script: &Path, program: &Path) -> Result<(), RigError> {
    let quoted = |path: &Path| format!("'{}'", path.to_string_lossy().replace('\'', r"'\''"));
    let libraries = LIBRARIES.map(|folder| quoted(&root.join(folder))).join(":");
    let text = format!(
        "#!/bin/sh\nexec {} --library-path {libraries} --argv0 \"$0\" {} \"$@\"\n",
        quoted(&loader(root)),
        quoted(program)
    );
    if fs::read_to_string(script).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(script, text).doing(format!("write {}", script.display()))?;
    fs::set_permissions(script, fs::Permissions::from_mode(0o755))
        .doing(format!("make {} a program", script.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rig::process::run;
    use std::process::Command;

    #[test]
    fn programs_of_unpacked_packages_run_through_their_own_loader_wherever_the_folder_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| {
            let path = folder.path().join("it's 1").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        // The loader that stands in says what it was to do.
        file("usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "#!/bin/sh\necho \"$2|$4|$5|$6\"\n");
        file("usr/lib/linux-kbuild-1/tools/objtool", "\x7fELF of a kind");
        file("usr/lib/linux-kbuild-1/scripts/x.sh", "#!/bin/sh\n");
        file("usr/src/linux-headers-1/Makefile", "include /usr/src/linux-headers-1-common/Makefile\n");
        let mut place = folder.path().join("it's 1");
        for moved in ["it's 1", "2"] {
            let root = folder.path().join(moved);
            if root != place {
                fs::rename(&place, &root).unwrap();
                place.clone_from(&root);
            }
            let kbuild = Kbuild::prepare(&root, "1".into()).unwrap();
            let makefile = fs::read_to_string(kbuild.folder.join("Makefile")).unwrap();
            assert_eq!(
                makefile,
                format!("include {}/usr/src/linux-headers-1-common/Makefile\n", root.display())
            );
            let program = root.join("usr/lib/linux-kbuild-1/tools/objtool");
            let said = run(Command::new(&program).arg("--x")).unwrap();
            let (root, own) = (root.display(), "usr/lib/linux-kbuild-1/tools/.elf/objtool");
            let libraries = format!("{root}/usr/lib/x86_64-linux-gnu:{root}/lib/x86_64-linux-gnu");
            assert_eq!(said, format!("{libraries}|{}|{root}/{own}|--x\n", program.display()));
            let script = place.join("usr/lib/linux-kbuild-1/scripts/x.sh");
            assert_eq!(fs::read_to_string(script).unwrap(), "#!/bin/sh\n");
        }
    }
}
