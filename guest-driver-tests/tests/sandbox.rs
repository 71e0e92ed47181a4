//! The sandbox of the running back-end: it is on for every thread, it is said, and what users need works in it. What it
//! refuses is tried from inside by the back-end's own tests.

use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command as Process, Output, Stdio};
use std::time::Duration;

use guest_driver_tests::soft_guest::backend::{program, run};
use guest_driver_tests::soft_guest::jobs::place;
use guest_driver_tests::soft_guest::*;
use job_stream::{Compare, Mode, Stream};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(10);

/// The status of each thread.
fn threads(backend: &Backend) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", backend.pid())).unwrap();
    tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap()).collect()
}

/// Asserts that each thread has these lines, before, during and after a session.
fn every_thread_has(args: &[&str], lines: &[&str]) {
    let backend = Backend::start(args).unwrap();
    let assert_lines = |when: &str| {
        let threads = threads(&backend);
        assert!(threads.len() > 5, "{when}: {} threads", threads.len());
        for (status, line) in threads.iter().flat_map(|status| lines.iter().map(move |line| (status, line))) {
            assert!(status.contains(line), "{when}: {line} is not in {status}");
        }
    };
    assert_lines("idle");
    let guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
    assert_lines("in a session");
    drop(guest);
    assert_lines("afterwards");
    assert!(backend.terminate(PATIENCE).unwrap().status.success());
}

#[test]
fn every_thread_has_a_filter_of_system_calls_unless_the_user_wants_none() {
    every_thread_has(&[], &["Seccomp:\t2", "NoNewPrivs:\t1"]);
    every_thread_has(&["--sandbox", "basic"], &["Seccomp:\t0", "NoNewPrivs:\t1"]);
    every_thread_has(&["--sandbox", "off"], &["Seccomp:\t0", "NoNewPrivs:\t1"]);
}

#[test]
fn a_session_starts_no_thread() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let before = backend.threads().unwrap();
    for _ in 0..3 {
        let guest = SoftGuest::boot(&backend, GuestConfig::default()).unwrap();
        assert_eq!(backend.threads().unwrap(), before);
        drop(guest);
    }
}

/// The line of the log about the sandbox.
fn said(stderr: &str) -> String {
    let mut lines = stderr.lines().filter(|line| line.contains("Sandbox "));
    let line = lines.next().unwrap_or_else(|| panic!("nothing is said in: {stderr}"));
    assert!(lines.next().is_none(), "more than one line in: {stderr}");
    line.to_owned()
}

#[test]
fn one_line_of_the_log_says_what_is_on() {
    let cases: [(&[&str], &[&str]); 3] = [
        (&[], &["Sandbox strict", "no_new_privs", "seccomp (", "system calls"]),
        (&["--sandbox", "basic"], &["Sandbox basic", "no_new_privs"]),
        (&["--sandbox", "off"], &["Sandbox off", "no_new_privs"]),
    ];
    for (args, parts) in cases {
        let line = said(&Backend::start(args).unwrap().stderr());
        for part in parts {
            assert!(line.contains(part), "{part} is not in: {line}");
        }
        assert_eq!(line.contains("seccomp"), args.is_empty(), "{line}");
    }
}

#[test]
fn traces_go_into_their_folder_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["--record-dir", folder.path().to_str().unwrap()];
    let backend = Backend::start(&args).unwrap();
    let mut control = backend.control().unwrap();
    let inside = folder.path().join("trace.json");
    control.execute_with("record", json!({ "path": inside })).unwrap();
    assert!(inside.is_file());
    let outside = backend.directory().join("trace.json");
    let refused = control.line(&json!({"execute": "record", "arguments": {"path": outside}}).to_string());
    let refused = refused.unwrap()["error"]["desc"].as_str().unwrap().to_owned();
    assert!(refused.contains("--record-dir") && refused.contains("sandbox"), "{refused}");
    assert!(!outside.exists());
}

#[test]
fn a_folder_for_traces_that_is_not_there_is_an_error_at_the_start() {
    let ended =
        run(&["--socket-path", "/tmp/mirrorgpu-never.sock", "--record-dir", "/nonexistent/traces"]).unwrap();
    assert!(!ended.status.success());
    assert!(ended.stderr.contains("/nonexistent/traces"), "{}", ended.stderr);
    assert!(!Path::new("/tmp/mirrorgpu-never.sock").exists());
}

/// Stops the process, and lets it continue when all of its threads stand still.
fn stop_and_continue(backend: &Backend) {
    backend.signal(libc::SIGSTOP).unwrap();
    while !threads(backend).iter().all(|status| status.contains("State:\tT")) {
        std::thread::yield_now();
    }
    backend.signal(libc::SIGCONT).unwrap();
}

/// The kernel continues a system call with a time limit by a call of its own (restart_syscall(2)).
#[test]
fn a_process_that_was_stopped_continues() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut guest = JobGuest::boot(&backend, Mode::Fence, 7).unwrap();
    // Its engine waits for a while between two looks at the value.
    let wait = Stream::new().wait(place(3, 0), Compare::Equal, 1, 300_000_000);
    let ticket = guest.submit(wait).unwrap();
    for _ in 0..20 {
        stop_and_continue(&backend);
    }
    guest.guest.driver.wait(ticket).unwrap();
    let ticket = guest.submit(Stream::new().nop(0)).unwrap();
    guest.guest.driver.wait(ticket).unwrap();
}

/// Runs the program where the kernel does not have these system calls, until it listens or has ended.
fn run_without(missing: &[libc::c_long], args: &[&str], user: Option<u32>) -> (Output, bool) {
    let folder = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(folder.path(), user, user).unwrap();
    let socket = folder.path().join("gpu.sock");
    let rules = missing.iter().map(|&call| (call, Vec::new())).collect();
    let (not_there, there) = (SeccompAction::Errno(libc::ENOSYS as u32), SeccompAction::Allow);
    let filter = SeccompFilter::new(rules, there, not_there, std::env::consts::ARCH.try_into().unwrap());
    let filter = BpfProgram::try_from(filter.unwrap()).unwrap();
    let mut command = Process::new(program().unwrap());
    command.arg("--socket-path").arg(&socket).args(args).arg("--once");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    if !missing.is_empty() {
        let prepare = move || seccompiler::apply_filter(&filter).map_err(std::io::Error::other);
        // SAFETY: between fork and exec only prctl and seccomp are called.
        unsafe { command.pre_exec(prepare) };
    }
    let mut child = command.spawn().unwrap();
    let guest = loop {
        match std::os::unix::net::UnixStream::connect(&socket) {
            // It may listen already when it finds that it cannot start.
            Ok(stream) => break SoftGuest::boot_on(stream, GuestConfig::default()).ok(),
            Err(_) if child.try_wait().unwrap().is_some() => break None,
            Err(_) => std::thread::yield_now(),
        }
    };
    let served = guest.is_some();
    drop(guest);
    (child.wait_with_output().unwrap(), served)
}

#[test]
fn what_the_kernel_lacks_is_said_and_an_error_only_if_it_was_asked_for() {
    for (call, part) in [(libc::SYS_landlock_create_ruleset, "landlock"), (libc::SYS_seccomp, "seccomp")] {
        // The filter with which the kernel's calls are taken away needs one of them itself, which then is not missing.
        let (output, served) = run_without(&[call], &[], None);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(served && output.status.success(), "{stderr}");
        let line = said(&stderr);
        assert!(line.contains(&format!("does not offer it: {part}")), "{line}");

        let (output, served) = run_without(&[call], &["--sandbox", "strict"], None);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!served && !output.status.success(), "{stderr}");
        assert!(stderr.contains("--sandbox strict needs") && stderr.contains(part), "{stderr}");
    }
}

/// The log has colours there, and the logger asks each time whether it does.
#[test]
fn a_terminal_gets_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gpu.sock");
    let (mut ours, mut theirs) = (-1, -1);
    let (name, settings, size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
    // SAFETY: the two numbers are this function's own; the other pointers may be null.
    let opened = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, name, settings, size) };
    assert_eq!(opened, 0);
    // SAFETY: openpty has just returned the descriptor, and nothing else owns it.
    let ours = unsafe { OwnedFd::from_raw_fd(ours) };
    // SAFETY: likewise.
    let theirs = unsafe { OwnedFd::from_raw_fd(theirs) };
    let mut command = Process::new(program().unwrap());
    command.arg("--socket-path").arg(&socket).arg("--once").stdin(Stdio::null());
    let mut child = command.stderr(theirs).stdout(Stdio::null()).spawn().unwrap();
    drop(command);
    let mut said = [0; 4096];
    let mut terminal = std::fs::File::from(ours);
    // The first line is about the sandbox.
    let count = terminal.read(&mut said).unwrap();
    let said = String::from_utf8_lossy(&said[..count]).into_owned();
    assert!(said.contains("Sandbox strict"), "{said}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_user_without_privileges_has_the_same_sandbox() {
    if !rustix::process::geteuid().is_root() {
        return println!("This process is such a user: the other tests show it");
    }
    let (output, served) = run_without(&[], &[], Some(65_534));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(served && output.status.success(), "{stderr}");
    assert!(said(&stderr).contains("Sandbox strict"), "{stderr}");
}
