//! A host that gives an engine no processor is not a device that is stuck: the ack is late, and the guest keeps its device.
//! That the engine was kept waiting is not hoped for, but read from the kernel's own account of it.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::jobs::{place, whole};
use guest_driver_tests::soft_guest::turns::Turns;
use guest_driver_tests::soft_guest::*;
use job_stream::{Mode, SpinBehaviour, Stream};

/// The ids of the back-end's engine threads.
fn engines(backend: &Backend) -> Vec<u32> {
    let tasks =
        fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap().map(|task| task.unwrap().path());
    let is_engine = |task: &std::path::PathBuf| {
        fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("engine"))
    };
    let id = |task: std::path::PathBuf| task.file_name().unwrap().to_str().unwrap().parse().unwrap();
    tasks.filter(is_engine).map(id).collect()
}

fn only_on_processor_0(thread: u32) {
    // SAFETY: a set of bits; all zeros are one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is this function's own.
    unsafe { libc::CPU_SET(0, &mut set) };
    // SAFETY: the kernel reads as much as the size says.
    let done = unsafe { libc::sched_setaffinity(thread.cast_signed(), size_of_val(&set), &raw const set) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Threads that keep an engine from its processor.
const HOGS: usize = 6;
/// For how long they do. A host may starve an engine for two seconds before its guest loses the device.
const HOGGED: Duration = Duration::from_millis(1200);
/// INVALIDATEs until one is late.
const TRIES: u32 = 8;
/// Longer than a drain waits for an engine that could have left: 10 ms of drain timeout, and 50 ms for the step.
const STARVED: Duration = Duration::from_millis(80);
/// A host is borne with for two seconds.
const BOUND: Duration = Duration::from_millis(2500);

/// An ack, with what the kernel says of the engine's turns meanwhile.
#[derive(Debug)]
struct Ack {
    latency: Duration,
    engine: Turns,
}

impl Ack {
    /// The ack was late because the engine could have run, and another did.
    fn shows_starvation(&self) -> bool {
        self.latency > STARVED && self.engine.waited > STARVED && self.engine.ran < self.engine.waited
    }
}

/// Takes a page from under a job that has pinned it, and leaves its engine as soon as that gets its processor.
fn invalidate_under_a_job(backend: &Backend, client: &mut JobGuest, engine: u32) -> Ack {
    client.buffers[2].write(0, &[0; 4]).unwrap();
    let spin = Stream::new().signal(place(3, 0), 0x51).spin(SpinBehaviour::Preemptible, 9_000_000_000);
    let ticket = client.submit(spin.fill(whole(1), 1)).unwrap();
    client.wait_for_word(3, 0, 0x51).unwrap();
    let iova = client.buffers[0].segments(0, PAGE)[0].at;
    schedule(engine, libc::SCHED_IDLE);
    let (before, latency) = beside_hogs(|| {
        let before = Turns::of(backend.pid(), engine).unwrap();
        (before, client.guest.front_end.invalidate(iova, PAGE).unwrap().latency)
    });
    let turns = Turns::of(backend.pid(), engine).unwrap().since(before);
    schedule(engine, libc::SCHED_OTHER);
    client.guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
    assert_eq!(client.guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
    client.make_context(1).unwrap();
    Ack { latency, engine: turns }
}

/// Has the kernel schedule a thread by this policy.
fn schedule(thread: u32, policy: i32) {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the parameters, which outlive the call.
    let done = unsafe { libc::sched_setscheduler(thread.cast_signed(), policy, &raw const parameters) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// Does something while threads have nothing to do on processor 0 but to keep an idle-class thread from it.
fn beside_hogs<T>(act: impl FnOnce() -> T) -> T {
    let (stop, running, begin) = (AtomicBool::new(false), AtomicUsize::new(0), Instant::now());
    let hog = || {
        only_on_processor_0(0);
        // ORDERING: numbers by themselves.
        running.fetch_add(1, Ordering::Relaxed);
        while !stop.load(Ordering::Relaxed) && begin.elapsed() < HOGGED {
            std::hint::spin_loop();
        }
    };
    /// Ends the threads, also when what is done beside them panics.
    struct Stop<'s>(&'s AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        (0..HOGS).for_each(|_| drop(scope.spawn(hog)));
        while running.load(Ordering::Relaxed) < HOGS {
            std::thread::yield_now();
        }
        act()
    })
}

#[test]
fn an_engine_that_gets_no_processor_is_waited_for_and_nothing_is_revoked() {
    let backend = Backend::start(&["--engines", "1", "--drain-timeout", "10ms"]).unwrap();
    let mut client = JobGuest::boot(&backend, Mode::Fence, 61).unwrap();
    let [engine] = engines(&backend)[..] else { panic!("one engine was asked for") };
    only_on_processor_0(engine);
    let mut acks: Vec<Ack> = Vec::new();
    while acks.len() < TRIES as usize && !acks.last().is_some_and(Ack::shows_starvation) {
        acks.push(invalidate_under_a_job(&backend, &mut client, engine));
    }
    println!("{acks:?}");
    assert_eq!(backend.stats().unwrap().get("revocations").unwrap(), 0);
    assert!(acks.iter().all(|ack| ack.latency < BOUND), "{acks:?}");
    let is_shown = acks.last().is_some_and(Ack::shows_starvation);
    assert!(is_shown, "Not shown, for the engine got its processor each time: {acks:?}");
}
