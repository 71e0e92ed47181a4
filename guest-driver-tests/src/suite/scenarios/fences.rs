//! Fences: in order, exactly once, and truthful (scenarios 32 to 37, 88, 89).

use super::ranges::LONG;
use crate::soft_guest::kind;
use crate::suite::failure::{Failure, Result, ensure};
use crate::suite::stage::{COHERENT, Job, PAGES, Stage, and_spin, pages, spin};
use job_stream::{Compare, Mode, SpinBehaviour, Stream};
use std::time::{Duration, Instant};

/// The jobs end in the order in which they were submitted.
fn must_end_in_order(stage: &mut Stage<'_>, jobs: Vec<Job>) -> Result<()> {
    let mut last = None;
    for job in jobs {
        let response = stage.end_well(job)?;
        ensure!(
            last.is_none_or(|last| response.order > last),
            "The fence {} came before an earlier one",
            job.fence
        );
        last = Some(response.order);
    }
    Ok(())
}

/// 32: fences of one ring come in order, however long their jobs take.
pub(crate) fn in_order(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
        let mut jobs = Vec::new();
        for time in [9_u64, 1, 5, 0, 3, 0, 7, 1] {
            let stream =
                and_spin(Stream::new().fill(buffer.whole(), time as u32), Duration::from_millis(time));
            jobs.push(stage.submit(context, stream)?);
        }
        must_end_in_order(stage, jobs)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 33: a job of another context overtakes a long one: its value is there before the other's fence.
pub(crate) fn out_of_order(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (slow, quick, flags) = (stage.context(mode)?, stage.context(mode)?, stage.buffer(1)?);
        stage.write(&flags, 0, &[0; 64])?;
        // Far longer than anything here takes on a busy machine.
        let job = stage.submit(slow, spin(20 * LONG))?;
        stage.until_packet(slow, 0)?;
        stage.submit_with_user_fence(quick, flags.at(8), Stream::new().signal(flags.at(0), 9))?;
        stage.until("The quick job's value", |stage| Ok(stage.word(&flags, 8)? == 1))?;
        ensure!(
            stage.ended(&job)?.is_none(),
            "The quick job waited for the slow one of another context, in mode {mode}"
        );
        stage.destroy(slow)?;
        stage.end_badly(job)?;
        stage.destroy(quick)?;
    }
    Ok(())
}

/// 34: a late fence still comes; one whose job failed carries the error, and comes once.
pub(crate) fn late_and_in_error(stage: &mut Stage<'_>) -> Result<()> {
    const DELAY: Duration = Duration::from_millis(60);
    let (context, buffer) = (stage.context(Mode::Fence)?, stage.buffer(PAGES)?);
    stage.inject("delay-fence=60ms")?;
    let begin = Instant::now();
    let mut jobs = Vec::new();
    for value in 0..3 {
        jobs.push(stage.submit(context, Stream::new().fill(buffer.whole(), value))?);
    }
    let ended = must_end_in_order(stage, jobs);
    let took = begin.elapsed();
    stage.end_injection("delay-fence")?;
    ended?;
    ensure!(took >= DELAY, "Fences that were to be {DELAY:?} late came after {took:?}");
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
    let fails = Stream::new().wait(buffer.at(0), Compare::Equal, !0, 1_000_000);
    let job = stage.submit(context, fails)?;
    stage.end_badly(job).map(drop)
}

/// 35: a job that hangs is killed, its context is lost, and all others continue; a new context works.
pub(crate) fn hang(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (bad, good, buffer) = (stage.context(mode)?, stage.context(mode)?, stage.buffer(PAGES)?);
        let hangs = stage.submit(bad, Stream::new().spin(SpinBehaviour::Wedged, 0))?;
        let behind = stage.submit(bad, Stream::new().fill(buffer.whole(), 1))?;
        stage.end_badly(hangs)?;
        ensure!(!stage.end(behind)?.is_ok(), "A job behind one that hung ended well in mode {mode}");
        let refused = stage.submit(bad, Stream::new())?;
        let refused = stage.end(refused)?.kind();
        ensure!(
            refused == kind::ERR_INVALID_CONTEXT_ID,
            "A lost context took a job: it answered {refused:#x}"
        );
        stage.run_job(good, Stream::new().fill(buffer.whole(), 2))?;
        stage.must_be(&buffer, 0, pages(PAGES) as usize, 2)?;
        let fresh = stage.renew(bad, mode)?;
        stage.run_job(fresh, Stream::new().fill(buffer.whole(), 3))?;
        stage.must_be(&buffer, 0, pages(PAGES) as usize, 3)?;
        stage.destroy(good)?;
        stage.destroy(fresh)?;
    }
    Ok(())
}

/// Fences with these ids are each answered, in order, with their own id.
fn with_ids(stage: &mut Stage<'_>, ids: &[u64]) -> Result<()> {
    let context = stage.context(Mode::Fence)?;
    let mut jobs = Vec::new();
    for id in ids {
        jobs.push(stage.submit_as(context, spin(Duration::from_millis(1)), *id)?);
    }
    must_end_in_order(stage, jobs)
}

/// 36: fence ids that go backwards: the device does not rely on their order.
pub(crate) fn backwards(stage: &mut Stage<'_>) -> Result<()> {
    with_ids(stage, &[1_000, 500, 499, 7, 1_001, 1])
}

/// 37: the same id again and again.
pub(crate) fn duplicates(stage: &mut Stage<'_>) -> Result<()> {
    with_ids(stage, &[77, 77, 77, 78, 77])
}

/// 88: a value without an interrupt, an interrupt without a value: memory always has the truth.
pub(crate) fn interrupts(stage: &mut Stage<'_>) -> Result<()> {
    use crate::soft_guest::{Command, Error};
    let (context, flags) = (stage.context(Mode::Fence)?, stage.buffer(1)?);
    stage.write(&flags, 0, &[0; 64])?;
    stage.inject("spurious-interrupt")?;
    for value in 1..=8 {
        stage.run_job(context, Stream::new().signal(flags.at(0), value))?;
    }
    stage.end_injection("spurious-interrupt")?;
    let words = Stream::new().signal(flags.at(0), 99).finish();
    stage.inject("no-interrupt=1")?;
    // A completion that the driver finds before it waits for one needs no interrupt, and loses none.
    let mut tries = 12..200;
    let (ticket, missed) = loop {
        let fence =
            tries.next().ok_or_else(|| Failure::check("The driver never had to wait for an interrupt"))?;
        let guest = stage.soft()?;
        let ticket = guest.driver.submit(&Command::submit_3d(context, &words).fenced(fence))?;
        match guest.driver.wait_for(ticket, Duration::from_millis(500)) {
            Ok(_) => {}
            missed => break (ticket, missed),
        }
    };
    stage.end_injection("no-interrupt")?;
    ensure!(
        matches!(missed, Err(Error::LostInterrupt { .. })),
        "An interrupt was kept back, and the driver saw this: {missed:?}"
    );
    stage.must_be(&flags, 0, 4, 99)?;
    let guest = stage.soft()?;
    guest.driver.poll()?;
    ensure!(guest.driver.wait(ticket)?.is_ok(), "The completion was not there for whoever looks");
    Ok(())
}

/// 89: sequence numbers near their end: fence ids, user fences and counters in memory wrap correctly.
pub(crate) fn wrap(stage: &mut Stage<'_>) -> Result<()> {
    with_ids(stage, &[u64::MAX - 1, u64::MAX, 0, 1])?;
    let (context, flags) = (stage.context(Mode::Fence)?, stage.buffer(1)?);
    stage.write(&flags, 0, &[0; 64])?;
    stage.write(&flags, 0, &[0xfe, 0xff, 0xff, 0xff])?;
    stage.write(&flags, 8, &[0xff; 8])?;
    for _ in 0..3 {
        stage.run_job(context, Stream::new().add(flags.at(0), 1, None).add64(flags.at(8), 1, None))?;
    }
    stage.must_be(&flags, 0, 4, 1)?;
    let wide = stage.read(&flags, 8, 8)?;
    ensure!(wide == 2_u64.to_le_bytes(), "A 64-bit counter did not wrap: {wide:02x?}");
    Ok(())
}
