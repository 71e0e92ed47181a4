//! Modes: what an invalidation does to a job (scenarios 25 to 30, 52, 83).

use super::ranges::{LONG, overtaken};
use crate::soft_guest::{Permission, dma_api};
use crate::suite::failure::{Result, ensure};
use crate::suite::results::Level;
use crate::suite::stage::{COHERENT, DRAIN_TIMEOUT, GRACE, PAGES, Stage, and_spin, pages};
use job_stream::{Mode, SpinBehaviour, Stream};
use std::time::Duration;

/// 25: a driver that waits for its fences is never accused, in any mode, however much is mapped and unmapped beside
/// its jobs.
pub(crate) fn correct(stage: &mut Stage<'_>) -> Result<()> {
    let rounds = if stage.level() == Level::Soft { 60 } else { 8 };
    let before = stage.stats()?;
    for mode in Mode::ALL {
        let context = stage.context(*mode)?;
        let (spare, kept) = (stage.buffer(4)?, stage.buffer(2)?);
        for round in 0..rounds {
            let buffer = stage.buffer(4)?;
            let job = stage.submit(
                context,
                and_spin(
                    Stream::new().fill(buffer.whole(), round).fill(kept.whole(), round),
                    Duration::from_millis(1),
                ),
            )?;
            stage.protect(&spare, 0..2, Permission::ReadWrite)?;
            stage.end_well(job)?;
            stage.must_be(&buffer, 0, pages(4) as usize, round)?;
            stage.must_be(&kept, 0, pages(2) as usize, round)?;
            stage.free(&buffer)?;
            // Other memory at the same address, used by the next job: correctly, after the fence.
            stage.move_away(&kept, 0..2)?;
        }
        stage.destroy(context)?;
    }
    stage.number("cycles of a correct driver", rounds as usize * Mode::ALL.len());
    stage.nobody_is_accused(&before)?;
    stage.must_be_left_alone()
}

/// 26: preempt: the job leaves the engine within the bound, continues later, and the result is correct.
pub(crate) fn preempt(stage: &mut Stage<'_>) -> Result<()> {
    let (context, buffer, before) = (stage.context(Mode::Preempt)?, stage.buffer(PAGES)?, stage.stats()?);
    let job = overtaken(stage, context, buffer.whole(), LONG)?;
    let acks = stage.soft()?.front_end.invalidate_all(&dma_api::WHOLE_DOMAIN)?;
    let longest = acks.iter().map(|ack| ack.latency).max().unwrap_or_default();
    stage.number("ack under a job in preempt mode", format!("{longest:?}"));
    ensure!(longest < DRAIN_TIMEOUT, "The job left its engine only after {longest:?}");
    stage.end_well(job)?;
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
    let found = stage.verdicts(&before, Mode::Preempt)?;
    ensure!(
        found.benign > 0 && found.accusations() == 0,
        "A flush that took nothing away should be benign: {found:?}"
    );
    Ok(())
}

/// 26: the ack comes when the job has left its engine, not at the drain timeout.
pub(crate) fn leaves_at_once(stage: &mut Stage<'_>) -> Result<()> {
    let mut shortest = Duration::MAX;
    // A busy machine may be late now and then, but not each time.
    for _ in 0..4 {
        let (context, buffer) = (stage.context(Mode::Preempt)?, stage.buffer_in_one(PAGES)?);
        let job = overtaken(stage, context, buffer.whole(), LONG)?;
        shortest = shortest.min(stage.take(&buffer, 0..1)?);
        stage.end_badly(job)?;
        stage.must_be_left_alone()?;
        stage.destroy(context)?;
    }
    stage.number("shortest unmap under a job in preempt mode", format!("{shortest:?}"));
    ensure!(
        shortest < DRAIN_TIMEOUT / 2,
        "Each unmap under a job in preempt mode took {shortest:?} or more: nobody notices when the job has left"
    );
    Ok(())
}

/// 27: a job that does not leave when requested: the ack still comes, within the bound (I2).
pub(crate) fn stubborn(stage: &mut Stage<'_>) -> Result<()> {
    let stays = (SpinBehaviour::Stubborn, 2 * LONG.as_nanos() as u64);
    [Mode::Preempt, Mode::Fence].into_iter().try_for_each(|mode| stays_on(stage, mode, stays))
}

/// 83: a job that never leaves its engine and never ends: the whole ladder, within the bound (I2).
pub(crate) fn ladder(stage: &mut Stage<'_>) -> Result<()> {
    COHERENT.into_iter().try_for_each(|mode| stays_on(stage, mode, (SpinBehaviour::Wedged, 0)))
}

/// Memory is unmapped under a job that stays on its engine.
fn stays_on(stage: &mut Stage<'_>, mode: Mode, (behaviour, time): (SpinBehaviour, u64)) -> Result<()> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
    let stays = Stream::new().fill(buffer.whole(), 1).spin(behaviour, time).fill(buffer.whole(), 2);
    let job = stage.submit(context, stays)?;
    stage.until_packet(context, 1)?;
    let took = stage.take(&buffer, 0..PAGES)?;
    stage.number(format!("unmap under a job that stays, {mode}"), format!("{took:?}"));
    let limit = DRAIN_TIMEOUT + GRACE;
    ensure!(took < limit, "The unmap took {took:?} in mode {mode}, where {limit:?} is the bound (I2)");
    stage.end_badly(job)?;
    stage.must_be_left_alone()?;
    stage.destroy(context)
}

/// 28: fault mode: other memory replaces the old while the job runs; the job continues in the new memory, and there
/// is no accusation.
pub(crate) fn replay(stage: &mut Stage<'_>) -> Result<()> {
    let (context, buffer, before) = (stage.context(Mode::Fault)?, stage.buffer(PAGES)?, stage.stats()?);
    let last = stage.last_violation()?;
    let job = overtaken(stage, context, buffer.whole(), LONG)?;
    stage.move_away(&buffer, 0..PAGES)?;
    stage.end_well(job)?;
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
    stage.must_be_left_alone()?;
    let found = stage.verdicts(&before, Mode::Fault)?;
    ensure!(found.moved > 0, "The memory of the job was exchanged, and nobody has noticed: {found:?}");
    ensure!(stage.last_violation()? == last, "In fault mode memory may go: there is nothing to report");
    Ok(())
}

/// 30: its translations are removed again and again, before all of them are there: the job still ends.
pub(crate) fn livelock(stage: &mut Stage<'_>) -> Result<()> {
    // Requesting all of them takes far longer than the pause between two flushes.
    const MANY: usize = 512;
    for mode in COHERENT {
        let (context, buffer, before) = (stage.context(mode)?, stage.buffer_in_one(MANY)?, stage.stats()?);
        let job = stage.submit(context, Stream::new().fill(buffer.whole(), 40))?;
        let mut flushes = 0;
        stage.until("The end of a job under flushes without end", |stage| {
            stage.soft()?.front_end.invalidate_all(&dma_api::WHOLE_DOMAIN)?;
            flushes += 1;
            Ok(stage.grown(&before, "jobs_done")? > 0)
        })?;
        stage.number(format!("flushes until the end of the job, {mode}"), flushes);
        stage.end_well(job)?;
        stage.must_be(&buffer, 0, pages(MANY) as usize, 40)?;
        stage.nobody_is_accused(&before)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 52: the registration cache keeps using unmapped memory, which is counted, and does not harm other contexts.
pub(crate) fn registration_cache(stage: &mut Stage<'_>) -> Result<()> {
    let (context, other) = (stage.context(Mode::RegistrationCache)?, stage.context(Mode::Fence)?);
    let (buffer, good, before) = (stage.buffer(PAGES)?, stage.buffer(PAGES)?, stage.stats()?);
    let job = overtaken(stage, context, buffer.whole(), LONG)?;
    let took = stage.take(&buffer, 0..PAGES)?;
    ensure!(took < GRACE, "The unmap took {took:?} in a mode that waits for nobody");
    stage.end_well(job)?;
    let late = stage.forgive_late()?;
    ensure!(
        late > 0,
        "The job went on after its memory was gone, and nothing was touched: it was not what it says"
    );
    let pins = stage.grown(&before, "incoherent_pins")?;
    ensure!(pins > 0, "Memory was touched after its unmap, and the back-end has not counted it");
    stage.run_job(other, Stream::new().fill(good.whole(), 3))?;
    stage.must_be(&good, 0, pages(PAGES) as usize, 3)
}
