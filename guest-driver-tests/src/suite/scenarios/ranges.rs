//! Range arithmetic: which invalidation concerns which job (scenarios 1 to 9).

use crate::soft_guest::{Iova, PAGE, Queue, dma_api};
use crate::suite::failure::{Result, ensure};
use crate::suite::stage::{Buffer, COHERENT, DRAIN_TIMEOUT, GRACE, PAGES, Stage, and_spin, pages, spin};
use job_stream::{Mode, Stream};
use std::ops::Range;
use std::time::Duration;

/// How long a job takes that must not be waited for: far longer than the drain timeout.
pub(crate) const LONG: Duration = Duration::from_millis(400);
/// The longest that a job spins for to be seen.
const LONGEST: Duration = Duration::from_secs(8);

/// A job that fills its buffer, spins, and fills it again; returns when it spins. On a machine so busy that it was over
/// before anyone looked, another one spins for longer.
pub(crate) fn overtaken(
    stage: &mut Stage<'_>,
    context: u32,
    to: job_stream::Range,
    time: Duration,
) -> Result<crate::suite::stage::Job> {
    let mut time = time;
    loop {
        let job = stage.submit(context, and_spin(Stream::new().fill(to, 1), time).fill(to, 2))?;
        let Some(answer) = stage.until_packet_or_end(&job, 1)? else { return Ok(job) };
        ensure!(answer.is_ok(), "A job that was left in peace failed with {:#x}", answer.kind());
        ensure!(time < LONGEST, "A job that spins for {time:?} was never seen to");
        time = (4 * time).min(LONGEST);
    }
}

/// 1: memory that no job uses is released at once, whatever else is in flight, and the job beside it is correct.
pub(crate) fn idle(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let context = stage.context(mode)?;
        let (busy, spare) = (stage.buffer(PAGES)?, stage.buffer_in_one(PAGES)?);
        let before = stage.stats()?;
        let job = overtaken(stage, context, busy.whole(), LONG)?;
        let took = stage.take(&spare, 0..1)?;
        stage.number(format!("unmap of an idle range, {mode}"), format!("{took:?}"));
        ensure!(
            took < LONG / 2,
            "The unmap of an idle range took {took:?} in mode {mode}, beside a job of {LONG:?}"
        );
        let hits = stage.grown(&before, "invalidations_with_work_in_flight")?;
        ensure!(hits == 0, "{hits} invalidations of an idle range hit a job in mode {mode}");
        stage.end_well(job)?;
        stage.nobody_was_taken_off(&before, mode)?;
        stage.must_be(&busy, 0, pages(PAGES) as usize, 2)?;
        stage.nobody_is_accused(&before)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// Unmaps pages of a running job, or others, in each coherent mode: the ack is bounded, nothing is touched after it,
/// and a job that lost memory does not succeed.
fn taken(stage: &mut Stage<'_>, used: &Range<usize>, taken: &Range<usize>) -> Result<()> {
    for mode in COHERENT {
        let context = stage.context(mode)?;
        let buffer = stage.buffer(PAGES)?;
        let before = stage.stats()?;
        let to = buffer.range(pages(used.start), pages(used.len()));
        let job = overtaken(stage, context, to, LONG)?;
        let took = stage.take(&buffer, taken.clone())?;
        stage
            .number(format!("unmap of pages {taken:?} under a job of {used:?}, {mode}"), format!("{took:?}"));
        let limit = bound(mode, taken.len());
        ensure!(took < limit, "The unmap took {took:?} in mode {mode}, where {limit:?} is the bound (I2)");
        let hits = stage.grown(&before, "invalidations_with_work_in_flight")?;
        ensure!(hits > 0 || mode != Mode::Fence, "No invalidation has met the job in mode {mode}");
        stage.end_badly(job)?;
        // All of it is gone, not only what the job reached first.
        let context = stage.renew(context, mode)?;
        let last = buffer.range(pages(taken.end - 1), PAGE);
        let job = stage.submit(context, Stream::new().fill(last, 3))?;
        stage.end_badly(job)?;
        stage.must_be_left_alone()?;
        let found = stage.verdicts(&before, mode)?;
        ensure!(
            found.gone > 0,
            "Memory was taken from under a job in mode {mode}, and nobody has noticed: {found:?}"
        );
        stage.destroy(context)?;
    }
    Ok(())
}

/// How long an unmap may take: fence mode waits for the drain timeout; a real guest may send one INVALIDATE per page,
/// but the job has left the engine after the first.
fn bound(mode: Mode, _pages: usize) -> Duration {
    if mode == Mode::Fence { DRAIN_TIMEOUT + GRACE } else { GRACE }
}

/// 2: exactly what the job uses.
pub(crate) fn exact(stage: &mut Stage<'_>) -> Result<()> {
    taken(stage, &(0..PAGES), &(0..PAGES))
}

/// 3: head, tail and middle of it.
pub(crate) fn partial(stage: &mut Stage<'_>) -> Result<()> {
    for part in [0..3, PAGES - 3..PAGES, 6..8] {
        taken(stage, &(0..PAGES), &part)?;
    }
    Ok(())
}

/// 4: more than it uses.
pub(crate) fn larger(stage: &mut Stage<'_>) -> Result<()> {
    taken(stage, &(5..9), &(0..PAGES))
}

/// 5: a neighbour, which the job does not use: no ack waits longer than a step.
pub(crate) fn adjacent(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let context = stage.context(mode)?;
        let buffer = stage.buffer(PAGES)?;
        let before = stage.stats()?;
        let job = overtaken(stage, context, buffer.range(pages(4), pages(4)), LONG)?;
        for neighbour in [3..4, 8..9] {
            let took = stage.take(&buffer, neighbour.clone())?;
            ensure!(took < LONG / 2, "Page {neighbour:?} took {took:?} in mode {mode}, beside a job on 4..8");
        }
        let hits = stage.grown(&before, "invalidations_with_work_in_flight")?;
        ensure!(hits == 0, "{hits} invalidations of a neighbour hit the job in mode {mode}");
        stage.end_well(job)?;
        stage.nobody_was_taken_off(&before, mode)?;
        stage.must_be(&buffer, pages(4), pages(4) as usize, 2)?;
        stage.nobody_is_accused(&before)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// Invalidations with odd numbers: each is acked, and afterwards every page is requested again.
fn odd(stage: &mut Stage<'_>, ranges: &[(Iova, u64)]) -> Result<()> {
    let context = stage.context(Mode::Strict)?;
    let buffer = stage.buffer(PAGES)?;
    stage.run_job(context, Stream::new().fill(buffer.whole(), 1))?;
    for &(iova, size) in ranges {
        all_answered(stage)?;
        let before = stage.stats()?;
        let ack = stage.soft()?.front_end.invalidate(iova, size)?;
        ensure!(ack.status == 0, "INVALIDATE {iova}+{size:#x} was acked with status {}", ack.status);
        stage.run_job(context, Stream::new().fill(buffer.whole(), 2))?;
        let misses = stage.grown(&before, "misses")?;
        ensure!(
            misses >= PAGES as u64,
            "After INVALIDATE {iova}+{size:#x} only {misses} pages of {PAGES} were asked for again"
        );
        stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
        stage.write(&buffer, 0, &[0; 64])?;
    }
    Ok(())
}

/// 6: size 0 is the whole space.
pub(crate) fn size_zero(stage: &mut Stage<'_>) -> Result<()> {
    odd(stage, &[(Iova(0), 0)])
}

/// Waits for the answers to all MISSes. A job that looks ahead may ask for a page a second time, and end before the second
/// answer, which would then count as one from after the INVALIDATE.
fn all_answered(stage: &mut Stage<'_>) -> Result<()> {
    stage.until("The answer to each MISS", |stage| {
        let counts = stage.soft()?.front_end.miss_counts();
        let answered = counts.updates + counts.refused + counts.ignored;
        Ok(stage.stats()?.get("misses")? == answered)
    })
}

/// 7: up to 2^64, and wrapping, as QEMU sends them.
pub(crate) fn to_the_end(stage: &mut Stage<'_>) -> Result<()> {
    odd(stage, &[(Iova(0), u64::MAX), (Iova(0x1000), u64::MAX), (Iova(0), 1 << 63)])?;
    for _ in 0..3 {
        let context = stage.context(Mode::Fence)?;
        let buffer = stage.buffer(PAGES)?;
        stage.run_job(context, Stream::new().fill(buffer.whole(), 3))?;
        stage.soft()?.front_end.invalidate_all(&dma_api::WHOLE_DOMAIN)?;
        stage.run_job(context, Stream::new().fill(buffer.whole(), 4))?;
        stage.must_be(&buffer, 0, pages(PAGES) as usize, 4)?;
    }
    Ok(())
}

/// 8: thirty in a row while a job runs, none of which overlaps it: none waits for it.
pub(crate) fn thirty(stage: &mut Stage<'_>) -> Result<()> {
    const BLOCKS: usize = 30;
    for mode in COHERENT {
        let context = stage.context(mode)?;
        let (busy, spare) = (stage.buffer(PAGES)?, stage.buffer(BLOCKS)?);
        let before = stage.stats()?;
        let job = overtaken(stage, context, busy.whole(), LONG)?;
        let mut longest = Duration::ZERO;
        for block in 0..BLOCKS {
            longest = longest.max(stage.take(&spare, block..block + 1)?);
        }
        stage.number(format!("longest of {BLOCKS} unmaps, {mode}"), format!("{longest:?}"));
        ensure!(
            longest < LONG / 2,
            "One of {BLOCKS} unmaps took {longest:?} in mode {mode}, beside a job of {LONG:?}"
        );
        stage.end_well(job)?;
        stage.nobody_was_taken_off(&before, mode)?;
        let seen = stage.grown(&before, "invalidations")?;
        ensure!(seen >= BLOCKS as u64, "{BLOCKS} unmaps were {seen} invalidations to the back-end");
        stage.must_be(&busy, 0, pages(PAGES) as usize, 2)?;
        stage.nobody_is_accused(&before)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// The burst of 28 that QEMU sends when translation is switched off, while a job runs: the job succeeds.
pub(crate) fn burst(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let context = stage.context(mode)?;
        let busy = stage.buffer(PAGES)?;
        let job = overtaken(stage, context, busy.whole(), DRAIN_TIMEOUT / 2)?;
        let acks = stage.soft()?.front_end.invalidate_all(&dma_api::burst())?;
        ensure!(acks.iter().all(|ack| ack.status == 0), "An INVALIDATE of the burst failed in mode {mode}");
        stage.end_well(job)?;
        stage.must_be(&busy, 0, pages(PAGES) as usize, 2)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 9: the pages of a ring: the device requests them again, and no command is lost.
pub(crate) fn ring_page(stage: &mut Stage<'_>) -> Result<()> {
    let context = stage.context(Mode::Fence)?;
    let buffer: Buffer = stage.buffer(PAGES)?;
    for round in 0..20 {
        let job = stage
            .submit(context, and_spin(Stream::new().fill(buffer.whole(), round), Duration::from_millis(2)))?;
        stage.soft()?.flush_ring(Queue::Control)?;
        stage.end_well(job)?;
        stage.must_be(&buffer, 0, pages(PAGES) as usize, round)?;
    }
    let job = stage.submit(context, spin(Duration::from_millis(1)))?;
    stage.end_well(job).map(drop)
}
