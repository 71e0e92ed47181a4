//! Life cycle and scheduling: destruction while jobs are in flight, and which job waits for which (scenarios 44, 46,
//! 48, 49, 51, 84, 86, 103, 104).

use super::ranges::{LONG, overtaken};
use crate::soft_guest::{Command, dma_api, kind};
use crate::suite::failure::{Result, ensure};
use crate::suite::machine::Then;
use crate::suite::results::Level;
use crate::suite::stage::{Buffer, COHERENT, DRAIN_TIMEOUT, GRACE, PAGES, Stage, and_spin, pages, spin};
use job_stream::{Compare, Mode, SpinBehaviour, Stream};
use std::time::{Duration, Instant};

const POISON: u32 = u32::from_le_bytes([crate::suite::stage::POISON; 4]);

/// 44: DETACH_BACKING and UNREF with a job in flight are answered when no job uses the memory any more; destroying a
/// context ends its job.
pub(crate) fn ends_under_jobs(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        for end in [Command::detach_backing, Command::unref] {
            let (context, buffer, before) = (stage.context(mode)?, stage.buffer(PAGES)?, stage.stats()?);
            let job = overtaken(stage, context, buffer.whole(), DRAIN_TIMEOUT / 2)?;
            let command = end(buffer.id);
            let answered = stage.run(&command)?;
            // As the stock driver does: memory that the device has released is unmapped at once.
            stage.take(&buffer, 0..PAGES)?;
            let ended = stage.end_well(job)?;
            ensure!(
                answered.order > ended.order,
                "The command {:#x} was answered while a job used the memory, in mode {mode}",
                command.kind
            );
            stage.must_be_left_alone()?;
            stage.nobody_is_accused(&before)?;
            stage.destroy(context)?;
            if command.kind == kind::RESOURCE_UNREF {
                stage.forget(&buffer);
                stage.machine().free(&buffer.area)?;
            } else {
                stage.free(&buffer)?;
            }
        }
        destroyed(stage, mode)?;
    }
    Ok(())
}

fn destroyed(stage: &mut Stage<'_>, mode: Mode) -> Result<()> {
    let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
    let job = overtaken(stage, context, buffer.whole(), 5 * LONG)?;
    let begin = Instant::now();
    stage.destroy(context)?;
    stage.end_badly(job)?;
    let took = begin.elapsed();
    ensure!(took < 4 * LONG, "The end of a context waited {took:?} for its job, in mode {mode}");
    stage.take(&buffer, 0..PAGES)?;
    stage.must_be_left_alone()?;
    stage.free(&buffer)
}

/// 46: the device is reset with jobs in flight: they are gone, their memory is not touched, and the device comes up
/// again.
pub(crate) fn reset(stage: &mut Stage<'_>) -> Result<()> {
    let (context, buffer) = (stage.context(Mode::Fence)?, stage.buffer(PAGES)?);
    let _gone = overtaken(stage, context, buffer.whole(), LONG)?;
    let begin = Instant::now();
    stage.soft()?.reboot()?;
    ensure!(begin.elapsed() < GRACE, "The reset took {:?}", begin.elapsed());
    stage.forget_all();
    // The memory is still mapped and belongs to the driver: a device that continues the job would show here.
    stage.write(&buffer, 0, &vec![0; pages(PAGES) as usize])?;
    stage.pause(4 * LONG);
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 0)?;
    stage.machine().unmap(&buffer.area, buffer.area.all(), Then::Retire)?;
    stage.must_be_left_alone()?;
    let (context, buffer) = (stage.context(Mode::Fence)?, stage.buffer(PAGES)?);
    stage.run_job(context, Stream::new().fill(buffer.whole(), 3))?;
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 3)
}

/// 48: memory is plugged in under a job, jobs of each mode use it, and it is unplugged under another job.
pub(crate) fn hot_plug(stage: &mut Stage<'_>) -> Result<()> {
    let (context, before) = (stage.context(Mode::Fence)?, stage.stats()?);
    let (old, gate) = (stage.buffer(PAGES)?, stage.buffer(1)?);
    begin_at_gate(stage, context, (&old, &gate), 1)?;
    stage.machine().plug()?;
    pass_gate(stage, (&old, &gate), 1)?;
    for mode in COHERENT {
        let (other, new) = (stage.context(mode)?, stage.buffer(PAGES)?);
        stage.run_job(other, Stream::new().fill(new.whole(), 3).copy(new.whole(), old.at(0)))?;
        stage.must_be(&new, 0, pages(PAGES) as usize, 3)?;
        stage.must_be(&old, 0, pages(PAGES) as usize, 3)?;
        stage.destroy(other)?;
        stage.free(&new)?;
    }
    stage.must_be_left_alone()?;
    begin_at_gate(stage, context, (&old, &gate), 2)?;
    stage.machine().unplug()?;
    pass_gate(stage, (&old, &gate), 2)?;
    stage.nobody_is_accused(&before)
}

/// A job that waits in the middle of its work until it is released, however long the event beside it takes. It
/// signals its end by a value, because a fence would hold others back.
fn begin_at_gate(
    stage: &mut Stage<'_>,
    context: u32,
    buffers: (&Buffer, &Buffer),
    number: u32,
) -> Result<()> {
    let (data, gate) = buffers;
    let begun = Stream::new().fill(data.whole(), number).wait(gate.at(0), Compare::Equal, number, 0);
    let end = gate.at(u64::from(number) * 8);
    stage.submit_with_user_fence(context, end, begun.fill(data.whole(), !number))?;
    // After the packet that names the end's value, and the first that writes.
    stage.until_packet(context, 2)
}

/// The job with this number has waited until now; released, it succeeds.
fn pass_gate(stage: &mut Stage<'_>, (data, gate): (&Buffer, &Buffer), number: u32) -> Result<()> {
    let end = u64::from(number) * 8;
    ensure!(
        stage.word(gate, end)? == POISON,
        "A job that stood has ended beside what happened to other memory"
    );
    stage.write(gate, 0, &number.to_le_bytes())?;
    stage.until("A job that was let through", |stage| Ok(stage.word(gate, end)? != POISON))?;
    ensure!(stage.word(gate, end)? == 1, "A job that stood has failed");
    stage.must_be(data, 0, pages(PAGES) as usize, !number)
}

/// 49: stop and cont with a job in flight: no activity while the machine is stopped, then the job continues.
pub(crate) fn stop(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
        let job = overtaken(stage, context, buffer.whole(), LONG)?;
        stage.soft()?.stop()?;
        let still = stage.stats()?;
        stage.write(&buffer, 0, &[0; 64])?;
        stage.pause(Duration::from_millis(30));
        let moved = stage.grown(&still, "bytes_moved")? + stage.grown(&still, "misses")?;
        ensure!(moved == 0, "The device went on while the machine was stopped, in mode {mode}");
        stage.must_be(&buffer, 0, 64, 0)?;
        stage.soft()?.start()?;
        stage.end_well(job)?;
        stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 51: a context names a resource that it was not given: its job is refused, the memory is unchanged, and the owner
/// continues.
pub(crate) fn isolation(stage: &mut Stage<'_>) -> Result<()> {
    let owner = stage.context(Mode::Fence)?;
    let buffer = stage.buffer(PAGES)?;
    let stranger = stage.stranger(Mode::Fence)?;
    let (own, secret) = (stage.buffer(1)?, buffer.whole());
    for stream in [Stream::new().fill(secret, 1), Stream::new().checksum(secret, own.at(0))] {
        let job = stage.submit(stranger, stream)?;
        let refused = stage.end(job)?.kind();
        ensure!(
            refused == kind::ERR_INVALID_RESOURCE_ID,
            "A context used a resource that it was not given: it was answered with {refused:#x}"
        );
    }
    stage.must_be(&buffer, 0, pages(PAGES) as usize, POISON)?;
    stage.must_be(&own, 0, 64, POISON)?;
    stage.run_job(owner, Stream::new().fill(secret, 2))?;
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)
}

/// 84: the job ends just at the drain timeout: either outcome is fine, but nothing in between.
pub(crate) fn at_the_timeout(stage: &mut Stage<'_>) -> Result<()> {
    let mut well = 0;
    let rounds = if stage.level() == Level::Soft { 12 } else { 5 };
    for round in 0..rounds {
        let (context, buffer) = (stage.context(Mode::Fence)?, stage.buffer(2)?);
        let time = DRAIN_TIMEOUT + Duration::from_millis(round) - Duration::from_millis(rounds / 2);
        let job = overtaken(stage, context, buffer.whole(), time)?;
        // Its memory stays mapped for the driver to read.
        let took = stage.machine().unmap(&buffer.area, 0..2, Then::Keep)?;
        ensure!(took < DRAIN_TIMEOUT + GRACE, "The unmap took {took:?} beside a job of {time:?}");
        let left = stage.word(&buffer, 0)?;
        let in_time = stage.end(job)?.is_ok();
        let due = if in_time { 2 } else { 1 };
        ensure!(left == due, "When the unmap returned, a job that ended well: {in_time} had left {left}");
        stage.must_be(&buffer, 0, pages(2) as usize, due)?;
        well += usize::from(in_time);
        stage.must_be_left_alone()?;
        stage.destroy(context)?;
        stage.free(&buffer)?;
    }
    stage.number("jobs that ended in time", format!("{well} of {rounds}"));
    Ok(())
}

/// 86: a storm of invalidations does not starve a job: it ends while the storm continues.
pub(crate) fn storm(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        // In the soft guest it needs more pages than can be requested between two flushes: it never has all of them
        // at once.
        let (size, fills) = if stage.level() == Level::Soft { (16 * PAGES, 4) } else { (PAGES, 20) };
        let (context, buffer, before) = (stage.context(mode)?, stage.buffer(size)?, stage.stats()?);
        let spare = stage.buffer(4)?;
        let work = (1..=fills).fold(Stream::new(), |stream, value| {
            and_spin(stream.fill(buffer.whole(), value), Duration::from_millis(2))
        });
        let job = stage.submit(context, work)?;
        let mut count: usize = 0;
        stage.until("The end of a job in a storm", |stage| {
            if stage.level() == Level::Soft {
                stage.soft()?.front_end.invalidate_all(&dma_api::WHOLE_DOMAIN)?;
            } else {
                let page = count % 4;
                stage.protect(&spare, page..page + 1, crate::soft_guest::Permission::ReadWrite)?;
            }
            count += 1;
            Ok(stage.grown(&before, "jobs_done")? > 0)
        })?;
        stage.number(format!("invalidations until the end of the job, {mode}"), count);
        stage.end_well(job)?;
        stage.must_be(&buffer, 0, pages(size) as usize, fills)?;
        stage.nobody_is_accused(&before)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 103: the VMM stands still and serves no MISS meanwhile: the device must not take that for an answer.
pub(crate) fn frozen(stage: &mut Stage<'_>) -> Result<()> {
    // Far longer than the back-end waits for the answer to a MISS that was read.
    const STILL: Duration = Duration::from_millis(2_500);
    let (context, buffer, before) = (stage.context(Mode::Fence)?, stage.buffer(PAGES)?, stage.stats()?);
    let front_end = stage.soft()?.front_end.clone();
    let job = {
        let _stands = front_end.freeze();
        let job = stage.submit(context, Stream::new().fill(buffer.whole(), 1))?;
        stage.pause(STILL);
        job
    };
    stage.end_well(job)?;
    let timeouts = stage.grown(&before, "miss_timeouts")?;
    ensure!(timeouts == 0, "{timeouts} misses were given up while the VMM stood still");
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 1)
}

/// 104: a ring full of jobs without an end, and UNREF behind them: UNREF waits, other commands do not.
pub(crate) fn full_ring(stage: &mut Stage<'_>) -> Result<()> {
    let (context, buffer) = (stage.context(Mode::Fence)?, stage.buffer(PAGES)?);
    let mut jobs = Vec::new();
    for _ in 0..8 {
        let endless = Stream::new().fill(buffer.whole(), 1).spin(SpinBehaviour::Preemptible, 10_000_000_000);
        jobs.push(stage.submit(context, endless)?);
    }
    stage.until_packet(context, 1)?;
    let unref = stage.command(&Command::unref(buffer.id))?;
    let begin = Instant::now();
    for _ in 0..20 {
        stage.ok(&Command::capset_info(0))?;
    }
    ensure!(begin.elapsed() < 4 * GRACE, "Twenty commands took {:?} behind endless jobs", begin.elapsed());
    let early = stage.machine().answer(unref, Duration::ZERO)?;
    ensure!(early.is_none(), "UNREF was answered while jobs used the memory");
    stage.destroy(context)?;
    for job in jobs {
        ensure!(!stage.end(job)?.is_ok(), "An endless job of a destroyed context ended well");
    }
    let answer = stage.machine().answer(unref, Duration::from_secs(10))?;
    ensure!(answer.is_some_and(|answer| answer.is_ok()), "UNREF was not answered after the last job");
    stage.forget(&buffer);
    stage.machine().free(&buffer.area)?;
    stage.must_be_left_alone()
}

/// The available index wraps: more commands than it can count.
pub(crate) fn index_wrap(stage: &mut Stage<'_>) -> Result<()> {
    const COMMANDS: usize = 66_000;
    const BATCH: usize = 24;
    let context = stage.context(Mode::Fence)?;
    let mut done = 0;
    while done < COMMANDS {
        let mut tickets = Vec::new();
        for _ in 0..BATCH {
            tickets.push(stage.command(&Command::ctx_attach(context, 0xffff))?);
        }
        for ticket in tickets {
            let answer = stage.machine().answer(ticket, Duration::from_secs(10))?;
            let kind = answer.map_or(0, |answer| answer.kind());
            ensure!(kind == kind::ERR_INVALID_RESOURCE_ID, "Command {done} was answered with {kind:#x}");
            done += 1;
        }
    }
    let job = stage.submit(context, spin(Duration::from_millis(1)))?;
    stage.end_well(job).map(drop)
}
