//! What a thread must not be able to do is tried from inside: in a process of its own, which is this test program again,
//! on a thread of each kind.

use std::ffi::c_long;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Command, Output};
use std::{env, fs, io};

use super::calls::CALLS;
use super::*;
use crate::threads::pool::spawn_confined;

/// Tells [`inside`] what to try: a kind of thread, an attempt, and a folder.
const TRY: &str = "MIRRORGPU_SANDBOX_TEST";

/// An attempt, and the name of the system call that must not succeed.
struct Attempt {
    name: &'static str,
    call: &'static str,
    make: fn(folder: &RecordDir) -> c_long,
}

macro_rules! attempt {
    ($name:literal, $call:ident $(, $argument:expr)*) => {
        Attempt {
            name: $name,
            call: stringify!($call),
            // SAFETY: the call is refused before it does anything.
            make: |_| unsafe { libc::syscall(libc::$call $(, $argument)*) },
        }
    };
}

/// The folder of traces, to read in it.
fn open_in_folder(folder: &RecordDir) -> c_long {
    // SAFETY: the call is refused before it does anything.
    unsafe { libc::syscall(libc::SYS_openat, folder.as_raw_fd(), c"kept".as_ptr(), READ_ONLY) }
}

const NOTHING: usize = 0;
const READ_ONLY: i32 = libc::O_RDONLY | libc::O_CLOEXEC;

#[rustfmt::skip]
const ATTEMPTS: &[Attempt] = &[
    attempt!("a program", SYS_execve, c"/bin/true".as_ptr(), NOTHING, NOTHING),
    attempt!("a program of a descriptor", SYS_execveat, 0, c"".as_ptr(), NOTHING, NOTHING, libc::AT_EMPTY_PATH),
    attempt!("a process", SYS_clone, libc::SIGCHLD, NOTHING, NOTHING, NOTHING, NOTHING),
    attempt!("a process in the new way", SYS_clone3, NOTHING, NOTHING),
    attempt!("namespaces", SYS_unshare, libc::CLONE_NEWUSER),
    attempt!("a socket", SYS_socket, libc::AF_UNIX, libc::SOCK_STREAM, 0),
    attempt!("a connection", SYS_connect, 0, NOTHING, 0),
    attempt!("a socket's address", SYS_bind, 0, NOTHING, 0),
    attempt!("a file", SYS_openat, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), READ_ONLY),
    attempt!("a file in the old way", SYS_open, c"/etc/passwd".as_ptr(), READ_ONLY),
    attempt!("a file in the new way", SYS_openat2, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), NOTHING, NOTHING),
    Attempt { name: "what is in the folder of traces", call: "SYS_openat", make: open_in_folder },
    attempt!("a file by its handle", SYS_open_by_handle_at, 0, NOTHING, 0),
    attempt!("a file that is not the socket", SYS_unlinkat, libc::AT_FDCWD, c"a".as_ptr(), 0),
    attempt!("a name of a file", SYS_renameat2, libc::AT_FDCWD, c"a".as_ptr(), libc::AT_FDCWD, c"b".as_ptr(), 0),
    attempt!("memory with code", SYS_mmap, NOTHING, 4096, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, NOTHING),
    attempt!("code in memory", SYS_mprotect, NOTHING, 4096, libc::PROT_READ | libc::PROT_EXEC),
    attempt!("code in memory with a key", SYS_pkey_mprotect, NOTHING, 4096, libc::PROT_EXEC, -1),
    attempt!("a file in memory", SYS_memfd_create, c"a".as_ptr(), 0),
    attempt!("another process' memory", SYS_process_vm_readv, 1, NOTHING, 0, NOTHING, 0, 0),
    attempt!("another process' registers", SYS_ptrace, libc::PTRACE_ATTACH, 1, 0, 0),
    attempt!("a signal to a process", SYS_kill, 1, 0),
    attempt!("a signal to another process", SYS_tgkill, 1, 1, 0),
    attempt!("attributes of the process", SYS_prctl, libc::PR_SET_DUMPABLE, 1, 0, 0, 0),
    attempt!("another user", SYS_setuid, 1),
    attempt!("another filter", SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, NOTHING),
    attempt!("a mount", SYS_mount, NOTHING, NOTHING, NOTHING, 0, NOTHING),
    attempt!("a kernel program", SYS_bpf, 0, NOTHING, 0),
    attempt!("a ring of system calls", SYS_io_uring_setup, 1, NOTHING),
    attempt!("input of a terminal", SYS_ioctl, 0, libc::TIOCSTI, c"a".as_ptr()),
    attempt!("the owner of a descriptor", SYS_fcntl, 0, libc::F_SETOWN, 1),
];

/// Runs [`inside`] in a process of its own.
fn try_inside(level: &str, thread: &str, attempt: &str, folder: &Path) -> Output {
    let what = [level, thread, attempt, folder.to_str().unwrap()].join("|");
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "sandbox::tests::inside", "--ignored", "--nocapture"]).env(TRY, what);
    command.output().unwrap()
}

#[test]
#[ignore = "The other tests run it, each in a process of its own"]
fn inside() {
    let Ok(what) = env::var(TRY) else { return };
    let [level, thread, attempt, folder] = what.split('|').collect::<Vec<_>>().try_into().unwrap();
    let record = RecordDir::open(Path::new(folder)).unwrap();
    let needs = Needs { record: Some(&record), ..Needs::default() };
    if let Err(error) = prepare(Some(Level::from_str(level, false).unwrap()), &needs) {
        return println!("skipped: {}", chain(&error));
    }
    let thread = ThreadKind::ALL.into_iter().find(|kind| kind.name() == thread).unwrap();
    let (attempt, folder) = (attempt.to_owned(), folder.to_owned());
    let body = move || {
        let result = match ATTEMPTS.iter().find(|row| row.name == attempt) {
            Some(row) if (row.make)(&record) == 0 => Ok(()),
            Some(_) => Err(io::Error::last_os_error()),
            None => try_files(&attempt, Path::new(&folder)),
        };
        eprintln!("outcome: {:?}", result.map_err(|error| error.raw_os_error()));
        // SAFETY: ends the process at once. Not every kind of thread may end alone.
        unsafe { libc::_exit(0) };
    };
    spawn_confined(thread, thread.name(), body).unwrap().join().unwrap();
}

fn try_files(attempt: &str, folder: &Path) -> io::Result<()> {
    match attempt {
        "read" => fs::read("/etc/passwd").map(drop),
        "read a trace" => fs::read(folder.join("kept")).map(drop),
        "write a trace" => fs::write(folder.join("trace"), "{}"),
        "write beside the traces" => fs::write(folder.with_file_name("beside"), "{}"),
        "remove" => fs::remove_file(folder.join("kept")),
        "list" => fs::read_dir(folder).map(drop),
        other => panic!("There is no attempt {other}"),
    }
}

#[test]
fn a_thread_of_any_kind_can_make_only_its_calls() {
    let folder = tempfile::tempdir().unwrap();
    for thread in ThreadKind::ALL {
        for Attempt { name, call, .. } in ATTEMPTS {
            let output = try_inside("strict", thread.name(), name, folder.path());
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let call = call.strip_prefix("SYS_").unwrap();
            let line = format!("the sandbox does not permit system call {call} (");
            assert!(said.contains(&line), "{thread:?}, {name}: {said}");
            assert!(said.contains(&format!("on thread {}", thread.name())), "{thread:?}, {name}: {said}");
            // A file that cannot be opened is an error as any other; all else ends the process.
            let fails = said.contains(&format!("outcome: Err(Some({}))", libc::EACCES));
            assert_eq!(fails, ["open", "openat"].contains(&call), "{thread:?}, {name}: {said}");
            assert_eq!(fails, output.status.success(), "{thread:?}, {name}: {said}");
        }
    }
}

#[test]
fn without_lists_only_traces_can_still_be_written() {
    let above = tempfile::tempdir().unwrap();
    let folder = above.path().join("traces");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("kept"), "{}").unwrap();
    let attempts = ["read", "read a trace", "write beside the traces", "remove", "list", "write a trace"];
    for attempt in attempts {
        let output = try_inside("basic", "reporter", attempt, &folder);
        if String::from_utf8_lossy(&output.stdout).contains("skipped: ") {
            return println!("{}", String::from_utf8_lossy(&output.stdout));
        }
        let expected = if attempt == "write a trace" { Ok(()) } else { Err(Some(libc::EACCES)) };
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(&format!("outcome: {expected:?}")), "{attempt}: {said}");
    }
    assert!(folder.join("trace").exists() && folder.join("kept").exists());
}

#[test]
fn the_table_has_each_call_once_with_its_reason_and_no_thread_has_many() {
    for (index, call) in CALLS.iter().enumerate() {
        assert!(!call.why.is_empty() && !call.threads.is_empty(), "{call:?}");
        assert!(CALLS[index + 1..].iter().all(|other| other.number != call.number), "{call:?}");
    }
    for thread in ThreadKind::ALL {
        let count = CALLS.iter().filter(|call| call.threads.contains(&thread)).count();
        println!("{thread:?}: {count}");
        assert!(count <= 35, "{thread:?} has {count} system calls");
    }
    assert!(CALLS.len() <= 39, "{} system calls in all", CALLS.len());
}
