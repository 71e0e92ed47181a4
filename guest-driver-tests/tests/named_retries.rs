//! What may be tried again is named: each override of `.config/nextest.toml` says why, and names tests that there are.

use std::fs;
use std::path::Path;

use guest_driver_tests::suite::table;

/// An override: the comment above it, and its lines.
struct Override {
    why: String,
    lines: Vec<String>,
}

fn overrides(text: &str) -> Vec<Override> {
    let mut found: Vec<Override> = Vec::new();
    let mut why = String::new();
    for line in text.lines() {
        match line.strip_prefix("# ") {
            Some(comment) => why.push_str(comment),
            None if line == "[[profile.default.overrides]]" => {
                found.push(Override { why: std::mem::take(&mut why), lines: Vec::new() });
            }
            None if line.is_empty() => why.clear(),
            None => found.iter_mut().last().into_iter().for_each(|last| last.lines.push(line.to_owned())),
        }
    }
    found
}

/// What stands between `open` and `close`, each time.
fn between<'t>(text: &'t str, open: &str, close: &str) -> Vec<&'t str> {
    text.split(open).skip(1).filter_map(|rest| rest.split(close).next()).collect()
}

#[test]
fn each_test_that_may_be_tried_again_is_there_and_has_a_reason() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(here.join("../.config/nextest.toml")).unwrap();
    let overrides = overrides(&text);
    assert_eq!(overrides.len(), text.matches("retries = 1").count(), "nothing but overrides has retries");
    assert_eq!(text.matches("retries").count(), overrides.len() + 1);
    let mut named = 0;
    for Override { why, lines } in overrides {
        let filter = lines.iter().find(|line| line.starts_with("filter = ")).unwrap();
        assert!(why.len() > 20, "no reason for {filter}");
        assert!(lines.contains(&"test-group = 'wall-clock'".to_owned()), "{filter}");
        // A file of tests, and what of it is meant, until the next file.
        for of_file in filter.split("binary(").skip(1) {
            let (file, rest) = of_file.split_once(')').unwrap();
            let source = fs::read_to_string(here.join(format!("tests/{file}.rs"))).unwrap();
            for test in between(rest, "test(=", ")") {
                assert!(source.contains(&format!("#[test]\nfn {test}()")), "{file} has no test {test}");
                named += 1;
            }
            for id in between(rest, "test(/^(", ")$/)").into_iter().flat_map(|ids| ids.split('|')) {
                assert!(table::ALL.iter().any(|scenario| scenario.id() == id), "there is no scenario {id}");
                named += 1;
            }
        }
    }
    assert!(named > 10, "{named}");
}
