//! Every INVALIDATE is acknowledged with 0, whatever its numbers, and takes away what it names (scenarios 6 to 8).

use guest_driver_tests::soft_guest::dma_api::{WHOLE_DOMAIN, burst};
use guest_driver_tests::soft_guest::*;

const PAGES: u64 = 64;

fn boot(args: &[&str]) -> (Backend, SoftGuest, Surface) {
    let backend = Backend::start(args).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, 256, 256).unwrap();
    surface.draw(&picture(256, 256, 1)).unwrap();
    guest.show(&surface).unwrap();
    (backend, guest, surface)
}

fn transfer(guest: &mut SoftGuest, surface: &Surface) {
    guest.driver.ok(&Command::transfer(surface.resource, surface.rect(), 0)).unwrap();
}

/// What a transfer of the whole surface has to ask for after `invalidate`, ring and command pages included.
fn misses_after(guest: &mut SoftGuest, surface: &Surface, iova: Iova, size: u64) -> Vec<Iova> {
    transfer(guest, surface);
    let before = guest.front_end.recent_misses().len();
    assert_eq!(guest.front_end.invalidate(iova, size).unwrap().status, 0, "{iova}+{size:#x}");
    transfer(guest, surface);
    guest.front_end.recent_misses()[before..].iter().map(|miss| miss.iova.page()).collect()
}

fn must_show_the_picture(guest: &mut SoftGuest, surface: &Surface, seed: u32) {
    let image = picture(256, 256, seed);
    surface.draw(&image).unwrap();
    guest.must_show(surface, &image).unwrap();
}

#[test]
fn size_zero_and_ranges_to_the_end_of_the_space_take_everything_away() {
    let (_backend, mut guest, surface) = boot(&[]);
    let whole = [(Iova(0), 0), (Iova(0), u64::MAX), (Iova(0x1000), u64::MAX), (Iova(0x123), u64::MAX - 5)];
    for (iova, size) in whole {
        let missed = misses_after(&mut guest, &surface, iova, size);
        let lost = |page: &u64| missed.contains(&surface.buffer.address(page * PAGE));
        assert!((0..PAGES).all(|page| lost(&page)), "{iova}+{size:#x} left pages behind");
    }
    assert_eq!(guest.dma.space().iommu().faults(), []);
}

#[test]
fn the_pair_of_a_global_flush_takes_everything_away() {
    let (backend, mut guest, surface) = boot(&[]);
    let before = backend.stats().unwrap();
    transfer(&mut guest, &surface);
    let seen = guest.front_end.miss_counts().seen;
    guest.dma.flush().unwrap();
    transfer(&mut guest, &surface);
    assert!(guest.front_end.miss_counts().seen >= seen + PAGES);
    let after = backend.stats().unwrap();
    assert_eq!(after.since(&before, "invalidations").unwrap(), WHOLE_DOMAIN.len() as u64);
    must_show_the_picture(&mut guest, &surface, 2);
}

#[test]
fn an_unaligned_range_takes_the_pages_away_that_it_touches_and_no_others() {
    let (_backend, mut guest, surface) = boot(&[]);
    let at = |page: u64| surface.buffer.address(page * PAGE);
    let cases = [
        (at(3).plus(0x10), 1, 3..=3),
        (at(5).plus(PAGE - 1), 2, 5..=6),
        (at(9), PAGE, 9..=9),
        (at(11).plus(1), 3 * PAGE, 11..=14),
    ];
    for (iova, size, pages) in cases {
        let mut missed = misses_after(&mut guest, &surface, iova, size);
        missed.sort();
        missed.dedup();
        assert_eq!(missed, pages.map(at).collect::<Vec<_>>(), "{iova}+{size:#x}");
    }
}

#[test]
fn ranges_that_name_nothing_are_acked_and_cost_no_miss() {
    let (backend, mut guest, surface) = boot(&[]);
    transfer(&mut guest, &surface);
    let before = (backend.stats().unwrap(), guest.front_end.miss_counts().seen);
    let last = guest.dma.space().frames().ram().regions().len() as u64;
    assert_eq!(last, 3);
    let nowhere = [
        (Iova(u64::MAX), 1),
        (Iova(u64::MAX - 0xfff), 0x1000),
        (Iova(1 << 63), 1 << 63),
        (Iova(0x1000), 0x1000),
        (Iova(0xfff), 1),
    ];
    for (iova, size) in nowhere {
        assert_eq!(guest.front_end.invalidate(iova, size).unwrap().status, 0, "{iova}+{size:#x}");
    }
    transfer(&mut guest, &surface);
    let after = backend.stats().unwrap();
    assert_eq!(after.since(&before.0, "invalidations").unwrap(), nowhere.len() as u64);
    assert_eq!(after.since(&before.0, "invalidations_with_work_in_flight").unwrap(), 0);
    assert_eq!(guest.front_end.miss_counts().seen, before.1);
    must_show_the_picture(&mut guest, &surface, 3);
}

#[test]
fn a_burst_of_28_is_acked_one_by_one_with_and_without_a_transfer_running() {
    let (backend, mut guest, surface) = boot(&["--inject", "step-delay=3ms"]);
    let before = backend.stats().unwrap();
    let idle = guest.front_end.invalidate_all(&burst()).unwrap();
    let middle = backend.stats().unwrap();
    assert_eq!(middle.since(&before, "invalidations").unwrap(), 28);
    assert_eq!(middle.since(&before, "invalidations_with_work_in_flight").unwrap(), 0);

    transfer(&mut guest, &surface);
    // On a busy machine, the transfer may end before the burst begins.
    for burst_number in 1.. {
        let ticket = guest.driver.submit(&Command::transfer(surface.resource, surface.rect(), 0)).unwrap();
        let busy = guest.front_end.invalidate_all(&burst()).unwrap();
        guest.driver.wait_ok(ticket).unwrap();
        let after = backend.stats().unwrap();
        assert_eq!((idle.len(), busy.len()), (28, 28));
        assert!(idle.iter().chain(&busy).all(|ack| ack.status == 0));
        assert_eq!(after.since(&middle, "invalidations").unwrap(), 28 * burst_number);
        if after.since(&middle, "invalidations_with_work_in_flight").unwrap() > 0 {
            break;
        }
        assert!(burst_number < 50, "no burst met a transfer");
    }
    must_show_the_picture(&mut guest, &surface, 4);
}
