//! A front-end that sends nonsense, stops in the middle or says nothing: the process lives, does not spin, keeps
//! no descriptor and no memory, and serves the next connection at once.
//!
//! `MIRRORGPU_SESSIONS` sets the number of sessions where there may be any (for the soak: 50000, about a million messages).

use std::io::IoSliceMut;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::frames::Dice;
use guest_driver_tests::soft_guest::wire::{self, NEED_REPLY, REPLY, VERSION};
use guest_driver_tests::soft_guest::*;
use job_stream::{SpinBehaviour, Stream};
use rustix::event::EventfdFlags;
use rustix::fs::OFlags;
use rustix::io::{ReadWriteFlags, preadv2};
use vmm_sys_util::eventfd::EventFd;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const GET_VRING_BASE: u32 = 11;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_BACKEND_REQ_FD: u32 = 21;
const GPU_SET_SOCKET: u32 = 33;
const LAST_REQUEST: u32 = 44;
/// Within this time, a stop is answered and the next front-end is served; on an idle machine it takes a few milliseconds.
const PROMPT: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(10);

/// What a session may leave behind of memory, after however many of them.
const KEPT_KIB: u64 = 1024;

fn sessions() -> u64 {
    std::env::var("MIRRORGPU_SESSIONS").ok().and_then(|sessions| sessions.parse().ok()).unwrap_or(300)
}

/// A back-end with its descriptors, threads and memory counted.
struct Victim {
    backend: Backend,
    idle: (usize, usize),
    /// Where so much happens that it would show.
    resident: Option<u64>,
    answers: Vec<Duration>,
}

impl Victim {
    fn new() -> Self {
        // Quiet: what it says of nonsense would fill the test's memory.
        let backend = Backend::start(&["--log-level", "error"]).unwrap();
        let mut this = Self { backend, idle: (0, 0), resident: None, answers: Vec::new() };
        // The first connections start what stays.
        for _ in 0..3 {
            drop(SoftGuest::boot(&this.backend, GuestConfig::default()).unwrap());
            this.must_answer("nothing");
        }
        // They end a little later than their front-ends: fewer descriptors is what there will be in the end.
        this.idle =
            (0..20).map(|_| this.backend.settled((0, 0), Duration::from_millis(10)).unwrap()).min().unwrap();
        this
    }

    /// Memory from now on: allocators and recorders have taken what they keep.
    fn settle_memory(&mut self) {
        self.resident = Some(self.backend.resident_kib().unwrap());
    }

    fn connect(&self) -> UnixStream {
        self.backend.connect().unwrap()
    }

    /// The next connection is answered, and nothing has piled up.
    fn must_answer(&mut self, after: &str) {
        let start = Instant::now();
        let stream = self.connect();
        wire::send(&stream, GET_FEATURES, VERSION, &[], &[]).unwrap();
        let readable = wire::wait_readable(&[stream.as_raw_fd()], Some(Duration::from_secs(10))).unwrap();
        assert!(readable.is_some(), "no answer after {after}");
        let reply = wire::receive(&stream).unwrap().unwrap_or_else(|| panic!("closed after {after}"));
        assert_eq!(
            (reply.request, reply.flags, reply.body.len()),
            (GET_FEATURES, VERSION | REPLY, 8),
            "after {after}"
        );
        self.answers.push(start.elapsed());
    }

    /// All is over: judge.
    fn judge(mut self) {
        self.must_answer("everything");
        assert!(self.backend.is_running(), "{}", self.backend.stderr());
        let settled = self.backend.settled(self.idle, Duration::from_secs(10)).unwrap();
        assert_eq!(settled, self.idle, "descriptors and threads");
        if let Some(before) = self.resident {
            let grown = self.backend.resident_kib().unwrap().saturating_sub(before);
            println!("{grown} KiB of memory more than before");
            assert!(grown <= KEPT_KIB, "{grown} KiB of memory more than before");
        }
        self.answers.sort();
        let median = self.answers[self.answers.len() / 2];
        assert!(median < Duration::from_millis(100), "the next connection waits {median:?}");
        let mut guest = SoftGuest::boot(&self.backend, GuestConfig::default()).unwrap();
        let image = picture(100, 100, 1);
        let surface = guest.surface(Format::B8G8R8X8, 100, 100).unwrap();
        surface.draw(&image).unwrap();
        guest.must_show(&surface, &image).unwrap();
        let before = self.backend.cpu_time().unwrap();
        wire::wait_readable(&[], Some(Duration::from_millis(300))).unwrap();
        let used = self.backend.cpu_time().unwrap() - before;
        assert!(used <= Duration::from_millis(100), "{used:?} of CPU time in 300 ms of silence");
    }
}

/// Sends, as long as the other side takes it.
fn try_send(stream: &UnixStream, request: u32, flags: u32, body: &[u8], fds: &[RawFd]) {
    // A back-end may close the connection at any of these messages.
    let _ = wire::send(stream, request, flags, body, fds);
}

/// Negotiates everything, in QEMU's order, so that replies and all messages are allowed. The back-end must go along.
fn negotiate(stream: &UnixStream) {
    let ask = |request| {
        wire::send(stream, request, VERSION, &[], &[]).unwrap();
        wire::receive(stream).unwrap().unwrap_or_else(|| panic!("no reply to request {request}")).body
    };
    let features = ask(GET_FEATURES);
    let protocol = ask(GET_PROTOCOL_FEATURES);
    wire::send(stream, SET_PROTOCOL_FEATURES, VERSION, &protocol, &[]).unwrap();
    wire::send(stream, SET_FEATURES, VERSION | NEED_REPLY, &features, &[]).unwrap();
    let reply = wire::receive(stream).unwrap().expect("a reply to SET_FEATURES");
    assert_eq!((reply.request, reply.body.as_slice()), (SET_FEATURES, &[0; 8][..]));
}

/// Waits until the other side has read everything or closed the connection, without relying on a reply.
fn settle(stream: &UnixStream) {
    let _ = stream.shutdown(Shutdown::Write);
    let closed = wire::wait_hang_up(stream, Duration::from_secs(10)).unwrap();
    assert!(closed, "the back-end does not notice a half-closed connection");
}

#[test]
fn unknown_requests_flags_and_sizes_do_no_harm() {
    let mut victim = Victim::new();
    for request in [0, LAST_REQUEST + 1, 99, 1 << 16, u32::MAX] {
        for flags in [VERSION, VERSION | NEED_REPLY] {
            let stream = victim.connect();
            negotiate(&stream);
            try_send(&stream, request, flags, &[0; 8], &[]);
            settle(&stream);
        }
        victim.must_answer(&format!("request {request}"));
    }
    for flags in [0, 2, 3, VERSION | REPLY, u32::MAX] {
        let stream = victim.connect();
        try_send(&stream, GET_FEATURES, flags, &[], &[]);
        settle(&stream);
        victim.must_answer(&format!("flags {flags:#x}"));
    }
    for size in [4097_u32, 1 << 20, u32::MAX] {
        let stream = victim.connect();
        let mut bytes = wire::encode(GET_FEATURES, VERSION, &[]);
        bytes[8..12].copy_from_slice(&size.to_le_bytes());
        let _ = wire::send_bytes(&stream, &bytes, &[]);
        settle(&stream);
        victim.must_answer(&format!("{size} announced bytes"));
    }
    victim.judge();
}

#[test]
fn every_request_with_every_wrong_size_does_no_harm() {
    let mut victim = Victim::new();
    for request in 1..=LAST_REQUEST {
        for size in [0, 1, 4, 7, 8, 9, 12, 31, 32, 33, 40, 41, 264, 4096] {
            for fill in [0, 1, 0xff] {
                let stream = victim.connect();
                negotiate(&stream);
                try_send(&stream, request, VERSION | NEED_REPLY, &vec![fill; size], &[]);
                try_send(&stream, request, VERSION, &vec![fill; size], &[]);
                settle(&stream);
            }
        }
        victim.must_answer(&format!("request {request}"));
    }
    victim.judge();
}

#[test]
fn descriptors_that_do_not_belong_there_are_closed() {
    let mut victim = Victim::new();
    let file = tempfile::tempfile().unwrap();
    for count in [1, 8, 32] {
        for request in 1..=LAST_REQUEST {
            let stream = victim.connect();
            negotiate(&stream);
            let fds = vec![file.as_raw_fd(); count];
            for size in [0, 8, 32, 40] {
                try_send(&stream, request, VERSION | NEED_REPLY, &vec![0; size], &fds);
            }
            settle(&stream);
        }
        victim.must_answer(&format!("{count} descriptors with each request"));
    }
    victim.judge();
}

#[test]
fn ring_messages_with_any_index_and_in_any_order_do_no_harm() {
    let mut victim = Victim::new();
    let event = EventFd::new(0).unwrap();
    for request in [8_u32, 9, 10, 11, 12, 13, 14, 18] {
        for index in [0_u32, 1, 2, 255, 256, 0x1_0000, u32::MAX] {
            for value in [0_u32, 1, 3, 64, 0x8000, 0xffff, 0x1_0000, u32::MAX] {
                let stream = victim.connect();
                if value != 3 {
                    negotiate(&stream);
                }
                let words = if request == 9 { 10 } else { 2 };
                let mut body: Vec<u8> = [index, value].iter().flat_map(|word| word.to_le_bytes()).collect();
                body.resize(words * 4, value as u8);
                let fds = if (12..=14).contains(&request) { vec![event.as_raw_fd()] } else { vec![] };
                try_send(&stream, request, VERSION | NEED_REPLY, &body, &fds);
                try_send(&stream, 18, VERSION, &[index.to_le_bytes(), 1_u32.to_le_bytes()].concat(), &[]);
                settle(&stream);
            }
        }
        victim.must_answer(&format!("request {request}"));
    }
    victim.judge();
}

#[test]
fn iotlb_messages_of_any_content_at_any_time_do_no_harm() {
    let mut victim = Victim::new();
    let mut dice = Dice::new(1);
    for negotiated in [false, true] {
        let stream = victim.connect();
        if negotiated {
            negotiate(&stream);
        }
        for kind in [0, 1, 2, 3, 4, 5, 6, 7, 255_u8] {
            for _ in 0..50 {
                let mut body: Vec<u8> =
                    (0..3).flat_map(|_| (dice.roll() << dice.below(64)).to_le_bytes()).collect();
                body.extend([dice.roll() as u8, kind, 0, 0, 0, 0, 0, 0]);
                try_send(&stream, 22, VERSION, &body, &[]);
            }
        }
        settle(&stream);
        victim.must_answer("IOTLB messages");
    }
    victim.judge();
}

#[test]
fn random_messages_do_no_harm() {
    let mut victim = Victim::new();
    let event = EventFd::new(0).unwrap();
    for seed in 0..sessions() {
        if seed == sessions() / 4 {
            victim.settle_memory();
        }
        let mut dice = Dice::new(seed);
        let stream = victim.connect();
        if dice.below(4) != 0 {
            negotiate(&stream);
        }
        for _ in 0..dice.below(40) {
            let request = 1 + dice.below(LAST_REQUEST as usize) as u32;
            let size = [0, 8, 8, 8, 32, 40, 40, dice.below(300)][dice.below(8)];
            let small = dice.below(2) == 0;
            let mut body: Vec<u8> =
                (0..size).map(|_| if small { dice.below(3) as u8 } else { dice.roll() as u8 }).collect();
            if small {
                body.iter_mut().skip(1).step_by(4).for_each(|byte| *byte = 0);
            }
            let fds = vec![event.as_raw_fd(); [0, 0, 1, 2][dice.below(4)]];
            let flags = VERSION | [0, NEED_REPLY][dice.below(2)];
            try_send(&stream, request, flags, &body, &fds);
        }
        settle(&stream);
        if seed % 10 == 0 {
            victim.must_answer(&format!("seed {seed}"));
        }
    }
    victim.judge();
}

#[test]
fn front_ends_that_come_and_go_in_the_middle_of_work_leave_nothing_behind() {
    let mut victim = Victim::new();
    for session in 0..sessions() {
        if session == sessions() / 4 {
            victim.settle_memory();
        }
        let config = GuestConfig { seed: session, ..GuestConfig::default() };
        let mut guest = SoftGuest::boot(&victim.backend, config).unwrap();
        let surface = guest.surface(Format::B8G8R8X8, 64, 64).unwrap();
        // Nobody waits for its end.
        let _ticket =
            guest.driver.submit(&Command::transfer(surface.resource, surface.rect(), 0).fenced(1)).unwrap();
        drop(guest);
        if session % 10 == 0 {
            victim.must_answer(&format!("session {session}"));
        }
    }
    victim.judge();
}

#[test]
fn a_message_may_come_byte_by_byte() {
    let victim = Victim::new();
    let stream = victim.connect();
    for _ in 0..3 {
        for byte in wire::encode(GET_FEATURES, VERSION, &[]) {
            wire::send_bytes(&stream, &[byte], &[]).unwrap();
            wire::wait_readable(&[], Some(Duration::from_millis(1))).unwrap();
        }
        assert_eq!(wire::receive(&stream).unwrap().unwrap().body.len(), 8);
    }
    // Body after header, too: SET_PROTOCOL_FEATURES, then something with a reply.
    for byte in wire::encode(16, VERSION, &8_u64.to_le_bytes()) {
        wire::send_bytes(&stream, &[byte], &[]).unwrap();
        wire::wait_readable(&[], Some(Duration::from_millis(1))).unwrap();
    }
    wire::send(&stream, GET_FEATURES, VERSION, &[], &[]).unwrap();
    assert_eq!(wire::receive(&stream).unwrap().unwrap().request, GET_FEATURES);
    drop(stream);
    victim.judge();
}

#[test]
fn a_message_that_is_cut_off_ends_its_session_and_no_other() {
    let mut victim = Victim::new();
    let whole = wire::encode(16, VERSION, &8_u64.to_le_bytes());
    for cut in 1..whole.len() {
        let stream = victim.connect();
        wire::send_bytes(&stream, &whole[..cut], &[]).unwrap();
        drop(stream);
        victim.must_answer(&format!("{cut} bytes and a close"));
    }
    let stalled = victim.connect();
    wire::send_bytes(&stalled, &whole[..15], &[]).unwrap();
    let start = Instant::now();
    let before = victim.backend.cpu_time().unwrap();
    let closed = wire::wait_hang_up(&stalled, Duration::from_secs(10)).unwrap();
    let (waited, used) = (start.elapsed(), victim.backend.cpu_time().unwrap() - before);
    assert!(closed && waited >= Duration::from_secs(4), "closed: {closed}, after {waited:?}");
    assert!(used <= Duration::from_millis(100), "{used:?} of CPU time for half a message");
    victim.judge();
}

#[test]
fn connections_that_say_nothing_or_do_not_listen_end_with_their_front_end() {
    let mut victim = Victim::new();
    for _ in 0..100 {
        drop(victim.connect());
    }
    victim.must_answer("100 connections that said nothing");
    let deaf = victim.connect();
    deaf.set_nonblocking(true).unwrap();
    let asked =
        (0..100_000).take_while(|_| wire::send(&deaf, GET_FEATURES, VERSION, &[], &[]).is_ok()).count();
    assert!(asked < 100_000, "the back-end reads on although nobody takes its replies");
    drop(deaf);
    victim.must_answer("a front-end that does not read");
    victim.judge();
}

#[test]
fn a_front_end_that_vanishes_during_a_drain_is_no_trouble() {
    let backend = Backend::start(&["--inject", "step-delay=20ms", "--drain-timeout", "300ms"]).unwrap();
    for _ in 0..10 {
        let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
        let surface = guest.surface(Format::B8G8R8X8, 256, 256).unwrap();
        let rect = surface.rect();
        guest.driver.ok(&Command::transfer(surface.resource, rect, 0)).unwrap();
        let _ = guest.driver.submit(&Command::transfer(surface.resource, rect, 0)).unwrap();
        guest.front_end.invalidate_and_vanish(surface.buffer.address(0), PAGE).unwrap();
    }
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, 32, 32).unwrap();
    guest.driver.ok(&Command::transfer(surface.resource, surface.rect(), 0)).unwrap();
    assert_eq!(backend.stats().unwrap().get("connections").unwrap(), 11);
}

/// Makes an eventfd that the back-end shares block whoever writes or reads it.
fn make_blocking(event: &EventFd) {
    // SAFETY: the eventfd is open as long as it is borrowed.
    let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let flags = rustix::fs::fcntl_getfl(event).unwrap();
    rustix::fs::fcntl_setfl(event, flags - OFlags::NONBLOCK).unwrap();
}

/// Reads what the back-end may have read already: without waiting, although the eventfd blocks.
fn take_back(event: &EventFd) {
    let mut count = [0; 8];
    // SAFETY: the eventfd is open as long as it is borrowed.
    let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let _ = preadv2(event, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
}

/// The front-end shares its open file descriptions, so it can make them block after the back-end has set them up.
#[test]
fn eventfds_that_the_front_end_makes_blocking_hold_nothing_up() {
    let backend = Backend::start(&["--log-level", "warn"]).unwrap();
    for which in ["call", "error", "kick"] {
        let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
        let setup = guest.driver.ring(Queue::Control).setup();
        let event = match which {
            "call" => setup.call.try_clone().unwrap(),
            "error" => setup.error.try_clone().unwrap(),
            _ => setup.kick.try_clone().unwrap(),
        };
        make_blocking(&event);
        if which == "kick" {
            // Each wakes the back-end, which often finds that it was taken back.
            for _ in 0..1000 {
                event.write(1).unwrap();
                take_back(&event);
            }
        } else {
            event.write(u64::MAX - 1).unwrap();
        }
        if which == "error" {
            guest.driver.ring(Queue::Control).jump(u16::MAX).unwrap();
        } else {
            let ticket = guest.driver.submit(&Command::edid(0)).unwrap();
            let begin = Instant::now();
            while guest.driver.try_wait(ticket).unwrap().is_none() {
                assert!(begin.elapsed() < PATIENCE, "A command is not answered: the {which} eventfd blocks");
                std::thread::yield_now();
            }
        }
        let stopped = guest.stop().unwrap();
        assert!(stopped.waits.iter().all(|wait| *wait < PROMPT), "{which}: {stopped:?}");
        drop(guest);
        let begin = Instant::now();
        drop(SoftGuest::boot(&backend, GuestConfig::headless()).unwrap());
        assert!(begin.elapsed() < PROMPT, "{which}: the next front-end waited {:?}", begin.elapsed());
    }
    let ended = backend.terminate(PATIENCE).unwrap();
    assert!(ended.status.success(), "{}", ended.stderr);
}

/// What a request with a descriptor brings: a file of a kind that it may bring.
fn file_for(request: u32) -> (OwnedFd, Box<dyn std::any::Any>) {
    if [SET_BACKEND_REQ_FD, GPU_SET_SOCKET].contains(&request) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        return (theirs.into(), Box::new(ours));
    }
    let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    (event, Box::new(()))
}

/// Descriptors of one file are one registration for epoll, whatever becomes of the one that was registered.
#[test]
fn a_descriptor_may_come_again_and_again() {
    let mut victim = Victim::new();
    let ring = 0u64.to_ne_bytes();
    let requests: [(u32, &[u8]); 5] = [
        (SET_BACKEND_REQ_FD, &[]),
        (GPU_SET_SOCKET, &[]),
        (SET_VRING_KICK, &ring),
        (SET_VRING_CALL, &ring),
        (SET_VRING_ERR, &ring),
    ];
    for (request, body) in requests {
        let stream = victim.connect();
        negotiate(&stream);
        let files = [file_for(request), file_for(request)];
        // The same one, another one, and the first one again, each several times.
        for which in [0, 0, 0, 0, 1, 0, 1, 1, 1, 0, 0] {
            let (file, _) = &files[which];
            let sent = wire::send(&stream, request, VERSION | NEED_REPLY, body, &[file.as_raw_fd()]);
            sent.unwrap_or_else(|e| {
                panic!("request {request} with file {which}: {e}\n{}", victim.backend.stderr())
            });
            let reply =
                wire::receive(&stream).unwrap_or_else(|e| panic!("request {request} with file {which}: {e}"));
            let reply =
                reply.unwrap_or_else(|| panic!("request {request} with file {which} ends the session"));
            assert_eq!((reply.request, reply.body.as_slice()), (request, &[0; 8][..]), "file {which}");
            if request == SET_VRING_KICK {
                // A ring that is started takes no other kick.
                wire::send(&stream, GET_VRING_BASE, VERSION, body, &[]).unwrap();
                assert!(wire::receive(&stream).unwrap().is_some());
            }
        }
        drop(stream);
        victim.must_answer(&format!("request {request} with the same descriptors"));
    }
    victim.judge();
}

/// What sessions that used all they may leave behind of memory, within a second.
const KEPT_AFTER_PLENTY_KIB: u64 = 2048;

/// Fills what the quotas allow: backings of many entries, jobs of many packets, contexts, and large commands.
fn use_plenty(guest: &mut SoftGuest) {
    let buffer = guest.dma.space().allocate(64, Permission::ReadWrite).unwrap();
    let entries: Vec<_> = (0..4096).flat_map(|entry| buffer.segments((entry % 64) * PAGE, 16)).collect();
    for resource in 1000..1004 {
        let _ = guest.driver.run(&Command::create_buffer(resource, 4096 * 16)).unwrap();
        let _ = guest.driver.run(&Command::attach_backing(resource, &entries)).unwrap();
    }
    for resource in 2000..2064 {
        let _ = guest.driver.run(&Command::create_2d(resource, Format::B8G8R8X8, 1024, 1024)).unwrap();
    }
    let stuck = Stream::new().spin(SpinBehaviour::Preemptible, 60_000_000_000).finish();
    let long = (0..2000).fold(Stream::new(), |stream, word| stream.nop(word % 4)).finish();
    for ctx in 1..=32 {
        let _ = guest.driver.run(&Command::ctx_create(ctx)).unwrap();
        let _ = guest.driver.run(&Command::submit_3d(ctx, &stuck)).unwrap();
        for _ in 0..4 {
            let _ = guest.driver.run(&Command::submit_3d(ctx, &long)).unwrap();
        }
    }
}

#[test]
fn memory_that_a_session_has_used_goes_back_to_the_system() {
    let mut backend = Backend::start(&["--log-level", "error"]).unwrap();
    drop(SoftGuest::boot(&backend, GuestConfig::headless()).unwrap());
    let before = backend.resident_kib().unwrap();
    let mut most = 0;
    for _ in 0..3 {
        let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
        use_plenty(&mut guest);
        most = most.max(backend.resident_kib().unwrap());
        drop(guest);
    }
    let begin = Instant::now();
    let mut kept = u64::MAX;
    while kept > KEPT_AFTER_PLENTY_KIB && begin.elapsed() < PATIENCE {
        wire::wait_readable(&[], Some(Duration::from_millis(100))).unwrap();
        kept = backend.resident_kib().unwrap().saturating_sub(before);
    }
    println!("{before} KiB, at most {most} KiB, {kept} KiB more after {:?}", begin.elapsed());
    assert!(backend.is_running());
    assert!(
        most > before + 2 * KEPT_AFTER_PLENTY_KIB,
        "at most {most} KiB after {before} KiB: nothing was used"
    );
    assert!(
        kept <= KEPT_AFTER_PLENTY_KIB,
        "{kept} KiB more than the {before} KiB before, at most {most} KiB"
    );
}
