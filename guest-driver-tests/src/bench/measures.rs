//! What is measured, each in a function: what it compares with is measured by turns in the same run.

use std::time::{Duration, Instant};

use job_stream::{At, Choice, Mode, Space, SpinBehaviour, Stream};

use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::echo::{Echo, exchange};
use super::subject::Subject;
use super::{Figure, Target, quantile};
use crate::soft_guest::dma_api::burst;
use crate::soft_guest::error::{Error, Result};
use crate::soft_guest::memory::{RamConfig, memory_file};
use crate::soft_guest::virtqueue::RingConfig;
use crate::soft_guest::{Command, Format, GuestConfig, Iova, PAGE, Permission, Queue, Rect, SoftGuest};

const ROUNDS: usize = 10_000;
const LOADED_ROUNDS: usize = 2_000;
/// Commands that are on their way at once.
const DEPTH: usize = 64;
const BATCHES: usize = 400;
/// Pages of each of the buffers of COPY.
const COPY_PAGES: usize = 2048;
const COPIES: usize = 40;
const COLD_PAGES: usize = 256;
const COLD_ROUNDS: usize = 30;
const IDLE: Duration = Duration::from_secs(3);

pub(super) fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// While it lives, this thread and what it starts run on the processor that it is on now.
struct OneProcessor(libc::cpu_set_t);

impl OneProcessor {
    fn stay() -> Result<Self> {
        let size = size_of::<libc::cpu_set_t>();
        // SAFETY: a set of processors is plain bits; all zeros is the empty set.
        let (mut before, mut one): (libc::cpu_set_t, libc::cpu_set_t) = unsafe { std::mem::zeroed() };
        // SAFETY: it takes nothing and touches no memory of ours.
        let here = usize::try_from(unsafe { libc::sched_getcpu() }).unwrap_or(0);
        // SAFETY: `one` is a set, and the number is that of a processor.
        unsafe { libc::CPU_SET(here, &mut one) };
        // SAFETY: it writes a set of this size to `before`.
        let known = unsafe { libc::sched_getaffinity(0, size, &mut before) };
        // SAFETY: it reads a set of this size.
        let set = unsafe { libc::sched_setaffinity(0, size, &one) };
        if known != 0 || set != 0 {
            return Err(Error::io("stay on one processor")(std::io::Error::last_os_error()));
        }
        Ok(Self(before))
    }
}

impl Drop for OneProcessor {
    fn drop(&mut self) {
        // SAFETY: it reads a set of this size. If it fails, the rest is measured on one processor.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &self.0) };
    }
}

/// A guest behind an IOMMU with memory for large buffers and a ring for many commands.
pub(super) fn guest(subject: &Subject, iommu: bool) -> Result<SoftGuest> {
    let mut config = GuestConfig::with_rings();
    config.ram = RamConfig { low: 64 << 20, high: 64 << 20, ..RamConfig::default() };
    config.driver.control = RingConfig::new(256);
    config.front_end.iommu = iommu;
    subject.boot(config)
}

/// A buffer for jobs of context 1; where it begins.
pub(super) fn buffer(guest: &mut SoftGuest, id: u32, pages: usize) -> Result<Iova> {
    let bytes = pages as u64 * PAGE;
    let buffer = guest.dma.space().allocate(pages, Permission::ReadWrite)?;
    guest.driver.ok(&Command::create_buffer(id, bytes as u32))?;
    guest.driver.ok(&Command::attach_backing(id, &buffer.segments(0, bytes)))?;
    guest.driver.ok(&Command::ctx_attach(1, id))?;
    Ok(buffer.address(0))
}

pub(super) fn place(id: u32, at: u64) -> At {
    At::new(Space::resource(id), at)
}

/// INVALIDATE to ack of an idle range against an echo, and a burst of 28; all three processes on one processor, for
/// where the kernel puts whom on an idle machine makes more of a difference than what they do.
pub fn invalidations() -> Result<Vec<Figure>> {
    let _one = OneProcessor::stay()?;
    let subject = Subject::ours(&[])?;
    let guest = guest(&subject, true)?;
    let (echo, main) = (Echo::start()?, guest.front_end.main_socket()?);
    let (mut echoes, mut acks) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        echoes.push(micros(echo.exchange()?));
        acks.push(micros(exchange(&main)?));
    }
    let ranges = burst();
    let mut bursts = Vec::new();
    for _ in 0..ROUNDS / 50 {
        let start = Instant::now();
        guest.front_end.invalidate_all(&ranges)?;
        bursts.push(micros(start.elapsed()));
    }
    let ack = Figure::new("INVALIDATE to ack, idle, one processor, median", quantile(&mut acks, 0.5), "µs");
    let burst = Figure::new("28 INVALIDATEs in a row, median", quantile(&mut bursts, 0.5), "µs");
    Ok(vec![
        ack.against("bare socket echo", quantile(&mut echoes, 0.5)).target(Target::RatioAtMost(1.5)),
        burst.target(Target::AtMost(1000.0)),
    ])
}

/// INVALIDATE to ack of a page that a saturating COPY uses, against the same of an idle page, p99.
pub fn invalidations_under_load(mode: Mode) -> Result<Figure> {
    let subject = Subject::ours(&["--engines", "1"])?;
    let mut guest = guest(&subject, true)?;
    guest.driver.ok(&Command::ctx_create(1))?;
    let used = buffer(&mut guest, 1, COPY_PAGES)?;
    buffer(&mut guest, 2, COPY_PAGES)?;
    let main = guest.front_end.main_socket()?;
    let mut idle = (0..LOADED_ROUNDS).map(|_| exchange(&main).map(micros)).collect::<Result<Vec<_>>>()?;
    let whole = place(1, 0).range(COPY_PAGES as u64 * PAGE);
    let copy = || (0..4).fold(Stream::new().mode(mode), |stream, _| stream.copy(whole, place(2, 0)));
    let (mut on_its_way, mut fence) = (None, 0);
    let mut acks = Vec::new();
    for _ in 0..LOADED_ROUNDS {
        let is_done = match on_its_way {
            Some(ticket) => guest.driver.try_wait(ticket)?.is_some(),
            None => true,
        };
        if is_done {
            fence += 1;
            let submit = Command::submit_3d(1, &copy().finish()).fenced(fence);
            on_its_way = Some(guest.driver.submit(&submit)?);
        }
        acks.push(micros(guest.front_end.invalidate(used, PAGE)?.latency));
        guest.driver.poll()?;
    }
    if let Some(ticket) = on_its_way {
        guest.driver.wait_ok(ticket)?;
    }
    let what = format!("INVALIDATE to ack under a COPY of all, {}, p99", mode.name());
    let figure = Figure::new(what, quantile(&mut acks, 0.99), "µs");
    let figure = figure.against("idle, p99", quantile(&mut idle, 0.99));
    Ok(if mode == Mode::Fence { figure } else { figure.target(Target::MoreByAtMost(100.0)) })
}

/// Commands a second, [`DEPTH`] on their way.
fn rate(guest: &mut SoftGuest, command: impl Fn(u64) -> Command) -> Result<f64> {
    let mut rates = Vec::new();
    let mut fence = 0;
    for _ in 0..BATCHES {
        let start = Instant::now();
        let mut tickets = Vec::with_capacity(DEPTH);
        for _ in 0..DEPTH {
            fence += 1;
            tickets.push(guest.driver.queue(Queue::Control, &command(fence))?);
        }
        guest.driver.ring(Queue::Control).notify(DEPTH as u16)?;
        for ticket in tickets {
            guest.driver.wait_ok(ticket)?;
        }
        rates.push(DEPTH as f64 / start.elapsed().as_secs_f64() / 1000.0);
    }
    Ok(quantile(&mut rates, 0.5))
}

/// Fenced jobs that do nothing, against fenced transfers of one pixel on the same device.
pub fn no_op_jobs() -> Result<Figure> {
    let subject = Subject::ours(&[])?;
    let transfers = transfer_rate(&subject)?;
    let mut guest = guest(&subject, false)?;
    guest.driver.ok(&Command::ctx_create(1))?;
    let jobs = rate(&mut guest, |fence| Command::submit_3d(1, &Stream::new().nop(0).finish()).fenced(fence))?;
    let figure = Figure::new(format!("fenced NOP jobs, {DEPTH} at once"), jobs, "k/s");
    Ok(figure.against("fenced transfers of a pixel", transfers))
}

fn transfer_rate(subject: &Subject) -> Result<f64> {
    let mut guest = guest(subject, false)?;
    let surface = guest.surface(Format::B8G8R8X8, 64, 64)?;
    let pixel = Rect { x: 0, y: 0, width: 1, height: 1 };
    rate(&mut guest, |fence| Command::transfer(surface.resource, pixel, 0).fenced(fence))
}

/// Fenced transfers of one pixel without an IOMMU, ours against a peer's if there is one, in turns.
pub fn transfers(peer: Option<&str>) -> Result<Figure> {
    let ours = Subject::ours(&[])?;
    let Some(command_line) = peer else {
        let figure = Figure::new("fenced transfers of a pixel, no IOMMU", transfer_rate(&ours)?, "k/s");
        return Ok(figure);
    };
    let peer = Subject::peer(command_line)?;
    let (first, theirs, second) = (transfer_rate(&ours)?, transfer_rate(&peer)?, transfer_rate(&ours)?);
    let figure = Figure::new("fenced transfers of a pixel, no IOMMU", (first + second) / 2.0, "k/s");
    Ok(figure.against("the peer", theirs))
}

/// COPY over scattered pages behind the IOMMU, against memcpy of as much: in one piece, and page by page in no order in
/// memory like a guest's (a memfd: small pages), which is the most that a device can do whatever its lookups cost.
pub fn copy() -> Result<Vec<Figure>> {
    let subject = Subject::ours(&["--engines", "1"])?;
    let mut guest = guest(&subject, true)?;
    guest.driver.ok(&Command::ctx_create(1))?;
    buffer(&mut guest, 1, COPY_PAGES)?;
    buffer(&mut guest, 2, COPY_PAGES)?;
    let bytes = COPY_PAGES as u64 * PAGE;
    let (source, mut target) = (vec![1_u8; bytes as usize], vec![2_u8; bytes as usize]);
    let (shared_source, shared_target) = (shared(bytes)?, shared(bytes)?);
    // Eight copies a job: what a submission costs is measured elsewhere.
    let stream = (0..8).fold(Stream::new(), |stream, _| stream.copy(place(1, 0).range(bytes), place(2, 0)));
    let submit = Command::submit_3d(1, &stream.finish());
    let (mut copies, mut plain, mut paged) = (Vec::new(), Vec::new(), Vec::new());
    let rate = |start: Instant| 8.0 * bytes as f64 / start.elapsed().as_secs_f64() / 1e9;
    for round in 0..COPIES {
        let start = Instant::now();
        let ticket = guest.driver.submit(&submit.clone().fenced(round as u64 + 1))?;
        guest.driver.wait_ok(ticket)?;
        copies.push(rate(start));
        let start = Instant::now();
        for _ in 0..8 {
            target.copy_from_slice(std::hint::black_box(&source));
            std::hint::black_box(&mut target);
        }
        plain.push(rate(start));
        let start = Instant::now();
        for _ in 0..8 {
            copy_scattered(&shared_source, &shared_target);
        }
        paged.push(rate(start));
    }
    let copies = quantile(&mut copies, 0.5);
    let figure = |what| Figure::new(what, copies, "GB/s").target(Target::RatioAtLeast(0.9));
    Ok(vec![
        figure("COPY of 8 MiB in scattered pages, behind the IOMMU")
            .against("memcpy", quantile(&mut plain, 0.5)),
        figure("the same").against("memcpy of scattered pages", quantile(&mut paged, 0.5)),
    ])
}

/// Memory like a guest's.
fn shared(bytes: u64) -> Result<MmapRegion> {
    let file = memory_file(c"copied", bytes, false)?;
    let region = MmapRegion::from_file(FileOffset::new(file, 0), bytes as usize);
    region.map_err(|error| Error::io("map a memfd")(std::io::Error::other(error)))
}

/// Copies each page once, far from the one before.
fn copy_scattered(source: &MmapRegion, target: &MmapRegion) {
    let page =
        |region, index| VolatileMemory::get_slice(region, index % COPY_PAGES * PAGE as usize, PAGE as usize);
    for index in 0..COPY_PAGES {
        // Odd factors, so that a power of two of pages is gone through once.
        if let (Ok(from), Ok(to)) = (page(source, index * 1_021), page(target, index * 619 + 7)) {
            from.copy_to_volatile_slice(to);
        }
    }
}

/// A job on a buffer of 1 MiB of which nothing is in the mirror, against as many jobs of one page each.
pub fn cold_buffer(mode: Mode) -> Result<Figure> {
    let subject = Subject::ours(&["--engines", "1"])?;
    let mut guest = guest(&subject, true)?;
    guest.driver.ok(&Command::ctx_create(1))?;
    buffer(&mut guest, 1, COLD_PAGES)?;
    let mut fence = 0;
    let mut run = |guest: &mut SoftGuest, stream: Stream| -> Result<f64> {
        fence += 1;
        let start = Instant::now();
        let ticket = guest.driver.submit(&Command::submit_3d(1, &stream.finish()).fenced(fence))?;
        guest.driver.wait_ok(ticket)?;
        Ok(micros(start.elapsed()))
    };
    let (mut whole, mut pages) = (Vec::new(), Vec::new());
    for _ in 0..COLD_ROUNDS {
        guest.dma.flush()?;
        let range = place(1, 0).range(COLD_PAGES as u64 * PAGE);
        whole.push(run(&mut guest, Stream::new().mode(mode).fill(range, 1))?);
        guest.dma.flush()?;
        let mut sum = 0.0;
        for page in 0..COLD_PAGES as u64 {
            sum += run(&mut guest, Stream::new().fill(place(1, page * PAGE).range(64), 1))?;
        }
        pages.push(sum);
    }
    let what = format!("a job on a cold buffer of 1 MiB, {}, median", mode.name());
    let figure = Figure::new(what, quantile(&mut whole, 0.5), "µs");
    let figure = figure.against("256 jobs of a cold page each", quantile(&mut pages, 0.5));
    Ok(figure.target(Target::RatioAtMost(0.2)))
}

/// What the process takes while nothing happens, after some work.
pub fn idle() -> Result<Vec<Figure>> {
    let subject = Subject::ours(&[])?;
    let backend = subject.backend().ok_or(Error::NoCounter("the back-end".into()))?;
    let fresh = backend.resident_kib()? as f64 / 1024.0;
    let mut guest = guest(&subject, true)?;
    guest.driver.ok(&Command::ctx_create(1))?;
    let spin = Stream::new().spin(SpinBehaviour::Preemptible, 1_000_000);
    let ticket = guest.driver.submit(&Command::submit_3d(1, &spin.finish()).fenced(1))?;
    guest.driver.wait_ok(ticket)?;
    let spent = backend.cpu_time_in(IDLE)?;
    Ok(vec![
        Figure::new("resident without a front-end", fresh, "MiB").target(Target::AtMost(8.0)),
        Figure::new("resident with an idle guest", backend.resident_kib()? as f64 / 1024.0, "MiB")
            .target(Target::AtMost(8.0)),
        Figure::new("CPU time in 3 s of idling", spent.as_secs_f64() * 1e3, "ms").target(Target::AtMost(0.0)),
    ])
}
