//! The filters of system calls (seccomp(2)): one for each kind of thread, made of the table in [`super::calls`].

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use rustix::process::getpid;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};

use super::calls::{CALLS, Known};
pub(super) use super::violation::{install as name_violations, print_panics_without_files};
use super::{Failure, Needs};
use crate::thread_kind::ThreadKind;

/// A filter for each kind of thread.
pub(super) struct Filters {
    /// In the order of [`ThreadKind::ALL`].
    programs: Vec<(ThreadKind, BpfProgram)>,
    summary: String,
}

impl Filters {
    /// Fails if the kernel has no filters.
    pub(super) fn new(needs: &Needs<'_>) -> Result<Self, Failure> {
        is_available()?;
        let known = Known {
            process: getpid().as_raw_nonzero().get().cast_unsigned(),
            socket_folders: needs.sockets.iter().map(|socket| socket.directory().as_raw_fd()).collect(),
            record_folder: needs.record.map(|record| record.as_fd().as_raw_fd()),
        };
        let lists = ThreadKind::ALL.map(|thread| list_of(thread, &known));
        let mut programs = Vec::new();
        for (thread, list) in ThreadKind::ALL.into_iter().zip(lists) {
            programs.push((thread, compile(list?)?));
        }
        let summary = format!("seccomp ({} system calls in {} lists)", CALLS.len(), programs.len());
        Ok(Self { programs, summary })
    }

    /// Installs the filter of this kind in the calling thread.
    pub(super) fn apply(&self, kind: ThreadKind) -> Result<(), Failure> {
        let program = self.programs.iter().find(|(of, _)| *of == kind);
        let (_, program) = program.ok_or("there is no list for this kind of thread")?;
        Ok(seccompiler::apply_filter(program)?)
    }

    pub(super) fn summary(&self) -> String {
        self.summary.clone()
    }
}

/// The system calls of a kind of thread, each with rules of which one has to hold (none: it may be called with anything).
type List = BTreeMap<i64, Vec<SeccompRule>>;

fn list_of(thread: ThreadKind, known: &Known) -> Result<List, Failure> {
    let mut list = List::new();
    for call in CALLS.iter().filter(|call| call.threads.contains(&thread)) {
        if let Some(rules) = call.arguments.rules(known)? {
            list.insert(call.number, rules);
        }
    }
    Ok(list)
}

/// A call that is not on the list raises SIGSYS, which [`super::violation`] handles.
fn compile(list: List) -> Result<BpfProgram, Failure> {
    let machine = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(list, SeccompAction::Trap, SeccompAction::Allow, machine)?;
    Ok(BpfProgram::try_from(filter)?)
}

/// Whether the kernel can raise a signal at a refused call (Linux 4.14).
fn is_available() -> io::Result<()> {
    let action = libc::SECCOMP_RET_TRAP;
    // SAFETY: the kernel reads one number, which `action` is.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, ptr::from_ref(&action))
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
