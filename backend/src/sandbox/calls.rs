//! The system calls that the threads make in the sandbox: one row each, with the threads that make it, what its arguments
//! must be, and why. A call that is in no row of its thread ends the process, with its name.

use std::os::fd::RawFd;

use seccompiler::{
    SeccompCmpArgLen::Dword,
    SeccompCmpOp::{self, Eq, MaskedEq},
    SeccompCondition, SeccompRule,
};

use crate::record_dir;
use crate::thread_kind::ThreadKind::{
    self, Control, Display, DisplayClock, Engine, Queue, Reporter, Session,
};

/// What the arguments of a call must be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Arguments {
    /// Anything.
    Any,
    /// The argument with this index has no PROT_EXEC.
    NotExecutable(u8),
    /// The argument with this index is one of these.
    OneOf(u8, &'static [u32]),
    /// The first argument is this process.
    ThisProcess,
    /// The first argument is the folder of a socket.
    SocketFolder,
    /// The first argument is the folder of `--record-dir`, and the file is opened as [`record_dir::CREATE`] says.
    RecordFolder,
}
use Arguments::{Any, NotExecutable, OneOf, RecordFolder, SocketFolder, ThisProcess};

/// A row of the table.
#[derive(Debug)]
pub(super) struct SystemCall {
    pub(super) number: libc::c_long,
    pub(super) threads: &'static [ThreadKind],
    pub(super) arguments: Arguments,
    /// What the threads need it for.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "For readers of the table, and for a test that it is there")
    )]
    pub(super) why: &'static str,
}

const fn call(
    number: libc::c_long,
    threads: &'static [ThreadKind],
    arguments: Arguments,
    why: &'static str,
) -> SystemCall {
    SystemCall { number, threads, arguments, why }
}

const ALL: &[ThreadKind] = &ThreadKind::ALL;
/// The threads that have an event loop.
const LOOPS: &[ThreadKind] = &[Session, Queue, Control];

/// The threads of a device.
const DEVICE: &[ThreadKind] = &[Session, Queue, Engine, Display, DisplayClock];
/// Threads that end before the process does.
const ENDING: &[ThreadKind] = &[Control, Reporter];

/// The table.
#[rustfmt::skip]
pub(super) const CALLS: &[SystemCall] = &[
    // Descriptors that are open already, or come over a socket.
    call(libc::SYS_read, ALL, Any, "eventfds, signals, sockets"),
    call(libc::SYS_write, ALL, Any, "eventfds, sockets, the log, traces"),
    call(libc::SYS_preadv2, &[Session, Queue], Any, "the state of an engine; a ring's eventfd, without waiting"),
    call(libc::SYS_recvmsg, &[Session, Display], Any, "messages of the front-end"),
    call(libc::SYS_sendmsg, &[Session, Display], Any, "messages to the front-end"),
    call(libc::SYS_accept4, &[Session, Control], Any, "the next front-end, the next tool"),
    call(libc::SYS_shutdown, DEVICE, Any, "a display that was replaced"),
    call(libc::SYS_getsockname, &[Session], Any, "whether a descriptor of the front-end is a socket"),
    call(libc::SYS_setsockopt, &[Display], OneOf(2, TIMEOUTS), "no timeouts on the display's socket"),
    call(libc::SYS_close, ALL, Any, "whichever thread drops a descriptor last"),
    call(libc::SYS_fcntl, ALL, OneOf(1, FCNTLS), "duplicates; that an eventfd does not block; debug builds, at a close"),
    call(libc::SYS_ioctl, ALL, OneOf(1, IOCTLS), "what a socket holds; that it does not block; whether the log is a terminal"),
    call(libc::SYS_epoll_create1, &[Session], Any, "event loops of a session"),
    call(libc::SYS_epoll_ctl, LOOPS, Any, "event loops"),
    call(libc::SYS_epoll_wait, LOOPS, Any, "event loops"),
    call(libc::SYS_ppoll, DEVICE, Any, "whether a write would wait; sleep"),
    // Files.
    call(libc::SYS_statx, &[Session], Any, "how long a file of guest memory is; whose a socket's path is"),
    call(libc::SYS_fstatfs, &[Session], Any, "the page size of a file of guest memory"),
    call(libc::SYS_flock, &[Session], Any, "the socket's folder, at the end"),
    call(libc::SYS_unlinkat, &[Session], SocketFolder, "the socket, at the end"),
    call(libc::SYS_openat, &[Control, Reporter], RecordFolder, "traces"),
    // Memory.
    call(libc::SYS_mmap, ALL, NotExecutable(2), "guest memory, pages that it lacks (SIGBUS), the allocator"),
    call(libc::SYS_munmap, ALL, Any, "guest memory, the allocator"),
    call(libc::SYS_mprotect, ALL, NotExecutable(2), "the allocator"),
    call(libc::SYS_madvise, ALL, Any, "core dumps without guest memory, the allocator"),
    call(libc::SYS_mremap, ALL, Any, "the allocator"),
    call(libc::SYS_brk, ALL, Any, "the allocator"),
    // Threads and time.
    call(libc::SYS_futex, ALL, Any, "locks, channels"),
    call(libc::SYS_sched_yield, ALL, Any, "channels of the standard library"),
    call(libc::SYS_clock_gettime, ALL, Any, "processor time of engines; the time where the vDSO lacks it"),
    call(libc::SYS_restart_syscall, ALL, Any, "the kernel's, after SIGCONT"),
    // Signals, and the end.
    call(libc::SYS_tgkill, ALL, ThisProcess, "a thread that is interrupted, a stop, an abort"),
    call(libc::SYS_getpid, ALL, Any, "a signal to this process"),
    call(libc::SYS_gettid, ALL, Any, "an abort"),
    call(libc::SYS_rt_sigprocmask, ALL, Any, "an abort"),
    call(libc::SYS_rt_sigreturn, ALL, Any, "the end of a signal handler"),
    call(libc::SYS_sigaltstack, ENDING, Any, "the end of a thread"),
    call(libc::SYS_exit, ENDING, Any, "the end of a thread"),
    call(libc::SYS_exit_group, ALL, Any, "the end of the process"),
];

/// Besides reading and changing its flags, a descriptor may be duplicated.
const FCNTLS: &[u32] = &[
    libc::F_DUPFD_CLOEXEC.cast_unsigned(),
    libc::F_GETFD.cast_unsigned(),
    libc::F_GETFL.cast_unsigned(),
    libc::F_SETFL.cast_unsigned(),
];
const IOCTLS: &[u32] = &[
    libc::FIONBIO as u32,
    libc::FIONREAD as u32,
    libc::TIOCOUTQ as u32,
    libc::TCGETS as u32,
    libc::TCGETS2 as u32,
];
/// SO_RCVTIMEO and SO_SNDTIMEO, with which a read or write would fail in time.
const TIMEOUTS: &[u32] = &[libc::SO_RCVTIMEO.cast_unsigned(), libc::SO_SNDTIMEO.cast_unsigned()];

/// Values that some rows depend on, known when the sandbox is made.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) process: u32,
    pub(super) socket_folders: Vec<RawFd>,
    pub(super) record_folder: Option<RawFd>,
}

impl Arguments {
    /// The rules of which one has to hold; none: any arguments will do. `None`: no arguments will do.
    pub(super) fn rules(self, known: &Known) -> Result<Option<Vec<SeccompRule>>, seccompiler::BackendError> {
        let rules: Vec<_> = match self {
            Any => return Ok(Some(Vec::new())),
            NotExecutable(index) => vec![vec![dword(index, MaskedEq(libc::PROT_EXEC as u64), 0)]],
            OneOf(index, values) => values.iter().map(|&value| vec![dword(index, Eq, value)]).collect(),
            ThisProcess => vec![vec![dword(0, Eq, known.process)]],
            SocketFolder => {
                known.socket_folders.iter().map(|&folder| vec![dword(0, Eq, folder as u32)]).collect()
            }
            RecordFolder => {
                let flags = record_dir::CREATE.bits();
                known
                    .record_folder
                    .iter()
                    .map(|&folder| vec![dword(0, Eq, folder as u32), dword(2, Eq, flags)])
                    .collect()
            }
        };
        let rules = rules.into_iter().map(|conditions| {
            let conditions = conditions.into_iter().collect::<Result<Vec<_>, _>>()?;
            SeccompRule::new(conditions)
        });
        let rules = rules.collect::<Result<Vec<_>, _>>()?;
        Ok(Some(rules).filter(|rules| !rules.is_empty()))
    }
}

fn dword(
    index: u8,
    operator: SeccompCmpOp,
    value: u32,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(index, Dword, operator, value.into())
}
