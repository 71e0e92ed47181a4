//! The exit codes under a real `git bisect run`: a bad revision is named, and a broken rig blames none.

use std::path::Path;
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_mirrorgpu-vm");
/// The revisions of the repository, and the first one with the bug.
const REVISIONS: usize = 6;
const FIRST_BAD: usize = 4;

/// Runs git, whatever the machine's configuration says.
fn git(repository: &Path, arguments: &[&str]) -> Output {
    let identity =
        ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"];
    Command::new("git")
        .args(identity)
        .args(arguments)
        .current_dir(repository)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env_remove("GIT_DIR")
        .output()
        .expect("git is installed")
}

fn must(repository: &Path, arguments: &[&str]) {
    let output = git(repository, arguments);
    assert!(output.status.success(), "git {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A repository of a device that gets a bug at one of its revisions.
fn repository() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    must(folder.path(), &["init", "--quiet"]);
    for revision in 0..REVISIONS {
        let flags = if revision < FIRST_BAD { "" } else { "--inject keep-staged-update" };
        std::fs::write(folder.path().join("flags"), format!("{flags}\n")).unwrap();
        std::fs::write(folder.path().join("revision"), revision.to_string()).unwrap();
        must(folder.path(), &["add", "."]);
        must(folder.path(), &["commit", "--quiet", "--message", &format!("Revision {revision}")]);
    }
    folder
}

/// The output of a bisection with this command line of a test.
fn bisect(test: &str) -> String {
    let folder = repository();
    let first = format!("HEAD~{}", REVISIONS - 1);
    must(folder.path(), &["bisect", "start", "HEAD", &first]);
    let script = format!("exec {PROGRAM} test {test}");
    let output = git(folder.path(), &["bisect", "run", "sh", "-c", &script]);
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_bisection_names_the_revision_that_brought_the_bug() {
    let said = bisect("12 --level soft $(cat flags)");
    assert!(said.contains("is the first bad commit"), "{said}");
    assert!(said.contains(&format!("Revision {FIRST_BAD}")), "{said}");
}

#[test]
fn a_broken_rig_ends_a_bisection_and_blames_no_revision() {
    for test in ["1 --level real --no-install --kernel /nowhere/vmlinuz", "--no-such-flag"] {
        let said = bisect(test);
        assert!(!said.contains("is the first bad commit"), "{said}");
        assert!(said.contains("exit code 128"), "{said}");
    }
}
