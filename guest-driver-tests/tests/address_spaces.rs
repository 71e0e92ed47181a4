//! Jobs in address spaces whose page tables the driver writes: each packet does what the twin says through leaves of all
//! sizes; what the tables do not permit ends the job and is recorded; no page, of a table or of memory, is touched after
//! the ack of its INVALIDATE.
//!
//! `MIRRORGPU_CYCLES` sets the number of cycles of the storm (250000 for the soak).

use std::collections::VecDeque;
use std::time::Duration;

use guest_driver_tests::soft_guest::frames::Dice;
use guest_driver_tests::soft_guest::jobs::{
    BYTES, PAGES, contents, every_packet, every_packet_at, place, whole,
};
use guest_driver_tests::soft_guest::page_tables::{in_space, pte, warm_up};
use guest_driver_tests::soft_guest::*;
use job_stream::twin::{Buffers, Outcome, interpret};
use job_stream::{Capset, Compare, Context, Limits, Mode, SpinBehaviour, Stream, verify};
use serde_json::json;

const ASID: u32 = 7;
/// Where buffer 1 is mapped by pages: across a boundary of tables of every level.
const BY_PAGES: u64 = (1 << 39) - 0x10_000;
const BY_2_MIB: u64 = 0x12_3460_0000;
const BY_1_GIB: u64 = 0x55_4000_0000;

fn cycles() -> u64 {
    std::env::var("MIRRORGPU_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(400)
}

/// A guest whose buffers are mapped in an address space too.
struct Client {
    jobs: JobGuest,
    tables: PageTables,
    /// Where each buffer is.
    at: [u64; 3],
}

impl Client {
    fn boot(backend: &Backend, mode: Mode, seed: u64) -> Self {
        let mut jobs = JobGuest::boot(backend, mode, seed).unwrap();
        let mut tables = PageTables::new(jobs.guest.dma.space()).unwrap();
        let [first, second, third] = &jobs.buffers[..] else { panic!("three buffers") };
        tables.map_pages(BY_PAGES, first, pte::ALL).unwrap();
        let second = tables.map_around(BY_1_GIB, 2, second, pte::ALL).unwrap();
        let third = tables.map_around(BY_2_MIB, 1, third, pte::ALL).unwrap();
        jobs.guest.driver.ok(&Command::as_create(1, ASID, tables.root())).unwrap();
        Self { jobs, tables, at: [BY_PAGES, second, third] }
    }

    /// The place where a byte of a buffer is in the address space.
    fn gva(&self, id: u32, offset: u64) -> job_stream::At {
        in_space(ASID, self.at[id as usize - 1] + offset)
    }

    fn iommu_faults(&self) -> usize {
        self.jobs.guest.dma.space().iommu().faults().len()
    }

    /// A job that must fail; the context is made anew.
    fn fails(&mut self, stream: Stream) {
        let ticket = self.jobs.submit(stream).unwrap();
        assert_eq!(self.jobs.guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
        self.jobs.guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
        self.jobs.make_context(1).unwrap();
        self.jobs.guest.driver.ok(&Command::as_create(1, ASID, self.tables.root())).unwrap();
    }
}

#[test]
fn every_packet_does_what_the_twin_says_through_leaves_of_every_size_and_in_every_mode() {
    let backend = Backend::start(&["--allow-incoherent"]).unwrap();
    for mode in Mode::ALL {
        let mut client = Client::boot(&backend, *mode, 41);
        let mut twin = (1..=3).fold(Buffers::new(), |twin, id| twin.with(id, contents(id)));
        let program = verify(&every_packet().finish(), &Limits::default()).unwrap();
        assert_eq!(interpret(&program, &mut twin), Ok(Outcome::Done));
        let stream = every_packet_at(|id, offset| client.gva(id, offset));
        client.jobs.run(stream).unwrap();
        for id in 1..=3 {
            assert!(client.jobs.bytes(id).unwrap() == twin.bytes(id), "buffer {id}, mode {mode}");
        }
        assert_eq!(client.iommu_faults(), 0, "{mode}");
    }
}

#[test]
fn a_job_that_misses_a_page_asks_for_the_next_ones_at_once() {
    let backend = Backend::start(&["--miss-timeout", "10s"]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fence, 42);
    // The first page is in the mirror then, the last one, and all tables.
    let last = client.gva(1, BYTES - 4);
    client.jobs.run(Stream::new().signal(client.gva(1, 0), 1).signal(last, 1)).unwrap();
    let before = backend.stats().unwrap();
    let front_end = client.jobs.guest.front_end.clone();
    let frozen = front_end.freeze();
    let ticket = client.jobs.submit(Stream::new().fill(client.gva(1, 0).range(BYTES), 9)).unwrap();
    let asked = |stats: &Stats| stats.since(&before, "misses").is_ok_and(|misses| misses >= PAGES as u64 - 2);
    assert!(backend.wait_for_stats(Duration::from_secs(5), asked).unwrap());
    let after = backend.stats().unwrap();
    assert_eq!(after.since(&before, "job_parks").unwrap(), 1);
    drop(frozen);
    client.jobs.guest.driver.wait_ok(ticket).unwrap();
    assert_eq!(client.iommu_faults(), 0);
}

#[test]
fn what_the_tables_do_not_permit_fails_the_job_and_the_record_names_it() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fence, 43);
    let mut control = backend.control().unwrap();
    let frame = client.jobs.buffers[0].address(0).0;
    let gva = BY_PAGES;
    let word = in_space(ASID, gva + 8);
    let read = Stream::new().copy(word.range(8), place(2, 0));
    for (entry, stream, kind, access) in [
        (0, read.clone(), "not-present", "read"),
        (frame | pte::ALL & !pte::WRITE, Stream::new().signal(word, 1), "write-denied", "write"),
        (frame | pte::ALL & !pte::READ, read.clone(), "read-denied", "read"),
        (frame | pte::ALL & !pte::ATOMIC, Stream::new().add(word, 1, None), "atomic-denied", "atomic"),
        (frame | pte::ALL | 1 << 62, read, "reserved-bits", "read"),
    ] {
        client.tables.set(gva, 0, entry).unwrap();
        let before = client.jobs.bytes(1).unwrap();
        let fence = Context { mode: None, priority: None, fence: Some(place(3, 8)), done: 1, failed: 2 };
        let all = Stream::new().push(fence).nop(0);
        let packets = verify(&stream.finish(), &Limits::default()).unwrap();
        let stream = packets.packets().iter().fold(all, |all, packet| all.push(*packet));
        client.fails(stream);
        assert_eq!(client.jobs.bytes(3).unwrap()[8..16], 2_u64.to_le_bytes(), "{kind}: the user fence");
        assert!(client.jobs.bytes(1).unwrap() == before, "{kind}: nothing is written");
        let faults = control.execute("faults").unwrap();
        let last = faults["faults"].as_array().unwrap().last().unwrap().clone();
        let told = json!({
            "asid": last["asid"], "gva": last["gva"], "kind": last["kind"], "access": last["access"],
            "level": last["level"], "pte": last["pte"], "packet": last["packet"], "context": last["context"],
        });
        assert_eq!(
            told,
            json!({
                "asid": ASID, "gva": format!("{:#x}", gva + 8), "kind": kind, "access": access,
                "level": 0, "pte": format!("{entry:#x}"), "packet": 2, "context": 1,
            })
        );
    }
    assert_eq!(client.iommu_faults(), 0, "no MISS was sent for what is not mapped");
}

#[test]
fn a_page_that_the_iommu_does_not_map_is_asked_for_twice_and_blamed_on_the_entry() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 44);
    let entry = 0x7_0000_0000 | pte::ALL;
    client.tables.set(BY_PAGES, 0, entry).unwrap();
    client.fails(Stream::new().signal(in_space(ASID, BY_PAGES + 8), 1));
    // The first refusal may be about memory that the guest has unmapped meanwhile.
    assert_eq!(client.iommu_faults(), 2);
    let faults = backend.control().unwrap().execute("faults").unwrap();
    let [fault] = &faults["faults"].as_array().unwrap()[..] else { panic!("{faults}") };
    assert_eq!((&fault["kind"], &fault["pte"]), (&json!("refused"), &json!(format!("{entry:#x}"))));
}

/// What a driver does whose mmu notifier comes while a job waits for a MISS: the entry is cleared, or changed, and the
/// page is unmapped. The job walks again, and finds the new entry.
#[test]
fn a_job_whose_page_is_refused_walks_again_before_it_fails() {
    let backend = Backend::start::<&str>(&["--miss-timeout", "10s"]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 45);
    let good = client.jobs.buffers[0].address(0).0 | pte::ALL;
    // The table is in the mirror already when the job comes to the entry.
    client.jobs.run(Stream::new().signal(in_space(ASID, BY_PAGES), 1)).unwrap();
    client.tables.set(BY_PAGES, 0, 0x7_0000_0000 | pte::ALL).unwrap();
    let flush = Command::as_invalidate(1, ASID, false, (BY_PAGES, BY_PAGES));
    warm_up(&mut client.jobs.guest.driver, ASID).unwrap();
    client.jobs.guest.driver.ok(&flush).unwrap();
    let front_end = client.jobs.guest.front_end.clone();
    let before = backend.stats().unwrap();
    let frozen = front_end.freeze();
    let ticket = client.jobs.submit(Stream::new().signal(in_space(ASID, BY_PAGES), 2)).unwrap();
    let asked = |stats: &Stats| stats.since(&before, "misses").is_ok_and(|misses| misses > 0);
    assert!(backend.wait_for_stats(Duration::from_secs(5), asked).unwrap());
    client.tables.set(BY_PAGES, 0, good).unwrap();
    client.jobs.guest.driver.ok(&flush).unwrap();
    drop(frozen);
    client.jobs.guest.driver.wait_ok(ticket).unwrap();
    client.jobs.wait_for_word(1, 0, 2).unwrap();
}

#[test]
fn tables_and_pages_that_are_taken_away_during_jobs_are_not_touched_after_the_ack() {
    let backend = Backend::start(&["--drain-timeout", "1s"]).unwrap();
    for mode in [Mode::Strict, Mode::Fence, Mode::Preempt, Mode::Fault] {
        let mut client = Client::boot(&backend, mode, 46);
        let mut dice = Dice::new(46);
        let before = backend.stats().unwrap();
        let mut on_their_way = VecDeque::new();
        for cycle in 0..cycles() {
            while on_their_way.len() < 3 {
                let all = client.gva(1, 0).range(BYTES);
                let stream = Stream::new().copy(all, client.gva(2, 0)).fill(all, cycle as u32);
                let stream = stream.checksum(client.gva(2, 0).range(BYTES), client.gva(3, 0));
                on_their_way.push_back(client.jobs.submit(stream).unwrap());
            }
            if cycle % 2 == 0 {
                let which = dice.below(client.tables.count());
                client.tables.move_table(&client.jobs.guest.dma, which).unwrap();
            } else {
                client.jobs.swap(1 + dice.below(2) as u32, dice.below(PAGES)).unwrap();
            }
            let oldest = on_their_way.pop_front().unwrap();
            client.jobs.guest.driver.wait_ok(oldest).unwrap();
            if cycle % 64 == 63 {
                on_their_way
                    .drain(..)
                    .for_each(|ticket| drop(client.jobs.guest.driver.wait_ok(ticket).unwrap()));
                client.jobs.guest.dma.oracle().release().unwrap();
            }
        }
        on_their_way.drain(..).for_each(|ticket| drop(client.jobs.guest.driver.wait_ok(ticket).unwrap()));
        client.jobs.guest.dma.oracle().release().unwrap();
        let after = backend.stats().unwrap();
        assert!(after.since(&before, "invalidations").unwrap() >= cycles(), "{mode}");
        assert_eq!(client.iommu_faults(), 0, "{mode}");
    }
}

#[test]
fn the_end_of_an_address_space_is_answered_after_its_jobs_and_then_its_tables_are_not_read() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 47);
    let all = client.gva(1, 0).range(BYTES);
    let spin = Stream::new().signal(place(3, 0), 0xabcd).spin(SpinBehaviour::Preemptible, 100_000_000);
    let job = client.jobs.submit(spin.fill(all, 5)).unwrap();
    client.jobs.wait_for_word(3, 0, 0xabcd).unwrap();
    let destroy = client.jobs.guest.driver.submit(&Command::as_destroy(1, ASID)).unwrap();
    let refused =
        client.jobs.guest.driver.run(&Command::submit_3d(1, &Stream::new().fill(all, 6).finish())).unwrap();
    assert_eq!(refused.kind(), kind::ERR_INVALID_RESOURCE_ID);
    let (job, destroy) =
        (client.jobs.guest.driver.wait_ok(job).unwrap(), client.jobs.guest.driver.wait_ok(destroy).unwrap());
    assert!(job.order < destroy.order);
    assert!(client.jobs.bytes(1).unwrap().chunks(4).all(|word| word == [5, 0, 0, 0]));
    let tables = client.tables.count();
    client.tables.free(&client.jobs.guest.dma).unwrap();
    client.jobs.run(Stream::new().fill(whole(1), 7)).unwrap();
    assert_eq!(client.jobs.guest.dma.oracle().release().unwrap(), tables);
}

#[test]
fn a_reset_ends_address_spaces_and_the_jobs_that_use_them() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 48);
    let waits = Stream::new().wait(client.gva(3, 0), Compare::Equal, 0xffff_fff1, 0);
    let _ = client.jobs.submit(waits).unwrap();
    client.jobs.guest.reboot().unwrap();
    client.tables.free(&client.jobs.guest.dma).unwrap();
    let driver = &mut client.jobs.guest.driver;
    driver.ok(&Command::ctx_create(1)).unwrap();
    let fill = Stream::new().fill(in_space(ASID, 0).range(4), 0).finish();
    assert_eq!(driver.run(&Command::submit_3d(1, &fill)).unwrap().kind(), kind::ERR_INVALID_RESOURCE_ID);
    let tables = PageTables::new(client.jobs.guest.dma.space()).unwrap();
    let driver = &mut client.jobs.guest.driver;
    driver.ok(&Command::as_create(1, ASID, tables.root())).unwrap();
    assert_eq!(driver.run(&Command::submit_3d(1, &fill).fenced(9)).unwrap().kind(), kind::ERR_UNSPEC);
    client.jobs.guest.dma.oracle().release().unwrap();
}

#[test]
fn there_are_as_many_address_spaces_as_the_command_line_says() {
    let backend = Backend::start(&["--max-address-spaces", "2"]).unwrap();
    let mut client = Client::boot(&backend, Mode::Fault, 49);
    let driver = &mut client.jobs.guest.driver;
    let capset = Capset::parse(driver.ok(&Command::job_capset()).unwrap().body()).unwrap();
    assert_eq!((capset.max_address_spaces, capset.gva_bits), (2, 48));
    driver.ok(&Command::as_create(1, 1, Iova(0x1000))).unwrap();
    assert_eq!(driver.run(&Command::as_create(1, 2, Iova(0x1000))).unwrap().kind(), kind::ERR_OUT_OF_MEMORY);
    driver.ok(&Command::as_destroy(1, 1)).unwrap();
    driver.ok(&Command::as_create(1, 2, Iova(0x1000))).unwrap();
}
