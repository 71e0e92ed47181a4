//! The process around the device: its command line, its sockets, its end.

use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::backend::{Ended, run};
use guest_driver_tests::soft_guest::turns::Turns;
use guest_driver_tests::soft_guest::*;

const SECOND: Duration = Duration::from_secs(1);

/// It must have ended with an error, in one line that has all these parts.
fn must_fail(ended: &Ended, parts: &[&str]) {
    let stderr = ended.stderr.trim_end();
    assert!(ended.status.code().is_some_and(|code| code != 0), "{:?}: {stderr}", ended.status);
    assert_eq!(stderr.lines().count(), 1, "not one line: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "{part} is not in: {stderr}");
    }
    assert_eq!(ended.stdout, "");
}

#[test]
fn a_command_line_that_makes_no_sense_is_refused_in_one_line() {
    let cases: &[(&[&str], &[&str])] = &[
        (&[], &["--socket-path", "--fd"]),
        (&["--socket-path", "/tmp/x.sock", "--fd", "3"], &["--socket-path", "--fd"]),
        (&["--no-such-flag"], &["--no-such-flag"]),
        (&["--socket-path", "/tmp/x.sock", "--drain-timeout", "soon"], &["--drain-timeout", "soon"]),
        (&["--socket-path", "/tmp/x.sock", "--engines", "0"], &["--engines", "0"]),
        (&["--socket-path", "/tmp/x.sock", "--inject", "gremlins"], &["--inject", "gremlins"]),
        (&["--socket-path", "/tmp/x.sock", "--iotlb-limit", "-1"], &["-1"]),
        (&["--fd", "99"], &["99"]),
        (&["--fd", "0"], &["0"]),
        (&["--socket-path", "/nonexistent/x.sock"], &["/nonexistent/x.sock"]),
    ];
    for (args, parts) in cases {
        must_fail(&run(args).unwrap(), parts);
    }
    let long = format!("/tmp/{}", "x".repeat(200));
    must_fail(&run(&["--socket-path", &long]).unwrap(), &[&long]);
}

#[test]
fn capabilities_are_those_of_a_gpu() {
    let ended = run(&["--print-capabilities"]).unwrap();
    assert!(ended.status.success(), "{}", ended.stderr);
    let capabilities: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(capabilities["type"], "gpu");
}

#[test]
fn a_socket_in_use_is_an_error_and_its_owner_goes_on() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let path = backend.socket_path().to_str().unwrap();
    must_fail(&run(&["--socket-path", path]).unwrap(), &[path, "in use"]);
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    guest.driver.ok(&Command::display_info()).unwrap();
    // Somebody else's socket, which nobody accepts on, is in use as well.
    let directory = tempfile::tempdir().unwrap();
    let other = directory.path().join("other.sock");
    let _listener = UnixListener::bind(&other).unwrap();
    must_fail(&run(&["--socket-path", other.to_str().unwrap()]).unwrap(), &["in use"]);
}

#[test]
fn the_socket_of_a_dead_process_is_replaced_but_a_file_is_not() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let directory = backend.kill().unwrap();
    assert!(directory.path().join("gpu.sock").exists(), "there is no stale socket to begin with");
    let backend = Backend::start_in::<&str>(directory, &[]).unwrap();
    drop(SoftGuest::boot(&backend, GuestConfig::headless()).unwrap());

    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("precious");
    std::fs::write(&file, "data").unwrap();
    must_fail(&run(&["--socket-path", file.to_str().unwrap()]).unwrap(), &["precious"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "data");
}

#[test]
fn an_inherited_connection_is_served() {
    let (backend, stream) = Backend::start_with_fd::<&str>(&[]).unwrap();
    let mut guest = SoftGuest::boot_on(stream, GuestConfig::headless()).unwrap();
    guest.driver.ok(&Command::display_info()).unwrap();
    drop(guest);
    let ended = backend.wait(10 * SECOND).unwrap();
    assert!(ended.status.success(), "{}", ended.stderr);
}

#[test]
fn once_means_that_the_first_connection_is_the_last() {
    let backend = Backend::start(&["--once"]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    guest.driver.ok(&Command::display_info()).unwrap();
    drop(guest);
    let ended = backend.wait(10 * SECOND).unwrap();
    assert!(ended.status.success(), "{}", ended.stderr);
}

#[test]
fn it_is_ready_at_once_and_says_so() {
    let mut waits: Vec<_> = (0..5)
        .map(|_| {
            let (start, before) = (Instant::now(), Turns::of_this_thread().unwrap());
            let backend = Backend::start::<&str>(&[]).unwrap();
            backend.connect().unwrap();
            let took = start.elapsed();
            // For how long a busy host has let neither of the two run is not the back-end's time.
            let ours = Turns::of_this_thread().unwrap().since(before).waited;
            let theirs = Turns::of(backend.pid(), backend.pid()).unwrap().waited;
            took.saturating_sub(ours + theirs)
        })
        .collect();
    waits.sort();
    println!("spawned and connected after {waits:?}");
    // 10 ms on an idle machine.
    assert!(waits[0] < Duration::from_millis(100), "{waits:?}");
}

#[test]
fn sigterm_and_sigint_end_it_within_a_second_idle_or_under_load() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        for load in [false, true] {
            let backend = Backend::start(&["--inject", "step-delay=20ms", "--stats-at-exit"]).unwrap();
            let socket = backend.socket_path().to_owned();
            let mut guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
            let surface = guest.surface(Format::B8G8R8X8, 512, 512).unwrap();
            let count = if load { 20 } else { 0 };
            for _ in 0..count {
                let _ = guest.driver.submit(&Command::transfer(surface.resource, surface.rect(), 0)).unwrap();
            }
            let start = Instant::now();
            backend.signal(signal).unwrap();
            let ended = backend.wait(10 * SECOND).unwrap();
            assert!(start.elapsed() <= SECOND, "signal {signal}, load {load}: {:?}", start.elapsed());
            assert_eq!((ended.status.code(), ended.status.signal()), (Some(0), None), "{}", ended.stderr);
            let stats: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
            assert_eq!(stats["connections"], 1);
            assert!(!socket.exists(), "the socket is left behind");
        }
    }
}

#[test]
fn an_end_in_mid_transfer_leaves_guest_memory_alone() {
    let backend = Backend::start(&["--inject", "step-delay=5ms"]).unwrap();
    let mut guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let surface = guest.surface(Format::B8G8R8X8, 512, 512).unwrap();
    let _ = guest.driver.submit(&Command::transfer(surface.resource, surface.rect(), 0)).unwrap();
    assert!(backend.terminate(10 * SECOND).unwrap().status.success());
    guest.dma.oracle().retire(surface.buffer.frames()).unwrap();
    assert!(guest.front_end.is_closed_within(SECOND).unwrap());
    assert_eq!(guest.dma.oracle().check().unwrap(), 256);
}

#[test]
fn the_control_socket_greets_counts_and_answers_nonsense_with_an_error() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut control = backend.control().unwrap();
    assert!(control.greeting()["MirrorGPU"]["version"].is_string());
    for nonsense in ["", "{", "[]", "{\"execute\":\"no-such-command\"}", "{\"execute\":7}", "\u{7f}"] {
        if !nonsense.is_empty() {
            assert!(control.line(nonsense).unwrap()["error"]["desc"].is_string(), "{nonsense}");
        }
    }
    assert_eq!(control.line("{\"execute\":\"stats\",\"id\":42}").unwrap()["id"], 42);
    assert_eq!(control.stats().unwrap().get("connections").unwrap(), 0);
    drop(SoftGuest::boot(&backend, GuestConfig::headless()).unwrap());
    assert_eq!(control.stats().unwrap().get("connections").unwrap(), 1);
    control.execute("quit").unwrap();
    assert!(backend.wait(10 * SECOND).unwrap().status.success());
}

#[test]
fn no_thread_of_the_process_can_gain_privileges() {
    let backend = Backend::start(&["--log-level", "error"]).unwrap();
    let guest = SoftGuest::boot(&backend, GuestConfig::headless()).unwrap();
    let tasks = std::fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
    let mut threads = 0;
    for task in tasks {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        threads += 1;
    }
    assert!(threads > 2, "{threads} threads");
    drop(guest);
}
