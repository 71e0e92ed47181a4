//! Jobs behind the vIOMMU, in every mode: each packet does what the twin says, an invalidation during a job is acked
//! as the mode has it, and no page is touched after its ack.
//!
//! `MIRRORGPU_CYCLES` sets the number of cycles of the last.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::driver::Ticket;
use guest_driver_tests::soft_guest::frames::Dice;
use guest_driver_tests::soft_guest::*;
use job_stream::twin::{Buffers, Outcome, interpret};
use job_stream::{
    At, Capset, Choice, Compare, Context, Limits, Mode, Range, Space, SpinBehaviour, Stream, verify,
};

const COHERENT: [Mode; 4] = [Mode::Strict, Mode::Fence, Mode::Preempt, Mode::Fault];
const PAGES: usize = 64;
const BYTES: u64 = PAGES as u64 * 4096;

fn cycles() -> u64 {
    std::env::var("MIRRORGPU_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(400)
}

fn place(id: u32, address: u64) -> At {
    At::new(Space::resource(id), address)
}

fn whole(id: u32) -> Range {
    place(id, 0).range(BYTES)
}

/// A guest with context 1 and the buffers 1, 2 and 3, of 256 KiB each in scattered frames.
struct Client {
    guest: SoftGuest,
    buffers: Vec<dma::DmaBuffer>,
    fence: u64,
}

impl Client {
    fn new(backend: &Backend, mode: Mode, seed: u64) -> Self {
        let mut guest = SoftGuest::boot(backend, GuestConfig { seed, ..GuestConfig::headless() }).unwrap();
        guest.driver.ok(&Command::ctx_create(1)).unwrap();
        let mut buffers = Vec::new();
        for id in 1..=3 {
            let buffer = guest.dma.space().allocate(PAGES, Permission::ReadWrite).unwrap();
            buffer.write(0, &contents(id)).unwrap();
            guest.driver.ok(&Command::create_buffer(id, BYTES as u32)).unwrap();
            guest.driver.ok(&Command::attach_backing(id, &buffer.segments(0, BYTES))).unwrap();
            guest.driver.ok(&Command::ctx_attach(1, id)).unwrap();
            buffers.push(buffer);
        }
        let mut client = Self { guest, buffers, fence: 0 };
        client.run(Stream::new().mode(mode));
        client
    }

    fn submit(&mut self, stream: Stream) -> Ticket {
        self.fence += 1;
        self.guest.driver.submit(&Command::submit_3d(1, &stream.finish()).fenced(self.fence)).unwrap()
    }

    fn run(&mut self, stream: Stream) {
        let ticket = self.submit(stream);
        self.guest.driver.wait_ok(ticket).unwrap();
    }

    /// A page keeps its address, stays mapped, and gets another frame.
    fn swap(&mut self, buffer: usize, page: usize) {
        let frame = self.guest.dma.space().frames().take(1).unwrap()[0];
        self.guest.dma.swap_page(&mut self.buffers[buffer], page, frame).unwrap();
    }

    fn bytes(&self, id: u32) -> Vec<u8> {
        let mut bytes = vec![0; BYTES as usize];
        self.buffers[id as usize - 1].read(0, &mut bytes).unwrap();
        bytes
    }
}

fn contents(id: u32) -> Vec<u8> {
    (0..BYTES as u32).map(|at| (at.wrapping_mul(id.wrapping_mul(0x9e37_79b1) | 1) >> 24) as u8).collect()
}

/// Every packet, but for those whose outcome is a time.
fn every_packet() -> Stream {
    Stream::new()
        .nop(3)
        .fill(place(1, 0x0ff4).range(0x2010), 0xdead_beef)
        .barrier()
        .copy(place(1, 0x0f01).range(0x2_1234), place(2, 0x0803))
        .checksum(place(2, 3).range(BYTES - 0x1003), place(3, 0x40))
        .signal(place(3, 0x48), 7)
        .signal64(place(3, 0x50), 1 << 40)
        .wait(place(3, 0x48), Compare::Equal, 7, 0)
        .add(place(3, 0x48), u32::MAX, Some(place(3, 0x4c)))
        .add64(place(3, 0x50), 5, Some(place(3, 0x58)))
        .cas(place(3, 0x48), 6, 99, Some(place(3, 0x60)))
        .cas64(place(3, 0x50), 0, 99, Some(place(3, 0x68)))
        .spin(SpinBehaviour::Preemptible, 1_000_000)
        .spin(SpinBehaviour::Stubborn, 100_000)
}

#[test]
fn every_packet_does_what_the_twin_says_in_every_mode() {
    let backend = Backend::start(&["--allow-incoherent"]).unwrap();
    for mode in Mode::ALL {
        let mut client = Client::new(&backend, *mode, 31);
        let mut twin = (1..=3).fold(Buffers::new(), |twin, id| twin.with(id, contents(id)));
        let program = verify(&every_packet().finish(), &Limits::default()).unwrap();
        assert_eq!(interpret(&program, &mut twin), Ok(Outcome::Done));
        let fence = Context { mode: None, priority: None, fence: Some(place(3, 0x1000)), done: 1, failed: 2 };
        let all = every_packet().finish();
        client.run(Stream::new().push(fence));
        let ticket = client.guest.driver.submit(&Command::submit_3d(1, &all).fenced(1000)).unwrap();
        client.guest.driver.wait_ok(ticket).unwrap();
        for id in 1..=2 {
            assert!(client.bytes(id) == twin.bytes(id), "buffer {id}, mode {mode}");
        }
        let (real, twin) = (client.bytes(3), twin.bytes(3));
        assert_eq!((&real[..0x1000], &real[0x1008..]), (&twin[..0x1000], &twin[0x1008..]), "mode {mode}");
        assert_eq!(real[0x1000..0x1008], 1_u64.to_le_bytes(), "mode {mode}");
        assert_eq!(client.guest.dma.space().iommu().faults(), []);
    }
}

#[test]
fn timestamps_measure_a_spin() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fault, 32);
    let spin = Stream::new().timestamp(place(3, 0)).spin(SpinBehaviour::Preemptible, 5_000_000);
    client.run(spin.timestamp(place(3, 8)));
    let bytes = client.bytes(3);
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
        let mut client = Client::new(&backend, mode, 33);
        client.guest.driver.ok(&Command::ctx_create(2)).unwrap();
        client.guest.driver.ok(&Command::ctx_attach(2, 3)).unwrap();
        client.run(Stream::new().signal(place(3, 0), 0));
        let waits = client.submit(Stream::new().wait(place(3, 0), Compare::Equal, 5, 0));
        // Without a fence, for those end in the order of their commands; the response is not its end.
        let signals = Stream::new().spin(SpinBehaviour::Preemptible, 2_000_000).signal(place(3, 0), 5);
        client.guest.driver.ok(&Command::submit_3d(2, &signals.finish())).unwrap();
        client.guest.driver.wait_ok(waits).unwrap();
    }
}

#[test]
fn a_job_that_fails_says_so_and_loses_its_context_and_no_other() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fence, 34);
    client.guest.driver.ok(&Command::ctx_create(2)).unwrap();
    let fence = Context { mode: None, priority: None, fence: Some(place(3, 8)), done: 1, failed: 2 };
    for broken in [
        Stream::new().push(fence).wait(place(1, 0), Compare::Equal, !0, 1_000_000),
        Stream::new().push(fence).spin(SpinBehaviour::Wedged, 0),
    ] {
        let ticket = client.submit(broken);
        assert_eq!(client.guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
        assert_eq!(client.bytes(3)[8..16], 2_u64.to_le_bytes());
        let refused = client.guest.driver.run(&Command::submit_3d(1, &[])).unwrap();
        assert_eq!(refused.kind(), kind::ERR_INVALID_CONTEXT_ID);
        client.guest.driver.ok(&Command::submit_3d(2, &[])).unwrap();
        client.guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
        client.guest.driver.ok(&Command::ctx_create(1)).unwrap();
        (1..=3).for_each(|id| drop(client.guest.driver.ok(&Command::ctx_attach(1, id)).unwrap()));
    }
}

/// How long an INVALIDATE of a page takes that a job has, which spins for `spin`.
fn ack_during_a_spin(backend: &Backend, mode: Mode, spin: Duration) -> Duration {
    let mut client = Client::new(backend, mode, 35);
    let started = Stream::new().signal(place(3, 0), 0xabcd).fill(whole(1), 1);
    let ticket =
        client.submit(started.spin(SpinBehaviour::Preemptible, spin.as_nanos() as u64).fill(whole(1), 2));
    let begin = Instant::now();
    while client.bytes(3)[..4] != 0xabcd_u32.to_le_bytes() {
        assert!(begin.elapsed() < Duration::from_secs(5), "the job does not start");
        wire::wait_readable(&[], Some(Duration::from_micros(100))).unwrap();
    }
    let asked = Instant::now();
    client.swap(0, 40);
    let took = asked.elapsed();
    client.guest.driver.wait_ok(ticket).unwrap();
    // Whoever was not waited for, and is coherent, has found the new frame for what came after the spin.
    if matches!(mode, Mode::Strict | Mode::Preempt | Mode::Fault) {
        assert!(client.bytes(1).chunks(4).all(|word| word == [2, 0, 0, 0]), "{mode}");
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
        let mut client = Client::new(&backend, mode, 36);
        let mut dice = Dice::new(36);
        let before = backend.stats().unwrap();
        let mut on_their_way: VecDeque<Ticket> = VecDeque::new();
        let mut clean = 0;
        for cycle in 0..cycles() {
            while on_their_way.len() < 3 {
                let there = Stream::new().copy(whole(1), place(2, 0)).fill(whole(1), cycle as u32);
                on_their_way.push_back(client.submit(there.checksum(whole(2), place(3, 0))));
            }
            client.swap(dice.below(2), dice.below(PAGES));
            let ticket = on_their_way.pop_front().unwrap();
            client.guest.driver.wait_ok(ticket).unwrap();
            if cycle % 64 == 0 {
                clean += client.guest.dma.oracle().check().unwrap();
            }
        }
        for ticket in on_their_way {
            client.guest.driver.wait_ok(ticket).unwrap();
        }
        clean += client.guest.dma.oracle().check().unwrap();
        let after = backend.stats().unwrap();
        let in_flight = after.since(&before, "invalidations_with_work_in_flight").unwrap();
        println!("{mode}: {clean} looks at retired frames, {in_flight} invalidations met a job");
        assert!(in_flight > 0 && clean > 0, "{mode}: {in_flight} met a job, {clean} frames");
    }
}
