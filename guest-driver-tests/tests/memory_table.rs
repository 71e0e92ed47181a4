//! The memory table changes while transfers run: what goes away is drained first, what cannot be is refused and
//! changes nothing, and a file that shrinks under us ends the session, not the process. Without an IOMMU the table
//! is all there is, and an invalidation does not take it away.

use std::os::fd::AsRawFd;
use std::time::Duration;

use guest_driver_tests::soft_guest::dma::Segment;
use guest_driver_tests::soft_guest::memory::{RamConfig, memory_file};
use guest_driver_tests::soft_guest::wire::{NEED_REPLY, VERSION, request};
use guest_driver_tests::soft_guest::*;

const ASK: u32 = VERSION | NEED_REPLY;

fn boot(backend: &Backend, iommu: bool, memory_slots: bool) -> (SoftGuest, Surface) {
    let mut config = GuestConfig::default();
    config.front_end.iommu = iommu;
    config.front_end.memory_slots = memory_slots;
    let mut guest = SoftGuest::boot(backend, config).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, 256, 256).unwrap();
    surface.draw(&picture(256, 256, 1)).unwrap();
    (guest, surface)
}

fn transfer(surface: &Surface) -> Command {
    Command::transfer(surface.resource, surface.rect(), 0)
}

#[test]
fn memory_that_is_unplugged_during_transfers_is_not_touched_while_it_is_gone() {
    for iommu in [true, false] {
        for memory_slots in [true, false] {
            let backend = Backend::start(&["--inject", "step-delay=1ms"]).unwrap();
            let mut config = GuestConfig::headless();
            (config.front_end.iommu, config.front_end.memory_slots) = (iommu, memory_slots);
            config.ram.module = 1 << 20;
            let mut guest = SoftGuest::boot(&backend, config).unwrap();
            assert_eq!(guest.front_end.uses_memory_slots(), memory_slots);
            let all = guest.dma.space().frames().ram().regions().to_vec();
            let module = guest.dma.space().frames().ram().module_frames();
            let buffer = guest.dma.space().map(module.clone(), Permission::ReadWrite);
            let surface = guest.surface_on(buffer, Format::B8G8R8X8, 512, 512).unwrap();
            guest.driver.ok(&transfer(&surface)).unwrap();
            for _ in 0..20 {
                let ticket = guest.driver.submit(&transfer(&surface)).unwrap();
                guest.front_end.set_memory(&all[..3]).unwrap();
                guest.dma.oracle().retire(&module).unwrap();
                // With its memory gone the transfer fails, unless it was through; it is answered in any case.
                guest.driver.wait(ticket).unwrap();
                assert_eq!(guest.dma.oracle().check().unwrap(), 256, "iommu {iommu}, slots {memory_slots}");
                guest.dma.oracle().forget();
                guest.front_end.set_memory(&all).unwrap();
                guest.driver.ok(&transfer(&surface)).unwrap();
            }
            let failed = backend.stats().unwrap().get("jobs_failed").unwrap();
            assert!(failed > 0, "no transfer was hit (iommu {iommu}, slots {memory_slots})");
        }
    }
}

#[test]
fn an_unchanged_table_that_is_sent_again_during_transfers_loses_none_of_them() {
    for iommu in [true, false] {
        let backend = Backend::start(&["--inject", "step-delay=1ms"]).unwrap();
        let (mut guest, surface) = boot(&backend, iommu, false);
        let all = guest.dma.space().frames().ram().regions().to_vec();
        for _ in 0..20 {
            let ticket = guest.driver.submit(&transfer(&surface)).unwrap();
            guest.front_end.set_memory(&all).unwrap();
            guest.driver.wait_ok(ticket).unwrap();
        }
        assert_eq!(backend.stats().unwrap().get("jobs_failed").unwrap(), 0);
    }
}

fn region(gpa: u64, len: u64, user: u64, offset: u64) -> Vec<u8> {
    [gpa, len, user, offset].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn table(regions: &[Vec<u8>]) -> Vec<u8> {
    let mut body = (regions.len() as u64).to_le_bytes().to_vec();
    body.extend(regions.concat());
    body
}

#[test]
fn an_invalid_table_is_refused_and_changes_nothing() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let (mut guest, surface) = boot(&backend, true, false);
    let image = picture(256, 256, 1);
    let file = memory_file(c"small", 1 << 20, true).unwrap();
    let fd = file.as_raw_fd();
    let mib = 1 << 20;
    let user = 0x7e00_0000_0000;
    let overlap = [region(0, mib, user, 0), region(mib - 4096, mib, user + (1 << 30), 0)];
    let overlap_user = [region(0, mib, user, 0), region(1 << 30, mib, user + mib - 4096, 0)];
    let cases = [
        ("file is too short", table(&[region(0, 2 * mib, user, 0)]), vec![fd]),
        ("offset past the file", table(&[region(0, mib, user, mib)]), vec![fd]),
        ("guest-physical overlap", table(&overlap), vec![fd, fd]),
        ("user overlap", table(&overlap_user), vec![fd, fd]),
    ];
    for (what, body, fds) in cases {
        let reply = guest.front_end.raw(request::SET_MEM_TABLE, ASK, &body, &fds);
        let reply = reply.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_ne!(reply.number(), Some(0), "{what}");
        guest.front_end.invalidate(Iova(0), 0).unwrap_or_else(|error| panic!("after {what}: {error}"));
        guest.must_show(&surface, &image).unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

#[test]
fn a_table_that_makes_no_sense_is_refused_and_the_next_connection_is_served() {
    let mut backend = Backend::start::<&str>(&[]).unwrap();
    let file = memory_file(c"small", 1 << 20, true).unwrap();
    let (mib, user) = (1 << 20, 0x7e00_0000_0000);
    let cases = [
        ("offset wraps", table(&[region(0, mib, user, u64::MAX - 4095)])),
        ("gpa wraps", table(&[region(u64::MAX - 4095, mib, user, 0)])),
        ("user address wraps", table(&[region(0, mib, u64::MAX - 4095, 0)])),
        ("length 0", table(&[region(0, 0, user, 0)])),
        ("no regions", table(&[])),
        ("more regions than it has", [9_u64.to_le_bytes().to_vec(), region(0, mib, user, 0)].concat()),
    ];
    for (what, body) in cases {
        let (guest, surface) = boot(&backend, true, false);
        // It is refused, or the session ends, or both: such a front-end is broken.
        if let Ok(reply) = guest.front_end.raw(request::SET_MEM_TABLE, ASK, &body, &[file.as_raw_fd()]) {
            assert_ne!(reply.number(), Some(0), "{what}");
        }
        drop((guest, surface));
        assert!(backend.is_running(), "{what}: {}", backend.stderr());
    }
    let (mut guest, surface) = boot(&backend, true, false);
    guest.driver.ok(&transfer(&surface)).unwrap();
}

#[test]
fn bad_slots_are_refused_and_change_nothing() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let (mut guest, surface) = boot(&backend, true, true);
    let file = memory_file(c"small", 1 << 20, true).unwrap();
    let fd = file.as_raw_fd();
    let single = |gpa: u64, len: u64, user: u64| [vec![0; 8], region(gpa, len, user, 0)].concat();
    let cases = [
        (
            "a file that is too short",
            request::ADD_MEM_REG,
            single(1 << 40, 2 << 20, 0x7e00_0000_0000),
            vec![fd],
        ),
        ("a slot that is taken", request::ADD_MEM_REG, single(0, 1 << 20, 0x7e00_0000_0000), vec![fd]),
        (
            "a slot that is not there",
            request::REM_MEM_REG,
            single(1 << 40, 1 << 20, 0x7e00_0000_0000),
            vec![],
        ),
        ("a slot of another size", request::REM_MEM_REG, single(0, 4096, 0x7f80_0000_0000), vec![]),
    ];
    for (what, request, body, fds) in cases {
        let reply = guest.front_end.raw(request, ASK, &body, &fds);
        let reply = reply.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_ne!(reply.number(), Some(0), "{what}");
        guest.front_end.invalidate(Iova(0), 0).unwrap();
        guest.driver.ok(&transfer(&surface)).unwrap();
    }
}

#[test]
fn a_file_that_is_cut_short_later_ends_its_session_and_no_other() {
    let mut backend = Backend::start::<&str>(&[]).unwrap();
    let ram = RamConfig { sealed: false, ..RamConfig::default() };
    let mut guest = SoftGuest::boot(&backend, GuestConfig { ram, ..GuestConfig::default() }).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, 256, 256).unwrap();
    let _ = guest.driver.submit(&transfer(&surface)).unwrap();
    guest.dma.space().frames().ram().truncate(1 << 20).unwrap();
    guest.driver.ring(Queue::Control).kick().unwrap();
    // Our own side of the ring is gone as well: only sockets can be looked at.
    let closed = guest.front_end.is_closed_within(Duration::from_secs(10)).unwrap();
    assert!(closed, "a session goes on with zeros for memory: {}", backend.stderr());
    assert!(backend.is_running(), "the process died: {}", backend.stderr());
    drop(guest);
    let (mut guest, surface) = boot(&backend, true, true);
    guest.must_show(&surface, &picture(256, 256, 1)).unwrap();
    assert_eq!(backend.stats().unwrap().get("connections").unwrap(), 2);
}

/// An idle process uses next to no CPU time.
fn must_rest(backend: &Backend) {
    let used = backend.cpu_time_in(Duration::from_millis(300)).unwrap();
    assert!(used <= Duration::from_millis(100), "{used:?} of CPU time in 300 ms of silence");
}

#[test]
fn an_invalidation_without_an_iommu_is_survived() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let (mut guest, surface) = boot(&backend, false, true);
    guest.show(&surface).unwrap();
    for (iova, size) in [(Iova(0), 0), (Iova(0), u64::MAX), (surface.buffer.address(0), PAGE)] {
        let image = picture(256, 256, 2);
        surface.draw(&image).unwrap();
        assert_eq!(guest.front_end.invalidate(iova, size).unwrap().status, 0, "{iova}+{size:#x}");
        guest.driver.cursor_ok(&Command::move_cursor(0, (1, 1), 0)).unwrap();
        guest.must_show(&surface, &image).unwrap();
        must_rest(&backend);
    }
    let stats = backend.stats().unwrap();
    assert_eq!((stats.get("jobs_failed").unwrap(), stats.get("ring_errors").unwrap()), (0, 0));
}

#[test]
fn the_part_of_a_page_at_the_end_of_a_region_is_no_memory_and_no_trouble() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut config = GuestConfig::without_iommu();
    config.ram.high -= 1000;
    let mut guest = SoftGuest::boot(&backend, config).unwrap();
    let last = *guest.dma.space().frames().ram().regions().last().unwrap();
    let part = Segment { at: Iova(last.gpa.0 + last.len / PAGE * PAGE), len: 2048 };
    guest.driver.ok(&Command::create_2d(1000, Format::B8G8R8X8, 16, 32)).unwrap();
    guest.driver.ok(&Command::attach_backing(1000, &[part])).unwrap();
    let response = guest.driver.run(&Command::transfer(1000, Rect::sized(16, 32), 0)).unwrap();
    assert_eq!(response.kind(), kind::ERR_UNSPEC);
    must_rest(&backend);
    let surface = guest.surface(Format::B8G8R8X8, 256, 256).unwrap();
    let image = picture(256, 256, 3);
    surface.draw(&image).unwrap();
    guest.must_show(&surface, &image).unwrap();
    assert_eq!(guest.front_end.invalidate(Iova(0), 0).unwrap().status, 0);
    guest.must_show(&surface, &image).unwrap();
    must_rest(&backend);
}
