//! The kernel's own tests of what a driver does that mirrors a process (tools/testing/selftests/mm/hmm-tests.c), and the
//! module that they were written for (lib/test_hmm.c), both out of the source package of the guest's kernel and built here:
//! they are GPL, and no part of this project. Knows the source's files; knows nothing of how the tests are run.

use crate::rig::apt::Apt;
use crate::rig::error::{Doing, RigError};
use crate::rig::kernel::Kernel;
use crate::rig::packages::two_numbers;
use crate::rig::process::run;
use crate::rig::report::say;
use crate::rig::store::Store;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The files that are needed, as tar's patterns; the tests were in `vm` up to Linux 6.2.
const MEMBERS: [&str; 4] = [
    "*/tools/testing/selftests/[mv]m/*.[ch]",
    "*/tools/testing/selftests/kselftest*.h",
    "*/lib/test_hmm*",
    "*/mm/gup_test.h",
];
const TESTS: &str = "hmm-tests.c";
/// Files that the tests are linked with, where the kernel's version has them.
const HELPERS: [&str; 2] = ["vm_util.c", "hugepage_settings.c"];
const HEADERS: &str = "linux-libc-dev";
const MODULE: &str = "test_hmm";
const KBUILD: &str = "obj-m := test_hmm.o\nccflags-y += -include $(src)/lacking.h\n";
/// What kernels do not have for modules that lib/test_hmm.c uses: then the tests of that fail, and the others can run.
const LACKING: &str = "\
#include <linux/version.h>
#include <linux/rmap.h>
#include <linux/memremap.h>
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 15, 0)
/* Not exported. */
#define make_device_exclusive_range(...) (-EOPNOTSUPP)
#endif
#if !IS_ENABLED(CONFIG_DEVICE_PRIVATE)
/* It would warn. */
#define memremap_pages(...) ERR_PTR(-EOPNOTSUPP)
#endif
";
/// lib/test_hmm.c does not load where a kernel has no memory of devices: there, it is to go on without.
const FIRST_CHUNK: [&str; 2] = [
    "return dmirror_allocate_chunk(mdevice, NULL);",
    "return IS_ENABLED(CONFIG_DEVICE_PRIVATE) ? \
    dmirror_allocate_chunk(mdevice, NULL) : 0;",
];

/// The tests and the module of one version of Linux.
#[derive(Clone, Debug)]
pub struct Selftests {
    root: PathBuf,
}

impl Selftests {
    /// Those of the guest's kernel, fetched if need be and allowed.
    pub fn of(kernel: &Kernel, no_install: bool) -> Result<Self, RigError> {
        let (store, name) = (Store::of_this_checkout(), name(kernel));
        if let Some(root) = store.complete(&name) {
            return Ok(Self { root });
        }
        if no_install {
            let text = "The kernel's own tests are built from its source, which is not here, and --no-install forbids to \
                        fetch it";
            return Err(RigError::Missing(text.into()));
        }
        let package = format!("linux-{name}");
        let apt = store.apt_with(&package)?.ok_or_else(|| {
            RigError::Missing(format!(
                "The kernel's own tests are in {package}, which is not among Debian's packages"
            ))
        })?;
        say(&format!(
            "Fetching {package} (about 160 MB), out of which the kernel's own tests are built; of it, 60 files are kept \
             in {}",
            store.path(&name).display()
        ));
        let root = store.fill(&name, |to| fetch(&apt, &package, to).and_then(|()| build(to)))?;
        Ok(Self { root })
    }

    /// Whether they have been fetched and built.
    pub fn at_hand(kernel: &Kernel) -> bool {
        Store::of_this_checkout().complete(&name(kernel)).is_some()
    }

    /// The program with the tests: its name, and what is in its file.
    pub fn program(&self) -> Result<(String, Vec<u8>), RigError> {
        let path = self.root.join("hmm-tests");
        let bytes = fs::read(&path).doing(format!("read {}", path.display()))?;
        Ok(("hmm-tests".into(), bytes))
    }

    /// The folder with the source of the module.
    pub fn module(&self) -> PathBuf {
        self.root.join(MODULE)
    }
}

/// The folder of the tests for a kernel.
fn name(kernel: &Kernel) -> String {
    let (major, minor) = two_numbers(&kernel.release);
    format!("source-{major}.{minor}")
}

/// Fetches the source with the headers for programs of the same version, and keeps of it what is needed.
fn fetch(apt: &Apt, package: &str, to: &Path) -> Result<(), RigError> {
    let headers = format!("{HEADERS}={}", apt.version(package)?);
    apt.unpack(&[package, &headers], apt.release(), false, to)?;
    let archive = to.join("usr/src").join(format!("{package}.tar.xz"));
    let mut unpack = Command::new("tar");
    unpack.arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(to);
    run(unpack.args(["--strip-components=1", "--wildcards"]).args(MEMBERS))?;
    fs::remove_file(&archive).doing(format!("remove {}", archive.display()))
}

/// Builds the program, and gives the module a folder that can be built.
fn build(root: &Path) -> Result<(), RigError> {
    let selftests = root.join("tools/testing/selftests");
    let folders = ["mm", "vm"].map(|folder| selftests.join(folder));
    let folder = folders.iter().find(|folder| folder.join(TESTS).is_file());
    let folder = folder.ok_or_else(|| RigError::check(format!("The kernel's source has no {TESTS}")))?;
    let mut compile = Command::new("gcc");
    compile.args(["-O2", "-static", "-w", "-D_GNU_SOURCE=", "-o"]).arg(root.join("hmm-tests"));
    compile.arg("-I").arg(&selftests).arg("-I").arg(root);
    for headers in ["usr/include", "usr/include/x86_64-linux-gnu"] {
        compile.arg("-isystem").arg(root.join(headers));
    }
    // From their own folder: the tests name their file in what they say.
    compile.current_dir(folder).arg(TESTS);
    compile.args(HELPERS.iter().filter(|helper| folder.join(helper).is_file()));
    run(compile.arg("-lpthread"))?;
    let module = root.join(MODULE);
    fs::create_dir_all(&module).doing(format!("create {}", module.display()))?;
    let read = |path: PathBuf| fs::read_to_string(&path).doing(format!("read {}", path.display()));
    let source = read(root.join("lib/test_hmm.c"))?.replace(FIRST_CHUNK[0], FIRST_CHUNK[1]);
    let uapi = read(root.join("lib/test_hmm_uapi.h"))?;
    let files = [
        ("test_hmm.c", source.as_str()),
        ("test_hmm_uapi.h", &uapi),
        ("Kbuild", KBUILD),
        ("lacking.h", LACKING),
    ];
    for (name, text) in files {
        let path = module.join(name);
        fs::write(&path, text).doing(format!("write {}", path.display()))?;
    }
    Ok(())
}
