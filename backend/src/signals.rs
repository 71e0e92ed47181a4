//! SIGTERM and SIGINT as a descriptor for an event loop. Knows nothing of what they stop.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use rustix::process::getpid;

/// The signals that request an orderly end.
const STOP: [libc::c_int; 2] = [libc::SIGTERM, libc::SIGINT];

/// The stop signals, blocked from their default action. The descriptor is readable while one is pending.
#[derive(Debug)]
pub struct StopSignals {
    file: File,
}

impl StopSignals {
    /// Blocks the signals in this thread and in those that it starts later. Call it before any other thread exists: a
    /// signal that is delivered to an unblocked thread kills the process.
    pub fn block() -> io::Result<Self> {
        let set = stop_set()?;
        // SAFETY: `set` was initialised by `stop_set` and outlives the call; a null old set is allowed.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: `set` was initialised by `stop_set` and outlives the call.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just returned this descriptor, and nothing else uses it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { file: fd.into() })
    }

    /// Takes one pending signal; `None` if there is none. Never blocks.
    pub fn take(&self) -> io::Result<Option<&'static str>> {
        let mut record = [0; size_of::<libc::signalfd_siginfo>()];
        match (&self.file).read(&mut record) {
            // The signal's number is the record's first field (signalfd(2)).
            Ok(_) => Ok(record.first_chunk().map(|number| name(u32::from_ne_bytes(*number)))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks this process to end: sends SIGTERM to its main thread, which takes it.
    pub fn request_stop() {
        let process = getpid().as_raw_nonzero().get();
        // SAFETY: tgkill takes three numbers. A signal to the own process cannot fail; the main thread has its number.
        let _ = unsafe { libc::syscall(libc::SYS_tgkill, process, process, libc::SIGTERM) };
    }
}

impl AsFd for StopSignals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl AsRawFd for StopSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

fn stop_set() -> io::Result<libc::sigset_t> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set at this address, which is valid for writes.
    if unsafe { libc::sigemptyset(set.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: sigemptyset has succeeded, so the set is initialised.
    let mut set = unsafe { set.assume_init() };
    for signal in STOP {
        // SAFETY: `set` is initialised and valid for writes.
        if unsafe { libc::sigaddset(&mut set, signal) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(set)
}

fn name(signal: u32) -> &'static str {
    if signal == libc::SIGINT as u32 { "SIGINT" } else { "SIGTERM" }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The signals are sent to this thread only: the test's other threads have not blocked them.
    #[test]
    fn a_blocked_signal_does_not_kill_and_can_be_taken_once() {
        let signals = StopSignals::block().unwrap();
        assert_eq!(signals.take().unwrap(), None);
        for (signal, name) in [(libc::SIGTERM, "SIGTERM"), (libc::SIGINT, "SIGINT")] {
            // SAFETY: raise does not access memory.
            assert_eq!(unsafe { libc::raise(signal) }, 0);
            assert_eq!(signals.take().unwrap(), Some(name));
            assert_eq!(signals.take().unwrap(), None);
        }
    }
}
