//! Front-ends that leave a message out, ask for what is not there, or never pause: odd, but no reason to lose a
//! guest, a signal or a deadline.

use std::thread;
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::wire::{IotlbMessage, NEED_REPLY, VERSION, request};
use guest_driver_tests::soft_guest::*;
use zerocopy::IntoBytes;

const SECOND: Duration = Duration::from_secs(1);
const GET_CONFIG: u32 = 24;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A guest whose front-end does not know RESET_DEVICE.
fn boot_without_reset(backend: &Backend) -> SoftGuest {
    let mut config = GuestConfig::default();
    config.front_end.announce_reset = false;
    SoftGuest::boot(backend, config).unwrap()
}

#[test]
fn a_reset_that_nobody_announced_keeps_what_was_negotiated_and_nothing_else() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = boot_without_reset(&backend);
    let surface = guest.surface(Format::B8G8R8X8, 64, 64).unwrap();
    for _ in 0..3 {
        guest.driver.ok(&Command::display_info()).unwrap();
        guest.reboot().unwrap();
        let edid = guest.driver.run(&Command::edid(0)).unwrap();
        assert_eq!(edid.kind(), kind::OK_EDID);
        let gone = guest.driver.run(&Command::unref(surface.resource)).unwrap();
        assert_eq!(gone.kind(), kind::ERR_INVALID_RESOURCE_ID);
        let image = picture(100, 100, 1);
        let fresh = guest.surface(Format::B8G8R8X8, 100, 100).unwrap();
        fresh.draw(&image).unwrap();
        guest.must_show(&fresh, &image).unwrap();
    }
    assert_eq!(backend.stats().unwrap().get("connections").unwrap(), 1);
}

#[test]
fn a_reset_that_only_one_ring_tells_of_stops_no_other() {
    for used in [Queue::Control, Queue::Cursor] {
        let backend = Backend::start::<&str>(&[]).unwrap();
        let mut guest = boot_without_reset(&backend);
        let (info, cursor) = (Command::display_info(), Command::move_cursor(0, (1, 1), 0));
        for round in 0..3 {
            // The other ring stands at 0 before and after.
            match used {
                Queue::Control => guest.driver.ok(&info).unwrap(),
                Queue::Cursor => guest.driver.cursor_ok(&cursor).unwrap(),
            };
            guest.reboot().unwrap();
            let other = match used {
                Queue::Control => guest.driver.cursor_ok(&cursor),
                Queue::Cursor => guest.driver.ok(&info),
            };
            other.unwrap_or_else(|error| panic!("{used:?} told, round {round}: {error}"));
            guest.reboot().unwrap();
        }
        guest.driver.ok(&info).unwrap();
        guest.driver.cursor_ok(&cursor).unwrap();
        assert_eq!(backend.stats().unwrap().get("ring_errors").unwrap(), 0);
    }
}

#[test]
fn configuration_past_the_end_is_answered_with_size_zero_and_the_session_lives() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let config_space = guest.front_end.config_space().unwrap();
    let cases = [(16, 1, VERSION | NEED_REPLY), (16, 4, VERSION), (252, 4, VERSION)];
    for (offset, size, flags) in cases {
        let mut body = words(&[offset, size, 0]);
        body.resize(body.len() + size as usize, 0);
        let reply = guest.front_end.raw(GET_CONFIG, flags, &body, &[]);
        let reply = reply.unwrap_or_else(|error| panic!("{offset}+{size}: {error}\n{}", backend.stderr()));
        // A header of offset, size and flags, and no bytes behind it.
        assert_eq!((reply.body.len(), &reply.body[4..8]), (12, &[0; 4][..]), "{offset}+{size}");
        assert_eq!(guest.front_end.config_space().unwrap(), config_space);
    }
    guest.driver.ok(&Command::display_info()).unwrap();
    assert_eq!(backend.stats().unwrap().get("connections").unwrap(), 1);
}

#[test]
fn configuration_that_we_do_not_have_yet_reads_as_zero_behind_what_we_have() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let config_space = guest.front_end.config_space().unwrap();
    for (offset, size) in [(0_usize, 20), (12, 8), (0, 256)] {
        let mut body = words(&[offset as u32, size, 0]);
        body.resize(body.len() + size as usize, 0xff);
        let reply = guest.front_end.raw(GET_CONFIG, VERSION, &body, &[]).unwrap();
        let mut expected = words(&[offset as u32, size, 0]);
        expected.extend(&config_space[offset..]);
        expected.resize(12 + size as usize, 0);
        assert_eq!(reply.body, expected, "{offset}+{size}");
    }
}

#[test]
fn the_base_of_a_ring_that_does_not_exist_ends_the_session() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    for index in [2, 255, 0x1_0000, u32::MAX] {
        for flags in [VERSION, VERSION | NEED_REPLY] {
            let guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
            let reply = guest.front_end.raw(request::GET_VRING_BASE, flags, &words(&[index, 0]), &[]);
            assert!(matches!(reply, Err(Error::Closed { .. })), "ring {index}, flags {flags}: {reply:?}");
        }
    }
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    guest.driver.ok(&Command::display_info()).unwrap();
}

/// Sends INVALIDATEs of a page that is never mapped, none of which asks for an ack, as long as there is a back-end;
/// returns when that has begun.
fn flood(backend: &Backend, guest: &SoftGuest) {
    let socket = guest.front_end.main_socket().unwrap();
    let message = IotlbMessage::invalidate(Iova(0), PAGE);
    let batch = wire::encode(request::IOTLB_MSG, VERSION, message.as_bytes()).repeat(500);
    // It ends with the connection: nobody has to wait for it.
    thread::spawn(move || while wire::send_bytes(&socket, &batch, &[]).is_ok() {});
    let flows = |stats: &Stats| stats.get("invalidations").is_ok_and(|count| count > 5000);
    assert!(backend.wait_for_stats(10 * SECOND, flows).unwrap(), "{}", backend.stderr());
}

#[test]
fn a_signal_is_heard_while_a_front_end_sends_without_end() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let backend = Backend::start::<&str>(&[]).unwrap();
        let guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
        flood(&backend, &guest);
        let start = Instant::now();
        backend.signal(signal).unwrap();
        let ended = backend.wait(10 * SECOND).unwrap();
        assert!(start.elapsed() <= SECOND, "signal {signal}: {:?}", start.elapsed());
        assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    }
}

#[test]
fn misses_are_sent_and_time_out_while_a_front_end_sends_without_end() {
    let backend = Backend::start(&["--miss-timeout", "300ms"]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, 32, 32).unwrap();
    let transfer = Command::transfer(surface.resource, surface.rect(), 0);
    guest.driver.ok(&transfer).unwrap();
    let page = surface.buffer.address(0);
    guest.front_end.invalidate(page, PAGE).unwrap();
    guest.front_end.on_miss(Box::new(
        move |miss| {
            if miss.iova.page() == page { Answer::Silence } else { Answer::Serve }
        },
    ));
    flood(&backend, &guest);
    let response = guest.driver.run(&transfer).unwrap();
    assert_eq!(response.kind(), kind::ERR_UNSPEC);
    assert_eq!(guest.front_end.miss_counts().ignored, 1);
    assert_eq!(backend.stats().unwrap().get("miss_timeouts").unwrap(), 1);
}
