//! Seeded bugs: known faults that `--inject` turns on, so that a test can show that it would have seen them.
//! One table has their names, arguments and explanations. Never use them with a guest that matters.

use std::time::Duration;

use crate::args::duration;

/// A seeded bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// Every INVALIDATE is acked at once, while jobs still use its range.
    AckBeforeDrain,
    /// Every step of a job takes that much longer. Not a fault by itself: it widens the window for others.
    StepDelay(Duration),
}

/// How a bug is written and explained.
struct Row {
    name: &'static str,
    /// What stands behind the `=`, if anything.
    argument: Option<&'static str>,
    help: &'static str,
    make: fn(&str) -> Result<Bug, String>,
}

const BUGS: &[Row] = &[
    Row {
        name: "ack-before-drain",
        argument: None,
        help: "ack every INVALIDATE at once, while jobs still use its range",
        make: |_| Ok(Bug::AckBeforeDrain),
    },
    Row {
        name: "step-delay",
        argument: Some("DURATION"),
        help: "make every step of a job take that much longer",
        make: |argument| duration(argument).map(Bug::StepDelay),
    },
];

/// One line for `-h`.
pub(crate) const SHORT_HELP: &str = "Turn on a seeded bug, for tests of the tests; repeatable, see --help";

/// All bugs, for `--help`.
pub(crate) fn long_help() -> String {
    let mut help =
        "Turn on a seeded bug, to see that tests catch it; repeatable. Never for a guest that matters.\n"
            .to_owned();
    for row in BUGS {
        help.push_str(&format!("\n  {}: {}", usage(row), row.help));
    }
    help
}

fn usage(row: &Row) -> String {
    match row.argument {
        None => row.name.to_owned(),
        Some(argument) => format!("{}={argument}", row.name),
    }
}

/// Reads `name` or `name=argument`.
pub(crate) fn parse(text: &str) -> Result<Bug, String> {
    let (name, argument) = match text.split_once('=') {
        Some((name, argument)) => (name, Some(argument)),
        None => (text, None),
    };
    let Some(row) = BUGS.iter().find(|row| row.name == name) else {
        let known: Vec<_> = BUGS.iter().map(usage).collect();
        return Err(format!("there is no bug of this name; there are {}", known.join(", ")));
    };
    if row.argument.is_some() != argument.is_some() {
        return Err(format!("write it as {}", usage(row)));
    }
    (row.make)(argument.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_is_written_as_its_table_says() {
        assert_eq!(parse("ack-before-drain"), Ok(Bug::AckBeforeDrain));
        assert_eq!(parse("step-delay=5ms"), Ok(Bug::StepDelay(Duration::from_millis(5))));
        assert_eq!(parse("step-delay"), Err("write it as step-delay=DURATION".to_owned()));
        assert_eq!(parse("ack-before-drain=1"), Err("write it as ack-before-drain".to_owned()));
        let unknown = "there is no bug of this name; there are ack-before-drain, step-delay=DURATION";
        assert_eq!(parse("ack"), Err(unknown.to_owned()));
        assert!(parse("step-delay=slow").unwrap_err().contains("such as 100ms"));
    }
}
