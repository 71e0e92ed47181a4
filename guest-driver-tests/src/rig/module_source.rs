//! Modules from source: a folder with a Kbuild file is built for the guest's kernel, without root and outside the folder,
//! and what comes of it is kept by content. Knows make and its files; knows nothing of what a module does.

use crate::rig::error::{Doing, RigError};
use crate::rig::kbuild::Kbuild;
use crate::rig::process::run;
use crate::rig::report::say;
use crate::rig::store::Store;
use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// Debian's kernel may be built by a newer gcc than this system's, which has an option for the alignment of functions; and
/// there is neither its type information nor its key here.
const SETTINGS: [&str; 4] = [
    "CC=gcc",
    "CONFIG_CC_HAS_MIN_FUNCTION_ALIGNMENT=",
    "CONFIG_DEBUG_INFO_BTF_MODULES=",
    "CONFIG_MODULE_SIG_ALL=",
];
/// What tells `make` how to build; one of them has to be there.
const RECIPES: [&str; 2] = ["Kbuild", "Makefile"];
/// What an earlier build in the folder itself may have left.
const LEFT: [&str; 7] = [".o", ".ko", ".mod", ".mod.c", ".order", ".symvers", ".cmd"];
/// Lines of the compiler's that are shown.
const LINES: usize = 60;
/// How many builds of a folder are kept.
const KEPT: usize = 8;

/// The modules that the folder `source` makes, for one kernel, in the order in which it names them.
pub fn build(source: &Path, kbuild: &Kbuild) -> Result<Vec<PathBuf>, RigError> {
    let compiler = compiler()?;
    let files = files_of(source)?;
    if !RECIPES.iter().any(|name| files.contains_key(Path::new(name))) {
        return Err(RigError::Missing(format!(
            "The folder {} has neither a Kbuild file nor a Makefile: no module can be built from it",
            source.display()
        )));
    }
    let store = Store::of_this_checkout();
    let (name, title) = (name_of(source), source.display());
    let all = format!("modules/{}/{name}", kbuild.release);
    let key = format!("{all}/{:016x}", key(&(&kbuild.release, &compiler, SETTINGS, &files)));
    if let Some(built) = store.complete(&key) {
        say(&format!("The module in {title} has not changed since it was built for {}", kbuild.release));
        return listed(&built);
    }
    say(&format!("Building the module in {title} for {}", kbuild.release));
    let begin = Instant::now();
    let built = store.fill(&key, |to| make(source, &files, kbuild, to))?;
    say(&format!("It was built in {:.1} s", begin.elapsed().as_secs_f64()));
    forget_old(&store.path(&all))?;
    listed(&built)
}

/// What this system lacks to build modules; empty: nothing.
pub fn lacking() -> Vec<&'static str> {
    let has =
        |program: &str| Command::new(program).arg("--version").output().is_ok_and(|it| it.status.success());
    ["gcc", "make", "ld"].into_iter().filter(|program| !has(program)).collect()
}

/// The compiler's version.
fn compiler() -> Result<String, RigError> {
    let lacking = lacking();
    if !lacking.is_empty() {
        let text = "To build a module, {} are needed, which are not here: `apt-get install gcc make`";
        return Err(RigError::Missing(text.replace("{}", &lacking.join(" and "))));
    }
    run(Command::new("gcc").arg("--version"))
}

fn make(source: &Path, files: &Files, kbuild: &Kbuild, to: &Path) -> Result<(), RigError> {
    let place = to.join("build");
    for (name, bytes) in files {
        let path = place.join(name);
        let folder = path.parent().unwrap_or(&place);
        fs::create_dir_all(folder).doing(format!("create {}", folder.display()))?;
        fs::write(&path, bytes).doing(format!("write {}", path.display()))?;
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut command = Command::new("make");
    command.arg(format!("-j{processors}"));
    command.arg("-C").arg(&kbuild.folder).arg(format!("M={}", place.display())).args(SETTINGS).arg("modules");
    // Words for another make, which may be running this.
    command.env_remove("MAKEFLAGS").env_remove("MFLAGS").env_remove("MAKELEVEL").env("LC_ALL", "C");
    let output = command.output().doing("start make")?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr)
            .replace(&*place.to_string_lossy(), &source.to_string_lossy());
        return Err(RigError::Build {
            folder: source.to_owned(),
            release: kbuild.release.clone(),
            words: shown(&words),
        });
    }
    for module in ordered(&place)? {
        let name = to.join(module.file_name().unwrap_or_default());
        run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&name).arg(&module))?;
    }
    let order = place.join("modules.order");
    fs::copy(&order, to.join("modules.order")).doing(format!("copy {}", order.display()))?;
    fs::remove_dir_all(&place).doing(format!("remove {}", place.display()))
}

/// The beginning of what the compiler said, without what `make` says of it.
fn shown(words: &str) -> String {
    let lines: Vec<_> = words.lines().filter(|line| !line.starts_with("make")).take(LINES).collect();
    if lines.is_empty() { words.to_owned() } else { lines.join("\n") }
}

/// The modules that a build has left, in its order.
fn ordered(folder: &Path) -> Result<Vec<PathBuf>, RigError> {
    let list = folder.join("modules.order");
    let text = fs::read_to_string(&list).doing(format!("read {}", list.display()))?;
    // Up to Linux 6.12 the paths are absolute, since then relative.
    let modules: Vec<_> = text.lines().map(|line| folder.join(line).with_extension("ko")).collect();
    if modules.is_empty() {
        return Err(RigError::check(
            "The folder was built, and made no module: its Kbuild file names none in obj-m",
        ));
    }
    Ok(modules)
}

/// The modules that were kept.
fn listed(folder: &Path) -> Result<Vec<PathBuf>, RigError> {
    let names = ordered(folder)?;
    Ok(names.iter().filter_map(|path| Some(folder.join(path.file_name()?))).collect())
}

/// Removes all but the newest builds.
fn forget_old(folder: &Path) -> Result<(), RigError> {
    let entries = fs::read_dir(folder).doing(format!("read {}", folder.display()))?;
    let age = |path: &PathBuf| fs::metadata(path).and_then(|data| data.modified()).ok();
    let mut builds: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    builds.sort_by_key(|path| std::cmp::Reverse(age(path)));
    for path in builds.iter().skip(KEPT) {
        fs::remove_dir_all(path).doing(format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// Files by their names in the folder.
type Files = BTreeMap<PathBuf, Vec<u8>>;

/// The files of a folder and those below it, without what is hidden, and without what a build leaves. A link is the file
/// that it leads to, which may be outside.
fn files_of(folder: &Path) -> Result<Files, RigError> {
    let mut files = Files::new();
    collect(folder, Path::new(""), &mut files)?;
    Ok(files)
}

fn collect(folder: &Path, below: &Path, files: &mut Files) -> Result<(), RigError> {
    let here = folder.join(below);
    for entry in fs::read_dir(&here).doing(format!("read {}", here.display()))?.flatten() {
        let (path, file) = (entry.path(), entry.file_name());
        let (text, name) = (file.to_string_lossy(), below.join(&file));
        if text.starts_with('.') || LEFT.iter().any(|ending| text.ends_with(ending)) {
            continue;
        }
        // A link to a folder could lead back.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(folder, &name, files)?;
        } else if path.is_file() {
            files.insert(name, fs::read(&path).doing(format!("read {}", path.display()))?);
        }
    }
    Ok(())
}

fn name_of(folder: &Path) -> String {
    let whole = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    whole.file_name().map_or_else(|| "module".into(), |name| name.to_string_lossy().into_owned())
}

fn key(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_the_content_wherever_it_is_and_whatever_a_build_has_left() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        fs::create_dir_all(folder.path().join("one/include")).unwrap();
        write("shared.h", "1");
        write("one/Kbuild", "obj-m := a.o\n");
        write("one/a.c", "x");
        std::os::unix::fs::symlink("../../shared.h", folder.path().join("one/include/shared.h")).unwrap();
        let key = || key(&files_of(&folder.path().join("one")).unwrap());
        let first = key();
        for name in ["one/a.o", "one/a.ko", "one/a.mod.c", "one/Module.symvers", "one/.a.o.cmd"] {
            write(name, "y");
        }
        assert_eq!(key(), first);
        write("shared.h", "2");
        assert_ne!(key(), first, "what a link leads to is part of the content");
        write("shared.h", "1");
        assert_eq!(key(), first);
    }

    #[test]
    fn the_order_of_modules_is_the_builds_with_relative_and_with_absolute_paths() {
        let folder = tempfile::tempdir().unwrap();
        let list = format!("b.o\n{}/sub/a.o\n", folder.path().display());
        fs::write(folder.path().join("modules.order"), list).unwrap();
        let here = |name: &str| folder.path().join(name);
        assert_eq!(ordered(folder.path()).unwrap(), [here("b.ko"), here("sub/a.ko")]);
        assert_eq!(listed(folder.path()).unwrap(), [here("b.ko"), here("a.ko")]);
        fs::write(folder.path().join("modules.order"), "").unwrap();
        assert!(ordered(folder.path()).is_err());
    }

    #[test]
    fn the_compilers_words_are_shown_and_not_makes() {
        let words =
            "a.c:3:5: error: 'x' undeclared\nmake[2]: *** [a.o] Error 1\nmake: *** [modules] Error 2\n";
        assert_eq!(shown(words), "a.c:3:5: error: 'x' undeclared");
        assert_eq!(shown("make: *** No rule\n"), "make: *** No rule\n");
    }

    #[test]
    fn only_the_newest_builds_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..KEPT + 2 {
            let path = folder.path().join(number.to_string());
            fs::create_dir(&path).unwrap();
            let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number as u64);
            fs::File::open(&path).unwrap().set_modified(time).unwrap();
        }
        forget_old(folder.path()).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(folder.path()).unwrap().flatten().map(|it| it.file_name()).collect();
        left.sort();
        assert_eq!(left.len(), KEPT);
        assert_eq!(left[0], "2");
    }
}
