//! Deliberate driver bugs: what each does, and which check has to detect it. Each must be reported with what the
//! driver's author needs: which job, which packet, which address, which invalidation, how long. Knows nothing of how
//! the back-end detects them.

use crate::soft_guest::{Command, Iova, Permission};
use crate::suite::failure::{Failure, Result, ensure};
use crate::suite::machine::Then;
use crate::suite::results::Level;
use crate::suite::scenarios::ranges::{LONG, overtaken};
use crate::suite::stage::{PAGES, Stage, pages};
use crate::suite::table::OnStage;
use job_stream::{Mode, Stream};
use serde_json::{Value, json};
use std::time::Duration;

/// A bug.
pub struct DriverBug {
    /// Its name.
    pub name: &'static str,
    /// What the driver does.
    pub what: &'static str,
    /// Whether only a guest without a VM can do it, and why.
    pub soft_only: Option<&'static str>,
    /// Runs it, and records what was reported about it.
    pub alone: OnStage,
    make: fn(&mut Stage<'_>, Mode) -> Result<Flag>,
}

/// Which check has to detect it.
enum Flag {
    /// A report of a violation, with one of these words.
    Violation(&'static [&'static str]),
    /// A fault record about this page.
    Fault(u64),
    /// An audit, about this page.
    Audit(u64),
}

/// All of them.
pub const ALL: [DriverBug; 10] = [
    DriverBug {
        name: "unmap-before-fence",
        what: "a buffer is unmapped while a job uses it",
        soft_only: None,
        alone: |stage| alone(stage, "unmap-before-fence"),
        make: unmap_before_fence,
    },
    DriverBug {
        name: "reuse-in-flight",
        what: "a buffer in flight gets other memory at the same address",
        soft_only: None,
        alone: |stage| alone(stage, "reuse-in-flight"),
        make: reuse_in_flight,
    },
    DriverBug {
        name: "wrong-fence",
        what: "the fence of another context is waited for, then the buffer is unmapped",
        soft_only: None,
        alone: |stage| alone(stage, "wrong-fence"),
        make: wrong_fence,
    },
    DriverBug {
        name: "unmap-too-much",
        what: "an unmap takes a page of the neighbour along, which is in flight",
        soft_only: None,
        alone: |stage| alone(stage, "unmap-too-much"),
        make: unmap_too_much,
    },
    DriverBug {
        name: "double-unmap",
        what: "a buffer is unmapped a second time, when its address is another's",
        soft_only: None,
        alone: |stage| alone(stage, "double-unmap"),
        make: double_unmap,
    },
    DriverBug {
        name: "unref-not-awaited",
        what: "UNREF is sent, and the memory unmapped without waiting for its answer",
        soft_only: None,
        alone: |stage| alone(stage, "unref-not-awaited"),
        make: unref_not_awaited,
    },
    DriverBug {
        name: "wrong-permission",
        what: "a buffer that a job writes is mapped for reading",
        soft_only: None,
        alone: |stage| alone(stage, "wrong-permission"),
        make: wrong_permission,
    },
    DriverBug {
        name: "mapping-too-short",
        what: "fewer pages are mapped than the backing has",
        soft_only: None,
        alone: |stage| alone(stage, "mapping-too-short"),
        make: mapping_too_short,
    },
    DriverBug {
        name: "use-after-unmap",
        what: "a job names a buffer that was unmapped long ago",
        soft_only: None,
        alone: |stage| alone(stage, "use-after-unmap"),
        make: use_after_unmap,
    },
    DriverBug {
        name: "missing-flush",
        what: "memory is unmapped, and the IOMMU's caches are not flushed",
        soft_only: Some("a kernel's VFIO always flushes"),
        alone: |stage| alone(stage, "missing-flush"),
        make: missing_flush,
    },
];

/// How long a job is in flight.
const MODES: [Mode; 2] = [Mode::Strict, Mode::Fence];

/// Runs a bug in each mode that checks for it; returns what the back-end reports to the driver's author.
pub fn make(stage: &mut Stage<'_>, bug: &DriverBug) -> Result<Vec<String>> {
    let mut said = Vec::new();
    for mode in MODES {
        let last = stage.last_violation()?;
        let flag = (bug.make)(stage, mode)?;
        let text = match flag {
            Flag::Violation(words) => reported(stage, last, words),
            Flag::Fault(at) => recorded(stage, at),
            Flag::Audit(at) => audited(stage, at),
        };
        said.push(text.map_err(|failure| named(bug, mode, &failure))?);
        stage.must_be_left_alone()?;
        stage.clear()?;
    }
    Ok(said)
}

/// Runs the bug of this name, and records what was reported about it.
fn alone(stage: &mut Stage<'_>, name: &str) -> Result<()> {
    for bug in ALL.iter().filter(|bug| bug.name == name) {
        for said in make(stage, bug)? {
            stage.note(said.lines().next().unwrap_or_default());
        }
    }
    Ok(())
}

fn named(bug: &DriverBug, mode: Mode, failure: &Failure) -> Failure {
    Failure::Check(format!("The driver's bug {} in mode {mode} was not flagged rightly: {failure}", bug.name))
}

/// The scenario: every bug that can be made here is reported.
pub(crate) fn all(stage: &mut Stage<'_>) -> Result<()> {
    let level = stage.level();
    for bug in ALL.iter().filter(|bug| level == Level::Soft || bug.soft_only.is_none()) {
        let said = make(stage, bug)?;
        stage.number(bug.name, said.first().and_then(|text| text.lines().next()).unwrap_or_default());
    }
    Ok(())
}

/// A report that names what it is about.
fn reported(stage: &mut Stage<'_>, last: u64, words: &[&str]) -> Result<String> {
    let report = stage.report_after(last)?;
    let has = |word: &str| report.contains(word);
    ensure!(words.iter().any(|word| has(word)), "The report says none of {words:?}:\n{report}");
    for part in ["job", "packet", "resource", "INVALIDATE", "0x", "after it came", "likely cause"] {
        ensure!(has(part), "The report says nothing of {part}:\n{report}");
    }
    Ok(report)
}

fn recorded(stage: &mut Stage<'_>, at: u64) -> Result<String> {
    let place = format!("{at:#x}");
    let mut record = Value::Null;
    stage.until(&format!("A fault record about {place}"), |stage| {
        let all = stage.control("faults", json!({}))?;
        let mut newest = all["faults"].as_array().into_iter().flatten().rev();
        record = newest.find(|one| one["range"].to_string().contains(&place)).cloned().unwrap_or_default();
        Ok(!record.is_null())
    })?;
    for part in ["job", "context", "packet", "access", "mode", "advice"] {
        ensure!(!record[part].is_null(), "The fault record says nothing of {part}: {record}");
    }
    let names = record["names"].to_string();
    ensure!(names.contains("resource"), "The fault record does not say whose address it is: {record}");
    Ok(format!("Fault: {record}"))
}

fn audited(stage: &mut Stage<'_>, at: u64) -> Result<String> {
    let stale = stage.audit()?.to_string();
    ensure!(stale.contains(&format!("{at:#x}")), "The audit found nothing at {at:#x}: {stale}");
    // Sent at last, so that the mirror is correct again.
    stage.soft()?.front_end.invalidate(Iova(at), pages(1))?;
    Ok(format!("Audit: {stale}"))
}

fn unmap_before_fence(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
    let job = overtaken(stage, context, buffer.whole(), LONG)?;
    stage.take(&buffer, 0..PAGES)?;
    stage.end(job)?;
    Ok(Flag::Violation(&["GONE"]))
}

fn reuse_in_flight(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
    let job = overtaken(stage, context, buffer.whole(), LONG)?;
    stage.move_away(&buffer, 3..4)?;
    stage.end(job)?;
    // Where the device requests the page at once, the driver may not yet have mapped the other memory.
    Ok(Flag::Violation(&["MOVED", "GONE"]))
}

fn wrong_fence(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let (context, other, buffer) = (stage.context(mode)?, stage.context(mode)?, stage.buffer(PAGES)?);
    let flags = stage.buffer(1)?;
    stage.write(&flags, 0, &[0; 16])?;
    let job = overtaken(stage, context, buffer.whole(), LONG)?;
    stage.submit_with_user_fence(other, flags.at(0), Stream::new().nop(1))?;
    stage.until("The other's fence", |stage| Ok(stage.word(&flags, 0)? == 1))?;
    stage.take(&buffer, 0..PAGES)?;
    stage.end(job)?;
    Ok(Flag::Violation(&["GONE"]))
}

fn unmap_too_much(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let context = stage.context(mode)?;
    let area = stage.machine().map(PAGES, 1, Permission::ReadWrite)?;
    // The first eight pages are one buffer, the others another.
    let neighbour = stage.buffer_on_part(area, pages(8), pages(PAGES - 8))?;
    let job = overtaken(stage, context, neighbour.range(0, pages(PAGES - 8)), LONG)?;
    stage.machine().unmap(&area, 0..9, Then::Retire)?;
    stage.end(job)?;
    Ok(Flag::Violation(&["GONE"]))
}

fn double_unmap(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let (context, first) = (stage.context(mode)?, stage.buffer(4)?);
    stage.run_job(context, Stream::new().fill(first.whole(), 1))?;
    stage.ok(&Command::unref(first.id))?;
    stage.forget(&first);
    stage.take(&first, 0..4)?;
    stage.machine().map_again(&first.area, 0..4, Permission::ReadWrite)?;
    let second = stage.buffer_on(first.area)?;
    let job = overtaken(stage, context, second.whole(), LONG)?;
    stage.take(&second, 0..4)?;
    stage.end(job)?;
    Ok(Flag::Violation(&["GONE"]))
}

fn unref_not_awaited(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
    let job = overtaken(stage, context, buffer.whole(), LONG)?;
    let unref = stage.command(&Command::unref(buffer.id))?;
    stage.take(&buffer, 0..PAGES)?;
    stage.end(job)?;
    let answer = stage.machine().answer(unref, Duration::from_secs(10))?;
    ensure!(answer.is_some_and(|answer| answer.is_ok()), "UNREF was not answered");
    stage.forget(&buffer);
    stage.machine().free(&buffer.area)?;
    Ok(Flag::Violation(&["GONE"]))
}

fn wrong_permission(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let context = stage.context(mode)?;
    let buffer = stage.read_only(1)?;
    let job = stage.submit(context, Stream::new().fill(buffer.whole(), 1))?;
    stage.end_badly(job)?;
    Ok(Flag::Fault(buffer.area.iova))
}

fn mapping_too_short(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(4)?);
    stage.take(&buffer, 3..4)?;
    let job = stage.submit(context, Stream::new().fill(buffer.whole(), 1))?;
    stage.end_badly(job)?;
    Ok(Flag::Fault(buffer.area.iova + pages(3)))
}

fn use_after_unmap(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(1)?);
    stage.run_job(context, Stream::new().fill(buffer.whole(), 1))?;
    stage.take(&buffer, 0..1)?;
    let job = stage.submit(context, Stream::new().fill(buffer.whole(), 2))?;
    stage.end_badly(job)?;
    Ok(Flag::Fault(buffer.area.iova))
}

fn missing_flush(stage: &mut Stage<'_>, mode: Mode) -> Result<Flag> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
    stage.run_job(context, Stream::new().fill(buffer.whole(), 1))?;
    let at = buffer.area.iova + pages(5);
    stage.soft()?.dma.space().iommu().unmap(Iova(at), 1);
    Ok(Flag::Audit(at))
}
