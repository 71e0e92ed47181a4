//! What happens at a system call that the sandbox does not permit: its name is printed, and the process ends. Only opening
//! a file is refused with EACCES instead, because C libraries look into files on their own and can do without.
//!
//! The handler allocates nothing and takes no lock: it may interrupt anything.

use std::fmt::{self, Write};
use std::io;
use std::mem::MaybeUninit;
use std::panic;
use std::ptr;
use std::thread;

use super::ENTERED;
use super::names::name_of;

/// Calls that may fail without harm.
const OPENS: [libc::c_long; 2] = [libc::SYS_open, libc::SYS_openat];

/// Installs the handler of SIGSYS. SIGSEGV ends the process from now on: the standard library's handler, which names a
/// thread whose stack has overflowed, makes a call that is not in the sandbox.
pub(super) fn install() -> io::Result<()> {
    set_action(libc::SIGSEGV, libc::SIG_DFL)?;
    set_action(libc::SIGSYS, handler as *const () as libc::sighandler_t)
}

fn set_action(signal: libc::c_int, what: libc::sighandler_t) -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: the default action, no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = what;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is initialised, and the old action is not requested.
    let result = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Prints panics without a backtrace, for which the standard library opens the program and maps it.
pub(super) fn print_panics_without_files() {
    panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        eprintln!("thread '{}' {panic}", thread.name().unwrap_or("without a name"));
    }));
}

extern "C" fn handler(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the thread's registers, which it restores when this returns.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let result = &mut context.uc_mcontext.gregs[libc::REG_RAX as usize];
    let call = *result;
    let is_open = OPENS.contains(&call);
    let mut line = Line::default();
    let thread = ENTERED.get().map_or("?", |thread| thread.name());
    let outcome = if is_open { "it fails" } else { "the process ends" };
    // The line is long enough.
    let _ = writeln!(
        line,
        "mirrorgpu: the sandbox does not permit system call {} ({call}) on thread {thread}: {outcome}. \
         --sandbox basic does without the lists; please report it",
        name_of(call).unwrap_or("without a known name"),
    );
    line.print();
    if !is_open {
        std::process::abort();
    }
    *result = -i64::from(libc::EACCES);
}

/// A line of text in a fixed buffer.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 256], len: 0 }
    }
}

impl Line {
    fn print(&self) {
        let text = self.bytes.get(..self.len).unwrap_or_default();
        // There is no one to tell if standard error is gone.
        let _ = rustix::io::write(io::stderr(), text);
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.len.saturating_add(text.len());
        let room = self.bytes.get_mut(self.len..end).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}
