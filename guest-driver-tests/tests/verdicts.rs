//! What an INVALIDATE under a job meant: benign, moved or gone, in every mode; and no correct driver is ever accused,
//! however its kernel flushes.
//!
//! `MIRRORGPU_CYCLES` sets the number of cycles of correct drivers.

use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::*;
use job_stream::{At, Choice, Mode, Range, Space, SpinBehaviour, Stream};

const PAGES: usize = 16;
const BYTES: u64 = PAGES as u64 * 4096;
/// How long a job that is hit holds its engine between its two looks at its buffer.
const SPIN: Duration = Duration::from_millis(300);

fn cycles() -> u64 {
    std::env::var("MIRRORGPU_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(300)
}

fn whole(id: u32) -> Range {
    At::new(Space::resource(id), 0).range(BYTES)
}

/// A guest with context 1; buffers are attached as they come.
struct Client {
    guest: SoftGuest,
    fence: u64,
}

impl Client {
    fn new(backend: &Backend, mode: Mode) -> Self {
        let mut guest = SoftGuest::boot(backend, GuestConfig::headless()).unwrap();
        guest.driver.ok(&Command::ctx_create(1)).unwrap();
        let mut client = Self { guest, fence: 0 };
        let ticket = client.submit(Stream::new().mode(mode));
        client.guest.driver.wait_ok(ticket).unwrap();
        client
    }

    fn attach(&mut self, id: u32) -> dma::DmaBuffer {
        let buffer = self.guest.dma.space().allocate(PAGES, Permission::ReadWrite).unwrap();
        self.guest.driver.ok(&Command::create_buffer(id, BYTES as u32)).unwrap();
        self.guest.driver.ok(&Command::attach_backing(id, &buffer.segments(0, BYTES))).unwrap();
        self.guest.driver.ok(&Command::ctx_attach(1, id)).unwrap();
        buffer
    }

    fn submit(&mut self, stream: Stream) -> driver::Ticket {
        self.fence += 1;
        self.guest.driver.submit(&Command::submit_3d(1, &stream.finish()).fenced(self.fence)).unwrap()
    }
}

/// What a driver does to the buffer of a job in flight.
#[derive(Clone, Copy, Debug)]
enum Deed {
    Unmap,
    MoveAPage,
}

/// The verdicts about one mode, and the reports that were printed.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    gone: bool,
    moved: bool,
    job_is_well: bool,
    report: Option<String>,
}

/// Does that to a job that has filled its buffer, spins, and will fill it again.
fn found(mode: Mode, deed: Deed, drain_timeout: &str) -> Found {
    let backend = Backend::start(&["--drain-timeout", drain_timeout, "--engines", "1"]).unwrap();
    let mut client = Client::new(&backend, mode);
    let mut buffer = client.attach(1);
    let before = backend.stats().unwrap();
    let twice = Stream::new().fill(whole(1), 1).spin(SpinBehaviour::Preemptible, SPIN.as_nanos() as u64);
    let ticket = client.submit(twice.fill(whole(1), 2));
    let (mut control, begin) = (backend.control().unwrap(), Instant::now());
    while control.execute("jobs").unwrap()["jobs"][0]["packet"] != 1 {
        assert!(begin.elapsed() < Duration::from_secs(5), "{mode}: the job does not spin");
        wire::wait_readable(&[], Some(Duration::from_millis(1))).unwrap();
    }
    match deed {
        Deed::Unmap => {
            client.guest.dma.unmap(buffer).unwrap();
        }
        Deed::MoveAPage => {
            let frame = client.guest.dma.space().frames().take(1).unwrap()[0];
            client.guest.dma.swap_page(&mut buffer, 5, frame).unwrap();
        }
    }
    let job_is_well = client.guest.driver.wait(ticket).unwrap().kind() == kind::OK_NODATA;
    let after = backend.stats().unwrap();
    let count =
        |verdict: &str| after.since(&before, &format!("verdicts.{}.{verdict}", mode.name())).unwrap() > 0;
    let violations = control.execute("violations").unwrap();
    let violations = violations["violations"].as_array().unwrap();
    assert!(violations.len() < 2, "{mode}: a job and an INVALIDATE are one violation: {violations:?}");
    let report = violations.first().map(|violation| violation["report"].as_str().unwrap().to_owned());
    if let Some(report) = &report {
        // It is printed too, but nobody waits for that.
        let begin = Instant::now();
        while !backend.stderr().contains(report.lines().next().unwrap()) {
            assert!(begin.elapsed() < Duration::from_secs(5), "{}", backend.stderr());
            wire::wait_readable(&[], Some(Duration::from_millis(1))).unwrap();
        }
    }
    Found { gone: count("gone"), moved: count("moved"), job_is_well, report }
}

fn has(found: &Found, text: &str) -> bool {
    found.report.as_ref().is_some_and(|report| report.contains(text))
}

#[test]
fn memory_that_is_unmapped_under_a_job_is_gone_and_the_job_that_needs_it_fails() {
    for mode in [Mode::Strict, Mode::Preempt, Mode::Fence] {
        let found = found(mode, Deed::Unmap, "20ms");
        assert!(has(&found, "Violation 1: GONE (certain)"), "{mode}: {found:?}");
        assert_eq!((found.gone, found.moved, found.job_is_well), (true, false, false), "{mode}");
    }
}

#[test]
fn memory_that_is_moved_under_a_job_is_a_violation_and_kills_a_job_that_was_to_hold_it() {
    for mode in [Mode::Strict, Mode::Preempt, Mode::Fence] {
        let found = found(mode, Deed::MoveAPage, "20ms");
        assert!(has(&found, "Violation 1: MOVED (certain)"), "{mode}: {found:?}");
        let well = mode != Mode::Fence;
        assert_eq!((found.gone, found.moved, found.job_is_well), (false, true, well), "{mode}");
    }
}

#[test]
fn a_job_that_an_invalidation_waited_for_is_well_and_its_driver_is_found_out_before_its_fence() {
    for (deed, words) in [(Deed::Unmap, "GONE (certain)"), (Deed::MoveAPage, "MOVED (certain)")] {
        let found = found(Mode::Fence, deed, "10s");
        assert!(found.job_is_well && has(&found, words), "{deed:?}: {found:?}");
    }
}

#[test]
fn in_fault_mode_memory_may_go_and_is_counted() {
    for deed in [Deed::Unmap, Deed::MoveAPage] {
        let found = found(Mode::Fault, deed, "20ms");
        assert_eq!(found.report, None, "{deed:?}");
        assert!(found.gone || found.moved, "{deed:?}");
    }
}

/// One cycle of a driver that does all right: maps, submits, waits for the fence, unmaps. Meanwhile its kernel flushes
/// more than it unmaps.
fn right(client: &mut Client, cycle: u64) {
    let mapped = client.attach(2);
    let ticket =
        client.submit(Stream::new().fill(whole(2), 7).copy(whole(1), At::new(Space::resource(2), 0)));
    let neighbour = client.guest.dma.space().allocate(1, Permission::ReadWrite).unwrap();
    match cycle % 3 {
        0 => {
            client.guest.dma.unmap_later(neighbour).unwrap();
            assert_eq!(client.guest.dma.flush().unwrap().len(), 2);
        }
        1 => assert_eq!(client.guest.dma.unmap_rounded(neighbour).unwrap().status, 0),
        _ => client.guest.dma.unmap_later(neighbour).unwrap(),
    }
    client.guest.driver.wait_ok(ticket).unwrap();
    if cycle.is_multiple_of(2) {
        client.guest.driver.ok(&Command::ctx_detach(1, 2)).unwrap();
        client.guest.driver.ok(&Command::unref(2)).unwrap();
        client.guest.dma.unmap(mapped).unwrap();
    } else {
        // Before UNREF is heard of: the fence is enough.
        client.guest.dma.unmap_later(mapped).unwrap();
        client.guest.dma.flush().unwrap();
        client.guest.driver.ok(&Command::ctx_detach(1, 2)).unwrap();
        client.guest.driver.ok(&Command::unref(2)).unwrap();
    }
}

#[test]
fn no_correct_driver_is_accused_in_any_mode_strict_or_lazy() {
    let backend = Backend::start(&["--drain-timeout", "1s", "--allow-incoherent"]).unwrap();
    for mode in Mode::ALL {
        let mut client = Client::new(&backend, *mode);
        let _source = client.attach(1);
        let mut clean = 0;
        for cycle in 0..cycles() {
            right(&mut client, cycle);
            if cycle % 64 == 0 {
                clean += client.guest.dma.oracle().release().unwrap();
            }
        }
        assert!(clean > 0);
    }
    let stats = backend.stats().unwrap();
    println!("{}", stats.0["verdicts"]);
    let mut benign = 0;
    for mode in Mode::ALL {
        let count = |verdict: &str| stats.get(&format!("verdicts.{}.{verdict}", mode.name())).unwrap();
        assert_eq!((count("moved"), count("gone"), count("untold")), (0, 0, 0), "{mode}");
        benign += count("benign");
    }
    assert!(benign > 0, "No invalidation has met a job");
    let violations = backend.control().unwrap().execute("violations").unwrap();
    assert_eq!(violations["violations"].as_array().unwrap().len(), 0, "{violations}");
}
