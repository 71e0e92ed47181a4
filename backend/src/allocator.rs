//! The C library's allocator: what a session has freed goes back to the system. Knows nothing of what was allocated.

/// Returns free memory to the system. The allocator keeps it otherwise, in an arena for each of a session's threads, and
/// sessions may use hundreds of MiB. Takes milliseconds after such a session; call it when nothing waits for this thread.
#[cfg(target_env = "gnu")]
pub fn trim() {
    // SAFETY: it may be called at any time, and from any thread (malloc_trim(3)).
    unsafe { libc::malloc_trim(0) };
}

/// Other C libraries return it by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn trim() {}
