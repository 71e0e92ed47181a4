//! The kernel module in `kernel` and its page say the same, as far as that can be told without a kernel to build it for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel")
}

fn read(name: &str) -> String {
    let path = folder().join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The names in the table of bugs, without the one that stands for no bug.
fn seeded_bugs() -> Vec<String> {
    let header = read("bug.h");
    let rows = header.lines().filter(|line| line.trim_start().starts_with("bug("));
    rows.filter_map(|row| row.split('"').nth(1)).filter(|name| *name != "none").map(str::to_owned).collect()
}

#[test]
fn each_seeded_bug_takes_effect_and_its_page_says_what_finds_it() {
    let page = read("README.md");
    let told: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | ")).collect();
    let bugs = seeded_bugs();
    assert!(bugs.len() >= 10, "{bugs:?}");
    let files = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path());
    let sources: Vec<_> = files.filter(|path| path.extension().is_some_and(|it| it == "c")).collect();
    let code: String = sources.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    for bug in &bugs {
        let rows = told.iter().filter(|(name, _)| name == bug).count();
        assert_eq!(rows, 1, "rows of {bug} in README.md");
        let constant = format!("mgpu_bug(MGPU_BUG_{})", bug.to_uppercase().replace('-', "_"));
        assert!(code.contains(&constant), "{constant} is nowhere asked");
    }
}

#[test]
fn each_object_of_the_module_has_its_source() {
    let build = read("Kbuild");
    let objects = build.lines().find_map(|line| line.strip_prefix("mirrorgpu_hmm-y := ")).unwrap();
    for object in objects.split_whitespace() {
        read(&object.replace(".o", ".c"));
    }
    assert!(
        read("include/mirrorgpu_job.h").contains("MIRRORGPU_JOB_COPY"),
        "The header of job streams is another"
    );
}

#[test]
fn the_race_compiles_without_a_warning_and_its_requests_are_those_of_the_kernels_tests() {
    let directory = tempfile::tempdir().unwrap();
    let numbers = directory.path().join("numbers.c");
    // The size and the numbers of lib/test_hmm_uapi.h, which hmm-tests are compiled with.
    let checks = "#include \"hmm_uapi.h\"\n\
        _Static_assert(sizeof(struct mgpu_hmm_request) == 40, \"size\");\n\
        _Static_assert(MGPU_HMM_READ == 0xc0284800, \"READ\");\n\
        _Static_assert(MGPU_HMM_READ_UNLOCKED == 0xc0284809, \"READ_UNLOCKED\");\n";
    fs::write(&numbers, checks).unwrap();
    for source in [&folder().join("race.c"), &numbers] {
        let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
        let mut compile = Command::new(&compiler);
        compile.args(["-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-fsyntax-only", "-I"]);
        let output = compile.arg(folder()).arg(source).output();
        let output = output.unwrap_or_else(|error| panic!("{compiler:?}: {error}; install gcc, or set CC"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
