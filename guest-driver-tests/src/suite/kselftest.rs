//! The words of the kernel's test harness (tools/testing/selftests/kselftest_harness.h): its list of tests, and the KTAP
//! of a run. Knows the text; knows nothing of the tests.

/// Lines of a failed test that are shown.
const LINES: usize = 40;

/// How a test has ended, as the harness says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It passed.
    Passed,
    /// It failed; with its own words.
    Failed(String),
    /// It did not run, for this reason.
    Skipped(String),
}

/// A fixture with its variants and its tests.
#[derive(Default)]
struct Fixture<'a> {
    name: &'a str,
    variants: Vec<&'a str>,
    tests: Vec<&'a str>,
}

/// The full names of all tests, out of what `-l` prints: a table with a column each for fixtures, their variants and their
/// tests. The columns are independent: each variant has each test. Other words of the program's, which begin with `#`, may
/// stand before and after.
pub fn list(text: &str) -> Vec<String> {
    let mut fixtures: Vec<Fixture<'_>> = Vec::new();
    let mut places = None;
    let mut begins = true;
    for line in text.lines() {
        if line.starts_with("# FIXTURE") {
            places = line.find("VARIANT").zip(line.find("TEST"));
            continue;
        }
        let Some((variants, tests)) = places.filter(|_| !line.starts_with('#')) else { continue };
        if line.starts_with("----") {
            begins = true;
            continue;
        }
        let cell = |from: usize, to: usize| line.get(from..to.min(line.len())).unwrap_or_default().trim();
        if std::mem::take(&mut begins) {
            fixtures.push(Fixture { name: cell(0, variants), ..Fixture::default() });
        }
        let Some(fixture) = fixtures.last_mut() else { continue };
        fixture.variants.extend(Some(cell(variants, tests)).filter(|name| !name.is_empty()));
        fixture.tests.extend(Some(cell(tests, line.len())).filter(|name| !name.is_empty()));
    }
    fixtures.iter().flat_map(Fixture::full_names).collect()
}

impl Fixture<'_> {
    fn full_names(&self) -> Vec<String> {
        let name = self.name;
        if self.variants.is_empty() {
            return self.tests.iter().map(|test| format!("{name}.{test}")).collect();
        }
        let of_a_variant = |variant| self.tests.iter().map(move |test| format!("{name}.{variant}.{test}"));
        self.variants.iter().flat_map(of_a_variant).collect()
    }
}

/// How the test `name` has ended, out of what a run printed; `None`: its result is not there.
pub fn verdict(output: &str, name: &str) -> Option<Verdict> {
    let (passed, rest) = output.lines().filter_map(result).find(|(_, rest)| named(rest) == name)?;
    let directive = rest.split_once('#').map(|(_, words)| words.trim()).unwrap_or_default();
    Some(match (passed, directive.strip_prefix("SKIP")) {
        (true, Some(reason)) => Verdict::Skipped(reason.trim().to_owned()),
        (true, None) => Verdict::Passed,
        (false, _) => Verdict::Failed(words(output)),
    })
}

/// A line with a result: whether it is good, and what follows the test's number.
fn result(line: &str) -> Option<(bool, &str)> {
    let (passed, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ')?;
    number.parse::<u32>().ok().map(|_| (passed, rest))
}

/// The name in the rest of a result, without directives and with no dash before it.
fn named(rest: &str) -> &str {
    let name = rest.split_once('#').map_or(rest, |(name, _)| name).trim();
    name.strip_prefix("- ").unwrap_or(name)
}

/// What a test that failed said of it, without what the harness says of every test.
fn words(output: &str) -> String {
    let of_the_harness = ["RUN ", "FAIL ", "OK ", "Starting ", "Totals:", "FAILED:", "PASSED:", "SKIP "];
    let said = output.lines().filter_map(|line| line.strip_prefix('#')).map(str::trim);
    let said =
        said.filter(|line| !line.is_empty() && !of_the_harness.iter().any(|start| line.starts_with(start)));
    let lines: Vec<_> = said.take(LINES).collect();
    if lines.is_empty() { "It failed without a word".to_owned() } else { lines.join("\n") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
# [INFO] detected hugetlb page size: 2048 KiB
# FIXTURE            VARIANT                   TEST
global                                         
--------------------------------------------------------------------------------
hmm                  hmm_device_private        open_close
                     hmm_device_coherent       anon_read
                                               migrate
--------------------------------------------------------------------------------
plain                                          snapshot
# [INFO] detected hugetlb page size: 1048576 KiB
";

    const RUN: &str = "\
TAP version 13
1..4
# Starting 4 tests from 1 test cases.
#  RUN           hmm.hmm_device_private.open_close ...
#            OK  hmm.hmm_device_private.open_close
ok 1 hmm.hmm_device_private.open_close
#  RUN           hmm.hmm_device_private.migrate ...
# hmm-tests.c:1068:migrate:Expected ret (-14) == 0 (0)
# migrate: Test terminated by assertion
#          FAIL  hmm.hmm_device_private.migrate
not ok 2 hmm.hmm_device_private.migrate
#      SKIP      Unable to open /sys/kernel/debug/gup_test
ok 3 hmm.hmm_device_private.hmm_gup_test # SKIP Unable to open /sys/kernel/debug/gup_test
ok 4 - hmm.hmm_device_private.migrate_fault
# FAILED: 3 / 4 tests passed.
# Totals: pass:2 fail:1 xfail:0 xpass:0 skip:1 error:0
";

    fn of(test: &str) -> Option<Verdict> {
        verdict(RUN, &format!("hmm.hmm_device_private.{test}"))
    }

    #[test]
    fn each_variant_of_a_fixture_has_each_of_its_tests() {
        let found = list(LIST);
        assert_eq!(found.len(), 7, "{found:?}");
        assert_eq!(found[0], "hmm.hmm_device_private.open_close");
        assert_eq!(found[5], "hmm.hmm_device_coherent.migrate");
        assert_eq!(found[6], "plain.snapshot");
        assert!(list("hmm-tests: not found\n").is_empty());
    }

    #[test]
    fn a_test_has_passed_was_skipped_or_failed_with_its_own_words() {
        assert_eq!(of("open_close"), Some(Verdict::Passed));
        assert_eq!(of("migrate_fault"), Some(Verdict::Passed));
        let reason = "Unable to open /sys/kernel/debug/gup_test";
        assert_eq!(of("hmm_gup_test"), Some(Verdict::Skipped(reason.into())));
        let Some(Verdict::Failed(words)) = of("migrate") else { panic!() };
        assert!(
            words.starts_with("hmm-tests.c:1068:migrate:Expected ret (-14) == 0 (0)\nmigrate: Test term"),
            "{words}"
        );
        assert!(!words.contains("RUN") && !words.contains("Totals"), "{words}");
    }

    #[test]
    fn a_test_without_a_result_has_not_passed() {
        assert_eq!(of("snapshot"), None);
        assert_eq!(of("migr"), None, "names are compared whole");
        assert_eq!(
            verdict("ok hmm.hmm_device_private.open_close\n", "hmm.hmm_device_private.open_close"),
            None
        );
    }
}
