//! The table of all rows: names, arguments, explanations; and how they are read and written. Knows nothing of what a
//! row does.

use std::fmt;
use std::time::Duration;

use crate::args::duration;

/// A row: a seeded bug or a kind of stress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Bug {
    /// Every INVALIDATE is acked at once, while jobs still use its range.
    AckBeforeDrain,
    /// Every step of a job takes that much longer.
    StepDelay,
}

/// What a row is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A fault of the device, to prove that a test catches it.
    Fault,
    /// What a device may do, at an awkward time: a good driver survives it.
    Stress,
}

impl Kind {
    /// How the control socket calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fault => "bug",
            Self::Stress => "stress",
        }
    }
}

/// What stands behind the `=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Argument {
    None,
    /// `DURATION`, or `..DURATION` for a random time up to it.
    Delay,
}

impl Argument {
    fn usage(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Delay => "=[..]DURATION",
        }
    }
}

/// A row of the table.
pub(super) struct Row {
    pub(super) bug: Bug,
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) argument: Argument,
    pub(super) help: &'static str,
}

/// In the order of [`Bug`].
pub(super) const ROWS: &[Row] = &[
    Row {
        bug: Bug::AckBeforeDrain,
        name: "ack-before-drain",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "ack every INVALIDATE at once, while jobs still use its range",
    },
    Row {
        bug: Bug::StepDelay,
        name: "step-delay",
        kind: Kind::Stress,
        argument: Argument::Delay,
        help: "make every step of a job take that much longer",
    },
];

const _: () = {
    let mut index = 0;
    while index < ROWS.len() {
        assert!(ROWS[index].bug as usize == index, "rows are in the order of Bug");
        index += 1;
    }
};

impl Row {
    /// Name and argument, as they are written.
    pub(super) fn usage(&self) -> String {
        format!("{}{}", self.name, self.argument.usage())
    }
}

/// A row that is on, with its argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// The row.
    pub bug: Bug,
    /// Its argument.
    pub value: Value,
}

/// The argument of a row that is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// It has none.
    Plain,
    /// This long.
    Fixed(Duration),
    /// A random time, up to this.
    UpTo(Duration),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => Ok(()),
            Self::Fixed(time) => write!(f, "{}", humantime::format_duration(*time)),
            Self::UpTo(time) => write!(f, "..{}", humantime::format_duration(*time)),
        }
    }
}

impl Setting {
    /// Reads name and argument.
    pub fn parse(name: &str, argument: Option<&str>) -> Result<Self, String> {
        let row = row(name)?;
        let value = match (row.argument, argument) {
            (Argument::None, None) => Value::Plain,
            (Argument::Delay, Some(text)) => match text.strip_prefix("..") {
                Some(most) => Value::UpTo(delay(most)?),
                None => Value::Fixed(delay(text)?),
            },
            _ => return Err(format!("write it as {}", row.usage())),
        };
        Ok(Self { bug: row.bug, value })
    }
}

/// The row of that name.
pub(super) fn row(name: &str) -> Result<&'static Row, String> {
    ROWS.iter().find(|row| row.name == name).ok_or_else(|| {
        let known: Vec<_> = ROWS.iter().map(Row::usage).collect();
        format!("there is no bug of this name; there are {}", known.join(", "))
    })
}

/// Most that anything is delayed: longer than every timeout that a test would wait for.
const LONGEST: Duration = Duration::from_secs(60);

fn delay(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    if time > LONGEST { Err(format!("must be at most {LONGEST:?}")) } else { Ok(time) }
}

/// One line for `-h`.
pub(crate) const SHORT_HELP: &str = "Turn on a seeded bug, for tests of the tests; repeatable, see --help";

/// All rows, for `--help`.
pub(crate) fn long_help() -> String {
    let mut help =
        "Turn on a seeded bug, to see that tests catch it, or stress, to see that drivers survive it; \
         repeatable. Never for a guest that matters.\n"
            .to_owned();
    for kind in [Kind::Fault, Kind::Stress] {
        help.push_str(match kind {
            Kind::Fault => "\nBugs:\n",
            Kind::Stress => "\nStress ([..]DURATION: a fixed time, or, with dots, a random one up to it):\n",
        });
        for row in ROWS.iter().filter(|row| row.kind == kind) {
            help.push_str(&format!("  {}: {}\n", row.usage(), row.help));
        }
    }
    help
}

/// Reads `name` or `name=argument`.
pub(crate) fn parse(text: &str) -> Result<Setting, String> {
    match text.split_once('=') {
        Some((name, argument)) => Setting::parse(name, Some(argument)),
        None => Setting::parse(text, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_written_as_its_table_says() {
        let on = |bug, value| Ok(Setting { bug, value });
        assert_eq!(parse("ack-before-drain"), on(Bug::AckBeforeDrain, Value::Plain));
        let time = Duration::from_millis(5);
        assert_eq!(parse("step-delay=5ms"), on(Bug::StepDelay, Value::Fixed(time)));
        assert_eq!(parse("step-delay=..5ms"), on(Bug::StepDelay, Value::UpTo(time)));
        assert_eq!(parse("step-delay"), Err("write it as step-delay=[..]DURATION".to_owned()));
        assert_eq!(parse("ack-before-drain=1"), Err("write it as ack-before-drain".to_owned()));
        let unknown = "there is no bug of this name; there are ack-before-drain, ";
        assert!(parse("ack").unwrap_err().starts_with(unknown));
        assert!(parse("step-delay=slow").unwrap_err().contains("such as 100ms"));
        assert_eq!(parse("step-delay=2min"), Err("must be at most 60s".to_owned()));
    }

    #[test]
    fn the_help_has_every_row() {
        let help = long_help();
        for row in ROWS {
            assert!(help.contains(&format!("\n  {}: {}\n", row.usage(), row.help)), "{}", row.name);
        }
    }
}
