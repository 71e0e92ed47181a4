//! Stop is a pause, reset discards, and a new connection finds nothing of the old one (DESIGN.md 4.6).

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::dma::DmaBuffer;
use guest_driver_tests::soft_guest::frozen::FrozenThread;
use guest_driver_tests::soft_guest::wire;
use guest_driver_tests::soft_guest::*;
use job_stream::{At, Compare, Context, Mode, Space, SpinBehaviour, Stream};

const SET_VRING_CALL: u32 = 13;
const QUIET: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(10);

fn boot(args: &[&str]) -> (Backend, SoftGuest, Surface) {
    let backend = Backend::start(args).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let surface = guest.surface(Format::B8G8R8A8, 256, 256).unwrap();
    (backend, guest, surface)
}

fn transfer(surface: &Surface) -> Command {
    Command::transfer(surface.resource, surface.rect(), 0)
}

#[test]
fn transfers_in_flight_at_a_stop_are_each_answered_once_after_the_next_start() {
    let (backend, mut guest, surface) = boot(&["--inject", "step-delay=2ms"]);
    let before = backend.stats().unwrap();
    let mut answered = 0;
    for round in 0..10_u64 {
        let fences = round * 20..round * 20 + 20;
        let tickets: Vec<_> = fences
            .map(|fence| (fence, guest.driver.submit(&transfer(&surface).fenced(fence)).unwrap()))
            .collect();
        guest.stop().unwrap();
        let waiting = guest.driver.in_flight();
        guest.start().unwrap();
        for (fence, ticket) in tickets {
            assert_eq!(guest.driver.wait_ok(ticket).unwrap().fence(), Some(fence));
            answered += 1;
        }
        assert!(waiting > 0 && guest.driver.in_flight() == 0);
    }
    let after = backend.stats().unwrap();
    assert_eq!(after.since(&before, "jobs_done").unwrap(), answered);
    assert_eq!(after.since(&before, "commands").unwrap(), answered);
    assert_eq!(after.get("connections").unwrap(), 1);
}

#[test]
fn a_stop_is_answered_in_time_and_followed_by_silence() {
    let (backend, mut guest, surface) = boot(&["--inject", "step-delay=5ms"]);
    let frames = surface.buffer.frames().to_vec();
    guest.driver.ok(&transfer(&surface)).unwrap();
    let tickets: Vec<_> = (0..10).map(|_| guest.driver.submit(&transfer(&surface)).unwrap()).collect();
    // One step takes 5 ms; the bound has room for a busy machine.
    let stopped = guest.stop().unwrap();
    assert!(stopped.waits.iter().all(|wait| *wait < Duration::from_millis(100)), "{stopped:?}");
    // What was sent before the stop may be read after it.
    let sent = backend.stats().unwrap().get("misses").unwrap();
    assert!(guest.front_end.wait_for_misses(PATIENCE, |counts| counts.seen == sent));

    guest.driver.poll().unwrap();
    guest.driver.ring(Queue::Control).interrupts();
    let (used, misses) =
        (guest.driver.ring(Queue::Control).used_index().unwrap(), guest.front_end.miss_counts());
    guest.dma.oracle().retire(&frames).unwrap();
    assert!(
        !guest.front_end.wait_for_misses(QUIET, |counts| counts.seen > misses.seen),
        "a miss after the stop"
    );
    assert_eq!(backend.stats().unwrap().get("misses").unwrap(), sent, "a miss after the stop");
    assert_eq!(guest.driver.ring(Queue::Control).used_index().unwrap(), used, "a completion after the stop");
    assert_eq!(guest.driver.ring(Queue::Control).interrupts(), 0, "an interrupt after the stop");
    guest.dma.oracle().check().unwrap();

    // The frames are still the surface's: they only read as zeros now.
    guest.start().unwrap();
    for ticket in tickets {
        guest.driver.wait_ok(ticket).unwrap();
    }
    assert_eq!(backend.stats().unwrap().get("jobs_failed").unwrap(), 0);
}

#[test]
fn a_job_that_waits_for_a_miss_does_not_hold_up_a_stop() {
    let (backend, mut guest, surface) = boot(&["--miss-timeout", "60s"]);
    let mut waits = Vec::new();
    for _ in 0..5 {
        guest.front_end.invalidate(surface.buffer.address(0), 64 * PAGE).unwrap();
        let seen = guest.front_end.miss_counts().seen;
        guest.front_end.hold_misses(true);
        let ticket = guest.driver.submit(&transfer(&surface)).unwrap();
        assert!(guest.front_end.wait_for_misses(Duration::from_secs(5), |counts| counts.seen > seen));
        let stopped = guest.stop().unwrap();
        waits.push(stopped.waits[0]);
        guest.front_end.hold_misses(false);
        guest.start().unwrap();
        guest.driver.wait_ok(ticket).unwrap();
    }
    let best = waits.iter().min().unwrap();
    assert!(*best <= Duration::from_millis(10), "{waits:?}");
    assert_eq!(backend.stats().unwrap().get("jobs_failed").unwrap(), 0);
}

#[test]
fn a_reboot_discards_everything_and_the_guest_comes_up_again() {
    let (backend, mut guest, surface) = boot(&["--inject", "step-delay=2ms"]);
    for _ in 0..5 {
        let jobs = backend.stats().unwrap().get("jobs_done").unwrap();
        for _ in 0..10 {
            let _ = guest.driver.submit(&transfer(&surface)).unwrap();
        }
        guest.reboot().unwrap();
        let gone = guest.driver.run(&Command::unref(surface.resource)).unwrap();
        assert_eq!(gone.kind(), kind::ERR_INVALID_RESOURCE_ID);
        let fresh = guest.surface(Format::B8G8R8A8, 32, 32).unwrap();
        guest.driver.ok(&transfer(&fresh)).unwrap();
        guest.free(fresh).unwrap();
        let done = backend.stats().unwrap().get("jobs_done").unwrap() - jobs;
        assert!((1..=10).contains(&done), "{done} of the discarded jobs ran to their end");
        guest.driver.ok(&Command::create_2d(surface.resource, Format::B8G8R8A8, 256, 256)).unwrap();
        let entries = surface.buffer.segments(0, 256 * 256 * 4);
        guest.driver.ok(&Command::attach_backing(surface.resource, &entries)).unwrap();
    }
    guest.dma.oracle().check().unwrap();
}

#[test]
fn a_hundred_connections_leave_no_descriptor_and_no_thread_behind() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut idle = None;
    for connection in 0..100 {
        let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
        let surface = guest.surface(Format::B8G8R8A8, 64, 64).unwrap();
        guest.driver.ok(&transfer(&surface)).unwrap();
        // Gone in the middle of something, every other time.
        if connection % 2 == 1 {
            let _ = guest.driver.submit(&transfer(&surface)).unwrap();
        }
        drop(guest);
        if connection == 10 {
            idle = Some(
                (0..20).map(|_| backend.settled((0, 0), Duration::from_millis(10)).unwrap()).min().unwrap(),
            );
        }
    }
    let idle = idle.unwrap();
    assert_eq!(backend.settled(idle, Duration::from_secs(10)).unwrap(), idle, "descriptors and threads");
    assert_eq!(backend.stats().unwrap().get("connections").unwrap(), 100);
}

#[test]
fn a_frozen_front_end_costs_no_transfer_its_answer() {
    let (backend, mut guest, surface) = boot(&["--miss-timeout", "5s"]);
    guest.front_end.invalidate(Iova(0), 0).unwrap();
    let front_end = guest.front_end.clone();
    let frozen = front_end.freeze();
    let seen = front_end.miss_counts().seen;
    let ticket = guest.driver.submit(&transfer(&surface)).unwrap();
    assert!(front_end.wait_for_misses(Duration::from_secs(5), |counts| counts.seen > seen));
    assert!(guest.driver.wait_for(ticket, QUIET).is_err(), "answered without a translation");
    drop(frozen);
    guest.driver.wait_ok(ticket).unwrap();
    assert_eq!(backend.stats().unwrap().get("miss_timeouts").unwrap(), 0);
}

#[test]
fn a_back_end_that_is_frozen_in_a_drain_revokes_nothing() {
    // A step takes 20 ms, and an engine has 50 ms for it once it is told to leave. The freeze takes far longer.
    const FREEZE: Duration = Duration::from_millis(150);
    const ROUNDS: usize = 20;
    let (backend, mut guest, surface) = boot(&["--inject", "step-delay=20ms"]);
    let mut frozen = 0;
    for round in 0..ROUNDS {
        let ticket = guest.driver.submit(&transfer(&surface)).unwrap();
        let stats = backend.stats().unwrap();
        let (steps, parked) = (stats.get("job_steps").unwrap(), stats.get("acks_parked").unwrap());
        let runs = |stats: &Stats| stats.get("job_steps").is_ok_and(|now| now > steps);
        assert!(backend.wait_for_stats(Duration::from_secs(5), runs).unwrap(), "round {round}: no step");
        let in_drain = |stats: &Stats| stats.get("acks_parked").is_ok_and(|now| now > parked);
        let (stopped, drained) = std::thread::scope(|scope| {
            let freezer = scope.spawn(|| {
                // A stop that finds the engine between two steps has nothing to wait for.
                let in_drain = backend.wait_for_stats(Duration::from_millis(100), in_drain).unwrap();
                backend.signal(libc::SIGSTOP).unwrap();
                wire::wait_readable(&[], Some(FREEZE)).unwrap();
                backend.signal(libc::SIGCONT).unwrap();
                in_drain
            });
            (guest.stop(), freezer.join().unwrap())
        });
        frozen += usize::from(drained);
        stopped.unwrap_or_else(|error| panic!("round {round}: {error}\n{}", backend.stderr()));
        assert_eq!(backend.stats().unwrap().get("revocations").unwrap(), 0, "round {round}");
        guest.start().unwrap();
        guest.driver.wait_ok(ticket).unwrap();
    }
    assert!(frozen >= ROUNDS / 2, "only {frozen} of {ROUNDS} freezes hit a drain");
    assert_eq!(backend.stats().unwrap().get("connections").unwrap(), 1);
}

/// A guest without an IOMMU, whose memory the device finds without asking, and its only buffer, which is resource 1.
fn boot_with_a_buffer(backend: &Backend) -> (SoftGuest, DmaBuffer) {
    let config = GuestConfig { display: None, ..GuestConfig::without_iommu() };
    let mut guest = SoftGuest::boot(backend, config).unwrap();
    let buffer = guest.dma.space().allocate(1, Permission::ReadWrite).unwrap();
    make_context(&mut guest, &buffer);
    (guest, buffer)
}

fn make_context(guest: &mut SoftGuest, buffer: &DmaBuffer) {
    buffer.write(0, &[0; PAGE as usize]).unwrap();
    for command in [
        Command::create_buffer(1, PAGE as u32),
        Command::attach_backing(1, &buffer.segments(0, PAGE)),
        Command::ctx_create(1),
        Command::ctx_attach(1, 1),
    ] {
        guest.driver.ok(&command).unwrap();
    }
}

fn at(offset: u64) -> At {
    At::new(Space::resource(1), offset)
}

fn wait_for(buffer: &DmaBuffer, value: u32) {
    let (begin, mut word) = (Instant::now(), [0; 4]);
    while word != value.to_le_bytes() {
        assert!(begin.elapsed() < Duration::from_secs(5), "{value} is not written");
        wire::wait_readable(&[], Some(Duration::from_micros(100))).unwrap();
        buffer.read(0x80, &mut word).unwrap();
    }
}

/// A stop does not wait for a job in SPIN, so a reset and the next driver may come before its engine looks at it again.
/// Its context was destroyed just before the stop: what it has left to do is to write `failed` to its user fence, in
/// memory that is the next driver's by then. (The engine is held up by force: else this happens now and then only.)
#[test]
fn a_spin_of_the_old_driver_writes_nothing_into_the_memory_of_the_next() {
    let backend = Backend::start(&["--engines", "1"]).unwrap();
    let (mut guest, buffer) = boot_with_a_buffer(&backend);
    for behaviour in [SpinBehaviour::Preemptible, SpinBehaviour::Stubborn, SpinBehaviour::Wedged] {
        let nanoseconds = if behaviour == SpinBehaviour::Wedged { 0 } else { 90_000_000 };
        let context =
            Context { mode: Some(Mode::Strict), priority: None, fence: Some(at(0)), done: 1, failed: !0 };
        let stream = Stream::new().push(context).signal(at(0x80), 7).spin(behaviour, nanoseconds);
        let _ = guest.driver.submit(&Command::submit_3d(1, &stream.finish())).unwrap();
        wait_for(&buffer, 7);
        let engine = FrozenThread::asleep(&backend, "engine-0").unwrap();
        let _ = guest.driver.submit(&Command::ctx_destroy(1)).unwrap();
        // Commands are taken in order.
        guest.driver.ok(&Command::capset_info(0)).unwrap();
        guest.reboot().unwrap();
        make_context(&mut guest, &buffer);
        drop(engine);
        // The only engine is free for this when it has done with the old job.
        let next = Stream::new().signal(at(0x80), 9).finish();
        let ticket = guest.driver.submit(&Command::submit_3d(1, &next).fenced(1)).unwrap();
        guest.driver.wait_ok(ticket).unwrap();
        wait_for(&buffer, 9);
        let mut fence = [0; 8];
        buffer.read(0, &mut fence).unwrap();
        assert_eq!(fence, [0; 8], "{behaviour:?}: the old job has written its fence");
        guest.reboot().unwrap();
        make_context(&mut guest, &buffer);
    }
}

/// Its guest stands still meanwhile, and with it the one that would write what the WAIT waits for.
#[test]
fn a_stop_costs_a_wait_none_of_its_time() {
    let backend = Backend::start(&["--engines", "1"]).unwrap();
    let (mut guest, buffer) = boot_with_a_buffer(&backend);
    let wait = Stream::new().signal(at(0x80), 7).wait(at(0x40), Compare::Equal, 1, 400_000_000).finish();
    let ticket = guest.driver.submit(&Command::submit_3d(1, &wait).fenced(1)).unwrap();
    wait_for(&buffer, 7);
    let begin = Instant::now();
    guest.stop().unwrap();
    // Far longer than it waits for.
    wire::wait_readable(&[], Some(Duration::from_secs(1))).unwrap();
    guest.start().unwrap();
    buffer.write(0x40, &1_u32.to_le_bytes()).unwrap();
    guest.driver.wait_ok(ticket).unwrap();
    assert!(begin.elapsed() >= Duration::from_secs(1));
    // And it does time out: of a WAIT that waits in vain, the time that the device ran for counts.
    let begin = Instant::now();
    let vain = Stream::new().wait(at(0x40), Compare::Equal, 2, 100_000_000).finish();
    let ticket = guest.driver.submit(&Command::submit_3d(1, &vain).fenced(2)).unwrap();
    assert_eq!(guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
    assert!(begin.elapsed() >= Duration::from_millis(100));
}

/// A SPIN that ignores preemption has no guest any more when its front-end has been killed.
#[test]
fn a_stubborn_job_does_not_keep_the_next_front_end_waiting() {
    for behaviour in [SpinBehaviour::Stubborn, SpinBehaviour::Wedged] {
        let backend = Backend::start(&["--log-level", "warn"]).unwrap();
        let mut waits = Vec::new();
        // The shortest of a few: a busy machine makes each longer.
        for _ in 0..5 {
            let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
            guest.driver.ok(&Command::ctx_create(1)).unwrap();
            let duration = if behaviour == SpinBehaviour::Wedged { 0 } else { 10_000_000_000 };
            let spin = Stream::new().spin(behaviour, duration).finish();
            let _ = guest.driver.submit(&Command::submit_3d(1, &spin)).unwrap();
            let before = backend.stats().unwrap().get("job_steps").unwrap();
            let spins = backend.wait_for_stats(PATIENCE, |stats| {
                stats.get("job_steps").is_ok_and(|steps| steps > before + 3)
            });
            assert!(spins.unwrap());
            drop(guest);
            let begin = Instant::now();
            drop(SoftGuest::boot(&backend, GuestConfig::headless()).unwrap());
            waits.push(begin.elapsed());
        }
        let shortest = waits.iter().min().unwrap();
        assert!(*shortest < Duration::from_millis(80), "{behaviour:?}: {waits:?}");
    }
}

/// An interrupt may be on its way to the eventfd that is replaced, and is read no more.
#[test]
fn a_call_eventfd_that_replaces_another_in_a_running_ring_is_signalled() {
    let (_backend, guest, _surface) = boot(&[]);
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let ring = 0_u64.to_ne_bytes();
    let flags = wire::VERSION | wire::NEED_REPLY;
    let reply = guest.front_end.raw(SET_VRING_CALL, flags, &ring, &[event.as_raw_fd()]).unwrap();
    assert_eq!(reply.body, [0; 8]);
    assert!(wire::wait_readable(&[event.as_raw_fd()], Some(PATIENCE)).unwrap().is_some());
}
