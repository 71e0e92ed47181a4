//! Compares a generated text with the file that holds it, or writes the file. Knows files and lines only.

use std::path::PathBuf;
use std::{env, fs};

const COMMAND: &str = "UPDATE_GENERATED=1 cargo test -p job-stream --test generated";

/// A file of this crate.
pub(crate) fn path(file: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(file)
}

/// What stands in a file of this crate.
pub(crate) fn read(file: &str) -> String {
    fs::read_to_string(path(file)).unwrap_or_default()
}

/// Panics with the difference unless `file` holds `expected`, or makes it so.
pub(crate) fn assert_generated(file: &str, expected: &str) {
    let found = read(file);
    if found == expected {
        return;
    }
    if env::var_os("UPDATE_GENERATED").is_some() {
        // Tests beside this one may be reading the file: they find it whole, as it was or as it is to be.
        let fresh = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        fs::write(fresh.path().join("file"), expected).unwrap();
        fs::rename(fresh.path().join("file"), path(file)).unwrap();
        return;
    }
    panic!(
        "{file} is not what the table says. `{COMMAND}` writes it anew.\n{}",
        difference(&found, expected)
    );
}

/// The lines between the first and the last that differ.
fn difference(found: &str, expected: &str) -> String {
    let (found, expected): (Vec<_>, Vec<_>) = (found.lines().collect(), expected.lines().collect());
    let same = |(a, b): &(&&str, &&str)| a == b;
    let start = found.iter().zip(&expected).take_while(same).count();
    let end = found[start..].iter().rev().zip(expected[start..].iter().rev()).take_while(same).count();
    let side = |sign: &'static str, lines: &[&str]| {
        let part: Vec<_> =
            lines[start..lines.len() - end].iter().map(|line| format!("{sign}{line}\n")).collect();
        part.concat()
    };
    format!("@@ line {} @@\n{}{}", start + 1, side("-", &found), side("+", &expected))
}

#[test]
fn a_difference_shows_the_lines_that_differ_and_no_others() {
    assert_eq!(difference("a\nb\nc\n", "a\nx\ny\nc\n"), "@@ line 2 @@\n-b\n+x\n+y\n");
    assert_eq!(difference("a\na\n", "a\n"), "@@ line 2 @@\n-a\n");
}
