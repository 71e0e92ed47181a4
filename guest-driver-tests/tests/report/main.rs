//! Reports say what the results say, in each form, whatever a guest has said: they are read back here by parsers that
//! know nothing of how they were written. What was told lies in target/report, to be looked at.

mod ktap;
mod page;
mod pictures;
mod sample;
mod terminal;

use std::collections::BTreeMap;
use std::path::PathBuf;

use guest_driver_tests::suite::report;
use guest_driver_tests::suite::results::{Case, Outcome, Results};
use roxmltree::Node;
use sample::results;

/// Puts a report where a person can look at it.
fn show(name: &str, text: &str) {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("report");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(name), text).unwrap();
}

/// What others have said, as it is to come out: nothing of it is lost but what cannot be shown.
fn cleaned() -> String {
    report::text::clean(sample::NASTY)
}

fn find<'a>(results: &'a Results, id: &str, place: &str) -> &'a Case {
    results.cases.iter().find(|case| case.id() == id && case.place() == place).unwrap()
}

fn children<'a>(node: Node<'a, 'a>, name: &'static str) -> impl Iterator<Item = Node<'a, 'a>> {
    node.children().filter(move |child| child.has_tag_name(name))
}

fn only<'a>(node: Node<'a, 'a>, name: &'static str) -> Option<Node<'a, 'a>> {
    let mut all = children(node, name);
    let first = all.next();
    assert_eq!(all.next(), None, "two {name}");
    first
}

fn number(node: Node<'_, '_>, attribute: &str) -> usize {
    node.attribute(attribute).unwrap_or_else(|| panic!("{node:?} has no {attribute}")).parse().unwrap()
}

/// What a suite or a case says of itself by name.
fn properties<'a>(node: Node<'a, 'a>) -> BTreeMap<&'a str, &'a str> {
    let all = only(node, "properties").into_iter().flat_map(|all| children(all, "property"));
    all.map(|one| (one.attribute("name").unwrap(), one.attribute("value").unwrap())).collect()
}

#[test]
fn junit_has_a_case_for_each_with_its_outcome() {
    let results = results();
    let text = report::junit::render(results).unwrap();
    show("junit.xml", &text);
    let document = roxmltree::Document::parse(&text).unwrap();
    let root = document.root_element();
    assert!(root.has_tag_name("testsuites"));
    let suites: Vec<_> = children(root, "testsuite").collect();
    assert_eq!(suites.len(), report::places(results).len());
    for (suite, place) in suites.iter().zip(report::places(results)) {
        assert_eq!(suite.attribute("name"), Some(place.as_str()));
        assert_eq!(properties(*suite)["QEMU"], "10.0.2");
        let cases: Vec<_> = report::cases_at(results, &place).collect();
        let tests: Vec<_> = children(*suite, "testcase").collect();
        assert_eq!((tests.len(), number(*suite, "tests")), (cases.len(), cases.len()));
        for (test, case) in tests.iter().zip(&cases) {
            assert_is_case(*test, case, &place);
        }
        let count = |wanted: fn(&Outcome) -> bool| cases.iter().filter(|case| wanted(&case.outcome)).count();
        assert_eq!(number(*suite, "failures"), count(|outcome| matches!(outcome, Outcome::Failed(_))));
        assert_eq!(number(*suite, "errors"), count(|outcome| matches!(outcome, Outcome::Broken(_))));
        let skipped = suite.attribute("skipped").or(suite.attribute("disabled"));
        let skipped: usize = skipped.unwrap().parse().unwrap();
        assert_eq!(skipped, count(|outcome| matches!(outcome, Outcome::Skipped(_))));
    }
}

fn assert_is_case(test: Node<'_, '_>, case: &Case, place: &str) {
    assert_eq!(test.attribute("name"), Some(case.id().as_str()));
    assert_eq!(test.attribute("classname"), Some(format!("{place}.{}", case.group).as_str()));
    let took: f64 = test.attribute("time").unwrap().parse().unwrap();
    assert!((took - case.took.as_secs_f64()).abs() < 0.001, "{took}");
    let (word, told) = report::told(&case.outcome);
    let element = match word {
        "failed" => Some("failure"),
        "broken" => Some("error"),
        "skipped" => Some("skipped"),
        _ => None,
    };
    let reruns = ["rerunFailure", "flakyError", "flakyFailure"].map(|name| only(test, name));
    assert_eq!(reruns.map(|rerun| rerun.is_some()), [false, false, word == "flaky"], "{}", case.id());
    if let [.., Some(first)] = reruns {
        assert_eq!(first.attribute("message"), Some(report::text::headline(told).as_str()));
    }
    for name in ["failure", "error", "skipped"] {
        assert_eq!(only(test, name).is_some(), element == Some(name), "{} at {place}", case.id());
    }
    if let Some(message) = element.and_then(|name| only(test, name)).map(|node| node.attribute("message")) {
        let expected =
            if word == "skipped" { report::text::one_line(told) } else { report::text::headline(told) };
        assert_eq!(message, Some(expected.as_str()));
    }
}

#[test]
fn junit_carries_what_others_said_as_text_and_no_more_than_fits() {
    let text = report::junit::render(results()).unwrap();
    let forbidden = |character: char| character.is_control() && !matches!(character, '\n' | '\t');
    assert!(!text.contains(forbidden) && !text.contains(['\u{fffe}', '\u{ffff}']));
    let document = roxmltree::Document::parse(&text).unwrap();
    let failure = document.descendants().find(|node| {
        node.has_tag_name("failure") && node.parent().unwrap().attribute("name") == Some("97-nasty")
    });
    let test = failure.unwrap().parent().unwrap();
    assert!(failure.unwrap().text().unwrap().contains(&format!("second line {}", cleaned())));
    let out = only(test, "system-out").unwrap().text().unwrap();
    assert!(out.ends_with("the last line of the console") && out.contains("bytes before this are left out"));
    assert!(out.len() <= 65 << 10, "{}", out.len());
    assert!(only(test, "system-err").unwrap().text().unwrap().contains(&cleaned()));
    assert!(text.len() < 1 << 20, "{}", text.len());
}

#[test]
fn ktap_has_a_subtest_a_place_and_keeps_its_plans() {
    let results = results();
    let text = report::ktap::render(results);
    show("results.ktap", &text);
    let tests = ktap::read(&text);
    let places = report::places(results);
    assert_eq!(tests.len(), places.len());
    for (test, place) in tests.iter().zip(&places) {
        assert_eq!(test.name, place.replace('#', "_"));
        let cases: Vec<_> = report::cases_at(results, place).collect();
        assert_eq!(test.subtests.len(), cases.len());
        assert_eq!(test.ok, test.subtests.iter().all(|subtest| subtest.ok));
        for (subtest, case) in test.subtests.iter().zip(cases) {
            let (word, told) = report::told(&case.outcome);
            let directive = match word {
                "skipped" => Some(("SKIP".to_owned(), report::text::one_line(told))),
                "broken" => Some(("ERROR".to_owned(), report::text::headline(told))),
                _ => None,
            };
            let ok = matches!(word, "passed" | "flaky" | "skipped");
            let says_flaky = subtest.diagnostics.iter().any(|line| line.contains(": flaky: it passed when"));
            assert_eq!(says_flaky, word == "flaky");
            assert_eq!((subtest.name.as_str(), subtest.ok), (case.id().as_str(), ok));
            assert_eq!(subtest.directive, directive);
        }
    }
}

#[test]
fn ktap_says_before_a_result_what_there_is_to_say_of_it() {
    let results = results();
    let tests = ktap::read(&report::ktap::render(results));
    let nasty = tests[0].subtests.iter().find(|test| test.name == "97-nasty").unwrap();
    let message = report::told(&find(results, "97-nasty", "soft").outcome).1;
    let told = report::text::clean(message);
    let said: Vec<&str> = nasty.diagnostics.iter().map(String::as_str).collect();
    for line in told.lines().chain(["console: the last line of the console", "97-nasty: A note."]) {
        assert!(said.contains(&line.trim_end()), "{line:?} is missing");
    }
    // What a guest says cannot be taken for a result, whatever a reader takes for the end of a line.
    let text = report::ktap::render(results);
    assert!(!text.contains(|character: char| character.is_control() && !matches!(character, '\n' | '\t')));
    assert!(!text.contains(['\u{2028}', '\u{2029}']));
    assert_eq!(tests.iter().flat_map(|test| &test.subtests).count(), results.cases.len());
}
