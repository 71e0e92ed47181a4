//! What jobs that WAIT cost others: how long INVALIDATEs take beside many of them, how long another context's job
//! takes, and how much memory and processor time the back-end spends on them. All of them name one resource of as many
//! scattered pages as the quota allows.

use std::time::{Duration, Instant};

use job_stream::{Compare, Stream};

use super::echo::exchange;
use super::measures::{buffer, guest, micros, place};
use super::subject::Subject;
use super::{Figure, Target, quantile};
use crate::soft_guest::dma::Segment;
use crate::soft_guest::error::{Error, Result};
use crate::soft_guest::{Backend, Command, PAGE, Permission, SoftGuest};

/// Pages of the resource that all WAITs share: each is an entry of its own, and no two are neighbours.
const PAGES: usize = 16_383;
/// Contexts whose jobs WAIT; context 1 is that of the other job.
const CONTEXTS: u32 = 63;
/// The resource that all WAITs share, and that of the other job.
const SHARED: u32 = 1;
const OTHER: u32 = 2;
/// Small measurements of a kind, as long as they take no longer than this all together.
const ROUNDS: usize = 400;
const LONGEST: Duration = Duration::from_secs(2);
/// How often all is set up from the beginning: a WAIT lasts a minute, and an INVALIDATE of the whole domain is measured
/// while all is mapped, which it is once.
const BOOTS: usize = 5;
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest with jobs that WAIT for a value that is never written.
struct Waits {
    subject: Subject,
    guest: SoftGuest,
    fence: u64,
}

impl Waits {
    /// With so many of them. All pages of their resource are in the mirror.
    fn boot(jobs: u32) -> Result<Self> {
        let subject = Subject::ours(&["--engines", "1"])?;
        let mut guest = guest(&subject, true)?;
        guest.driver.ok(&Command::ctx_create(1))?;
        buffer(&mut guest, OTHER, 1)?;
        scattered(&mut guest, SHARED)?;
        guest.driver.ok(&Command::ctx_attach(1, SHARED))?;
        let mut this = Self { subject, guest, fence: 0 };
        let all = place(SHARED, 0).range(PAGES as u64 * PAGE);
        this.run(Stream::new().checksum(all, place(OTHER, 0)))?;
        for ctx in 2..2 + CONTEXTS {
            this.guest.driver.ok(&Command::ctx_create(ctx))?;
            this.guest.driver.ok(&Command::ctx_attach(ctx, SHARED))?;
        }
        for job in 0..jobs {
            this.wait(job)?;
        }
        // Taken in turn: when this one ends, an engine has looked at all of them.
        this.run(Stream::new().nop(0))?;
        Ok(this)
    }

    fn backend(&self) -> Result<&Backend> {
        self.subject.backend().ok_or(Error::NoCounter("the back-end".into()))
    }

    /// Submits a job that WAITs, and would use all of the shared resource after that.
    fn wait(&mut self, job: u32) -> Result<()> {
        let (all, last) = (PAGES as u64 * PAGE - 8, PAGES as u64 * PAGE - 4);
        let stream = Stream::new().wait(place(SHARED, last), Compare::Equal, 0xffff_fff1, 0);
        let stream = stream.checksum(place(SHARED, 0).range(all), place(SHARED, all));
        let submit = Command::submit_3d(2 + job % CONTEXTS, &stream.finish());
        self.guest.driver.ok(&submit.on_ring((job / CONTEXTS) as u8)).map(drop)
    }

    /// A job of context 1, from its submission to its fence.
    fn run(&mut self, stream: Stream) -> Result<Duration> {
        self.fence += 1;
        let start = Instant::now();
        let submit = Command::submit_3d(1, &stream.finish()).fenced(self.fence);
        let ticket = self.guest.driver.submit(&submit)?;
        let response = self.guest.driver.wait_for(ticket, PATIENCE)?;
        let took = start.elapsed();
        let (command, kind) = (response.command, response.kind());
        if response.is_ok() { Ok(took) } else { Err(Error::Command { command, response: kind }) }
    }

    /// INVALIDATEs of a page that no job has, and that is not mapped.
    fn idle_invalidations(&self) -> Result<Vec<f64>> {
        let main = self.guest.front_end.main_socket()?;
        some(|| {
            let _lock = self.guest.front_end.freeze();
            exchange(&main)
        })
    }

    /// Small jobs of the other context.
    fn small_jobs(&mut self) -> Result<Vec<f64>> {
        some(|| self.run(Stream::new().fill(place(OTHER, 0).range(64), 1)))
    }
}

/// Measures something [`ROUNDS`] times, or less often if it takes long.
fn some(mut measure: impl FnMut() -> Result<Duration>) -> Result<Vec<f64>> {
    let (begin, mut took) = (Instant::now(), Vec::new());
    while took.len() < ROUNDS && (took.len() < 3 || begin.elapsed() < LONGEST) {
        took.push(micros(measure()?));
    }
    Ok(took)
}

/// A buffer that has an entry for each page, with a page between them that is not its own.
fn scattered(guest: &mut SoftGuest, id: u32) -> Result<()> {
    let space = guest.dma.space();
    let (frames, start) = (space.frames().take(PAGES)?, space.iommu().allocate(2 * PAGES));
    let place = |(index, frame)| {
        let at = start.plus(2 * index as u64 * PAGE);
        space.iommu().map(at, frame, Permission::ReadWrite);
        Segment { at, len: PAGE as u32 }
    };
    let entries: Vec<Segment> = frames.into_iter().enumerate().map(place).collect();
    guest.driver.ok(&Command::create_buffer(id, (PAGES as u64 * PAGE) as u32))?;
    guest.driver.ok(&Command::attach_backing(id, &entries))?;
    Ok(())
}

/// What INVALIDATEs take beside so many WAITs, medians: of an idle page, of the whole domain; and the memory that the
/// jobs take, in MiB.
fn beside(jobs: u32) -> Result<[f64; 3]> {
    let (mut idle, mut whole, mut memory) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..BOOTS {
        let waits = Waits::boot(jobs)?;
        idle.extend(waits.idle_invalidations()?);
        let acks = waits.guest.dma.flush()?;
        whole.push(acks.into_iter().map(|ack| micros(ack.latency)).fold(0.0, f64::max));
        memory.push(waits.backend()?.resident_kib()? as f64 / 1024.0);
    }
    Ok([idle, whole, memory].map(|mut values| quantile(&mut values, 0.5)))
}

/// INVALIDATEs beside 0, 64 and 256 jobs that WAIT, and what these jobs cost in memory.
pub fn invalidations_beside_waits(mut note: impl FnMut(Figure)) -> Result<()> {
    let [idle, whole, memory] = beside(0)?;
    note(Figure::new("INVALIDATE of an idle page, no job, median", idle, "µs"));
    note(Figure::new("INVALIDATE of the whole domain, no job, median", whole, "µs"));
    for jobs in [64, 256] {
        let [idle_beside, whole_beside, memory_beside] = beside(jobs)?;
        let figure =
            |what: &str, value, unit| Figure::new(format!("{what} beside {jobs} WAITs, median"), value, unit);
        let one = figure("INVALIDATE of an idle page", idle_beside, "µs").against("without", idle);
        note(one.target(Target::RatioAtMost(2.0)));
        let all = figure("INVALIDATE of the whole domain", whole_beside, "µs").against("without", whole);
        note(all.target(Target::AtMost(5000.0)));
        note(
            figure("resident", memory_beside, "MiB")
                .against("without", memory)
                .target(Target::MoreByAtMost(16.0)),
        );
    }
    Ok(())
}

/// Another context's small job, and the processor time of the back-end, beside 0, 16 and 63 jobs that WAIT.
pub fn small_jobs_beside_waits(mut note: impl FnMut(Figure)) -> Result<()> {
    let alone = quantile(&mut Waits::boot(0)?.small_jobs()?, 0.5);
    note(Figure::new("a small job alone, median", alone, "µs"));
    for jobs in [16, 63] {
        let mut waits = Waits::boot(jobs)?;
        let mut took = waits.small_jobs()?;
        let figure =
            Figure::new(format!("a small job beside {jobs} WAITs, median"), quantile(&mut took, 0.5), "µs");
        note(figure.against("alone", alone).target(Target::RatioAtMost(2.0)));
        note(
            Figure::new("the same, 90 of 100", quantile(&mut took, 0.9), "µs")
                .against("alone, median", alone),
        );
        let spent = waits.backend()?.cpu_time_in(Duration::from_secs(2))?.as_secs_f64() * 500.0;
        note(Figure::new(format!("CPU time of {jobs} WAITs in a second"), spent, "ms"));
    }
    Ok(())
}
