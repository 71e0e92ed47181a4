//! What an invalidation meant: nothing, or that the memory has another owner (scenarios 53 to 55, 57 to 59, 64).

use super::ranges::{LONG, overtaken};
use crate::soft_guest::misses::Answer;
use crate::soft_guest::{Iova, PAGE, Permission, dma_api};
use crate::suite::failure::{Result, ensure};
use crate::suite::results::Level;
use crate::suite::stage::{Buffer, COHERENT, DRAIN_TIMEOUT, GRACE, PAGES, Stage, pages};
use job_stream::{Mode, Stream};
use serde_json::json;
use std::time::Duration;

/// 53: the whole domain is flushed under jobs whose pages stay mapped: no ack waits longer than the mode allows, no
/// job is killed, and the data is correct.
pub(crate) fn domain_flush(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, buffer, before) = (stage.context(mode)?, stage.buffer(PAGES)?, stage.stats()?);
        let job = overtaken(stage, context, buffer.whole(), LONG)?;
        let acks = stage.soft()?.front_end.invalidate_all(&dma_api::WHOLE_DOMAIN)?;
        let took: Duration = acks.iter().map(|ack| ack.latency).sum();
        stage.number(format!("flush of the domain under a job, {mode}"), format!("{took:?}"));
        let limit = if mode == Mode::Fence { DRAIN_TIMEOUT + GRACE } else { DRAIN_TIMEOUT };
        ensure!(took < limit, "The flush took {took:?} in mode {mode}, where {limit:?} is the bound");
        stage.end_well(job)?;
        stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
        let found = stage.verdicts(&before, mode)?;
        ensure!(
            found.benign > 0 && found.accusations() == 0,
            "The flush took nothing away from mode {mode}: {found:?}"
        );
        stage.destroy(context)?;
    }
    Ok(())
}

/// 54: an invalidation is rounded up and hits a neighbour in use: it may wait, but there is no accusation, and the
/// data is correct.
pub(crate) fn rounding(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, before) = (stage.context(mode)?, stage.stats()?);
        // VT-d rounds three pages up to an aligned four or eight.
        let area = stage.machine().map(4, 3, Permission::ReadWrite)?;
        let neighbour = stage.buffer_on_part(area, 0, pages(3))?;
        let job = overtaken(stage, context, neighbour.range(0, pages(3)), LONG)?;
        let took = if stage.level() == Level::Soft {
            stage.soft()?.front_end.invalidate(Iova(area.iova & !(pages(8) - 1)), pages(8))?.latency
        } else {
            stage.take(&neighbour, 1..2)?
        };
        let limit = DRAIN_TIMEOUT + GRACE;
        ensure!(took < limit, "The rounded unmap took {took:?} in mode {mode}, where {limit:?} is the bound");
        stage.end_well(job)?;
        stage.must_be(&neighbour, 0, pages(3) as usize, 2)?;
        stage.nobody_is_accused(&before)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 55: what replaces memory that was unmapped under a job: the same memory, other memory, none, or the same with
/// fewer rights. Each has its verdict.
pub(crate) fn after_a_flush(stage: &mut Stage<'_>) -> Result<()> {
    let mode = Mode::Strict;
    for (what, due_well) in [("same", true), ("moved", true), ("gone", false), ("read-only", false)] {
        let (context, buffer, before) = (stage.context(mode)?, stage.buffer(4)?, stage.stats()?);
        let job = overtaken(stage, context, buffer.whole(), LONG)?;
        match what {
            "same" => stage.protect(&buffer, 1..2, Permission::ReadWrite)?,
            "moved" => stage.move_away(&buffer, 1..2)?,
            "gone" => stage.take(&buffer, 1..2)?,
            _ => stage.protect(&buffer, 1..2, Permission::ReadOnly)?,
        };
        let well = stage.end(job)?.is_ok();
        ensure!(well == due_well, "A job whose page is {what} after an invalidation ended well: {well}");
        let found = stage.verdicts(&before, mode)?;
        let count = match what {
            "same" => found.benign,
            "moved" => found.moved,
            _ => found.gone,
        };
        ensure!(count > 0, "A page that is {what} after an invalidation had these verdicts: {found:?}");
        ensure!(what != "same" || found.accusations() == 0, "Nothing has changed, and still: {found:?}");
        stage.must_be_left_alone()?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 57: memory is unmapped without an INVALIDATE, a bug of the driver or of the VMM: an audit finds it.
pub(crate) fn audit(stage: &mut Stage<'_>) -> Result<()> {
    let (context, buffer) = (stage.context(Mode::Fence)?, stage.buffer(PAGES)?);
    stage.run_job(context, Stream::new().fill(buffer.whole(), 1))?;
    let clean = stage.audit()?;
    ensure!(clean == json!([]), "An audit of a mirror that is right found something: {clean}");
    let at = |page: usize| Iova(buffer.area.iova + pages(page));
    let space = stage.soft()?.dma.space().clone();
    space.iommu().unmap(at(2), 1);
    let frame = space.frames().take(1)?;
    if let Some(frame) = frame.first() {
        space.iommu().map(at(9), *frame, Permission::ReadWrite);
    }
    let stale = stage.audit()?.to_string();
    for (page, found) in [(2, "gone"), (9, "moved")] {
        let place = format!("{:#x}", at(page).0);
        ensure!(
            stale.contains(&place) && stale.contains(found),
            "Page {place} was {found} without an INVALIDATE, and the audit found only this: {stale}"
        );
    }
    // Sent at last.
    stage.soft()?.front_end.invalidate(at(0), pages(PAGES))?;
    Ok(())
}

/// 58: two mappings of one page: one is removed, the other stays; and one unmap spans several maps.
pub(crate) fn aliases(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, before) = (stage.context(mode)?, stage.stats()?);
        let first = stage.buffer(4)?;
        let area = stage.machine().alias(&first.area, Permission::ReadWrite)?;
        let second = stage.buffer_on(area)?;
        stage.run_job(context, Stream::new().fill(first.whole(), 1))?;
        stage.must_be(&second, 0, pages(4) as usize, 1)?;
        let job = overtaken(stage, context, second.whole(), LONG)?;
        // Across four maps, with one call.
        stage.machine().unmap(&first.area, 0..4, crate::suite::machine::Then::Keep)?;
        stage.end_well(job)?;
        stage.nobody_was_taken_off(&before, mode)?;
        stage.must_be(&second, 0, pages(4) as usize, 2)?;
        stage.nobody_is_accused(&before)?;
        let mut context = context;
        for page in [0, 3] {
            let gone = stage.submit(context, Stream::new().fill(first.range(pages(page), PAGE), 3))?;
            stage.end_badly(gone)?;
            stage.must_be(&second, 0, pages(4) as usize, 2)?;
            context = stage.renew(context, mode)?;
        }
        stage.destroy(context)?;
        stage.free(&second)?;
        stage.free(&first)?;
    }
    Ok(())
}

/// 59: an address is reused at once by another buffer: correctly, after fence and UNREF. The old memory is unchanged,
/// and there is no accusation.
pub(crate) fn reuse(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, before) = (stage.context(mode)?, stage.stats()?);
        let old = stage.buffer(PAGES)?;
        let mut newer: Buffer = old;
        for round in 1..=5 {
            stage.run_job(context, Stream::new().fill(newer.whole(), round))?;
            stage.must_be(&newer, 0, pages(PAGES) as usize, round)?;
            stage.ok(&crate::soft_guest::Command::unref(newer.id))?;
            stage.forget(&newer);
            stage.move_away(&newer, 0..PAGES)?;
            newer = stage.buffer_on(old.area)?;
        }
        stage.must_be_left_alone()?;
        stage.nobody_is_accused(&before)?;
        stage.destroy(context)?;
        stage.free(&newer)?;
    }
    Ok(())
}

/// 64: one mapping of many pages, and an operand that is larger than the largest.
pub(crate) fn huge(stage: &mut Stage<'_>) -> Result<()> {
    let many: usize = match stage.level() {
        Level::Soft => {
            // One UPDATE for all of it, as a front-end with huge pages sends.
            stage.soft()?.front_end.on_miss(Box::new(|_| Answer::ServeRun));
            512
        }
        Level::Real => 1_024,
    };
    for (mode, value) in COHERENT.into_iter().zip(0x600d..) {
        let (context, buffer) = (stage.context(mode)?, stage.buffer_in_one(many)?);
        let before = stage.stats()?;
        stage.run_job(context, Stream::new().fill(buffer.whole(), value))?;
        for at in [0, pages(many / 2) - PAGE, pages(many) - PAGE] {
            stage.must_be(&buffer, at, PAGE as usize, value)?;
        }
        let misses = stage.grown(&before, "misses")?;
        stage.number(format!("MISSes for {many} pages, {mode}"), misses);
        ensure!(
            stage.level() == Level::Real || misses < many as u64 / 2,
            "{misses} MISSes were sent for {many} pages, of which one UPDATE tells all"
        );
        let beyond = buffer.range(0, pages(many) + 4);
        let job = stage.submit(context, Stream::new().fill(beyond, 1))?;
        let refused = stage.end(job)?.kind();
        ensure!(
            refused == crate::soft_guest::kind::ERR_INVALID_PARAMETER,
            "An operand past the end of its resource was answered with {refused:#x}"
        );
        stage.must_be(&buffer, 0, 4, value)?;
        let took = stage.move_away(&buffer, 0..1)?;
        stage.number(format!("unmap of {many} pages, {mode}"), format!("{took:?}"));
        let last = (pages(many) - PAGE, PAGE);
        stage.run_job(context, Stream::new().fill(buffer.range(last.0, last.1), !value))?;
        stage.must_be(&buffer, last.0, last.1 as usize, !value)?;
        stage.destroy(context)?;
    }
    stage.must_be_left_alone()
}
