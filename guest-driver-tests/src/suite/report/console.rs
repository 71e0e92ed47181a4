//! Results on the terminal: a line for each case as it ends, a progress bar below them on a terminal, and at the end
//! the failures, a table and the counts. Knows what is printed and when; knows nothing of how cases are run.

use crate::soft_guest::turn::held;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::super::super::rig::report::{keep_below, table};
use super::super::results::{Case, Counts, Outcome, Results};
use super::{cases_at, places, text, told};

/// Bytes of a message that are printed at the end.
const MESSAGE: usize = 4 << 10;
/// Characters of a reason that are printed next to a case.
const REASON: usize = 100;

/// Reports the progress of a run; may be called by many threads.
pub struct Teller(Mutex<Inner>);

struct Inner {
    out: Box<dyn Write + Send>,
    colour: bool,
    bar: Option<ProgressBar>,
    bad: usize,
}

impl fmt::Debug for Teller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Teller")
    }
}

impl Default for Teller {
    fn default() -> Self {
        Self::new()
    }
}

impl Teller {
    /// Prints to standard output: with a bar and colours if that is an interactive terminal.
    pub fn new() -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let terminal = io::stdout().is_terminal() && !set("CI") && !dumb;
        let bar = terminal.then(|| ProgressBar::with_draw_target(None, ProgressDrawTarget::stdout()));
        let colour = terminal && !set("NO_COLOR");
        Self(Mutex::new(Inner { out: Box::new(io::stdout()), colour, bar, bad: 0 }))
    }

    /// Prints plain lines to this writer.
    pub fn plain(out: Box<dyn Write + Send>) -> Self {
        Self(Mutex::new(Inner { out, colour: false, bar: None, bad: 0 }))
    }

    /// A run of this many cases begins.
    pub fn begin(&self, total: usize) {
        let inner = self.lock();
        let Some(bar) = &inner.bar else { return };
        bar.set_length(total as u64);
        keep_below(Some(bar.clone()));
        let style = ProgressStyle::with_template("{bar:30} {pos}/{len}{msg}  {elapsed}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        // The time keeps counting although nothing ends.
        bar.enable_steady_tick(Duration::from_secs(1));
    }

    /// A case has ended.
    pub fn case(&self, case: &Case) {
        let mut inner = self.lock();
        let line = inner.line(case);
        inner.say(&line);
        inner.bad += usize::from(case.outcome.is_bad());
        if let Some(bar) = &inner.bar {
            bar.inc(1);
            if inner.bad > 0 {
                bar.set_message(format!(", {} not passed", inner.bad));
            }
        }
    }

    /// Prints other messages meanwhile: on their own lines, above the bar.
    pub fn say(&self, what: &str) {
        self.lock().say(what);
    }

    /// The run is over. The last line has the counts and nothing else.
    pub fn end(&self, results: &Results) {
        let mut inner = self.lock();
        if let Some(bar) = inner.bar.take() {
            keep_below(None);
            bar.finish_and_clear();
        }
        let said = inner.ending(results);
        inner.say(&said);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        held(&self.0)
    }
}

impl Inner {
    /// Prints one or more lines, above the bar if there is one.
    fn say(&mut self, what: &str) {
        let Self { out, bar, .. } = self;
        let mut write = || {
            // A closed output is no reason to stop.
            let _ = writeln!(out, "{what}").and_then(|()| out.flush());
        };
        match bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// `ok     15-unmap-then-remap  soft  0.4 s`
    fn line(&self, case: &Case) -> String {
        let (id, place) = (case.id(), text::one_line(&case.place()));
        let rest = match &case.outcome {
            Outcome::Passed => text::took(case.took),
            Outcome::Skipped(reason) => short(reason),
            Outcome::Flaky(why) | Outcome::Failed(why) | Outcome::Broken(why) => {
                format!("{}  {}", text::took(case.took), short(why))
            }
        };
        format!("{}  {id}  {place}  {rest}", self.word(&case.outcome))
    }

    /// The outcome in six columns.
    fn word(&self, outcome: &Outcome) -> String {
        let (word, colour) = match outcome {
            Outcome::Passed => ("ok", "32"),
            Outcome::Flaky(_) => ("flaky", "1;33"),
            Outcome::Failed(_) => ("FAILED", "1;31"),
            Outcome::Skipped(_) => ("skip", "2"),
            Outcome::Broken(_) => ("BROKEN", "1;33"),
        };
        match self.colour {
            true => format!("\x1b[{colour}m{word:<6}\x1b[0m"),
            false => format!("{word:<6}"),
        }
    }

    fn ending(&self, results: &Results) -> String {
        let mut said = String::new();
        let wants_a_look = |case: &&Case| case.outcome.wants_a_look();
        for case in results.cases.iter().filter(wants_a_look) {
            let (word, place) = (self.word(&case.outcome), text::one_line(&case.place()));
            said += &format!("\n{}  {}  {place}\n", word, case.id());
            for line in text::beginning(told(&case.outcome).1, MESSAGE).lines() {
                said += &format!("    {line}\n");
            }
        }
        said += &format!("\n{}\n", counted(results));
        let Counts { passed, flaky, failed, skipped, broken } = results.counts();
        if flaky > 0 {
            said += &format!(
                "\nFlaky, and counted as passed: {flaky}. They failed first, as above, and passed when run again.\n"
            );
        }
        if broken > 0 {
            said += &format!(
                "\nBroken, and counted as failed: {broken}. The rig could not judge them; see above why.\n"
            );
        }
        said + &format!("\n{} passed, {} failed, {skipped} skipped", passed + flaky, failed + broken)
    }
}

/// A reason as the rest of a line.
fn short(reason: &str) -> String {
    let line = text::headline(reason);
    match line.char_indices().nth(REASON) {
        Some((end, _)) => format!("{}…", line.get(..end).unwrap_or_default()),
        None => line,
    }
}

/// The counts by place.
fn counted(results: &Results) -> String {
    let head = ["", "passed", "flaky", "failed", "broken", "skipped"].map(str::to_owned).to_vec();
    let row = |place: String| {
        let count = |word: &str| {
            cases_at(results, &place).filter(|case| told(&case.outcome).0 == word).count().to_string()
        };
        let counts = ["passed", "flaky", "failed", "broken", "skipped"].map(count);
        [text::one_line(&place)].into_iter().chain(counts).collect()
    };
    let rows: Vec<Vec<String>> = [head].into_iter().chain(places(results).into_iter().map(row)).collect();
    table(&rows)
}
