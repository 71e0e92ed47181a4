//! The TLB of device address spaces: what is flushed is used by no step any more, whatever else is outstanding; a driver
//! that flushes rightly is never accused, and one that forgets a flush, or flushes too early, is told so.
//!
//! `MIRRORGPU_CYCLES` sets the number of cycles of the storms.

use std::collections::VecDeque;
use std::time::Duration;

use guest_driver_tests::soft_guest::dma::DmaBuffer;
use guest_driver_tests::soft_guest::driver::Ticket;
use guest_driver_tests::soft_guest::frames::Dice;
use guest_driver_tests::soft_guest::jobs::{BYTES, PAGES, place};
use guest_driver_tests::soft_guest::page_tables::{in_space, pte, warm_up};
use guest_driver_tests::soft_guest::*;
use job_stream::{Compare, Mode, SpinBehaviour, Stream};
use serde_json::{Value, json};

const ASID: u32 = 3;
/// Where a page of the driver's is mapped, and the pages around it.
const GVA: u64 = 0x7000_0000;
/// The largest range.
const EVERYTHING: (u64, u64) = (0, (1 << 48) - 1);
const LEAVES: bool = false;
const TABLES_TOO: bool = true;
/// What no job writes.
const POISON: [u8; 4096] = [0xdb; 4096];

fn cycles() -> u64 {
    std::env::var("MIRRORGPU_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(300)
}

/// A driver that maps one page at a time at [`GVA`].
struct Client {
    jobs: JobGuest,
    tables: PageTables,
}

impl Client {
    fn boot(backend: &Backend, mode: Mode, seed: u64) -> Self {
        let mut jobs = JobGuest::boot(backend, mode, seed).unwrap();
        let tables = PageTables::new(jobs.guest.dma.space()).unwrap();
        jobs.guest.driver.ok(&Command::as_create(1, ASID, tables.root())).unwrap();
        Self { jobs, tables }
    }

    fn page(&self) -> DmaBuffer {
        self.jobs.guest.dma.space().allocate(1, Permission::ReadWrite).unwrap()
    }

    fn map(&mut self, page: &DmaBuffer) {
        self.tables.set(GVA, 0, page.address(0).0 | pte::ALL).unwrap();
    }

    fn clear(&mut self) {
        self.tables.set(GVA, 0, 0).unwrap();
    }

    fn flush(&mut self, tables_too: bool, range: (u64, u64)) {
        self.jobs.guest.driver.ok(&Command::as_invalidate(1, ASID, tables_too, range)).unwrap();
    }

    fn unmap(&self, page: DmaBuffer) {
        self.jobs.guest.dma.unmap(page).unwrap();
    }

    /// Runs a job that writes to [`GVA`]: what became of it.
    fn writes(&mut self) -> std::result::Result<(), u32> {
        let ticket = self.jobs.submit(Stream::new().signal(in_space(ASID, GVA), 7)).unwrap();
        let answer = self.jobs.guest.driver.wait(ticket).unwrap().kind();
        if answer == kind::OK_NODATA {
            return Ok(());
        }
        self.renew();
        Err(answer)
    }

    /// Recreates the context and the address space after a job that failed.
    fn renew(&mut self) {
        self.jobs.guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
        self.jobs.make_context(1).unwrap();
        self.jobs.guest.driver.ok(&Command::as_create(1, ASID, self.tables.root())).unwrap();
    }
}

fn faults(backend: &Backend) -> Vec<Value> {
    backend.control().unwrap().execute("faults").unwrap()["faults"].as_array().unwrap().clone()
}

/// Those that accuse the driver of a wrong order of flushing.
fn accusations(backend: &Backend) -> Vec<Value> {
    faults(backend).into_iter().filter(|fault| !fault["cached"].is_null()).collect()
}

/// Submits a job to any context.
fn submit_to(client: &mut Client, ctx: u32, stream: Stream) -> Ticket {
    let command = Command::submit_3d(ctx, &stream.finish()).fenced(1000 + u64::from(ctx));
    client.jobs.guest.driver.submit(&command).unwrap()
}

/// One waits for a value that never comes, one keeps an engine, and one waits for a MISS that is not answered.
#[test]
fn a_flush_is_answered_whatever_jobs_and_misses_are_outstanding() {
    let backend = Backend::start(&["--miss-timeout", "60s", "--engines", "2"]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 61);
    let (page, cold) = (client.page(), client.page());
    client.map(&page);
    client.tables.set(GVA + 0x1000, 0, cold.address(0).0 | pte::ALL).unwrap();
    client.writes().unwrap();
    for ctx in [2, 3] {
        client.jobs.make_context(ctx).unwrap();
        let root = client.tables.root();
        client.jobs.guest.driver.ok(&Command::as_create(ctx, ASID + ctx, root)).unwrap();
    }
    let waits = Stream::new().signal(place(3, 0), 0xa1).wait(in_space(ASID, GVA), Compare::Equal, !0, 0);
    let spins = Stream::new().signal(place(3, 4), 0xa2).spin(SpinBehaviour::Stubborn, 9_000_000_000);
    let _jobs = [(1, waits), (2, spins)].map(|(ctx, stream)| submit_to(&mut client, ctx, stream));
    client.jobs.wait_for_word(3, 0, 0xa1).unwrap();
    client.jobs.wait_for_word(3, 4, 0xa2).unwrap();
    warm_up(&mut client.jobs.guest.driver, ASID).unwrap();
    let before = backend.stats().unwrap();
    let front_end = client.jobs.guest.front_end.clone();
    let frozen = front_end.freeze();
    let _misses = submit_to(&mut client, 3, Stream::new().signal(in_space(ASID + 3, GVA + 0x1000), 1));
    let asked = |stats: &Stats| stats.since(&before, "misses").is_ok_and(|misses| misses > 0);
    assert!(backend.wait_for_stats(Duration::from_secs(5), asked).unwrap());
    for (asid, ctx) in [(ASID, 1), (ASID + 2, 2), (ASID + 3, 3)] {
        for flush in [(LEAVES, EVERYTHING), (TABLES_TOO, (GVA, GVA + 0xfff))] {
            client.jobs.guest.driver.ok(&Command::as_invalidate(ctx, asid, flush.0, flush.1)).unwrap();
        }
    }
    let after = backend.stats().unwrap();
    assert_eq!(after.since(&before, "jobs_done").unwrap(), 0, "all three are still there");
    drop(frozen);
    // Its fence waits for the others on their timeline.
    let is_done = |stats: &Stats| stats.since(&before, "jobs_done").is_ok_and(|done| done == 1);
    assert!(backend.wait_for_stats(Duration::from_secs(5), is_done).unwrap());
    assert_eq!(accusations(&backend), [] as [Value; 0]);
}

#[test]
fn an_entry_is_used_until_it_is_flushed() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 62);
    let (old, new) = (client.page(), client.page());
    client.map(&old);
    client.writes().unwrap();
    let before = backend.stats().unwrap();
    let word = |page: &DmaBuffer| {
        let mut word = [0; 4];
        page.read(0, &mut word).unwrap();
        word
    };
    client.map(&new);
    old.write(0, &[0; 4]).unwrap();
    new.write(0, &[0; 4]).unwrap();
    client.writes().unwrap();
    assert_eq!((word(&old), word(&new)), ([7, 0, 0, 0], [0; 4]));
    client.flush(LEAVES, (GVA, GVA));
    old.write(0, &[0; 4]).unwrap();
    client.writes().unwrap();
    assert_eq!((word(&old), word(&new)), ([0; 4], [7, 0, 0, 0]));
    let after = backend.stats().unwrap();
    // The last job walks, comes to a page that the mirror does not have yet, and finds the entry when it comes back.
    let counts = ["tlb_hits", "tlb_misses"].map(|name| after.since(&before, name).unwrap());
    assert_eq!(counts, [2, 1]);
    assert_eq!(accusations(&backend), [] as [Value; 0]);
}

#[test]
fn a_range_that_is_none_is_refused() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 63);
    let driver = &mut client.jobs.guest.driver;
    for range in [(1, 0), (0, 1 << 48), (u64::MAX, u64::MAX)] {
        let flush = Command::as_invalidate(1, ASID, LEAVES, range);
        assert_eq!(driver.run(&flush).unwrap().kind(), kind::ERR_INVALID_PARAMETER, "{range:x?}");
    }
    let other = Command::as_invalidate(1, ASID + 1, LEAVES, (0, 0));
    assert_eq!(driver.run(&other).unwrap().kind(), kind::ERR_INVALID_RESOURCE_ID);
}

/// What a driver does wrong between two jobs that use one address.
type Mistake = fn(&mut Client, DmaBuffer);

/// The page is unmapped before the device was told that the entry is gone (the order of CVE-2022-0330).
fn unmap_before_flush(client: &mut Client, page: DmaBuffer) {
    client.clear();
    client.unmap(page);
}

/// The flush comes before the entry is cleared, and a job reads the entry again in between.
fn flush_before_clearing(client: &mut Client, page: DmaBuffer) {
    client.flush(LEAVES, (GVA, GVA));
    client.writes().unwrap();
    client.clear();
    client.unmap(page);
}

/// The page is unmapped, and the entry stays.
fn entry_never_cleared(client: &mut Client, page: DmaBuffer) {
    client.unmap(page);
}

/// Another range is flushed.
fn flush_beside(client: &mut Client, page: DmaBuffer) {
    client.clear();
    client.flush(LEAVES, (GVA + 0x1000, GVA + 0x1fff));
    client.unmap(page);
}

#[test]
fn a_driver_that_unmaps_a_page_which_the_tlb_still_has_is_told_what_it_did() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mistakes: [(Mistake, bool, bool, &str); 4] = [
        (unmap_before_flush, true, false, "the device was not told, or the page was unmapped before it was"),
        (flush_before_clearing, true, true, "read the old entry again after an AS_INVALIDATE"),
        (entry_never_cleared, false, false, "while the page tables still map it"),
        (flush_beside, true, false, "the device was not told"),
    ];
    for mode in [Mode::Strict, Mode::Fence, Mode::Preempt, Mode::Fault] {
        for (mistake, contradicts, after_flush, advice) in mistakes {
            let mut client = Client::boot(&backend, mode, 64);
            let page = client.page();
            client.map(&page);
            client.writes().unwrap();
            let entry = page.address(0).0 | pte::ALL;
            let told = faults(&backend).len();
            mistake(&mut client, page);
            assert_eq!(client.writes(), Err(kind::ERR_UNSPEC));
            let [fault] = &faults(&backend)[told..] else { panic!("one fault") };
            let found = json!([
                fault["asid"],
                fault["gva"],
                fault["kind"],
                fault["pte"],
                fault["cached"]["contradicts"],
                fault["cached"]["after_flush"],
            ]);
            let expected = json!([
                ASID,
                format!("{GVA:#x}"),
                "refused",
                format!("{entry:#x}"),
                contradicts,
                after_flush
            ]);
            assert_eq!(found, expected, "{mode}: {fault}");
            assert!(fault["advice"].as_str().unwrap().contains(advice), "{fault}");
            client.jobs.guest.dma.oracle().release().unwrap();
        }
    }
}

#[test]
fn an_iova_that_is_given_to_other_memory_before_the_flush_is_not_used_for_the_old_address() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 65);
    let mut page = client.page();
    client.map(&page);
    client.writes().unwrap();
    client.clear();
    let frame = client.jobs.guest.dma.space().frames().take(1).unwrap()[0];
    client.jobs.guest.dma.swap_page(&mut page, 0, frame).unwrap();
    page.write(0, &[0x55; 8]).unwrap();
    // Something else uses the IOVA, so the mirror has the new page before the job comes.
    client.tables.set(GVA + 0x1000, 0, page.address(0).0 | pte::ALL).unwrap();
    client.jobs.run(Stream::new().copy(in_space(ASID, GVA + 0x1000).range(8), place(1, 0))).unwrap();
    assert_eq!(client.writes(), Err(kind::ERR_UNSPEC));
    let mut word = [0; 8];
    page.read(0, &mut word).unwrap();
    assert_eq!(word, [0x55; 8], "the memory of someone else is untouched");
    let [fault] = &accusations(&backend)[..] else { panic!("one accusation") };
    assert_eq!((&fault["kind"], &fault["gva"]), (&json!("moved"), &json!(format!("{GVA:#x}"))));
}

#[test]
fn a_table_that_is_freed_after_a_flush_of_leaves_alone_is_told_as_that() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    for (what, is_told) in [(LEAVES, true), (TABLES_TOO, false)] {
        let mut client = Client::boot(&backend, Mode::Fault, 66);
        let page = client.page();
        client.map(&page);
        client.writes().unwrap();
        let told = accusations(&backend).len();
        client.tables.set(GVA, 1, 0).unwrap();
        client.flush(what, (GVA, GVA));
        let table = client.tables.take_table(GVA, 0).unwrap();
        client.unmap(table);
        assert_eq!(client.writes(), Err(kind::ERR_UNSPEC));
        let accused = &accusations(&backend)[told..];
        assert_eq!(accused.len(), usize::from(is_told), "{accused:?}");
        assert!(accused.iter().all(|fault| fault["advice"].as_str().unwrap().contains("without LEAVES")));
        client.jobs.guest.dma.oracle().release().unwrap();
    }
}

/// The right order, all the time, with jobs in flight: an entry goes or changes, is flushed, and only then is its page
/// unmapped and given to something else. Jobs that come too late fail by the entry, and nothing is blamed on the TLB.
#[test]
fn a_driver_that_flushes_before_it_unmaps_is_never_accused_and_no_page_is_touched_after_its_flush() {
    for policy in ["sticky", "thrash", "random:7", "prefetch:8"] {
        let backend = Backend::start(&["--tlb", policy, "--drain-timeout", "1s"]).unwrap();
        let mut client = Client::boot(&backend, Mode::Fault, 67);
        let mut dice = Dice::new(67);
        let mut pages: Vec<DmaBuffer> = (0..PAGES).map(|_| client.page()).collect();
        let at = |page: usize| GVA + page as u64 * 0x1000;
        let map = |client: &mut Client, index: usize, page: &DmaBuffer| {
            client.tables.set(at(index), 0, page.address(0).0 | pte::ALL).unwrap();
        };
        for (index, page) in pages.iter().enumerate() {
            map(&mut client, index, page);
        }
        let (mut on_their_way, mut succeeded) = (VecDeque::new(), 0);
        let all = in_space(ASID, GVA).range(BYTES);
        for cycle in 0..cycles() {
            while on_their_way.len() < 3 {
                let stream = Stream::new().fill(all, cycle as u32).checksum(all, place(3, 0));
                on_their_way.push_back(client.jobs.submit(stream).unwrap());
            }
            let index = dice.below(PAGES);
            let new = client.page();
            // In place, or by way of an entry that maps nothing.
            if dice.below(2) == 0 {
                map(&mut client, index, &new);
            } else {
                client.tables.set(at(index), 0, 0).unwrap();
            }
            client.flush(if dice.below(4) == 0 { TABLES_TOO } else { LEAVES }, (at(index), at(index)));
            // From here on no job writes to the old page, though it is still mapped.
            let old = std::mem::replace(&mut pages[index], new);
            old.write(0, &POISON).unwrap();
            map(&mut client, index, &pages[index]);
            let oldest = on_their_way.pop_front().unwrap();
            if client.jobs.guest.driver.wait(oldest).unwrap().kind() != kind::OK_NODATA {
                on_their_way.drain(..).for_each(|job| drop(client.jobs.guest.driver.wait(job).unwrap()));
                client.renew();
            } else {
                succeeded += 1;
            }
            let mut found = [0; POISON.len()];
            old.read(0, &mut found).unwrap();
            assert_eq!(found, POISON, "{policy}, cycle {cycle}: touched after its flush");
            client.unmap(old);
            if cycle % 64 == 63 {
                on_their_way.drain(..).for_each(|job| drop(client.jobs.guest.driver.wait(job).unwrap()));
                client.renew();
                client.jobs.guest.dma.oracle().release().unwrap();
            }
        }
        on_their_way.drain(..).for_each(|job| drop(client.jobs.guest.driver.wait(job).unwrap()));
        client.jobs.guest.dma.oracle().release().unwrap();
        assert_eq!(accusations(&backend), [] as [Value; 0], "{policy}");
        let hits = backend.stats().unwrap().get("tlb_hits").unwrap();
        assert!(succeeded > cycles() / 4, "{policy}: {succeeded} jobs succeeded");
        assert!(policy == "thrash" || hits > cycles(), "{policy}: {hits} hits");
    }
}
