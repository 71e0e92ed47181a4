//! Jobs behind the vIOMMU, in every mode: each packet does what the twin says, an invalidation during a job is acked
//! as the mode has it, and no page is touched after its ack.
//!
//! `MIRRORGPU_CYCLES` sets the number of cycles of the last, in each mode (250000 for the soak).

use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::jobs::{contents, every_packet, place, whole};
use guest_driver_tests::soft_guest::*;
use job_stream::twin::{Buffers, Outcome, interpret};
use job_stream::{Capset, Choice, Compare, Context, Limits, Mode, SpinBehaviour, Stream, verify};

const COHERENT: [Mode; 4] = [Mode::Strict, Mode::Fence, Mode::Preempt, Mode::Fault];
fn cycles() -> u64 {
    std::env::var("MIRRORGPU_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(400)
}

#[test]
fn every_packet_does_what_the_twin_says_in_every_mode() {
    let backend = Backend::start(&["--allow-incoherent"]).unwrap();
    for mode in Mode::ALL {
        let mut client = JobGuest::boot(&backend, *mode, 31).unwrap();
        let mut twin = (1..=3).fold(Buffers::new(), |twin, id| twin.with(id, contents(id)));
        let program = verify(&every_packet().finish(), &Limits::default()).unwrap();
        assert_eq!(interpret(&program, &mut twin), Ok(Outcome::Done));
        let fence = Context { mode: None, priority: None, fence: Some(place(3, 0x1000)), done: 1, failed: 2 };
        let all = every_packet().finish();
        client.run(Stream::new().push(fence)).unwrap();
        let ticket = client.guest.driver.submit(&Command::submit_3d(1, &all).fenced(1000)).unwrap();
        client.guest.driver.wait_ok(ticket).unwrap();
        for id in 1..=2 {
            assert!(client.bytes(id).unwrap() == twin.bytes(id), "buffer {id}, mode {mode}");
        }
        let (real, twin) = (client.bytes(3).unwrap(), twin.bytes(3));
        assert_eq!((&real[..0x1000], &real[0x1008..]), (&twin[..0x1000], &twin[0x1008..]), "mode {mode}");
        assert_eq!(real[0x1000..0x1008], 1_u64.to_le_bytes(), "mode {mode}");
        assert_eq!(client.guest.dma.space().iommu().faults(), []);
    }
}

#[test]
fn timestamps_measure_a_spin() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = JobGuest::boot(&backend, Mode::Fault, 32).unwrap();
    let spin = Stream::new().timestamp(place(3, 0)).spin(SpinBehaviour::Preemptible, 5_000_000);
    client.run(spin.timestamp(place(3, 8))).unwrap();
    let bytes = client.bytes(3).unwrap();
    let time = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert!(time(8) - time(0) >= 5_000_000, "{} ns", time(8) - time(0));
}

#[test]
fn the_capability_set_says_what_the_command_line_says() {
    let backend = Backend::start(&["--default-mode", "fault", "--engines", "2"]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let response = guest.driver.ok(&Command::job_capset()).unwrap();
    let capset = Capset::parse(response.body()).unwrap();
    assert_eq!((capset.engines, capset.default_mode), (2, Mode::Fault.raw()));
    assert_eq!(capset.modes & 1 << Mode::RegistrationCache.raw(), 0);
}

#[test]
fn a_wait_is_ended_by_another_context_on_the_same_engine() {
    let backend = Backend::start(&["--engines", "1"]).unwrap();
    for mode in COHERENT {
        let mut client = JobGuest::boot(&backend, mode, 33).unwrap();
        client.make_context(2).unwrap();
        client.run(Stream::new().signal(place(3, 0), 0)).unwrap();
        let waits = client.submit(Stream::new().wait(place(3, 0), Compare::Equal, 5, 0)).unwrap();
        // Without a fence, for those end in the order of their commands; the response is not its end.
        let signals = Stream::new().spin(SpinBehaviour::Preemptible, 2_000_000).signal(place(3, 0), 5);
        client.guest.driver.ok(&Command::submit_3d(2, &signals.finish())).unwrap();
        client.guest.driver.wait_ok(waits).unwrap();
    }
}

#[test]
fn a_job_that_fails_says_so_and_loses_its_context_and_no_other() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = JobGuest::boot(&backend, Mode::Fence, 34).unwrap();
    client.make_context(2).unwrap();
    let fence = Context { mode: None, priority: None, fence: Some(place(3, 8)), done: 1, failed: 2 };
    for broken in [
        Stream::new().push(fence).wait(place(1, 0), Compare::Equal, !0, 1_000_000),
        Stream::new().push(fence).spin(SpinBehaviour::Wedged, 0),
    ] {
        let ticket = client.submit(broken).unwrap();
        assert_eq!(client.guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
        assert_eq!(client.bytes(3).unwrap()[8..16], 2_u64.to_le_bytes());
        let refused = client.guest.driver.run(&Command::submit_3d(1, &[])).unwrap();
        assert_eq!(refused.kind(), kind::ERR_INVALID_CONTEXT_ID);
        client.guest.driver.ok(&Command::submit_3d(2, &[])).unwrap();
        client.guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
        client.make_context(1).unwrap();
    }
}

/// How long an INVALIDATE of a page takes that a job has, which spins for `spin`.
fn ack_during_a_spin(backend: &Backend, mode: Mode, spin: Duration) -> Duration {
    let mut client = JobGuest::boot(backend, mode, 35).unwrap();
    let started = Stream::new().signal(place(3, 0), 0xabcd).fill(whole(1), 1);
    let ticket = client
        .submit(started.spin(SpinBehaviour::Preemptible, spin.as_nanos() as u64).fill(whole(1), 2))
        .unwrap();
    client.wait_for_word(3, 0, 0xabcd).unwrap();
    let asked = Instant::now();
    client.swap(1, 40).unwrap();
    let took = asked.elapsed();
    client.guest.driver.wait_ok(ticket).unwrap();
    // Whoever was not waited for, and is coherent, has found the new frame for what came after the spin.
    if matches!(mode, Mode::Strict | Mode::Preempt | Mode::Fault) {
        assert!(client.bytes(1).unwrap().chunks(4).all(|word| word == [2, 0, 0, 0]), "{mode}");
    }
    took
}

#[test]
fn only_in_fence_mode_does_an_invalidation_wait_for_the_job() {
    let backend = Backend::start(&["--drain-timeout", "10s", "--allow-incoherent"]).unwrap();
    let spin = Duration::from_millis(400);
    for mode in Mode::ALL {
        let before = backend.stats().unwrap();
        let took = ack_during_a_spin(&backend, *mode, spin);
        println!("{mode}: acked after {took:?}");
        let waited = took > Duration::from_millis(200);
        assert_eq!(waited, *mode == Mode::Fence, "{mode}: acked after {took:?}");
        let incoherent = backend.stats().unwrap().since(&before, "incoherent_pins").unwrap();
        assert_eq!(incoherent > 0, *mode == Mode::RegistrationCache, "{mode}");
    }
}

#[test]
fn invalidate_during_a_job_never_leaves_a_late_touch_in_a_coherent_mode() {
    let backend = Backend::start(&["--drain-timeout", "1s"]).unwrap();
    for mode in COHERENT {
        let mut client = JobGuest::boot(&backend, mode, 36).unwrap();
        let before = backend.stats().unwrap();
        let clean = client.storm(cycles(), 36).unwrap();
        let after = backend.stats().unwrap();
        let in_flight = after.since(&before, "invalidations_with_work_in_flight").unwrap();
        println!("{mode}: {clean} looks at retired frames, {in_flight} invalidations met a job");
        assert!(in_flight >= cycles() / 20, "{mode}: only {in_flight} met a job");
        assert_eq!(clean as u64, cycles(), "{mode}: frames looked at");
    }
}
