//! Permissions and faults: the device does not do what it may not do, and reports it (scenarios 19 to 24, 29, 62).

use crate::soft_guest::{PAGE, Permission};
use crate::suite::failure::{Result, ensure};
use crate::suite::results::Level;
use crate::suite::stage::{Buffer, COHERENT, PAGES, Stage, pages};
use job_stream::{Crc32c, Mode, Stream};
use serde_json::{Value, json};

const POISON: u32 = u32::from_le_bytes([crate::suite::stage::POISON; 4]);

/// The fault records, the newest last.
fn faults(stage: &mut Stage<'_>) -> Result<Vec<Value>> {
    let all = stage.control("faults", json!({}))?;
    Ok(all["faults"].as_array().cloned().unwrap_or_default())
}

/// How many faults there were, including forgotten ones.
fn all_faults(stage: &mut Stage<'_>) -> Result<u64> {
    let all = stage.control("faults", json!({}))?;
    let kept = all["faults"].as_array().map_or(0, Vec::len) as u64;
    Ok(kept + all["dropped"].as_u64().unwrap_or_default())
}

/// The newest fault record is about one of these pages, and a write. Modes that pin first find the fault before any
/// packet.
fn must_be_recorded(
    stage: &mut Stage<'_>,
    mode: Mode,
    (buffer, holes): (&Buffer, std::ops::Range<usize>),
    packet: u64,
) -> Result<()> {
    let places: Vec<_> = holes.map(|page| format!("{:#x}", buffer.area.iova + pages(page))).collect();
    let mut newest = Value::Null;
    stage.until(&format!("A fault record about one of {places:?}"), |stage| {
        newest = faults(stage)?.last().cloned().unwrap_or_default();
        let range = newest["range"].to_string();
        Ok(places.iter().any(|place| range.contains(place)))
    })?;
    let due = if looks_first(mode) { 0 } else { packet };
    ensure!(
        newest["packet"] == due && newest["access"] == "write",
        "The fault record about {places:?} should name packet {due} and a write: {newest}"
    );
    Ok(())
}

/// In these modes a job has all its memory before it begins, or none.
fn looks_first(mode: Mode) -> bool {
    matches!(mode, Mode::Fence | Mode::Preempt)
}

/// 19: the device can read read-only memory; a write fails, and the memory is unchanged.
pub(crate) fn read_only(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, result) = (stage.context(mode)?, stage.buffer(1)?);
        let page = stage.read_only(1)?;
        stage.run_job(context, Stream::new().checksum(page.whole(), result.at(0)))?;
        let job = stage.submit(context, Stream::new().nop(1).fill(page.range(0, 64), 0))?;
        stage.end_badly(job)?;
        stage.must_be(&page, 0, PAGE as usize, POISON)?;
        must_be_recorded(stage, mode, (&page, 0..1), 1)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 20: read-only memory becomes writable: the old translation must not block writes.
pub(crate) fn upgrade(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, result) = (stage.context(mode)?, stage.buffer(1)?);
        let page = stage.read_only(2)?;
        stage.run_job(context, Stream::new().checksum(page.whole(), result.at(0)))?;
        // An earlier refusal of a write must not be remembered either.
        let refused = stage.submit(context, Stream::new().fill(page.whole(), 6))?;
        stage.end_badly(refused)?;
        let context = stage.renew(context, mode)?;
        stage.protect(&page, 0..2, Permission::ReadWrite)?;
        stage.run_job(context, Stream::new().fill(page.whole(), 7))?;
        stage.must_be(&page, 0, pages(2) as usize, 7)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 20: the same without an INVALIDATE: an IOMMU need not announce that a permission grew.
pub(crate) fn upgrade_in_place(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, result) = (stage.context(mode)?, stage.buffer(1)?);
        let page = stage.read_only(2)?;
        stage.run_job(context, Stream::new().checksum(page.whole(), result.at(0)))?;
        let before = stage.stats()?;
        stage.machine().map_again(&page.area, 0..2, Permission::ReadWrite)?;
        stage.run_job(context, Stream::new().fill(page.whole(), 8))?;
        stage.must_be(&page, 0, pages(2) as usize, 8)?;
        let told = stage.grown(&before, "invalidations")?;
        ensure!(told == 0, "{told} INVALIDATEs came, where none was sent");
        stage.destroy(context)?;
    }
    Ok(())
}

/// 21: writable memory becomes read-only: after the ack, no write uses the permission proven before.
pub(crate) fn downgrade(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, buffer, result) = (stage.context(mode)?, stage.buffer(2)?, stage.buffer(1)?);
        stage.run_job(context, Stream::new().fill(buffer.whole(), 7))?;
        stage.protect(&buffer, 0..2, Permission::ReadOnly)?;
        stage.run_job(context, Stream::new().checksum(buffer.whole(), result.at(0)))?;
        let mut context = context;
        for page in [0, 1] {
            let job = stage.submit(context, Stream::new().fill(buffer.range(pages(page), PAGE), 9))?;
            stage.end_badly(job)?;
            stage.must_be(&buffer, 0, pages(2) as usize, 7)?;
            context = stage.renew(context, mode)?;
        }
        stage.destroy(context)?;
    }
    Ok(())
}

/// 22: a page that is not mapped: the fence carries an error, the record names the address, and the guest's IOMMU has
/// logged it.
pub(crate) fn unmapped(stage: &mut Stage<'_>) -> Result<()> {
    let logged = stage.machine().faults_logged()?;
    for mode in COHERENT {
        let (context, buffer) = (stage.context(mode)?, stage.buffer(PAGES)?);
        stage.take(&buffer, 7..8)?;
        let before = stage.stats()?;
        let job = stage.submit(context, Stream::new().fill(buffer.range(pages(7), PAGE), 1))?;
        stage.end_badly(job)?;
        must_be_recorded(stage, mode, (&buffer, 7..8), 0)?;
        ensure!(stage.grown(&before, "miss_refused")? > 0, "No MISS was refused in mode {mode}");
        stage.nobody_is_accused(&before)?;
        stage.destroy(context)?;
    }
    // Linux limits how many it prints.
    stage.until("A fault in the guest's IOMMU log", |stage| Ok(stage.machine().faults_logged()? > logged))
}

/// 23: scattered pages behind contiguous addresses: a copy across all of them is correct.
pub(crate) fn scattered(stage: &mut Stage<'_>) -> Result<()> {
    let (from, to) = (stage.buffer(PAGES)?, stage.buffer(PAGES)?);
    let bytes: Vec<u8> = (0..pages(PAGES)).map(|at| (at.wrapping_mul(0x9e37_79b1) >> 16) as u8).collect();
    stage.write(&from, 0, &bytes)?;
    for (mode, word) in COHERENT.into_iter().zip(0x2300..) {
        let context = stage.context(mode)?;
        // The mode before has left the right contents: they have to be overwritten.
        stage.run_job(context, Stream::new().fill(to.whole(), word))?;
        stage.must_be(&to, 0, pages(PAGES) as usize, word)?;
        let len = (pages(PAGES) - 4096 - 8) as usize;
        stage.run_job(context, Stream::new().copy(from.range(3, len as u64), to.at(2049)))?;
        let due = &bytes[3..3 + len];
        if stage.machine().checksum(&to.area, 2049, len)? != Crc32c::of(due) {
            let found = stage.read(&to, 2049, len)?;
            let wrong = found.iter().zip(due).position(|(found, due)| found != due);
            ensure!(wrong.is_none(), "A copy in mode {mode} went wrong at byte {wrong:?}");
        }
        stage.must_be(&to, 0, 2048, word)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 24: the second page of a job is not mapped: memory and the record show what it wrote before, and in the modes that
/// pin first nothing is written at all.
pub(crate) fn second_page(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, buffer) = (stage.context(mode)?, stage.buffer(4)?);
        stage.take(&buffer, 1..2)?;
        let job = stage.submit(context, Stream::new().fill(buffer.whole(), 1))?;
        stage.end_badly(job)?;
        let found = stage.word(&buffer, 0)?;
        let due = if looks_first(mode) { POISON } else { 1 };
        ensure!(found == due, "In mode {mode} the first page holds {found:#x}, not {due:#x}");
        stage.must_be(&buffer, pages(2), pages(2) as usize, POISON)?;
        must_be_recorded(stage, mode, (&buffer, 1..2), 0)?;
        stage.destroy(context)?;
    }
    Ok(())
}

/// 29: more faults than there are records: the newest are kept, the rest is counted, and the device continues.
pub(crate) fn storm(stage: &mut Stage<'_>) -> Result<()> {
    const KEPT: usize = 256;
    // A serial port is slow: a real guest shows only that the device continues.
    let count = if stage.level() == Level::Soft { KEPT + 44 } else { 40 };
    let good = stage.context(Mode::Fence)?;
    let (hole, buffer) = (stage.buffer(1)?, stage.buffer(PAGES)?);
    stage.take(&hole, 0..1)?;
    let (before, known) = (stage.stats()?, all_faults(stage)?);
    for _ in 0..count {
        let context = stage.context(Mode::Fault)?;
        let job = stage.submit(context, Stream::new().fill(hole.whole(), 1))?;
        stage.end_badly(job)?;
        stage.destroy(context)?;
    }
    ensure!(
        stage.grown(&before, "jobs_failed")? == count as u64,
        "{count} jobs met a page that is not there, and the back-end counts others"
    );
    let (kept, all) = (faults(stage)?.len(), all_faults(stage)?);
    ensure!(kept <= KEPT, "{kept} fault records are kept: the list has no end");
    ensure!(
        all - known == count as u64,
        "Of {count} faults {} are in the records or counted as forgotten",
        all - known
    );
    stage.run_job(good, Stream::new().fill(buffer.whole(), 5))?;
    stage.must_be(&buffer, 0, pages(PAGES) as usize, 5)
}

/// 62: a buffer is mapped for the wrong direction: the copy into it fails and is recorded, its source is untouched.
pub(crate) fn wrong_direction(stage: &mut Stage<'_>) -> Result<()> {
    for mode in COHERENT {
        let (context, from) = (stage.context(mode)?, stage.buffer(2)?);
        let to = stage.read_only(2)?;
        stage.write(&from, 0, &[1; 64])?;
        let job = stage.submit(context, Stream::new().copy(from.whole(), to.at(0)))?;
        stage.end_badly(job)?;
        stage.must_be(&to, 0, pages(2) as usize, POISON)?;
        must_be_recorded(stage, mode, (&to, 0..2), 0)?;
        stage.destroy(context)?;
    }
    Ok(())
}
