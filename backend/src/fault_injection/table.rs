//! The table of faults that can be injected: names, arguments, help texts; and their parser. Knows nothing of how a
//! fault takes effect.

use std::fmt;
use std::time::Duration;

use crate::units::duration;

/// A row: a seeded bug or a kind of stress. What it does is its help text.
#[expect(missing_docs, reason = "the table says it")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Bug {
    AckBeforeDrain,
    SkipSection,
    SkipPin,
    DropZap,
    StaleTranslation,
    CacheClaimedPermission,
    SignalBeforeWrite,
    LoseFence,
    RepeatFence,
    ReorderFence,
    ForgetWake,
    LoseJobOverStop,
    KeepJobsOverReset,
    KeepStagedUpdate,
    SwallowFailure,
    DrainEverything,
    DelayAck,
    StepDelay,
    DelayMiss,
    DelayFence,
    RefuseMiss,
    ForcePreempt,
    HangJob,
    SpuriousFault,
    NoInterrupt,
    SpuriousInterrupt,
}

/// What a row is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A fault of the device, to prove that a test catches it.
    Fault,
    /// Legal behaviour of a device at an awkward time: a correct driver survives it.
    Stress,
}

impl Kind {
    /// Its name on the control socket.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fault => "bug",
            Self::Stress => "stress",
        }
    }
}

/// The form of the argument, behind the `=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Argument {
    None,
    /// `DURATION`, or `..DURATION` for a random time up to it.
    Delay,
    /// `N`: every Nth time; N is at least this.
    Every(u32),
    /// How badly a job hangs.
    Grade,
}

impl Argument {
    fn usage(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Delay => "=[..]DURATION",
            Self::Every(_) => "=N",
            Self::Grade => "=yielding|stubborn|stuck",
        }
    }
}

/// How badly a job hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Grade {
    /// It leaves its engine when it is asked to.
    Yielding,
    /// It ignores requests to leave its engine for a while, but gives its pin back at once.
    Stubborn,
    /// Its steps do not end in time.
    Stuck,
}

impl Grade {
    pub(super) const ALL: [Self; 3] = [Self::Yielding, Self::Stubborn, Self::Stuck];

    fn name(self) -> &'static str {
        match self {
            Self::Yielding => "yielding",
            Self::Stubborn => "stubborn",
            Self::Stuck => "stuck",
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
        bug: Bug::SkipSection,
        name: "skip-section",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "ack an INVALIDATE although a step that began before it is not over",
    },
    Row {
        bug: Bug::SkipPin,
        name: "skip-pin",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "ack an INVALIDATE although a job still has its range pinned",
    },
    Row {
        bug: Bug::DropZap,
        name: "drop-zap",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "keep translations that an INVALIDATE takes away",
    },
    Row {
        bug: Bug::StaleTranslation,
        name: "stale-translation",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "answer a miss for a page that was remapped with where it was before",
    },
    Row {
        bug: Bug::CacheClaimedPermission,
        name: "cache-claimed-permission",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "cache the permission that an UPDATE claims, not the one that its MISS proved",
    },
    Row {
        bug: Bug::SignalBeforeWrite,
        name: "signal-before-write",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "write the values of SIGNALs and user fences before what a job writes ahead of them",
    },
    Row {
        bug: Bug::LoseFence,
        name: "lose-fence",
        kind: Kind::Fault,
        argument: Argument::Every(1),
        help: "never answer every Nth command that has a fence",
    },
    Row {
        bug: Bug::RepeatFence,
        name: "repeat-fence",
        kind: Kind::Fault,
        argument: Argument::Every(1),
        help: "answer every Nth command that has a fence twice",
    },
    Row {
        bug: Bug::ReorderFence,
        name: "reorder-fence",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "let the next fence of a timeline go out before one that comes first, if it comes within \
               20ms",
    },
    Row {
        bug: Bug::ForgetWake,
        name: "forget-wake",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "do not wake a parked ack when the last one is out: only its deadline finds that",
    },
    Row {
        bug: Bug::LoseJobOverStop,
        name: "lose-job-over-stop",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "forget the jobs that a stop finds",
    },
    Row {
        bug: Bug::KeepJobsOverReset,
        name: "keep-jobs-over-reset",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "let the jobs that a reset finds go on after the next start",
    },
    Row {
        bug: Bug::KeepStagedUpdate,
        name: "keep-staged-update",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "believe an UPDATE whose pages an INVALIDATE takes away before the reply to its miss",
    },
    Row {
        bug: Bug::SwallowFailure,
        name: "swallow-failure",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "answer a job that failed as one that ended well",
    },
    Row {
        bug: Bug::DrainEverything,
        name: "drain-everything",
        kind: Kind::Fault,
        argument: Argument::None,
        help: "let every INVALIDATE take away all translations, and wait for all jobs",
    },
    Row {
        bug: Bug::DelayAck,
        name: "delay-ack",
        kind: Kind::Stress,
        argument: Argument::Delay,
        help: "hold the ack of every INVALIDATE back",
    },
    Row {
        bug: Bug::StepDelay,
        name: "step-delay",
        kind: Kind::Stress,
        argument: Argument::Delay,
        help: "make every step of a job take that much longer",
    },
    Row {
        bug: Bug::DelayMiss,
        name: "delay-miss",
        kind: Kind::Stress,
        argument: Argument::Delay,
        help: "hold every MISS back",
    },
    Row {
        bug: Bug::DelayFence,
        name: "delay-fence",
        kind: Kind::Stress,
        argument: Argument::Delay,
        help: "hold the answer to every command that has a fence back",
    },
    Row {
        bug: Bug::RefuseMiss,
        name: "refuse-miss",
        kind: Kind::Stress,
        argument: Argument::Every(1),
        help: "refuse every Nth page that a job misses, without asking",
    },
    Row {
        bug: Bug::ForcePreempt,
        name: "force-preempt",
        kind: Kind::Stress,
        argument: Argument::None,
        help: "take jobs off their engines at each step that touches memory",
    },
    Row {
        bug: Bug::HangJob,
        name: "hang-job",
        kind: Kind::Stress,
        argument: Argument::Grade,
        help: "let jobs of contexts get nowhere: yielding, they leave their engines when they are asked \
               to; stubborn, not for other jobs; stuck, each step takes 600ms, so that a drain revokes \
               the guest's memory and the session ends",
    },
    Row {
        bug: Bug::SpuriousFault,
        name: "spurious-fault",
        kind: Kind::Stress,
        argument: Argument::Every(2),
        help: "let every Nth step of a job fault on a page that is there",
    },
    Row {
        bug: Bug::NoInterrupt,
        name: "no-interrupt",
        kind: Kind::Stress,
        argument: Argument::Every(1),
        help: "complete without the interrupt that is due, every Nth time",
    },
    Row {
        bug: Bug::SpuriousInterrupt,
        name: "spurious-interrupt",
        kind: Kind::Stress,
        argument: Argument::None,
        help: "interrupt without a completion, whenever the rings are looked at",
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
    /// Name and argument as the user writes them.
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
    /// The row takes no argument.
    Plain,
    /// A fixed time.
    Fixed(Duration),
    /// A random time up to this one.
    UpTo(Duration),
    /// Every Nth time.
    Every(u32),
    /// How badly a job hangs.
    Grade(Grade),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => Ok(()),
            Self::Fixed(time) => write!(f, "{}", humantime::format_duration(*time)),
            Self::UpTo(time) => write!(f, "..{}", humantime::format_duration(*time)),
            Self::Every(count) => write!(f, "{count}"),
            Self::Grade(grade) => f.write_str(grade.name()),
        }
    }
}

impl Setting {
    /// Parses name and argument.
    pub fn parse(name: &str, argument: Option<&str>) -> Result<Self, String> {
        let row = row(name)?;
        let value = match (row.argument, argument) {
            (Argument::None, None) => Value::Plain,
            (Argument::Delay, Some(text)) => match text.strip_prefix("..") {
                Some(most) => Value::UpTo(delay(most)?),
                None => Value::Fixed(delay(text)?),
            },
            (Argument::Every(least), Some(text)) => Value::Every(every(text, least)?),
            (Argument::Grade, Some(text)) => {
                let known = Grade::ALL.into_iter().find(|grade| grade.name() == text);
                Value::Grade(known.ok_or_else(|| format!("write it as {}", row.usage()))?)
            }
            _ => return Err(format!("write it as {}", row.usage())),
        };
        Ok(Self { bug: row.bug, value })
    }
}

/// The row with this name.
pub(super) fn row(name: &str) -> Result<&'static Row, String> {
    ROWS.iter().find(|row| row.name == name).ok_or_else(|| {
        let known: Vec<_> = ROWS.iter().map(Row::usage).collect();
        format!("there is no bug of this name; there are {}", known.join(", "))
    })
}

/// Maximum delay: longer than every timeout that a test would wait for.
const LONGEST: Duration = Duration::from_secs(60);

fn delay(text: &str) -> Result<Duration, String> {
    let time = duration(text)?;
    if time > LONGEST { Err(format!("must be at most {LONGEST:?}")) } else { Ok(time) }
}

fn every(text: &str, least: u32) -> Result<u32, String> {
    match text.parse() {
        Ok(count) if count >= least => Ok(count),
        _ => Err(format!("must be a number, at least {least}")),
    }
}

/// One-line help for `-h`.
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

/// Parses `name` or `name=argument`.
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
        assert_eq!(parse("lose-fence=3"), on(Bug::LoseFence, Value::Every(3)));
        assert_eq!(parse("lose-fence=0"), Err("must be a number, at least 1".to_owned()));
        assert_eq!(parse("spurious-fault=1"), Err("must be a number, at least 2".to_owned()));
        assert_eq!(parse("hang-job=stuck"), on(Bug::HangJob, Value::Grade(Grade::Stuck)));
        let usage = "write it as hang-job=yielding|stubborn|stuck".to_owned();
        assert_eq!((parse("hang-job"), parse("hang-job=badly")), (Err(usage.clone()), Err(usage)));
    }

    #[test]
    fn the_help_has_every_row() {
        let help = long_help();
        assert_eq!(ROWS.len(), 26);
        for row in ROWS {
            assert!(help.contains(&format!("\n  {}: {}\n", row.usage(), row.help)), "{}", row.name);
        }
    }
}
