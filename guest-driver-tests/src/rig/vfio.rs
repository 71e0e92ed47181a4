//! Jobs through the agent's own driver, through VFIO: correctly, with an idle range that comes and goes beside them;
//! and with deliberate driver bugs. Knows what both sides must have counted; knows nothing of VFIO itself.

use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::instruments::{self, Verdicts, Violation};
use crate::rig::jobs::{ModeRun, line, run_jobs};
use crate::rig::report::{self, say};
use crate::rig::run::Run;
use crate::rig::scenario::{at_least, same, settled};
use crate::rig::stats::Stats;
use guest_agent::jobs::{CASES, long_time, overtaken_time};
use guest_agent::protocol::{Broken, Bug, Command, Event};
use job_stream::{Choice, Mode};

/// Jobs that are in flight while an idle range comes and goes, in each mode.
const STORM: u32 = 12;
/// The long job, the one that publishes, and the cases once more after a buffer has moved.
const JOBS: u64 = STORM as u64 + 2 + 2 * CASES.len() as u64;
/// The back-end's default. An ack as late as this was not found to be due before.
const DRAIN_TIMEOUT_NS: u64 = 100_000_000;
/// The device's answer to a successful job.
const OK: u32 = 0x1100;

/// Jobs in each mode through the agent's own driver.
pub(crate) fn vfio(run: &mut Run<'_>) -> Result<(), RigError> {
    if !can_be_taken(run)? {
        return Ok(());
    }
    take(run)?;
    for mode in Mode::ALL {
        say(&line(&jobs(run, *mode)?));
    }
    give_back(run)
}

/// The bugs in each mode: the device behaves correctly, whatever the driver does.
pub(crate) fn driver_bugs(run: &mut Run<'_>) -> Result<(), RigError> {
    if !can_be_taken(run)? {
        return Ok(());
    }
    // From here on the IOMMU has reason to complain.
    run.expect_faults();
    take(run)?;
    for mode in Mode::ALL {
        for bug in [Bug::UnmapBeforeFence, Bug::RemapBeforeFence] {
            let (before, verdicts) = (settled(run)?.unwrap_or_default(), run.verdicts(*mode)?);
            let last = instruments::last_violation(run)?;
            let broken = break_on_purpose(run, *mode, bug)?;
            let backend = settled(run)?.unwrap_or_default().since(&before);
            let verdicts = run.verdicts(*mode)?.since(&verdicts);
            say(&format!("{}; verdicts: {verdicts}", told(*mode, bug, &broken)));
            judge(*mode, bug, &broken)?;
            judge_backend(*mode, &broken, &backend)?;
            judge_verdicts(*mode, bug, &verdicts)?;
            let due = usize::from(is_reported(*mode));
            let reports = instruments::violations_after(run, last, due)?.unwrap_or_default();
            judge_reports(*mode, bug, &reports)?;
        }
    }
    give_back(run)
}

/// Whether the device can be taken from its driver and driven by another: there has to be an IOMMU.
fn can_be_taken(run: &mut Run<'_>) -> Result<bool, RigError> {
    let can = run.topology.has_iommu() && run.stats()?.is_some();
    if !can {
        say("Without an IOMMU, or without jobs, there is nothing to check");
    }
    Ok(can)
}

/// The agent's own driver takes the device.
pub fn take(run: &mut Run<'_>) -> Result<(), RigError> {
    match run.ask("The agent's word that it has the device", Command::TakeByVfio)? {
        Event::Taken => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// The stock driver has the device again, which makes no mistakes.
pub fn give_back(run: &mut Run<'_>) -> Result<(), RigError> {
    match run.ask("The driver's return", Command::GiveBack)? {
        Event::Rebound => {
            run.expect_no_more_faults();
            Ok(())
        }
        other => Err(unexpected(&other)),
    }
}

fn jobs(run: &mut Run<'_>, mode: Mode) -> Result<ModeRun, RigError> {
    let shown = run_jobs(run, mode, Command::JobsByVfio { mode, storm: STORM })?;
    compare(&shown)?;
    Ok(shown)
}

fn compare(shown: &ModeRun) -> Result<(), RigError> {
    shown.compare(JOBS)?;
    let ModeRun { mode, guest, backend, .. } = shown;
    // The buffers, one of them twice; the ranges; and the one beside the long job.
    let unmaps = guest.buffers_churned + 4;
    at_least(&format!("invalidations in mode {mode}"), backend.invalidations, unmaps)?;
    let hits = backend.invalidations_with_work_in_flight;
    same(&format!("invalidations of idle ranges that hit a job in mode {mode}"), "the back-end", hits, 0)?;
    if guest.idle_unmap_ns < long_time() / 2 {
        return Ok(());
    }
    let (took, job) = (report::duration(guest.idle_unmap_ns), report::duration(long_time()));
    Err(RigError::check(format!(
        "The unmap of an idle range took {took} in mode {mode}, beside a job of {job}"
    )))
}

/// Makes the guest's driver break a rule.
pub fn break_on_purpose(run: &mut Run<'_>, mode: Mode, bug: Bug) -> Result<Broken, RigError> {
    match run.ask("What came of the driver's bug", Command::Break { mode, bug })? {
        Event::Broken(broken) => Ok(broken),
        other => Err(unexpected(&other)),
    }
}

/// What the guest saw of its own bug, in a line.
pub fn told(mode: Mode, bug: Bug, broken: &Broken) -> String {
    let what = match bug {
        Bug::UnmapBeforeFence => "unmapped",
        Bug::RemapBeforeFence => "given other memory",
    };
    let Broken { response, unmap_ns, late_bytes, .. } = *broken;
    let took = report::duration(unmap_ns);
    let end = if response == OK { "ended well".to_owned() } else { format!("failed with {response:#x}") };
    format!(
        "mode {mode}: a buffer was {what} under a job: the unmap took {took}, the job {end}, \
         and {late_bytes} bytes of the old memory were written after the unmap"
    )
}

/// No coherent mode touches memory after its unmap, and a job whose memory is gone does not succeed.
fn judge(mode: Mode, bug: Bug, broken: &Broken) -> Result<(), RigError> {
    if mode == Mode::RegistrationCache {
        return at_least(
            "bytes written to memory that is gone, in the mode that does so",
            broken.late_bytes,
            1,
        );
    }
    if broken.late_bytes > 0 {
        return Err(RigError::Corrupted(format!(
            "{} bytes were written in mode {mode} after their unmap had returned (I1)",
            broken.late_bytes
        )));
    }
    if bug == Bug::UnmapBeforeFence && broken.response == OK {
        return Err(RigError::check(format!("A job whose memory was gone ended well in mode {mode}")));
    }
    Ok(())
}

/// The back-end has seen the same as the guest, and acked before the job's own end.
fn judge_backend(mode: Mode, broken: &Broken, backend: &Stats) -> Result<(), RigError> {
    let (who, failed) = ("the back-end", u64::from(broken.response != OK));
    same(&format!("failed jobs in mode {mode}"), who, backend.jobs_failed, failed)?;
    same(&format!("jobs that were done in mode {mode}"), who, backend.jobs_done, 1 - failed)?;
    // A job in preempt mode holds nothing while it is off its engine, which may be the case just then.
    let (hits, due) = (backend.invalidations_with_work_in_flight, u64::from(mode != Mode::Preempt));
    at_least(&format!("invalidations that found work in flight in mode {mode}"), hits, due)?;
    if mode == Mode::RegistrationCache {
        at_least("pins that an invalidation did not wait for", backend.incoherent_pins, 1)?;
    }
    // Only fence mode makes the machine wait for a job, until the drain timeout.
    let limit = if mode == Mode::Fence { overtaken_time() } else { DRAIN_TIMEOUT_NS };
    if backend.frozen_ns < limit {
        return Ok(());
    }
    let (frozen, limit) = (report::duration(backend.frozen_ns), report::duration(limit));
    Err(RigError::check(format!(
        "The machine stood still for {frozen} in mode {mode}, where {limit} was the limit"
    )))
}

/// The bug is reported, except in the mode that requests no translation again: its pins are counted. The verdict may
/// be either where the device requests the memory at once: the driver may not yet have mapped the other memory.
fn judge_verdicts(mode: Mode, bug: Bug, verdicts: &Verdicts) -> Result<(), RigError> {
    let Verdicts { moved, gone, .. } = *verdicts;
    let (due, found) = match (mode, bug) {
        (Mode::RegistrationCache, _) => return Ok(()),
        (_, Bug::UnmapBeforeFence) => ("gone", gone),
        (Mode::Strict | Mode::Fault, Bug::RemapBeforeFence) => ("moved", moved),
        (_, Bug::RemapBeforeFence) => ("moved or gone", moved + gone),
    };
    at_least(&format!("verdicts {due} in mode {mode}"), found, 1)
}

/// Whether a driver's bug is reported: in fault mode memory may go, and a registration cache does not check.
fn is_reported(mode: Mode) -> bool {
    !matches!(mode, Mode::Fault | Mode::RegistrationCache)
}

/// The report names the right mode, the right verdict, and is certain.
fn judge_reports(mode: Mode, bug: Bug, reports: &[Violation]) -> Result<(), RigError> {
    let is_right = |report: &Violation| {
        let name = report.verdict.as_str();
        let named = name == "gone" || bug == Bug::RemapBeforeFence && name == "moved";
        is_reported(mode) && named && report.mode == mode.name() && report.confidence == "certain"
    };
    match reports.iter().find(|report| !is_right(report)) {
        Some(wrong) => Err(RigError::check(format!("A report is not what it should be: {wrong:?}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_agent::protocol::JobCounts;

    #[test]
    fn a_late_byte_and_a_job_that_ended_well_without_memory_are_noticed() {
        let (unmap, remap) = (Bug::UnmapBeforeFence, Bug::RemapBeforeFence);
        let failed = Broken { response: 0x1200, ..Broken::default() };
        let well = Broken { response: OK, ..Broken::default() };
        assert!(judge(Mode::Fence, unmap, &failed).is_ok());
        assert!(judge(Mode::Fence, unmap, &well).is_err());
        assert!(judge(Mode::Fault, remap, &well).is_ok());
        assert!(judge(Mode::Strict, unmap, &Broken { late_bytes: 1, ..failed }).is_err());
        assert!(judge(Mode::RegistrationCache, unmap, &well).is_err());
        assert!(judge(Mode::RegistrationCache, unmap, &Broken { late_bytes: 1, ..well }).is_ok());
    }

    #[test]
    fn what_the_back_end_counts_of_a_bug_has_to_be_what_the_guest_saw() {
        let failed = Broken { response: 0x1200, ..Broken::default() };
        let backend = Stats { jobs_failed: 1, invalidations_with_work_in_flight: 1, ..Stats::default() };
        let check = |mode, backend| judge_backend(mode, &failed, &backend);
        assert!(check(Mode::Fence, backend).is_ok());
        assert!(check(Mode::Fence, Stats { jobs_failed: 0, jobs_done: 1, ..backend }).is_err());
        assert!(check(Mode::Fence, Stats { invalidations_with_work_in_flight: 0, ..backend }).is_err());
        assert!(check(Mode::Fence, Stats { frozen_ns: overtaken_time(), ..backend }).is_err());
        let late = Stats { frozen_ns: DRAIN_TIMEOUT_NS, ..backend };
        assert!(check(Mode::Fence, late).is_ok() && check(Mode::Preempt, late).is_err());
        assert!(check(Mode::RegistrationCache, backend).is_err());
        assert!(check(Mode::RegistrationCache, Stats { incoherent_pins: 1, ..backend }).is_ok());
    }

    #[test]
    fn a_bug_that_is_not_found_out_or_called_by_another_name_is_noticed() {
        let (unmap, remap) = (Bug::UnmapBeforeFence, Bug::RemapBeforeFence);
        let (none, gone) = (Verdicts::default(), Verdicts { gone: 1, ..Verdicts::default() });
        let moved = Verdicts { moved: 1, ..Verdicts::default() };
        assert!(judge_verdicts(Mode::Fence, unmap, &gone).is_ok());
        assert!(judge_verdicts(Mode::Fence, unmap, &moved).is_err());
        assert!(judge_verdicts(Mode::Fence, remap, &gone).is_ok());
        assert!(judge_verdicts(Mode::Fence, remap, &none).is_err());
        assert!(judge_verdicts(Mode::Strict, remap, &gone).is_err());
        assert!(judge_verdicts(Mode::RegistrationCache, unmap, &none).is_ok());
    }

    #[test]
    fn a_report_of_another_mode_or_of_what_did_not_happen_is_noticed() {
        let report = |verdict: &str, confidence: &str, mode: &str| Violation {
            id: 1,
            verdict: verdict.to_owned(),
            confidence: confidence.to_owned(),
            mode: mode.to_owned(),
            report: String::new(),
        };
        let check = |mode, bug, report| judge_reports(mode, bug, &[report]);
        let (unmap, remap) = (Bug::UnmapBeforeFence, Bug::RemapBeforeFence);
        assert!(check(Mode::Fence, unmap, report("gone", "certain", "fence")).is_ok());
        assert!(check(Mode::Fence, unmap, report("moved", "certain", "fence")).is_err());
        assert!(check(Mode::Fence, remap, report("moved", "certain", "fence")).is_ok());
        assert!(check(Mode::Fence, unmap, report("gone", "likely", "fence")).is_err());
        assert!(check(Mode::Fence, unmap, report("gone", "certain", "strict")).is_err());
        assert!(check(Mode::Fault, unmap, report("gone", "certain", "fault")).is_err());
    }

    #[test]
    fn an_unmap_that_waits_for_a_job_that_it_does_not_concern_is_noticed() {
        let guest = JobCounts { jobs: JOBS, buffers_churned: 1, ..JobCounts::default() };
        let backend = Stats { jobs_submitted: JOBS, jobs_done: JOBS, invalidations: 5, ..Stats::default() };
        let check = |guest, backend| {
            compare(&ModeRun { mode: Mode::Fence, guest, backend, verdicts: Verdicts::default() })
        };
        assert!(check(guest, backend).is_ok());
        assert!(check(JobCounts { idle_unmap_ns: long_time() / 2, ..guest }, backend).is_err());
        assert!(check(guest, Stats { invalidations: 4, ..backend }).is_err());
        assert!(check(guest, Stats { invalidations_with_work_in_flight: 1, ..backend }).is_err());
    }
}
