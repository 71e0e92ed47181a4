//! The kernel's own tests of drivers that mirror a process, against a driver for the device in a real guest: one case a
//! test, with the device's counts and findings beside it. Knows how they are run and judged; knows nothing of the tests.

use crate::rig::error::RigError;
use crate::rig::run::{Mark, Rig, Run};
use crate::rig::stats::{self, Stats};
use crate::rig::topology::Topology;
use crate::rig::variation::Variation;
use crate::suite::kselftest::{self, Verdict};
use crate::suite::real;
use crate::suite::results::{Case, Evidence, Level, Outcome};
use guest_agent::protocol::{Command, Ended, Event, Program};
use std::time::{Duration, Instant};

const PROGRAM: &str = "/programs/hmm-tests";
/// Two tests of huge pages fail with 512 MiB, whatever the driver.
const MACHINE: Variation =
    Variation { memory: Some(2048), qemu: &["-smp", "2"], no_driver: true, ..Variation::NONE };
/// One for each place where the tests map some, and a few more.
const HUGE_PAGES: u32 = 16;
/// Memory that a CPU reaches too needs hardware, and the benchmark judges nothing.
const LEFT_OUT: [&str; 2] = ["_coherent.", ".benchmark_"];
const GROUP: &str = "The kernel's hmm-tests";
const PROMISE: &str = "What this test of the kernel's expects of a driver that mirrors a process.";
const CLEAN_END: &str = "Guest, QEMU and back-end end, and none has complained.";
/// The rig's own time within the limit for an answer.
const MARGIN: Duration = Duration::from_secs(10);

/// Where and what to run.
pub struct HmmTests<'r> {
    /// Tools and programs; the guest has the tests and the driver.
    pub rig: &'r Rig,
    /// The machine.
    pub topology: &'r Topology,
    /// Only tests whose names have one of these in them; none: all.
    pub patterns: &'r [String],
    /// The longest that one may take.
    pub limit: Duration,
}

impl HmmTests<'_> {
    /// Runs them, and passes each case to `tell`. `begin` is told how many there are.
    pub fn run(&self, begin: &dyn Fn(usize), tell: &dyn Fn(&Case)) -> Result<Vec<Case>, RigError> {
        let mut guest = Some(self.boot()?);
        let names = self.names(guest.as_mut())?;
        begin(names.len() + 1);
        let mut cases = Vec::new();
        for (name, number) in names.iter().zip(1..) {
            let case = self.case(number, name, &mut guest);
            tell(&case);
            cases.push(case);
        }
        let begin = Instant::now();
        let outcome = match guest.map(Run::end) {
            None => Outcome::Skipped("The last guest has ended before".into()),
            Some(Ok(())) => Outcome::Passed,
            Some(Err(error)) => Outcome::Failed(error.to_string()),
        };
        let number = u32::try_from(cases.len() + 1).unwrap_or(u32::MAX);
        let case = self.made((number, "clean-end"), CLEAN_END, outcome, begin.elapsed(), Evidence::default());
        tell(&case);
        cases.push(case);
        Ok(cases)
    }

    fn boot(&self) -> Result<Run<'_>, RigError> {
        Run::boot_varied(self.rig, self.topology, MACHINE)
    }

    /// The names of the tests to run.
    fn names(&self, guest: Option<&mut Run<'_>>) -> Result<Vec<String>, RigError> {
        let Some(run) = guest else { return Ok(Vec::new()) };
        let listed = ask(run, self.program(vec!["-l".into()]))?;
        let names = wanted(kselftest::list(&listed.output), self.patterns);
        if names.is_empty() {
            let (patterns, said) = (self.patterns.join(", "), listed.output);
            return Err(RigError::Missing(format!("No test is named by {patterns}. The list says:\n{said}")));
        }
        Ok(names)
    }

    fn program(&self, arguments: Vec<String>) -> Program {
        let seconds = self.limit.saturating_sub(MARGIN).as_secs().max(1);
        Program { path: PROGRAM.into(), arguments, seconds, huge_pages: HUGE_PAGES }
    }

    /// Runs one test, in the guest that is there, or in a new one. After a failure of the rig or the kernel the guest is
    /// not used again.
    fn case<'s>(&'s self, number: u32, name: &str, guest: &mut Option<Run<'s>>) -> Case {
        let begin = Instant::now();
        let broken =
            |outcome, took| self.made((number, short(name)), PROMISE, outcome, took, Evidence::default());
        let mut run = match guest.take().map_or_else(|| self.boot(), Ok) {
            Ok(run) => run,
            Err(error) => {
                return broken(Outcome::Broken(format!("The guest did not boot: {error}")), begin.elapsed());
            }
        };
        let mut evidence = Evidence::default();
        let mut took = begin.elapsed();
        let outcome = match self.perform(&mut run, name, &mut evidence) {
            Ok((outcome, ran, is_usable)) => {
                took = ran;
                if is_usable {
                    *guest = Some(run);
                }
                outcome
            }
            Err(error) => Outcome::Failed(run.explain(error).to_string()),
        };
        self.made((number, short(name)), PROMISE, outcome, took, evidence)
    }

    /// Runs a test: its outcome, how long it took, and whether the guest can be used further.
    fn perform(
        &self,
        run: &mut Run<'_>,
        name: &str,
        evidence: &mut Evidence,
    ) -> Result<(Outcome, Duration, bool), RigError> {
        let (mark, log) = (run.console_mark(), run.backend_log().len());
        let (before, last) = (run.stats()?, real::last_violation(run));
        let ended = ask(run, self.program(vec!["-r".into(), name.to_owned()]))?;
        let after = run.stats()?;
        evidence.reports = real::reports_after(run, last);
        evidence.console = run.console_since(mark);
        evidence.backend_log = run.backend_log().get(log..).unwrap_or_default().to_owned();
        let counts = before.zip(after);
        evidence.numbers = counts.map(|(before, after)| numbers(&after.since(&before))).unwrap_or_default();
        let mut outcome = judged(&ended, name);
        let found = complaints(run, mark, counts, &evidence.reports);
        let is_usable = found.is_empty() && !ended.hangs;
        if !found.is_empty() && !outcome.is_bad() {
            outcome = Outcome::Failed(format!("The test itself passed, but:\n{}", found.join("\n")));
        } else if !found.is_empty()
            && let Outcome::Failed(words) = &mut outcome
        {
            words.push_str(&format!("\n{}", found.join("\n")));
        }
        Ok((outcome, Duration::from_millis(ended.milliseconds), is_usable))
    }

    fn made(
        &self,
        (number, name): (u32, &str),
        promise: &'static str,
        outcome: Outcome,
        took: Duration,
        evidence: Evidence,
    ) -> Case {
        Case {
            number,
            name: name.to_owned().into(),
            group: GROUP,
            promise,
            level: Level::Real,
            topology: Some(self.topology.name.clone()),
            outcome,
            took,
            evidence,
        }
    }
}

fn ask(run: &mut Run<'_>, program: Program) -> Result<Ended, RigError> {
    match run.ask("The end of a program in the guest", Command::Program(program))? {
        Event::Ended(ended) => Ok(ended),
        other => Err(crate::rig::guest::unexpected(&other)),
    }
}

/// The tests to run, of those that there are.
fn wanted(mut names: Vec<String>, patterns: &[String]) -> Vec<String> {
    names.retain(|name| {
        let is_named = patterns.is_empty() || patterns.iter().any(|pattern| name.contains(pattern.as_str()));
        is_named && !LEFT_OUT.iter().any(|part| name.contains(part))
    });
    names
}

/// A test's name without its fixture and variant, of which there is one each.
fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// What the test itself says.
fn judged(ended: &Ended, name: &str) -> Outcome {
    match (kselftest::verdict(&ended.output, name), ended.code, ended.signal) {
        (_, None, None) if ended.hangs => {
            Outcome::Failed(format!("It hangs in the kernel, and could not be killed:\n{}", ended.output))
        }
        (_, None, None) => {
            Outcome::Failed(format!("It did not end in time, and was killed:\n{}", ended.output))
        }
        (Some(Verdict::Passed), ..) => Outcome::Passed,
        (Some(Verdict::Skipped(reason)), ..) => Outcome::Skipped(reason),
        (Some(Verdict::Failed(words)), ..) => Outcome::Failed(words),
        (None, code, signal) => {
            let how =
                signal.map(|signal| format!("signal {signal}")).or(code.map(|code| format!("code {code}")));
            let how = how.unwrap_or_default();
            Outcome::Failed(format!("It ended with {how}, and without a result:\n{}", ended.output))
        }
    }
}

/// What the kernel and the device have to say against the driver.
fn complaints(run: &Run<'_>, mark: Mark, counts: Option<(Stats, Stats)>, reports: &[String]) -> Vec<String> {
    let of_the_kernel = run.no_troubles_since(mark).err().map(|error| error.to_string());
    let counts = counts.map(|(before, after)| stats::troubles(&before, &after)).unwrap_or_default();
    let of_the_device = counts.into_iter().map(|(name, rise)| format!("the device counts {rise} {name}"));
    let heads = reports.iter().filter_map(|report| report.lines().next());
    of_the_kernel.into_iter().chain(of_the_device).chain(heads.map(str::to_owned)).collect()
}

/// The device's counts during a test.
fn numbers(counts: &Stats) -> Vec<(String, String)> {
    let all = [
        ("jobs", counts.jobs_submitted),
        ("bytes moved", counts.bytes_moved),
        ("misses", counts.misses),
        ("invalidations", counts.invalidations),
        ("invalidations with work in flight", counts.invalidations_with_work_in_flight),
        ("acks parked", counts.acks_parked),
    ];
    all.map(|(name, count)| (name.to_owned(), count.to_string())).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn coherent_memory_and_the_benchmark_are_left_out_and_patterns_choose_among_the_rest() {
        let all = names(&["hmm.hmm_device_private.migrate", "hmm.hmm_device_private.anon_read"]);
        let out =
            names(&["hmm2.hmm2_device_coherent.snapshot", "hmm.hmm_device_private.benchmark_thp_migration"]);
        assert_eq!(wanted([all.clone(), out].concat(), &[]), all);
        assert_eq!(wanted(all.clone(), &names(&["anon"])), all[1..]);
        assert_eq!(short(&all[1]), "anon_read");
    }

    #[test]
    fn only_a_result_that_says_so_is_a_pass() {
        let ended = |code, signal, hangs, output: &str| {
            judged(&Ended { code, signal, hangs, milliseconds: 1, output: output.into() }, "a.b")
        };
        assert_eq!(ended(Some(0), None, false, "ok 1 a.b\n"), Outcome::Passed);
        assert_eq!(ended(Some(4), None, false, "ok 1 a.b # SKIP no\n"), Outcome::Skipped("no".into()));
        for (code, signal, hangs, output, word) in [
            (Some(1), None, false, "# a.c:1:b:Expected\nnot ok 1 a.b\n", "a.c:1:b:Expected"),
            (Some(0), None, false, "", "code 0"),
            (None, Some(9), false, "", "signal 9"),
            (None, None, false, "ok 1 a.b\n", "in time"),
            (None, None, true, "ok 1 a.b\n", "hangs"),
        ] {
            let Outcome::Failed(words) = ended(code, signal, hangs, output) else { panic!("{output}") };
            assert!(words.contains(word), "{words}");
        }
    }
}
