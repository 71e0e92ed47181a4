//! Faults that the driver answers: jobs run over memory that is mapped when they come to it; no fault is lost, dropped or
//! raised twice; and a job that waits for its driver holds up no ack, no flush, no other job, no stop and no reset.
//!
//! `MIRRORGPU_CYCLES` sets the number of cycles of the storm.

use std::collections::{BTreeMap, VecDeque};

use guest_driver_tests::soft_guest::dma::DmaBuffer;
use guest_driver_tests::soft_guest::driver::Ticket;
use guest_driver_tests::soft_guest::frames::Dice;
use guest_driver_tests::soft_guest::jobs::{BYTES, PAGES, contents, every_packet, every_packet_at, place};
use guest_driver_tests::soft_guest::page_tables::{in_space, pte};
use guest_driver_tests::soft_guest::*;
use job_stream::twin::{Buffers, Outcome, interpret};
use job_stream::{AsFault, Compare, Limits, Mode, Stream, verify};

const ASID: u32 = 4;
/// Where the buffers are in the address space: each at its number times this.
const APART: u64 = 1 << 30;
/// How many AS_FETCH_FAULT are on their way.
const FETCHES: usize = 4;

fn cycles() -> u64 {
    std::env::var("MIRRORGPU_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(300)
}

/// A driver that maps pages of its buffers when jobs come to them.
struct Client {
    jobs: JobGuest,
    tables: PageTables,
    fetches: VecDeque<Ticket>,
    faults: u64,
    /// Pages of their own, by their address; elsewhere the buffers' are mapped.
    pages: BTreeMap<u64, DmaBuffer>,
}

impl Client {
    fn boot(backend: &Backend, mode: Mode, seed: u64) -> Self {
        let mut jobs = JobGuest::boot(backend, mode, seed).unwrap();
        let tables = PageTables::new(jobs.guest.dma.space()).unwrap();
        jobs.guest.driver.ok(&Command::as_create_with_faults(1, ASID, tables.root())).unwrap();
        Self { jobs, tables, fetches: VecDeque::new(), faults: 0, pages: BTreeMap::new() }
    }

    fn submit(&mut self, stream: Stream) -> Ticket {
        let command = Command::submit_3d(1, &stream.finish()).fenced(70);
        self.jobs.guest.driver.submit(&command).unwrap()
    }

    /// The next fault, if there is one.
    fn fetched(&mut self) -> Option<AsFault> {
        let driver = &mut self.jobs.guest.driver;
        while self.fetches.len() < FETCHES {
            self.fetches.push_back(driver.submit(&Command::as_fetch_fault(1, ASID)).unwrap());
        }
        let answered = driver.try_wait(*self.fetches.front()?).unwrap()?;
        self.fetches.pop_front();
        assert_eq!(answered.kind(), kind::AS_FAULT);
        self.faults += 1;
        AsFault::parse(answered.body())
    }

    fn wait_for_fault(&mut self) -> AsFault {
        loop {
            if let Some(fault) = self.fetched() {
                return fault;
            }
            std::thread::yield_now();
        }
    }

    fn answer(&mut self, fault: &AsFault, replay: bool) {
        let answer = Command::as_answer_fault(1, ASID, replay, fault.id);
        self.jobs.guest.driver.ok(&answer).unwrap();
    }

    /// Maps the page of a fault, as its buffer has it, and has the job tried again.
    fn resolve(&mut self, fault: &AsFault) {
        let at = fault.gva & !0xfff;
        let page = match self.pages.get(&at) {
            Some(page) => page.address(0),
            None => self.jobs.buffers[(at / APART) as usize - 1].address(at % APART),
        };
        self.tables.set(at, 0, page.0 | pte::ALL).unwrap();
        self.answer(fault, true);
    }

    /// Allocates another page for this address; the old one stays mapped for DMA.
    fn replace(&mut self, at: u64) -> Option<DmaBuffer> {
        let page = self.jobs.guest.dma.space().allocate(1, Permission::ReadWrite).unwrap();
        self.pages.insert(at, page)
    }

    /// Answers faults until a job has ended; returns the type of its response.
    fn serve_until(&mut self, job: Ticket) -> u32 {
        loop {
            if let Some(response) = self.jobs.guest.driver.try_wait(job).unwrap() {
                return response.kind();
            }
            match self.fetched() {
                Some(fault) => self.resolve(&fault),
                None => std::thread::yield_now(),
            }
        }
    }
}

fn gva(id: u32, offset: u64) -> job_stream::At {
    in_space(ASID, u64::from(id) * APART + offset)
}

#[test]
fn every_packet_does_what_the_twin_says_over_memory_that_is_mapped_when_it_comes_there() {
    let backend = Backend::start(&["--allow-incoherent"]).unwrap();
    for mode in Mode::ALL {
        let mut client = Client::boot(&backend, *mode, 71);
        let mut twin = (1..=3).fold(Buffers::new(), |twin, id| twin.with(id, contents(id)));
        let program = verify(&every_packet().finish(), &Limits::default()).unwrap();
        assert_eq!(interpret(&program, &mut twin), Ok(Outcome::Done));
        let before = backend.stats().unwrap();
        let job = client.submit(every_packet_at(gva));
        assert_eq!(client.serve_until(job), kind::OK_NODATA, "{mode}");
        for id in 1..=3 {
            assert!(client.jobs.bytes(id).unwrap() == twin.bytes(id), "buffer {id}, mode {mode}");
        }
        let after = backend.stats().unwrap();
        let counts = ["faults_raised", "faults_replayed", "address_space_faults"];
        let counts = counts.map(|name| after.since(&before, name).unwrap());
        assert_eq!(counts, [client.faults, client.faults, 0], "{mode}");
        assert!(client.faults > PAGES as u64, "{mode}: {} faults", client.faults);
    }
}

#[test]
fn a_job_that_waits_for_its_driver_holds_up_nothing_else() {
    let backend = Backend::start(&["--engines", "1"]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fence, 72);
    let waits = client.submit(Stream::new().fill(gva(1, 0).range(0x1000), 1).fill(gva(2, 0).range(8), 2));
    let fault = client.wait_for_fault();
    client.resolve(&fault);
    let fault = client.wait_for_fault();
    assert_eq!((fault.gva, fault.packet, fault.repeats), (2 * APART, 1, 0));
    // The ack of a page that it has used, and a flush.
    client.jobs.swap(1, 0).unwrap();
    let driver = &mut client.jobs.guest.driver;
    driver.ok(&Command::as_invalidate(1, ASID, true, (0, (1 << 48) - 1))).unwrap();
    // Another context's job, on the only engine. It is not fenced, because fences end in order.
    driver.ok(&Command::ctx_create(2)).unwrap();
    driver.ok(&Command::ctx_attach(2, 3)).unwrap();
    driver.ok(&Command::submit_3d(2, &Stream::new().signal(place(3, 0), 0x77).finish())).unwrap();
    client.jobs.wait_for_word(3, 0, 0x77).unwrap();
    // A stop, and a start.
    client.jobs.guest.stop().unwrap();
    client.jobs.guest.start().unwrap();
    assert_eq!(client.fetched(), None, "the fault is not raised twice");
    client.resolve(&fault);
    assert_eq!(client.serve_until(waits), kind::OK_NODATA);
    assert_eq!(client.jobs.bytes(2).unwrap()[..8], [2, 0, 0, 0, 2, 0, 0, 0]);
}

#[test]
fn a_job_whose_driver_answers_fail_fails_and_the_record_names_the_address() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 73);
    let job = client.submit(Stream::new().signal(gva(1, 0x18), 1));
    let fault = client.wait_for_fault();
    client.answer(&fault, false);
    assert_eq!(client.jobs.guest.driver.wait(job).unwrap().kind(), kind::ERR_UNSPEC);
    let faults = backend.control().unwrap().execute("faults").unwrap();
    let last = faults["faults"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(
        (&last["kind"], &last["gva"]),
        (&"not-present".into(), &format!("{:#x}", APART + 0x18).into())
    );
}

#[test]
fn a_job_that_is_killed_while_it_waits_for_its_driver_ends() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 74);
    let job = client.submit(Stream::new().signal(gva(1, 0), 1));
    let fault = client.wait_for_fault();
    let driver = &mut client.jobs.guest.driver;
    driver.ok(&Command::ctx_destroy(1)).unwrap();
    assert_eq!(driver.wait(job).unwrap().kind(), kind::ERR_UNSPEC);
    // What was fetched ahead is answered too: the address space has ended.
    for fetch in client.fetches.drain(..) {
        assert_eq!(driver.wait(fetch).unwrap().kind(), kind::ERR_INVALID_RESOURCE_ID);
    }
    let late = driver.run(&Command::as_answer_fault(1, ASID, true, fault.id)).unwrap();
    assert_eq!(late.kind(), kind::ERR_INVALID_CONTEXT_ID);
}

#[test]
fn a_reset_discards_what_waits_for_a_driver_that_is_gone() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 75);
    let _job = client.submit(Stream::new().wait(gva(1, 0), Compare::Equal, 1, 0));
    let fault = client.wait_for_fault();
    client.jobs.guest.reboot().unwrap();
    let driver = &mut client.jobs.guest.driver;
    driver.ok(&Command::ctx_create(1)).unwrap();
    driver.ok(&Command::as_create_with_faults(1, ASID, client.tables.root())).unwrap();
    let answer = Command::as_answer_fault(1, ASID, true, fault.id);
    assert_eq!(driver.run(&answer).unwrap().kind(), kind::ERR_INVALID_PARAMETER);
    assert_eq!(backend.stats().unwrap().get("faults_raised").unwrap(), 1);
}

/// The driver takes pages away all the time, in the right order, and maps them again when a job comes there: every job
/// succeeds, nothing is written to a page after its flush, and the device accuses no driver.
#[test]
fn jobs_succeed_while_their_pages_come_and_go() {
    for policy in ["sticky", "prefetch:4", "random:5"] {
        let backend = Backend::start(&["--tlb", policy, "--drain-timeout", "1s"]).unwrap();
        let mut client = Client::boot(&backend, Mode::Fault, 76);
        let mut dice = Dice::new(76);
        let mut on_their_way = VecDeque::new();
        let place_of = |page: usize| APART + page as u64 * 0x1000;
        (0..PAGES).for_each(|page| drop(client.replace(place_of(page))));
        for cycle in 0..cycles() {
            while on_their_way.len() < 3 {
                let all = gva(1, 0).range(BYTES);
                let stream = Stream::new().fill(all, cycle as u32).checksum(all, place(3, 0));
                on_their_way.push_back(client.submit(stream));
            }
            let at = place_of(dice.below(PAGES));
            client.tables.set(at, 0, 0).unwrap();
            client.jobs.guest.driver.ok(&Command::as_invalidate(1, ASID, false, (at, at))).unwrap();
            let old = client.replace(at).unwrap();
            old.write(0, &[0xdb; 64]).unwrap();
            let oldest = on_their_way.pop_front().unwrap();
            assert_eq!(client.serve_until(oldest), kind::OK_NODATA, "{policy}, cycle {cycle}");
            let mut found = [0; 64];
            old.read(0, &mut found).unwrap();
            assert_eq!(found, [0xdb; 64], "{policy}, cycle {cycle}: touched after its flush");
            client.jobs.guest.dma.unmap(old).unwrap();
            if cycle % 64 == 63 {
                client.jobs.guest.dma.oracle().release().unwrap();
            }
        }
        for job in on_their_way {
            assert_eq!(client.serve_until(job), kind::OK_NODATA);
        }
        client.jobs.guest.dma.oracle().release().unwrap();
        let faults = backend.control().unwrap().execute("faults").unwrap();
        assert_eq!(faults["faults"].as_array().unwrap().len(), 0, "{policy}: {faults}");
        assert!(client.faults > cycles() / 4, "{policy}: {} faults", client.faults);
    }
}
