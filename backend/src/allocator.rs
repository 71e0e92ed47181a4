//! The C library's allocator: what a session has freed goes back to the system. Knows nothing of what was allocated.

/// Returns free memory to the system. The allocator keeps it otherwise, in an arena for each of a session's threads, and
/// sessions may use hundreds of MiB. Takes milliseconds after such a session; call it when nothing waits for this thread.
#[cfg(target_env = "gnu")]
pub fn trim() {
    // SAFETY: it may be called at any time, and from any thread (malloc_trim(3)).
    unsafe { libc::malloc_trim(0) };
}

/// Has the allocator ask the system now what glibc otherwise asks at any time, with system calls that are not in the
/// sandbox: how many processors there are, and what kind of overcommit (it opens a file of /proc when it first gives memory
/// of an arena back). Call it on a thread of its own, which has an arena.
#[cfg(target_env = "gnu")]
pub fn settle() {
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        // The limit that glibc would find itself.
        let arenas = libc::c_int::try_from(8 * processors).unwrap_or(libc::c_int::MAX);
        // SAFETY: mallopt takes two numbers, and may be called at any time (mallopt(3)).
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
    }
    // Below the size at which the allocator maps a block by itself, and together above the one at which it trims.
    let blocks: Vec<Vec<u8>> = (0..8).map(|_| Vec::with_capacity(64 << 10)).collect();
    drop(std::hint::black_box(blocks));
}

/// Other C libraries read nothing.
#[cfg(not(target_env = "gnu"))]
pub fn settle() {}

/// Other C libraries return it by themselves.
#[cfg(not(target_env = "gnu"))]
pub fn trim() {}
