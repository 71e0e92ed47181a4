//! What the guest draws is what the display shows, pixel by pixel: all formats, with and without an IOMMU, rings
//! of every kind, scattered or in odd pieces.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use guest_driver_tests::soft_guest::dma::Segment;
use guest_driver_tests::soft_guest::frames::Dice;
use guest_driver_tests::soft_guest::virtqueue::RingConfig;
use guest_driver_tests::soft_guest::*;

const LONG: Duration = Duration::from_secs(10);

#[test]
fn every_format_shows_the_picture_with_and_without_an_iommu() {
    for config in [GuestConfig::default(), GuestConfig::without_iommu()] {
        let backend = Backend::start::<&str>(&[]).unwrap();
        let mut guest = SoftGuest::boot(&backend, config).unwrap();
        for (seed, format) in Format::ALL.into_iter().enumerate() {
            let image = picture(97, 61, seed as u32);
            let surface = guest.surface(format, 97, 61).unwrap();
            surface.draw(&image).unwrap();
            guest.must_show(&surface, &image).unwrap();
            guest.driver.ok(&Command::set_scanout(0, 0, Rect::default())).unwrap();
            guest.free(surface).unwrap();
        }
        guest.dma.oracle().check().unwrap();
        let (stats, counts) = (backend.stats().unwrap(), guest.front_end.miss_counts());
        assert_eq!(stats.get("misses").unwrap(), counts.seen);
        assert_eq!(counts.seen == 0, !config.front_end.iommu, "misses: {}", counts.seen);
        assert_eq!(stats.get("commands").unwrap(), guest.driver.completed());
        assert_eq!(stats.get("command_errors").unwrap(), 0);
        assert_eq!(stats.get("bytes_moved").unwrap(), 8 * 97 * 61 * 4);
        assert_eq!(counts.refused, 0);
    }
}

#[test]
fn a_rectangle_moves_its_own_pixels_and_no_others() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
    let (width, height) = (200, 150);
    let surface = guest.surface(Format::X8R8G8B8, width, height).unwrap();
    let (old, new) = (picture(width, height, 1), picture(width, height, 2));
    surface.draw(&old).unwrap();
    guest.must_show(&surface, &old).unwrap();
    surface.draw(&new).unwrap();
    let rects = [
        Rect { x: 0, y: 0, width: 1, height: 1 },
        Rect { x: 199, y: 149, width: 1, height: 1 },
        Rect { x: 37, y: 5, width: 101, height: 83 },
        Rect { x: 0, y: 100, width: 200, height: 3 },
    ];
    let mut expected = old;
    for rect in rects {
        let offset = u64::from(rect.y * width + rect.x) * 4;
        guest.driver.ok(&Command::transfer(surface.resource, rect, offset)).unwrap();
        guest.driver.ok(&Command::flush(surface.resource, rect)).unwrap();
        for y in rect.y..rect.y + rect.height {
            let row = (y * width + rect.x) as usize..(y * width + rect.x + rect.width) as usize;
            expected[row.clone()].copy_from_slice(&new[row]);
        }
        guest.display_must_show(&expected).unwrap();
    }
}

#[test]
fn backing_in_odd_pieces_is_put_together_in_order() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
    let (width, height) = (64, 48);
    let bytes = u64::from(width * height * 4);
    let buffer = guest.dma.space().allocate(8, Permission::ReadOnly).unwrap();
    // Pieces of 1, 2, 3, ... bytes, each of which lies where it lies in the picture, but given by an entry of its own.
    let (mut entries, mut at) = (Vec::new(), 0);
    for len in 1.. {
        let len = u64::min(len, bytes - at);
        if len == 0 {
            break;
        }
        entries.push(Segment { at: buffer.address(at), len: len as u32 });
        at += len;
    }
    let surface = Surface { resource: 9, format: Format::A8B8G8R8, width, height, buffer };
    guest.driver.ok(&Command::create_2d(9, surface.format, width, height)).unwrap();
    guest.driver.ok(&Command::attach_backing(9, &entries)).unwrap();
    let image = picture(width, height, 5);
    surface.draw(&image).unwrap();
    guest.must_show(&surface, &image).unwrap();
}

#[test]
fn rings_of_every_kind_serve_commands_over_many_laps() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    for (indirect, event_idx) in [(false, false), (false, true), (true, false), (true, true)] {
        for (size, start) in [(64, 0), (64, 3968), (256, 0), (256, 2048 + 16), (16, 4080), (4, 16)] {
            for iommu in [true, false] {
                let mut config = GuestConfig { seed: start, ..GuestConfig::default() };
                config.driver.control = RingConfig { size, indirect, event_idx, start };
                config.driver.cursor = RingConfig { size: 16, indirect, event_idx, start };
                config.front_end.iommu = iommu;
                let mut guest = SoftGuest::boot(&backend, config).unwrap();
                let image = picture(32, 32, u32::from(size));
                let surface = guest.surface(Format::B8G8R8X8, 32, 32).unwrap();
                surface.draw(&image).unwrap();
                for lap in 0..u32::from(size) {
                    guest.driver.ok(&Command::transfer(surface.resource, surface.rect(), 0)).unwrap();
                    guest.driver.cursor_ok(&Command::move_cursor(0, (lap, 0), 0)).unwrap();
                }
                guest.must_show(&surface, &image).unwrap();
            }
        }
    }
}

#[test]
fn batches_are_served_with_few_kicks_and_every_fence_comes_back() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut config = GuestConfig::headless();
    config.driver.control = RingConfig::new(256);
    let mut guest = SoftGuest::boot(&backend, config).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, 64, 64).unwrap();
    let kicks = guest.driver.ring(Queue::Control).kicks();
    for batch in 0..50_u64 {
        let fences = batch * 100 + 1..=batch * 100 + 100;
        let command = Command::transfer(surface.resource, surface.rect(), 0);
        let tickets: Vec<_> = fences
            .map(|fence| (fence, guest.driver.queue(Queue::Control, &command.clone().fenced(fence)).unwrap()))
            .collect();
        guest.driver.ring(Queue::Control).notify(100).unwrap();
        for (fence, ticket) in tickets {
            let response = guest.driver.wait_ok(ticket).unwrap();
            assert_eq!(response.fence(), Some(fence));
            assert_eq!((response.bytes.len(), response.rest_intact), (24, true));
        }
    }
    let kicks = guest.driver.ring(Queue::Control).kicks() - kicks;
    assert!(kicks <= 50, "{kicks} kicks for 50 batches");
    assert_eq!(backend.stats().unwrap().get("jobs_done").unwrap(), 5000);
}

#[test]
fn ring_pages_can_be_invalidated_while_the_rings_are_hot() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut config = GuestConfig::default();
    config.driver.control = RingConfig { start: 3968, ..RingConfig::new(64) };
    let mut guest = SoftGuest::boot(&backend, config).unwrap();
    let image = picture(64, 64, 1);
    let surface = guest.surface(Format::B8G8R8X8, 64, 64).unwrap();
    surface.draw(&image).unwrap();
    let before = backend.stats().unwrap();
    let (ring, pages) = {
        let memory = guest.driver.ring(Queue::Control).memory();
        (memory.address(0), memory.pages() as u64)
    };
    let (front_end, done) = (guest.front_end.clone(), AtomicBool::new(false));
    let flushes = std::thread::scope(|scope| {
        let flusher = scope.spawn(|| {
            let (mut flushes, mut dice) = (0, Dice::new(1));
            while !done.load(Ordering::Relaxed) {
                assert_eq!(front_end.invalidate(ring, pages * PAGE).unwrap().status, 0);
                flushes += 1;
                // Without a pause nothing would ever find its ring.
                wire::wait_readable(&[], Some(Duration::from_micros(dice.below(1000) as u64))).unwrap();
            }
            flushes
        });
        let served = (0..1000).try_for_each(|fence| {
            let command = Command::transfer(surface.resource, surface.rect(), 0).fenced(fence);
            assert_eq!(guest.driver.ok(&command)?.fence(), Some(fence));
            Ok::<_, Error>(())
        });
        done.store(true, Ordering::Relaxed);
        let flushes = flusher.join().unwrap();
        served.unwrap_or_else(|error| panic!("{error} after {}", backend.stats().unwrap().0));
        flushes
    });
    let after = backend.stats().unwrap();
    assert_eq!(after.since(&before, "invalidations").unwrap(), flushes);
    assert_eq!(after.since(&before, "jobs_done").unwrap(), 1000);
    assert_eq!(after.get("ring_errors").unwrap(), 0);
    assert_eq!(guest.dma.space().iommu().faults(), []);
    guest.must_show(&surface, &image).unwrap();
}

#[test]
fn a_ring_whose_pages_move_goes_on_in_the_new_ones_and_leaves_the_old_alone() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, 64, 64).unwrap();
    let dma = guest.dma.clone();
    for round in 0..100 {
        // Idle, the ring moves elsewhere, contents and all.
        let fresh = dma.space().frames().take(1).unwrap()[0];
        let ram = dma.space().frames().ram().clone();
        let ring = guest.driver.ring(Queue::Control).memory_mut();
        let page = round % ring.pages();
        let mut contents = vec![0; PAGE as usize];
        ram.read(ring.frames()[page], &mut contents).unwrap();
        ram.write(fresh, &contents).unwrap();
        dma.swap_page(ring, page, fresh).unwrap();
        // The device may have said meanwhile, in the old page, that it wants a kick.
        let command = Command::transfer(surface.resource, surface.rect(), 0);
        let ticket = guest.driver.queue(Queue::Control, &command).unwrap();
        guest.driver.ring(Queue::Control).kick().unwrap();
        guest.driver.wait_ok(ticket).unwrap();
    }
    assert_eq!(dma.oracle().check().unwrap(), 100);
}

#[test]
fn the_display_is_asked_for_its_size_and_its_edid() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
    let info = guest.driver.ok(&Command::display_info()).unwrap();
    assert_eq!(info.kind(), kind::OK_DISPLAY_INFO);
    assert_eq!((0..6).map(|word| info.body_word(word)).collect::<Vec<_>>(), [0, 0, 640, 480, 1, 0]);
    let edid = guest.driver.ok(&Command::edid(0)).unwrap();
    assert_eq!((edid.kind(), edid.body_word(0)), (kind::OK_EDID, 128));
    assert_eq!(edid.body()[8..136], display::EDID);
    assert_eq!((info.rest_intact, edid.rest_intact), (true, true));
}

#[test]
fn a_cursor_is_shown_moved_and_hidden() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
    let image = picture(64, 64, 8);
    let surface = guest.surface(Format::B8G8R8A8, 64, 64).unwrap();
    surface.draw(&image).unwrap();
    guest.driver.ok(&Command::transfer(surface.resource, surface.rect(), 0)).unwrap();
    guest.driver.cursor_ok(&Command::update_cursor(0, (10, 20), surface.resource, (3, 4))).unwrap();
    let display = guest.display.as_ref().unwrap();
    assert!(display.wait(LONG, |seen| seen.cursor_updates == 1));
    let cursor = display.seen().cursor;
    assert_eq!((cursor.at, cursor.hot, cursor.visible), ((10, 20), (3, 4), true));
    assert!(cursor.pixels.iter().zip(&image).all(|(shown, drawn)| shown & 0xff_ffff == *drawn));
    guest.driver.cursor_ok(&Command::move_cursor(0, (30, 40), surface.resource)).unwrap();
    let display = guest.display.as_ref().unwrap();
    assert!(display.wait(LONG, |seen| seen.cursor.at == (30, 40) && seen.cursor.visible));
    guest.driver.cursor_ok(&Command::update_cursor(0, (30, 40), 0, (0, 0))).unwrap();
    let display = guest.display.as_ref().unwrap();
    assert!(display.wait(LONG, |seen| !seen.cursor.visible));
    // A move shows and hides it too, as with QEMU's own device.
    for (at, resource) in [((31, 41), surface.resource), ((32, 42), 0)] {
        guest.driver.cursor_ok(&Command::move_cursor(0, at, resource)).unwrap();
        let display = guest.display.as_ref().unwrap();
        let is_seen = |seen: &display::Seen| {
            if resource == 0 { !seen.cursor.visible } else { seen.cursor.visible && seen.cursor.at == at }
        };
        assert!(display.wait(LONG, is_seen));
    }
    assert_eq!(backend.stats().unwrap().get("cursor_commands").unwrap(), 5);
}

#[test]
fn a_guest_without_a_display_works() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let surface = guest.surface(Format::B8G8R8A8, 320, 200).unwrap();
    guest.show(&surface).unwrap();
    let info = guest.driver.ok(&Command::display_info()).unwrap();
    assert_eq!((info.body_word(4), info.body_word(2) > 0), (1, true), "the first scanout is on");
    guest.driver.ok(&Command::edid(0)).unwrap();
}

#[test]
fn a_slow_display_makes_flushes_coalesce_and_holds_nobody_up() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let slow = Manner::Slow(Duration::from_millis(100));
    let config = GuestConfig { display: Some(slow), ..GuestConfig::default() };
    let mut guest = SoftGuest::boot(&backend, config).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, 640, 480).unwrap();
    surface.draw(&picture(640, 480, 0)).unwrap();
    guest.show(&surface).unwrap();
    let start = std::time::Instant::now();
    for _ in 0..100 {
        guest.driver.ok(&Command::flush(surface.resource, surface.rect())).unwrap();
    }
    // A hundred at 100 ms each would take ten seconds.
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "flushes waited for the display: {:?}",
        start.elapsed()
    );
    let image = picture(640, 480, 1);
    surface.draw(&image).unwrap();
    guest.driver.ok(&Command::transfer(surface.resource, surface.rect(), 0)).unwrap();
    guest.driver.ok(&Command::flush(surface.resource, surface.rect())).unwrap();
    let display = guest.display.as_ref().unwrap();
    assert!(
        display.wait(LONG, |seen| seen.screens[0].must_show(&image).is_ok()),
        "the last flush is not shown"
    );
    let stats = backend.stats().unwrap();
    assert_eq!(stats.get("flushes").unwrap(), 102);
    assert!(stats.get("flushes_coalesced").unwrap() > 50, "{}", stats.0);
    assert!(display.seen().updates < 50);
}

#[test]
fn a_silent_or_dead_display_holds_nobody_up() {
    for manner in [Manner::Silent, Manner::Dead] {
        let backend = Backend::start::<&str>(&[]).unwrap();
        let config = GuestConfig { display: Some(manner), ..GuestConfig::default() };
        let mut guest = SoftGuest::boot(&backend, config).unwrap();
        let surface = guest.surface(Format::B8G8R8X8, 640, 480).unwrap();
        for _ in 0..20 {
            guest.show(&surface).unwrap();
        }
        let info = guest.driver.ok(&Command::display_info()).unwrap();
        assert_eq!(info.kind(), kind::OK_DISPLAY_INFO);
        let (threads, descriptors) = (backend.threads().unwrap(), backend.descriptors().unwrap());
        for _ in 0..10 {
            guest.stop().unwrap();
            guest.start().unwrap();
            guest.show(&surface).unwrap();
        }
        assert!(backend.threads().unwrap() <= threads + 1, "{manner:?} displays leak threads");
        assert!(backend.descriptors().unwrap() <= descriptors + 2, "{manner:?} displays leak descriptors");
        assert_eq!(guest.front_end.invalidate(Iova(0), 0).unwrap().status, 0);
    }
}
