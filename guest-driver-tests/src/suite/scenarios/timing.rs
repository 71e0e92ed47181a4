//! Timing: at which moment of a job's life an invalidation comes (scenarios 10 to 16).

use super::ranges::{LONG, overtaken};
use crate::soft_guest::misses::{Answer, Miss};
use crate::soft_guest::{Iova, PAGE};
use crate::suite::failure::{Result, ensure};
use crate::suite::stage::{COHERENT, DRAIN_TIMEOUT, GRACE, PAGES, PATIENCE, Stage, and_spin, pages, spin};
use job_stream::{Mode, Stream};
use std::time::Duration;

/// 10: before the start, queued, executing, after completion but before the fence, after the fence.
pub(crate) fn phases(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        before_start(stage, mode)?;
        queued(stage, mode)?;
        before_fence(stage, mode)?;
        after_fence(stage, mode)?;
    }
    Ok(())
}

fn before_start(stage: &mut Stage<'_>, mode: Mode) -> Result<()> {
    let (context, buffer, before) = (stage.context(mode)?, stage.buffer(PAGES)?, stage.stats()?);
    stage.run_job(context, Stream::new().fill(buffer.whole(), 1))?;
    stage.move_away(&buffer, 0..PAGES)?;
    stage.run_job(context, Stream::new().fill(buffer.whole(), 2))?;
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
    stage.must_be_left_alone()?;
    stage.nobody_is_accused(&before)?;
    stage.destroy(context)
}

/// A queued job has touched nothing: the ack does not wait for it, and it does not get its memory.
fn queued(stage: &mut Stage<'_>, mode: Mode) -> Result<()> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer_in_one(PAGES)?);
    let first = stage.submit(context, spin(LONG))?;
    let second = stage.submit(context, Stream::new().fill(buffer.whole(), 1))?;
    stage.until_packet(context, 0)?;
    let took = stage.take(&buffer, 0..1)?;
    ensure!(took < LONG / 2, "The unmap waited {took:?} for a job that was only queued, in mode {mode}");
    stage.end_well(first)?;
    stage.end_badly(second)?;
    stage.must_be_left_alone()?;
    stage.destroy(context)
}

/// The job is done, its fence is late: its memory is already free, and in no mode is it touched again.
fn before_fence(stage: &mut Stage<'_>, mode: Mode) -> Result<()> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
    // Longer than the drain timeout: a device that waited for the fence would look like a stuck engine.
    stage.inject("delay-fence=400ms")?;
    let before = stage.stats()?;
    let job = stage.submit(context, Stream::new().fill(buffer.whole(), 1))?;
    stage.until("The end of a job", |stage| Ok(stage.grown(&before, "jobs_done")? > 0))?;
    let took = stage.take(&buffer, 0..PAGES)?;
    stage.end_injection("delay-fence")?;
    ensure!(
        took < GRACE,
        "The unmap waited {took:?} for a fence that was only to be written, in mode {mode}"
    );
    let hits = stage.grown(&before, "invalidations_with_work_in_flight")?;
    ensure!(hits == 0, "{hits} invalidations found work in flight in mode {mode}, when the job had ended");
    stage.end_well(job)?;
    stage.must_be_left_alone()?;
    stage.destroy(context)
}

fn after_fence(stage: &mut Stage<'_>, mode: Mode) -> Result<()> {
    let (context, buffer, before) = (stage.context(mode)?, stage.buffer(PAGES)?, stage.stats()?);
    stage.run_job(context, Stream::new().fill(buffer.whole(), 1))?;
    stage.take(&buffer, 0..PAGES)?;
    stage.must_be_left_alone()?;
    stage.nobody_is_accused(&before)?;
    let hits = stage.grown(&before, "invalidations_with_work_in_flight")?;
    ensure!(hits == 0, "{hits} invalidations after the fence found work in flight in mode {mode}");
    stage.destroy(context)
}

/// 11: the fence and the unmap race, again and again; a driver that waits for the fence is never accused.
pub(crate) fn race(stage: &mut Stage<'_>) -> Result<()> {
    const ROUNDS: u32 = 12;
    for mode in COHERENT {
        let (context, buffer, before) = (stage.context(mode)?, stage.buffer(2)?, stage.stats()?);
        for round in 0..ROUNDS {
            let job = stage.submit(context, Stream::new().fill(buffer.whole(), round))?;
            stage.end_well(job)?;
            stage.move_away(&buffer, 0..2)?;
        }
        stage.must_be_left_alone()?;
        stage.nobody_is_accused(&before)?;
        // And without waiting for the fence: a driver's bug, which must not harm other contexts.
        for round in 0..ROUNDS {
            let job = stage.submit(context, Stream::new().fill(buffer.whole(), round))?;
            stage.pause(Duration::from_micros(u64::from(round) * 37));
            stage.move_away(&buffer, 0..2)?;
            if !stage.end(job)?.is_ok() {
                break;
            }
        }
        stage.must_be_left_alone()?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 12: the page of a pending MISS: the front-end's last message about it decides.
pub(crate) fn pending_miss(stage: &mut Stage<'_>) -> Result<()> {
    COHERENT.into_iter().try_for_each(|mode| half_answered(stage, mode))?;
    COHERENT.into_iter().try_for_each(|mode| unanswered(stage, mode))
}

/// The UPDATE has come, but the reply that confirms it has not: by then the page is another.
fn half_answered(stage: &mut Stage<'_>, mode: Mode) -> Result<()> {
    let (context, buffer, before) = (stage.context(mode)?, stage.buffer(PAGES)?, stage.stats()?);
    let (first, front_end) = (Iova(buffer.area.iova), stage.soft()?.front_end.clone());
    let torn = front_end.miss_counts().torn;
    let tear = move |miss: &Miss| if miss.iova.page() == first { Answer::ServeTorn } else { Answer::Serve };
    front_end.on_miss(Box::new(tear));
    let job = stage.submit(context, Stream::new().fill(buffer.whole(), 1));
    let is_half = front_end.wait_for_misses(PATIENCE, |counts| counts.torn > torn);
    let acked = stage.move_away(&buffer, 0..PAGES);
    front_end.serve_misses();
    front_end.release_replies();
    ensure!(is_half, "No MISS came for the first page of a job in mode {mode}");
    ensure!(acked.clone()? < GRACE, "The unmap took {acked:?} beside a MISS that was pending");
    stage.end_well(job?)?;
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 1)?;
    stage.must_be_left_alone()?;
    let misses = stage.grown(&before, "misses")?;
    ensure!(
        misses > PAGES as u64,
        "An UPDATE from before the INVALIDATE was believed in mode {mode}: {PAGES} pages were asked for {misses} times"
    );
    stage.destroy(context)
}

/// Not even the UPDATE has come.
fn unanswered(stage: &mut Stage<'_>, mode: Mode) -> Result<()> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
    stage.soft()?.front_end.hold_misses(true);
    let before = stage.stats()?;
    let job = stage.submit(context, Stream::new().fill(buffer.whole(), 1));
    let acked = stage.until("A MISS", |stage| Ok(stage.grown(&before, "misses")? > 0)).and_then(|()| {
        // Other memory, and this is the only message about the old.
        stage.move_away(&buffer, 0..PAGES)
    });
    stage.soft()?.front_end.hold_misses(false);
    ensure!(acked.clone()? < GRACE, "The unmap took {acked:?} beside a MISS that was pending");
    stage.end_well(job?)?;
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 1)?;
    stage.must_be_left_alone()?;
    stage.destroy(context)
}

/// 13: a job that is parked on a MISS holds nothing: acks come at once, for its memory and for any other.
pub(crate) fn parked(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, buffer, other) = (stage.context(mode)?, stage.buffer(PAGES)?, stage.buffer(PAGES)?);
        stage.run_job(context, Stream::new().fill(buffer.range(0, pages(8)), 1))?;
        stage.soft()?.front_end.hold_misses(true);
        let job = stage.submit(context, Stream::new().fill(buffer.whole(), 2));
        let took = missing(stage, context).and_then(|()| {
            let (all, iova) = (other.area.bytes(), other.area.iova);
            let [own, idle] = [(buffer.area.iova, pages(8)), (iova, all)];
            let acks =
                stage.soft()?.front_end.invalidate_all(&[own, idle].map(|(at, len)| (Iova(at), len)))?;
            Ok(acks.iter().map(|ack| ack.latency).max().unwrap_or_default())
        });
        stage.soft()?.front_end.hold_misses(false);
        let took = took?;
        stage.number(format!("longest ack beside a parked job, {mode}"), format!("{took:?}"));
        ensure!(
            took < DRAIN_TIMEOUT,
            "An ack took {took:?} beside a job that was parked on a MISS, in mode {mode}"
        );
        stage.end_well(job?)?;
        stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
        stage.destroy(context)?;
    }
    Ok(())
}

fn missing(stage: &mut Stage<'_>, context: u32) -> Result<()> {
    stage.until("A job that is parked on a MISS", |stage| {
        let jobs = stage.control("jobs", serde_json::json!({}))?;
        let mut jobs = jobs["jobs"].as_array().into_iter().flatten();
        Ok(jobs.any(|job| job["context"] == context && job["state"] == "missing"))
    })
}

/// 14: two that overlap, one after the other without a pause: both are acked, in order, and within the bound.
pub(crate) fn overlapping(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
        let job = overtaken(stage, context, buffer.whole(), DRAIN_TIMEOUT / 2)?;
        let ranges =
            [(0, 10), (6, 10), (0, 16)].map(|(at, len)| (Iova(buffer.area.iova + pages(at)), pages(len)));
        let acks = stage.soft()?.front_end.invalidate_all(&ranges)?;
        let all: Duration = acks.iter().map(|ack| ack.latency).sum();
        ensure!(acks.iter().all(|ack| ack.status == 0), "An INVALIDATE failed in mode {mode}: {acks:?}");
        ensure!(all < 3 * DRAIN_TIMEOUT + GRACE, "Three acks took {all:?} in mode {mode}");
        stage.end_well(job)?;
        stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 15: a page is unmapped and another mapped at its address at once, under a job that has used it (ABA): what the job
/// writes then goes to the new page or nowhere, and the driver gets a report.
pub(crate) fn aba(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, buffer, before) = (stage.context(mode)?, stage.buffer(PAGES)?, stage.stats()?);
        let last = stage.last_violation()?;
        let job = overtaken(stage, context, buffer.whole(), LONG)?;
        let took = stage.move_away(&buffer, 5..6)?;
        stage.number(format!("unmap of the page, {mode}"), format!("{took:?}"));
        let well = stage.end(job)?.is_ok();
        stage.must_be_left_alone()?;
        let found = stage.verdicts(&before, mode)?;
        ensure!(
            found.moved + found.gone > 0,
            "A page was moved under a job in mode {mode}, unnoticed: {found:?}"
        );
        if well {
            stage.must_be(&buffer, pages(5), PAGE as usize, 2)?;
        }
        // Only a mode that requests the page later than the driver maps it is sure to find the new page.
        if matches!(mode, Mode::Strict | Mode::Fault) {
            ensure!(
                well && found.moved > 0,
                "In mode {mode} the job should have gone on in the new page: {found:?}"
            );
        }
        if mode != Mode::Fault {
            let report = stage.report_after(last)?;
            ensure!(
                report.contains("fill") || report.contains("FILL"),
                "The report names no packet:\n{report}"
            );
        }
        stage.destroy(context)?;
    }
    Ok(())
}

/// 16: time passes between the translation and the access: an ack that comes then waits for the access.
pub(crate) fn slow_access(stage: &mut Stage<'_>) -> Result<()> {
    const STEP: Duration = Duration::from_millis(20);
    for mode in [Mode::Strict, Mode::Fault] {
        let (context, buffer, spare) = (stage.context(mode)?, stage.buffer(PAGES)?, stage.buffer(8)?);
        stage.run_job(context, Stream::new().fill(buffer.whole(), 0))?;
        stage.inject("step-delay=20ms")?;
        let before = stage.stats()?;
        let fills = (1..=12).fold(Stream::new(), |stream, value| stream.fill(buffer.whole(), value));
        let job = stage.submit(context, fills)?;
        stage.until("The job's first step", |stage| Ok(stage.word(&buffer, 0)? > 0))?;
        let mut waits = Vec::new();
        for page in 0..8 {
            let took = stage.take(&spare, page..page + 1)?;
            waits.extend((took > STEP / 4).then_some(took));
        }
        stage.end_injection("step-delay")?;
        stage.end_well(job)?;
        let parked = stage.grown(&before, "acks_parked")?;
        stage.number(format!("acks that waited for a step, {mode}"), format!("{parked} of 8"));
        let (late, shortest) = (waits.len(), waits.into_iter().min().unwrap_or_default());
        ensure!(
            parked > 0 && late > 0,
            "Of 8 acks {parked} were parked and {late} came late, while each step took {STEP:?}: who waits for the access?"
        );
        ensure!(
            shortest < DRAIN_TIMEOUT * 3 / 4,
            "Each ack that waited for a step of {STEP:?} took {shortest:?} or more: nobody notices the step's end"
        );
        stage.must_be_left_alone()?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 94: a reader that sees a signal sees all that was written before it, even what took many steps to write.
pub(crate) fn posted(stage: &mut Stage<'_>) -> Result<()> {
    const MANY: usize = 4 * PAGES;
    for mode in COHERENT {
        let (context, buffer, flag) = (stage.context(mode)?, stage.buffer_in_one(MANY)?, stage.buffer(1)?);
        stage.write(&flag, 0, &[0; 64])?;
        stage.run_job(context, Stream::new().fill(buffer.whole(), 0))?;
        stage.inject("step-delay=20ms")?;
        let tells = Stream::new().fill(buffer.whole(), !0).signal(flag.at(0), 0x51);
        let job = stage.submit(context, and_spin(tells, Duration::from_millis(1)))?;
        stage.until("The signal", |stage| Ok(stage.word(&flag, 0)? == 0x51))?;
        // The last write is checked first.
        let seen = [MANY - 1, MANY / 2, 0]
            .into_iter()
            .try_for_each(|page| stage.must_be(&buffer, pages(page), PAGE as usize, !0));
        stage.end_injection("step-delay")?;
        stage.end_well(job)?;
        seen?;
        stage.destroy(context)?;
    }
    Ok(())
}
