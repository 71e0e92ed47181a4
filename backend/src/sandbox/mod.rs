//! The sandbox of the process (`--sandbox`): what it can still do when a hostile guest or front-end has taken it over.
//! [`calls`] is the table of the system calls that its threads make, [`seccomp`] makes a filter of it for each kind of
//! thread, [`violation`] names a call that is refused, and [`landlock`] takes the file system away. Knows nothing of the
//! device.
//!
//! Filters and landlock hold for one thread and for those that it starts. So each thread enters by itself, before it does
//! any work, and the main thread last: it starts the others.

#[cfg(target_arch = "x86_64")]
mod calls;
mod landlock;
#[cfg(target_arch = "x86_64")]
mod names;
#[cfg(target_arch = "x86_64")]
mod seccomp;
#[cfg(not(target_arch = "x86_64"))]
#[path = "no_seccomp.rs"]
mod seccomp;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
#[cfg(target_arch = "x86_64")]
mod violation;

use std::cell::Cell;
use std::error::Error;
use std::io;
use std::sync::OnceLock;

use clap::ValueEnum;

use self::landlock::Folders;
use self::seccomp::Filters;
use crate::error::chain;
use crate::limits;
use crate::listener::PathListener;
use crate::record_dir::RecordDir;
use crate::thread_kind::ThreadKind;

/// Why a part of the sandbox is not there.
type Failure = Box<dyn Error + Send + Sync>;

/// How much the process gives up when it has started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// All of it.
    Strict,
    /// All but the lists of system calls, for tracers, sanitizers and other C libraries.
    Basic,
    /// Nothing but privileges and surplus descriptors, which it gives up at any level.
    Off,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Self::Strict => "strict",
            Self::Basic => "basic",
            Self::Off => "off",
        }
    }
}

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel, or a container around the process, does not offer a part of it.
    #[error(
        "--sandbox {level} needs {part}, which this kernel or container does not offer; without the flag, the process goes without"
    )]
    Missing {
        /// The level that was asked for.
        level: &'static str,
        /// The part.
        part: &'static str,
        /// Why.
        source: Failure,
    },
    /// A thread cannot enter, although all parts are there.
    #[error("Thread {thread} cannot enter the sandbox ({part}): start with --sandbox off")]
    Enter {
        /// The thread.
        thread: &'static str,
        /// The part.
        part: &'static str,
        /// Why.
        source: Failure,
    },
    /// A limit or a handler cannot be set.
    #[error("The sandbox cannot be prepared")]
    Prepare(#[from] io::Error),
}

/// What the process needs of the file system when it has started.
#[derive(Debug, Default)]
pub struct Needs<'a> {
    /// The sockets that it removes at its end.
    pub sockets: Vec<&'a PathListener>,
    /// Where it writes traces.
    pub record: Option<&'a RecordDir>,
}

struct Sandbox {
    level: Level,
    folders: Option<Folders>,
    filters: Option<Filters>,
    /// Parts of the level that are not there, and why.
    missing: Vec<String>,
}

static SANDBOX: OnceLock<Sandbox> = OnceLock::new();

thread_local! {
    /// Which list holds for this thread. Has no destructor, so that a signal handler can read it.
    static ENTERED: Cell<Option<ThreadKind>> = const { Cell::new(None) };
}

/// Makes the sandbox that threads [`enter`], once per process. A level that was asked for is an error where a part of it
/// is missing; without one, the process gets what there is.
pub fn prepare(asked: Option<Level>, needs: &Needs<'_>) -> Result<(), SandboxError> {
    let level = asked.unwrap_or(Level::Strict);
    if level == Level::Off {
        return Ok(());
    }
    let mut missing = Vec::new();
    let folders = part("landlock", asked, Folders::new(needs), &mut missing)?;
    let filters = match level {
        Level::Strict => part("seccomp", asked, Filters::new(needs), &mut missing)?,
        Level::Basic | Level::Off => None,
    };
    if filters.is_some() {
        seccomp::name_violations()?;
        // `rustix` asks the kernel for it once, with a system call that is on no list.
        rustix::param::page_size();
    }
    let _ = SANDBOX.set(Sandbox { level, folders, filters, missing });
    Ok(())
}

/// This part; `None`, and a note in `missing`, if it cannot be made and no level was asked for.
fn part<T>(
    name: &'static str,
    asked: Option<Level>,
    made: Result<T, Failure>,
    missing: &mut Vec<String>,
) -> Result<Option<T>, SandboxError> {
    match (made, asked) {
        (Ok(made), _) => Ok(Some(made)),
        (Err(source), Some(level)) => Err(SandboxError::Missing { level: level.name(), part: name, source }),
        (Err(source), None) => {
            missing.push(format!("{name} ({})", chain(&*source)));
            Ok(None)
        }
    }
}

/// Confines this thread for good. Does nothing without a sandbox.
pub fn enter(thread: ThreadKind) -> Result<(), SandboxError> {
    let Some(sandbox) = SANDBOX.get() else { return Ok(()) };
    let failed = |part| move |source| SandboxError::Enter { thread: thread.name(), part, source };
    ENTERED.set(Some(thread));
    if let Some(folders) = &sandbox.folders {
        folders.restrict_this_thread().map_err(failed("landlock"))?;
    }
    if let Some(filters) = &sandbox.filters {
        filters.apply(thread).map_err(failed("seccomp"))?;
    }
    Ok(())
}

/// Confines the main thread, after all others were started, and says what is on.
pub fn enter_last(descriptors: u32) -> Result<(), SandboxError> {
    let always =
        format!("no_new_privs, at most {descriptors} descriptors, guest memory left out of core dumps");
    let Some(sandbox) = SANDBOX.get() else {
        log::info!("Sandbox off, which leaves: {always}");
        return Ok(());
    };
    limits::start_no_processes()?;
    if sandbox.filters.is_some() {
        seccomp::print_panics_without_files();
    }
    enter(ThreadKind::Session)?;
    let folders = sandbox.folders.as_ref().map(Folders::summary);
    let filters = sandbox.filters.as_ref().map(Filters::summary);
    let on = [folders, filters].into_iter().flatten().map(|part| format!(", {part}")).collect::<String>();
    let line = format!("Sandbox {}: {always}, no new processes{on}", sandbox.level.name());
    match sandbox.missing.as_slice() {
        [] => log::info!("{line}"),
        missing => log::warn!(
            "{line}. Not on, because this kernel or container does not offer it: {}",
            missing.join(", ")
        ),
    }
    Ok(())
}

/// Whether files can be opened only as the sandbox says.
pub fn is_on() -> bool {
    SANDBOX.get().is_some_and(|sandbox| sandbox.folders.is_some() || sandbox.filters.is_some())
}
