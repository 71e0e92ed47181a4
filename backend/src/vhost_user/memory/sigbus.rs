//! If the front-end truncates a mapped file, an access raises SIGBUS. The handler puts a zero page over the hole, so
//! that the access completes, and counts it, so that the session can be ended. Everything here is safe in a signal
//! handler: atomics and mmap, no locks, no allocation.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

/// Maximum number of regions of all sessions together. A memory table has up to 32; two tables exist while one replaces
/// the other.
const SLOTS: usize = 128;

struct RegionEntry {
    base: AtomicUsize,
    /// 0: the entry is free or being filled.
    len: AtomicUsize,
    page: AtomicUsize,
}

static TABLE: [RegionEntry; SLOTS] = [const {
    RegionEntry { base: AtomicUsize::new(0), len: AtomicUsize::new(0), page: AtomicUsize::new(0) }
}; SLOTS];

/// Holes that were filled since the start of the process.
static HOLES: AtomicU64 = AtomicU64::new(0);

/// The eventfd that is signalled after a hole; -1 if there is none.
static LISTENER: AtomicI32 = AtomicI32::new(-1);

/// Has an eventfd signalled after each hole, until [`wake_nobody`].
pub fn wake_at_a_hole(eventfd: RawFd) {
    LISTENER.store(eventfd, Ordering::Release);
}

/// Stops signalling the eventfd. Has to be called before the eventfd is closed.
pub fn wake_nobody() {
    LISTENER.store(-1, Ordering::Release);
}

/// How often a page of a region turned out to have no memory behind it, since the start of the process.
pub fn holes() -> u64 {
    HOLES.load(Ordering::Acquire)
}

/// A mapping that is registered with the handler.
pub struct RegionSlot(usize);

const BEING_FILLED: usize = usize::MAX;

impl RegionSlot {
    /// Registers a mapping; `None` if there are too many.
    pub fn register(base: usize, len: usize, page: usize) -> Option<Self> {
        let index = TABLE.iter().position(|entry| {
            // Claims a free entry: a `base` of 0 marks a free one, and no mapping starts at 0.
            entry.base.compare_exchange(0, BEING_FILLED, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })?;
        let entry = TABLE.get(index)?;
        entry.page.store(page, Ordering::Relaxed);
        entry.base.store(base, Ordering::Relaxed);
        // ORDERING: Release: a handler that sees the length also sees the other fields.
        entry.len.store(len, Ordering::Release);
        Some(Self(index))
    }

    /// Unregisters the mapping. Has to be called before it is unmapped.
    pub fn forget(&self) {
        if let Some(entry) = TABLE.get(self.0) {
            entry.len.store(0, Ordering::Release);
            // ORDERING: Release: a thread that claims the entry sees a length of 0.
            entry.base.store(0, Ordering::Release);
        }
    }
}

/// Installs the handler, once per process.
pub fn install() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    ONCE.call_once(|| result = set_handler());
    result
}

fn set_handler() -> io::Result<()> {
    // SAFETY: an all-zero sigaction is valid: the default action, no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: `action` is initialised, and the old action is not requested.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

extern "C" fn handler(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for SIGBUS.
    let info = unsafe { &*info };
    // SAFETY: SIGBUS fills the address field.
    let address = unsafe { info.si_addr() } as usize;
    if !paper_over(address) {
        // A bug of MirrorGPU. The sandbox does not permit to set the default action and to repeat the access.
        let _ = rustix::io::write(io::stderr(), b"mirrorgpu: SIGBUS outside of guest memory\n");
        std::process::abort();
    }
}

/// Puts zero pages at `address` if it lies in guest memory.
fn paper_over(address: usize) -> bool {
    for entry in &TABLE {
        // ORDERING: Acquire pairs with the Release in `register`.
        let len = entry.len.load(Ordering::Acquire);
        let base = entry.base.load(Ordering::Relaxed);
        if len == 0 || address < base || address - base >= len {
            continue;
        }
        let page = entry.page.load(Ordering::Relaxed);
        let start = address & !(page - 1);
        // SAFETY: the page lies in a registered mapping, which is not unmapped while it is registered.
        let result = unsafe { super::region::zero_pages(start as *mut libc::c_void, page) };
        HOLES.fetch_add(1, Ordering::AcqRel);
        let listener = LISTENER.load(Ordering::Acquire);
        if listener >= 0 {
            // SAFETY: the eventfd is open: it is closed only after `wake_nobody`, and borrowed for one write.
            let listener = unsafe { BorrowedFd::borrow_raw(listener) };
            // A full counter means that a wake-up is already pending.
            let _ = rustix::io::write(listener, &1u64.to_ne_bytes());
        }
        return result.is_ok();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::super::region::{Region, RegionSpec};
    use super::*;

    #[test]
    fn a_file_truncated_under_us_reads_as_zeroes_and_is_counted() {
        install().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x3000).unwrap();
        let spec = RegionSpec { gpa: 0, size: 0x3000, user_address: 0, file_offset: 0 };
        let region = Region::map(spec, &file).unwrap();
        file.set_len(0x1000).unwrap();
        let before = holes();
        // SAFETY: inside a mapping of 0x3000 bytes; the handler maps a page that the file no longer has.
        let byte = unsafe { region.host_at(0x2008).read_volatile() };
        assert_eq!((byte, holes() - before), (0, 1));
    }
}
