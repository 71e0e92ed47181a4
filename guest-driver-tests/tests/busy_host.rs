//! A host that gives an engine no processor is not a device that is stuck: the ack is late, and the guest keeps its device.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::jobs::{place, whole};
use guest_driver_tests::soft_guest::*;
use job_stream::{Mode, SpinBehaviour, Stream};

/// The ids of the back-end's engine threads.
fn engines(backend: &Backend) -> Vec<libc::pid_t> {
    let tasks =
        fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap().map(|task| task.unwrap().path());
    let is_engine = |task: &std::path::PathBuf| {
        fs::read_to_string(task.join("comm")).is_ok_and(|name| name.starts_with("engine"))
    };
    let id = |task: std::path::PathBuf| task.file_name().unwrap().to_str().unwrap().parse().unwrap();
    tasks.filter(is_engine).map(id).collect()
}

fn only_on_processor_0(thread: libc::pid_t) {
    // SAFETY: a set of bits; all zeros are one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is this function's own.
    unsafe { libc::CPU_SET(0, &mut set) };
    // SAFETY: the kernel reads as much as the size says.
    let done = unsafe { libc::sched_setaffinity(thread, size_of_val(&set), &raw const set) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// The thread runs only when nobody else wants the processor.
fn only_when_idle(thread: libc::pid_t) {
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the parameters.
    let done = unsafe { libc::sched_setscheduler(thread, libc::SCHED_IDLE, &raw const parameters) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn an_engine_that_gets_no_processor_is_waited_for_and_nothing_is_revoked() {
    let backend = Backend::start(&["--engines", "1", "--drain-timeout", "10ms"]).unwrap();
    let mut client = JobGuest::boot(&backend, Mode::Fence, 61).unwrap();
    let spin = Stream::new().signal(place(3, 0), 0x51).spin(SpinBehaviour::Preemptible, 5_000_000_000);
    let ticket = client.submit(spin.fill(whole(1), 1)).unwrap();
    client.wait_for_word(3, 0, 0x51).unwrap();
    for engine in engines(&backend) {
        only_when_idle(engine);
        only_on_processor_0(engine);
    }
    let (stop, begin) = (AtomicBool::new(false), Instant::now());
    let hog = || {
        only_on_processor_0(0);
        // Longer than an engine has for its step, and shorter than a host is borne with.
        while begin.elapsed() < Duration::from_millis(1200) && !stop.load(Ordering::Relaxed) {
            std::hint::spin_loop();
        }
    };
    let longest = std::thread::scope(|scope| {
        (0..6).for_each(|_| drop(scope.spawn(hog)));
        let mut longest = Duration::ZERO;
        while longest < Duration::from_millis(150) && begin.elapsed() < Duration::from_millis(1200) {
            let iova = client.buffers[0].segments(0, PAGE)[0].at;
            longest = longest.max(client.guest.front_end.invalidate(iova, PAGE).unwrap().latency);
        }
        stop.store(true, Ordering::Relaxed);
        longest
    });
    println!("longest ack: {longest:?}");
    assert!(longest < Duration::from_millis(2500), "{longest:?}");
    assert_eq!(backend.stats().unwrap().get("revocations").unwrap(), 0);
    client.guest.driver.ok(&Command::ctx_destroy(1)).unwrap();
    assert_eq!(client.guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
}
