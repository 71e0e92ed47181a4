//! Results as JUnit XML: the format that Jenkins, GitLab and the readers on GitHub take. A suite per place, a class
//! per group. Knows that format; knows nothing of its readers.

use chrono::{DateTime, Utc};
use quick_junit::{
    NonSuccessKind, Property, Report, SerializeError, TestCase, TestCaseStatus, TestRerun, TestSuite,
};

use super::super::results::{Case, Outcome, Results};
use super::{cases_at, places, text};

/// Bytes of a console or a log that are kept of each case: readers hold the whole file in memory.
const MOST: usize = 64 << 10;

/// The results as JUnit XML.
pub fn render(results: &Results) -> Result<String, SerializeError> {
    let mut report = Report::new("mirrorgpu");
    report.set_timestamp(DateTime::<Utc>::from(results.started)).set_time(results.took);
    for place in places(results) {
        report.add_test_suite(suite(results, &place));
    }
    report.to_string()
}

fn suite(results: &Results, place: &str) -> TestSuite {
    let mut suite = TestSuite::new(text::one_line(place));
    let cases: Vec<_> = cases_at(results, place).collect();
    suite.set_timestamp(DateTime::<Utc>::from(results.started));
    suite.set_time(cases.iter().map(|case| case.took).sum());
    suite.add_properties(results.environment.iter().map(property));
    suite.add_test_cases(cases.into_iter().map(test_case));
    suite
}

fn property((name, value): &(String, String)) -> Property {
    Property::new(text::one_line(name), text::one_line(value))
}

fn test_case(case: &Case) -> TestCase {
    let mut test = TestCase::new(text::one_line(&case.id()), status(case));
    // Readers take the part before the last dot for a folder.
    test.set_classname(format!("{}.{}", text::one_line(&case.place()), case.group.replace('.', " ")));
    test.set_time(case.took);
    test.add_property(Property::new("promise", text::one_line(case.promise)));
    test.add_properties(case.evidence.numbers.iter().map(property));
    let notes = case.evidence.notes.iter().map(|note| format!("{note}\n")).collect::<String>();
    let said = notes + &case.evidence.console;
    if !said.is_empty() {
        test.set_system_out(text::excerpt(&said, MOST));
    }
    if !case.evidence.backend_log.is_empty() {
        test.set_system_err(text::excerpt(&case.evidence.backend_log, MOST));
    }
    test
}

fn status(case: &Case) -> TestCaseStatus {
    let (mut status, told) = match &case.outcome {
        Outcome::Passed => return TestCaseStatus::success(),
        Outcome::Flaky(told) => {
            let mut first = TestRerun::new(NonSuccessKind::Failure);
            first.set_message(text::headline(told)).set_type("flaky").set_description(whole(case, told));
            let mut status = TestCaseStatus::success();
            status.add_rerun(first);
            return status;
        }
        Outcome::Skipped(reason) => {
            let mut status = TestCaseStatus::skipped();
            status.set_message(text::one_line(reason));
            return status;
        }
        Outcome::Failed(told) => (TestCaseStatus::non_success(NonSuccessKind::Failure), told),
        Outcome::Broken(told) => (TestCaseStatus::non_success(NonSuccessKind::Error), told),
    };
    let kind = if matches!(case.outcome, Outcome::Broken(_)) { "broken" } else { "failed" };
    status.set_message(text::headline(told)).set_type(kind);
    status.set_description(whole(case, told));
    status
}

/// The failure, and the back-end's reports.
fn whole(case: &Case, told: &String) -> String {
    let whole = std::iter::once(told).chain(&case.evidence.reports);
    let whole = whole.map(|part| text::clean(part)).collect::<Vec<_>>().join("\n\n");
    text::beginning(&whole, MOST)
}
