//! INVALIDATE → ack of an idle range against a bare socket echo: the same message sizes, the same client code,
//! another process on the other side, in the same run. And a burst of 28.
//!
//! criterion's figures come first; then both are measured in turns, for a ratio that a change of the machine's mood
//! does not move.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use criterion::Criterion;
use guest_driver_tests::soft_guest::dma_api::burst;
use guest_driver_tests::soft_guest::wire::{self, IotlbMessage, NEED_REPLY, VERSION, request};
use guest_driver_tests::soft_guest::{Backend, GuestConfig, Iova, PAGE, SoftGuest};
use zerocopy::IntoBytes;

/// Set in the child that plays the echo.
const ECHO: &str = "ACK_BENCH_ECHO";
const MESSAGE: usize = 12 + 32;
const ROUNDS: usize = 20_000;

fn main() {
    if std::env::var_os(ECHO).is_some() {
        return echo();
    }
    let (mut child, bare) = start_echo();
    let backend = Backend::start(&["--log-level", "error"]).expect("the back-end starts");
    let guest = SoftGuest::boot(&backend, GuestConfig::headless()).expect("the soft guest boots");
    let main = guest.front_end.main_socket().expect("the main socket can be shared");
    let mut criterion = Criterion::default().configure_from_args();
    criterion.bench_function("bare socket echo", |b| b.iter(|| exchange(&bare, Iova(0x1000))));
    criterion.bench_function("INVALIDATE idle", |b| b.iter(|| exchange(&main, Iova(0x1000))));
    let ranges = burst();
    criterion.bench_function("burst of 28", |b| {
        b.iter(|| guest.front_end.invalidate_all(&ranges).expect("the burst is acknowledged"));
    });
    criterion.final_summary();
    compare(&bare, &main);
    drop(bare);
    child.wait().expect("the echo ends");
}

/// Both in turns, and the ratio of their medians.
fn compare(bare: &UnixStream, main: &UnixStream) {
    let (mut echoes, mut acks) = (Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS));
    for _ in 0..ROUNDS {
        echoes.push(timed(bare));
        acks.push(timed(main));
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    let (echo, ack) = (median(&mut echoes), median(&mut acks));
    let ratio = ack.as_secs_f64() / echo.as_secs_f64();
    println!("In turns: echo {echo:?}, INVALIDATE {ack:?}, ratio {ratio:.2} (medians of {ROUNDS})");
}

fn timed(stream: &UnixStream) -> Duration {
    let start = Instant::now();
    exchange(stream, Iova(0x1000));
    start.elapsed()
}

fn exchange(stream: &UnixStream, iova: Iova) {
    let message = IotlbMessage::invalidate(iova, PAGE);
    wire::send(stream, request::IOTLB_MSG, VERSION | NEED_REPLY, message.as_bytes(), &[])
        .expect("it is sent");
    let reply = wire::receive(stream).expect("a reply comes").expect("nobody hangs up");
    assert_eq!(reply.number(), Some(0));
}

fn start_echo() -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let program = std::env::current_exe().expect("this program has a path");
    let child = Command::new(program).env(ECHO, "1").stdin(Stdio::from(OwnedFd::from(theirs))).spawn();
    (child.expect("the echo starts"), ours)
}

/// The child: waits in epoll, reads a message, writes a reply, and nothing else.
fn echo() {
    let stdin = std::io::stdin();
    let mut socket =
        UnixStream::from(wire::duplicate(&stdin).map(OwnedFd::from).expect("standard input is a socket"));
    let epoll = epoll::create(true).expect("an epoll");
    let event = epoll::Event::new(epoll::Events::EPOLLIN, 0);
    epoll::ctl(epoll, epoll::ControlOptions::EPOLL_CTL_ADD, socket.as_raw_fd(), event)
        .expect("it can be waited for");
    let mut message = [0; MESSAGE];
    let reply = wire::encode(request::IOTLB_MSG, VERSION | wire::REPLY, &0_u64.to_le_bytes());
    loop {
        let mut events = [epoll::Event::new(epoll::Events::empty(), 0)];
        epoll::wait(epoll, -1, &mut events).expect("epoll waits");
        if socket.read_exact(&mut message).is_err() || socket.write_all(&reply).is_err() {
            return;
        }
    }
}
