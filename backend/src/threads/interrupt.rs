//! Ends a system call in which a thread blocks: it returns with EINTR. Knows nothing of why it blocks.

use std::io;
use std::mem::MaybeUninit;
use std::os::unix::thread::JoinHandleExt;
use std::ptr;
use std::sync::Once;
use std::thread::JoinHandle;

/// Nothing else uses it here, and its default action is to do nothing.
const SIGNAL: libc::c_int = libc::SIGURG;

/// Installs the signal's handler, once per process. Without a handler, system calls would be restarted.
pub(super) fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = set_handler());
    result
}

fn set_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: no flags (not SA_RESTART either), an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    // SAFETY: `action` is initialised, and the old action is not requested.
    let result = unsafe { libc::sigaction(SIGNAL, &raw const action, ptr::null_mut()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

extern "C" fn handler(_signal: libc::c_int) {}

/// Interrupts the thread's current system call. Does nothing to a thread that has ended.
pub(super) fn interrupt<T>(thread: &JoinHandle<T>) {
    // SAFETY: a thread that was not joined has a valid identifier.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGNAL) };
}
