//! A thread of the back-end that stands still while the others run, like one that its host does not schedule: stopped
//! by ptrace, and released later. Knows threads by their names; knows nothing of what they do.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use super::backend::Backend;
use super::error::{Error, Result};
use super::wire;

/// How long a thread may take to be found asleep.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A thread that stands still until this is dropped, which has to happen on the thread that stopped it.
#[derive(Debug)]
#[must_use = "the thread goes on when this is dropped"]
pub struct FrozenThread(libc::pid_t);

impl FrozenThread {
    /// Stops a thread of the back-end in a pause that it makes itself (`ppoll`, for which an engine has no other use): there
    /// it is in the middle of no work.
    pub fn asleep(backend: &Backend, name: &str) -> Result<Self> {
        let thread = find(backend, name)?;
        let begin = Instant::now();
        while begin.elapsed() < TIMEOUT {
            let frozen = Self::stop(thread)?;
            if frozen.is_in_a_pause(backend)? {
                return Ok(frozen);
            }
            drop(frozen);
            wire::wait_readable(&[], Some(Duration::from_micros(100))).map_err(Error::io("wait"))?;
        }
        Err(Error::Timeout { what: format!("a pause of thread {name}"), after: TIMEOUT })
    }

    fn stop(thread: libc::pid_t) -> Result<Self> {
        request(libc::PTRACE_SEIZE, thread).map_err(Error::io("trace a thread"))?;
        let frozen = Self(thread);
        request(libc::PTRACE_INTERRUPT, thread).map_err(Error::io("stop a thread"))?;
        let mut status = 0;
        // SAFETY: the status is this function's own.
        let stopped = unsafe { libc::waitpid(thread, &mut status, libc::__WALL) };
        if stopped == thread {
            Ok(frozen)
        } else {
            Err(Error::io("wait for a thread")(io::Error::last_os_error()))
        }
    }

    /// The line of `/proc` begins with the current system call.
    fn is_in_a_pause(&self, backend: &Backend) -> Result<bool> {
        let file = format!("/proc/{}/task/{}/syscall", backend.pid(), self.0);
        let line = fs::read_to_string(&file).map_err(Error::io(format!("read {file}")))?;
        let call = line.split_whitespace().next().and_then(|call| call.parse().ok());
        Ok(call == Some(libc::SYS_ppoll))
    }
}

impl Drop for FrozenThread {
    fn drop(&mut self) {
        // Fails if its process is gone, and then there is nothing to release.
        let _ = request(libc::PTRACE_DETACH, self.0);
    }
}

fn find(backend: &Backend, name: &str) -> Result<libc::pid_t> {
    let directory = format!("/proc/{}/task", backend.pid());
    let threads = fs::read_dir(&directory).map_err(Error::io(format!("read {directory}")))?;
    let named = |entry: &fs::DirEntry| {
        fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    let thread = threads.flatten().find(named);
    let id = thread.and_then(|entry| entry.file_name().to_str()?.parse().ok());
    id.ok_or_else(|| Error::io(format!("find thread {name}"))(io::ErrorKind::NotFound.into()))
}

fn request(request: libc::c_uint, thread: libc::pid_t) -> io::Result<()> {
    let none = std::ptr::null_mut::<libc::c_void>();
    // SAFETY: these requests take no address and write nothing.
    let result = unsafe { libc::ptrace(request, thread, none, none) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
