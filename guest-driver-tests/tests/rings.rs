//! Rings and blobs behind a front-end that passes all features on and has no display, as QEMU's
//! vhost-user-test-device: fences of one ring wait for no other, and guest memory of a blob is a job's memory.

use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::driver::Ticket;
use guest_driver_tests::soft_guest::*;
use job_stream::{At, CAPSET_ID, Compare, Space, SpinBehaviour, Stream};

/// As long as a spin may be: longer than any command here may take.
const ENDLESS: u64 = 10_000_000_000;
/// Pages of the blob.
const PAGES: usize = 8;

fn place(address: u64) -> At {
    At::new(Space::resource(1), address)
}

/// A guest with contexts 1 and 2, and the blob 1 attached to both.
fn boot(backend: &Backend, config: GuestConfig) -> (SoftGuest, dma::DmaBuffer) {
    let mut guest = SoftGuest::boot(backend, config).unwrap();
    let bytes = PAGES as u64 * PAGE;
    let buffer = guest.dma.space().allocate(PAGES, Permission::ReadWrite).unwrap();
    buffer.write(0, &vec![0; bytes as usize]).unwrap();
    guest.driver.ok(&Command::create_blob(1, bytes, &buffer.segments(0, bytes))).unwrap();
    for ctx in [1, 2] {
        guest.driver.ok(&Command::ctx_create_for(ctx, CAPSET_ID)).unwrap();
        guest.driver.ok(&Command::ctx_attach(ctx, 1)).unwrap();
    }
    (guest, buffer)
}

fn submit(guest: &mut SoftGuest, (ctx, ring): (u32, u8), fence: u64, stream: Stream) -> Ticket {
    let command = Command::submit_3d(ctx, &stream.finish()).on_ring(ring).fenced(fence);
    guest.driver.submit(&command).unwrap()
}

fn spin() -> Stream {
    Stream::new().spin(SpinBehaviour::Preemptible, ENDLESS)
}

#[test]
fn an_endless_spin_on_one_ring_holds_back_no_fence_of_another() {
    let backend = Backend::start(&["--engines", "1"]).unwrap();
    let (mut guest, _buffer) = boot(&backend, GuestConfig::with_rings());
    let begin = Instant::now();
    let spins = submit(&mut guest, (1, 0), 1, spin());
    for ring_of in [(1, 1), (2, 0), (2, 63)] {
        let quick = submit(&mut guest, ring_of, 9, Stream::new().signal(place(0), 7));
        let response = guest.driver.wait_ok(quick).unwrap();
        assert_eq!((response.fence(), response.ring()), (Some(9), Some(ring_of.1)));
    }
    assert!(guest.driver.try_wait(spins).unwrap().is_none());
    let behind = submit(&mut guest, (1, 0), 2, Stream::new());
    guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
    for ticket in [spins, behind] {
        assert_eq!(guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
    }
    assert!(begin.elapsed() < Duration::from_nanos(ENDLESS), "nobody waited for the spin");
}

#[test]
fn fences_of_one_ring_end_in_order() {
    let backend = Backend::start(&["--engines", "2"]).unwrap();
    let (mut guest, buffer) = boot(&backend, GuestConfig::with_rings());
    let waits = Stream::new().wait(place(0), Compare::Equal, 5, 0);
    let first = submit(&mut guest, (1, 4), 1, waits);
    // Done at once, but for the order.
    let second = guest.driver.submit(&Command::display_info().in_context(1).on_ring(4).fenced(2)).unwrap();
    let other = submit(&mut guest, (1, 5), 3, Stream::new().signal(place(8), 1));
    guest.driver.wait_ok(other).unwrap();
    assert!(guest.driver.try_wait(second).unwrap().is_none(), "it overtook fence 1 of its ring");
    let signals = submit(&mut guest, (2, 4), 1, Stream::new().signal(place(0), 5));
    guest.driver.wait_ok(signals).unwrap();
    guest.driver.wait_ok(second).unwrap();
    assert!(guest.driver.try_wait(first).unwrap().is_some(), "fence 1 came first");
    let mut bytes = [0; 16];
    buffer.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn without_context_init_there_are_no_rings_and_one_timeline() {
    let backend = Backend::start(&["--engines", "2"]).unwrap();
    let mut config = GuestConfig::with_rings();
    config.front_end.gpu_features &= !front_end::feature::CONTEXT_INIT;
    let mut guest = SoftGuest::boot(&backend, config).unwrap();
    guest.driver.ok(&Command::ctx_create(1)).unwrap();
    let refused = guest.driver.run(&Command::ctx_create_for(2, CAPSET_ID)).unwrap();
    assert_eq!(refused.kind(), kind::ERR_INVALID_PARAMETER);
    let refused = guest.driver.run(&Command::submit_3d(1, &[]).on_ring(1).fenced(1)).unwrap();
    assert_eq!(refused.kind(), kind::ERR_INVALID_PARAMETER);
    guest.driver.ok(&Command::ctx_create(2)).unwrap();
    let spins = guest.driver.submit(&Command::submit_3d(1, &spin().finish()).fenced(2)).unwrap();
    let quick = guest.driver.submit(&Command::submit_3d(2, &[]).fenced(3)).unwrap();
    // Unfenced, and behind both in the ring.
    guest.driver.ok(&Command::display_info()).unwrap();
    assert!(guest.driver.try_wait(quick).unwrap().is_none(), "fence 3 says that fence 2 is over");
    guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
    guest.driver.wait_ok(quick).unwrap();
    assert_eq!(guest.driver.wait(spins).unwrap().kind(), kind::ERR_UNSPEC);
}

#[test]
fn without_resource_blob_there_are_no_blobs() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let buffer = guest.dma.space().allocate(1, Permission::ReadWrite).unwrap();
    let blob = Command::create_blob(1, PAGE, &buffer.segments(0, PAGE));
    assert_eq!(guest.driver.run(&blob).unwrap().kind(), kind::ERR_UNSPEC);
}

#[test]
fn a_job_works_on_a_blob_and_its_memory_is_free_after_the_unref() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let (mut guest, buffer) = boot(&backend, GuestConfig::with_rings());
    let bytes = PAGES as u64 * PAGE;
    let fill =
        Stream::new().fill(place(0).range(bytes), 0x0403_0201).copy(place(1).range(99), place(bytes - 99));
    let ticket = submit(&mut guest, (1, 0), 1, fill);
    guest.driver.ok(&Command::unref(1)).unwrap();
    guest.driver.wait_ok(ticket).unwrap();
    let mut found = vec![0; bytes as usize];
    buffer.read(0, &mut found).unwrap();
    let mut wanted = [1, 2, 3, 4].repeat(bytes as usize / 4);
    let tail = wanted[1..100].to_vec();
    let at = wanted.len() - 99;
    wanted[at..].copy_from_slice(&tail);
    assert!(found == wanted);
    guest.dma.unmap(buffer).unwrap();
    guest.dma.oracle().check().unwrap();
    assert_eq!(guest.dma.space().iommu().faults(), []);
}

#[test]
fn a_device_without_a_display_says_how_many_scanouts_it_has_and_answers_at_once() {
    let backend = Backend::start(&["--scanouts", "3"]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::with_rings()).unwrap();
    let config = guest.front_end.config_space().unwrap();
    assert_eq!((config[8], config[12]), (3, 1), "scanouts, capability sets");
    let begin = Instant::now();
    let info = guest.driver.ok(&Command::display_info()).unwrap();
    assert_eq!((info.body_word(2), info.body_word(3), info.body_word(4)), (1024, 768, 1));
    let edid = guest.driver.ok(&Command::edid(0)).unwrap();
    assert_eq!(edid.body()[8..16], [0, 255, 255, 255, 255, 255, 255, 0]);
    assert!(begin.elapsed() < Duration::from_millis(500), "{:?}", begin.elapsed());
}

#[test]
fn a_device_without_jobs_is_a_display_and_nothing_else() {
    let backend = Backend::start(&["--no-jobs"]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
    // Device-specific bits: EDID alone. And no capability set.
    assert_eq!(guest.front_end.features() & 0xff_ffff, 1 << 1);
    assert_eq!(guest.front_end.config_space().unwrap()[12..16], [0; 4]);
    for (command, error) in [
        (Command::ctx_create(1), kind::ERR_UNSPEC),
        (Command::create_buffer(9, 4096), kind::ERR_UNSPEC),
        (Command::capset_info(0), kind::ERR_INVALID_PARAMETER),
    ] {
        assert_eq!(guest.driver.run(&command).unwrap().kind(), error, "{command:?}");
    }
    let image = picture(64, 64, 3);
    let surface = guest.surface(Format::B8G8R8X8, 64, 64).unwrap();
    surface.draw(&image).unwrap();
    guest.must_show(&surface, &image).unwrap();
}
