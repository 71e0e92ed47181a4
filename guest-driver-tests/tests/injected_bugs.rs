//! Every seeded bug of the device (`--inject`) is caught from outside: with the bug on, the check that holds otherwise
//! fails, by its name. Each check is here run without the bug too, so that it is the bug that it finds.

use std::time::Duration;

use guest_driver_tests::soft_guest::gpu::Response;
use guest_driver_tests::soft_guest::jobs::{place, whole};
use guest_driver_tests::soft_guest::*;
use job_stream::{Mode, SpinBehaviour, Stream};

/// Cycles of a storm: most bugs show in the first few.
const CYCLES: u64 = 400;

fn backend(args: &[&str]) -> Backend {
    Backend::start(args).unwrap()
}

/// A back-end with this bug, and more.
fn with(bug: &str, args: &[&str]) -> Backend {
    backend(&[&["--inject", bug], args].concat())
}

fn storm(backend: &Backend, mode: Mode) -> Result<usize> {
    JobGuest::boot(backend, mode, 41).unwrap().storm(CYCLES, 41)
}

fn is_late_touch(result: Result<usize>) -> bool {
    matches!(result, Err(Error::LateTouch(frames)) if !frames.is_empty())
}

const SLOW: [&str; 2] = ["--inject", "step-delay=200us"];

#[test]
fn ack_before_drain_is_caught_by_the_late_touch_oracle() {
    assert!(storm(&backend(&SLOW), Mode::Fence).unwrap() > 0);
    assert!(is_late_touch(storm(&with("ack-before-drain", &SLOW), Mode::Fence)));
}

#[test]
fn skip_pin_is_caught_by_the_late_touch_oracle() {
    assert!(is_late_touch(storm(&with("skip-pin", &SLOW), Mode::Fence)));
    assert!(storm(&with("skip-pin", &SLOW), Mode::Fault).unwrap() > 0, "there is no pin to skip");
}

/// INVALIDATEs of pages that no job has, while one runs whose steps take 20 ms: how many of their acks waited for half a
/// step or more, and how many were parked.
fn acks_that_waited_for_a_step(backend: &Backend) -> (usize, u64) {
    let mut client = JobGuest::boot(backend, Mode::Fault, 42).unwrap();
    let long = (0..10).fold(Stream::new(), |stream, value| stream.fill(whole(1), value));
    let ticket = client.submit(long).unwrap();
    client.wait_for_word(1, 0, 1).unwrap();
    let before = backend.stats().unwrap();
    let mut waited = 0;
    // A busy host may keep the engine from its next step for a while: then acks are quick.
    for _ in 0..400 {
        if client.guest.driver.try_wait(ticket).unwrap().is_some() {
            break;
        }
        waited += usize::from(client.swap(2, 0).unwrap().latency > Duration::from_millis(10));
    }
    (waited, backend.stats().unwrap().since(&before, "acks_parked").unwrap())
}

/// What a step touches after such an ack it touches within microseconds: no oracle is fast enough for that.
#[test]
fn skip_section_is_caught_by_acks_that_do_not_wait_for_the_step() {
    let slow = ["--inject", "step-delay=20ms"];
    let (waited, parked) = acks_that_waited_for_a_step(&backend(&slow));
    assert!(waited >= 5 && parked >= 5, "{waited} waited, {parked} were parked");
    let (_, parked) = acks_that_waited_for_a_step(&with("skip-section", &slow));
    assert_eq!(parked, 0);
}

#[test]
fn drop_zap_is_caught_by_the_late_touch_oracle() {
    for mode in [Mode::Strict, Mode::Fence, Mode::Preempt, Mode::Fault] {
        assert!(is_late_touch(storm(&with("drop-zap", &[]), mode)), "{mode}");
    }
}

#[test]
fn stale_translation_is_caught_by_the_late_touch_oracle() {
    for mode in [Mode::Strict, Mode::Fence, Mode::Preempt, Mode::Fault] {
        assert!(is_late_touch(storm(&with("stale-translation", &[]), mode)), "{mode}");
    }
}

/// Whether a job that writes to a page which the device may only read is stopped, and the page is as it was.
fn write_to_a_read_only_page_is_refused(backend: &Backend, mode: Mode) -> bool {
    let mut client = JobGuest::boot(backend, mode, 43).unwrap();
    let driver = &mut client.guest.driver;
    let page = client.guest.dma.space().allocate(1, Permission::ReadOnly).unwrap();
    page.write(0, &[7; PAGE as usize]).unwrap();
    driver.ok(&Command::create_buffer(4, PAGE as u32)).unwrap();
    driver.ok(&Command::attach_backing(4, &page.segments(0, PAGE))).unwrap();
    driver.ok(&Command::ctx_attach(1, 4)).unwrap();
    // Read first: its UPDATE claims that it may be written too, as QEMU's do.
    client.run(Stream::new().checksum(place(4, 0).range(PAGE), place(3, 0))).unwrap();
    let ticket = client.submit(Stream::new().fill(place(4, 0).range(64), 0)).unwrap();
    let response = client.guest.driver.wait(ticket).unwrap();
    let mut bytes = [0; 64];
    page.read(0, &mut bytes).unwrap();
    let refused = response.kind() == kind::ERR_UNSPEC;
    assert_eq!(refused, bytes == [7; 64], "{mode}");
    refused
}

#[test]
fn cache_claimed_permission_is_caught_by_a_write_to_a_read_only_page() {
    for mode in [Mode::Fence, Mode::Fault] {
        assert!(write_to_a_read_only_page_is_refused(&backend(&[]), mode));
        assert!(!write_to_a_read_only_page_is_refused(&with("cache-claimed-permission", &[]), mode));
    }
}

/// Whether all that a job has written is there when its SIGNAL is.
fn signal_comes_after_what_it_tells_of(backend: &Backend) -> bool {
    let mut client = JobGuest::boot(backend, Mode::Fence, 44).unwrap();
    client.run(Stream::new().fill(whole(1), 0)).unwrap();
    let ticket = client.submit(Stream::new().fill(whole(1), !0).signal(place(3, 0), 0x51)).unwrap();
    client.wait_for_word(3, 0, 0x51).unwrap();
    let there = client.bytes(1).unwrap().iter().all(|byte| *byte == 0xff);
    client.guest.driver.wait_ok(ticket).unwrap();
    there
}

#[test]
fn signal_before_write_is_caught_by_whoever_looks_at_the_signal() {
    let slow = ["--inject", "step-delay=20ms"];
    assert!(signal_comes_after_what_it_tells_of(&backend(&slow)));
    assert!(!signal_comes_after_what_it_tells_of(&with("signal-before-write", &slow)));
}

/// The answers to ten commands with fences of one timeline.
fn ten_fences(backend: &Backend) -> Result<Vec<Response>> {
    let mut guest = SoftGuest::boot(backend, GuestConfig::headless())?;
    let tickets: Vec<_> = (1..=10)
        .map(|fence| guest.driver.submit(&Command::capset_info(0).fenced(fence)))
        .collect::<Result<_>>()?;
    let wait = |ticket| guest.driver.wait_for(ticket, Duration::from_millis(500));
    tickets.into_iter().map(wait).collect()
}

fn are_in_order(answers: &[Response]) -> bool {
    answers.is_sorted_by_key(|answer| answer.order)
        && answers.iter().map(|answer| answer.fence()).eq((1..=10).map(Some))
}

#[test]
fn lose_fence_is_caught_by_a_wait_without_end() {
    assert!(are_in_order(&ten_fences(&backend(&[])).unwrap()));
    assert!(matches!(ten_fences(&with("lose-fence=7", &[])), Err(Error::Timeout { .. })));
}

#[test]
fn repeat_fence_is_caught_by_a_used_entry_that_is_not_in_flight() {
    assert!(matches!(ten_fences(&with("repeat-fence=7", &[])), Err(Error::NotInFlight { .. })));
}

#[test]
fn reorder_fence_is_caught_by_the_order_of_completions() {
    assert!(!are_in_order(&ten_fences(&with("reorder-fence", &[])).unwrap()));
}

/// How long an INVALIDATE of a page takes that a job has pinned, which leaves its engine at once. It then waits for the
/// end of the invalidation, so that nothing but the last one out tells the session.
fn ack_behind_a_spin(backend: &Backend) -> Duration {
    let mut client = JobGuest::boot(backend, Mode::Preempt, 45).unwrap();
    let spin = Stream::new().signal(place(3, 0), 0x51).spin(SpinBehaviour::Preemptible, 9_000_000_000);
    let ticket = client.submit(spin.fill(whole(1), 1)).unwrap();
    client.wait_for_word(3, 0, 0x51).unwrap();
    let latency = client.swap(1, 40).unwrap().latency;
    client.guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
    assert_eq!(client.guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
    latency
}

#[test]
fn forget_wake_is_caught_by_an_ack_that_comes_only_at_its_deadline_and_no_later() {
    let patient = ["--drain-timeout", "1500ms"];
    let latency = ack_behind_a_spin(&backend(&patient));
    assert!(latency < Duration::from_secs(1), "{latency:?}");
    let latency = ack_behind_a_spin(&with("forget-wake", &patient));
    assert!(latency >= Duration::from_millis(1400), "{latency:?}");
    // I2: the drain timeout and a step, with room for a busy machine.
    assert!(latency < Duration::from_millis(1800), "{latency:?}");
}

/// Whether a job that a reset finds comes to its end after it.
fn a_job_survives_a_reset(backend: &Backend) -> Result<()> {
    let mut client = JobGuest::boot(backend, Mode::Fence, 48)?;
    let spin = Stream::new().signal(place(3, 0), 0x51).spin(SpinBehaviour::Preemptible, 50_000_000);
    let _lost = client.submit(spin.signal(place(3, 4), 0x52))?;
    client.wait_for_word(3, 0, 0x51)?;
    client.guest.reboot()?;
    client.wait_for_word(3, 4, 0x52)
}

#[test]
fn keep_jobs_over_reset_is_caught_by_a_job_that_goes_on_after_it() {
    assert!(a_job_survives_a_reset(&with("keep-jobs-over-reset", &[])).is_ok());
    assert!(matches!(a_job_survives_a_reset(&backend(&[])), Err(Error::Timeout { .. })));
}

/// Whether a job that a stop finds comes to its end after the next start.
fn a_job_survives_a_stop(backend: &Backend, patience: Duration) -> Result<Response> {
    let mut client = JobGuest::boot(backend, Mode::Fence, 46)?;
    let spin = Stream::new().signal(place(3, 0), 0x51).spin(SpinBehaviour::Preemptible, 50_000_000);
    let ticket = client.submit(spin.signal(place(3, 4), 0x52))?;
    client.wait_for_word(3, 0, 0x51)?;
    client.guest.stop()?;
    client.guest.start()?;
    client.guest.driver.wait_for(ticket, patience)
}

#[test]
fn lose_job_over_stop_is_caught_by_a_wait_without_end_and_a_reset_is_the_end_of_it() {
    assert!(a_job_survives_a_stop(&backend(&[]), Duration::from_secs(20)).unwrap().is_ok());
    let wrong = with("lose-job-over-stop", &[]);
    assert!(matches!(a_job_survives_a_stop(&wrong, Duration::from_secs(1)), Err(Error::Timeout { .. })));
    assert!(JobGuest::boot(&wrong, Mode::Fence, 47).is_ok(), "the next guest finds a device");
}
