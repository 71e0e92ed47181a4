//! Another process with a context of its own: it says when it is ready, and is killed, or ends by itself. Knows fork and
//! what has to be known of a child; knows nothing of what it does.

use super::client::{Client, count_pages, map_export};
use crate::error::{AgentError, Doing};
use guest_agent::stock_words::{Standing, Until};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// For a child to come so far.
const LIMIT_MS: libc::c_int = 30_000;

/// A child of ours; it is killed when this is dropped.
pub(super) struct Child {
    id: libc::pid_t,
    words: File,
}

/// What a child has to say to us.
pub(super) struct Parent(File);

impl Parent {
    /// Says a number.
    pub(super) fn say(&mut self, number: u64) -> Result<(), AgentError> {
        self.0.write_all(&number.to_le_bytes()).doing("write to the parent")
    }
}

impl Child {
    /// Starts a child that does this and ends. The agent has no other thread by now, so all of its memory is sound
    /// there.
    pub(super) fn start(work: impl FnOnce(Parent) -> Result<(), AgentError>) -> Result<Self, AgentError> {
        let (ours, theirs) = pipe().doing("make a pipe")?;
        // SAFETY: takes no pointer.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()).doing("fork"),
            0 => {
                drop(ours);
                let status = match work(Parent(theirs)) {
                    Ok(()) => 0,
                    Err(error) => {
                        eprintln!("A child of the agent failed: {error}");
                        1
                    }
                };
                // SAFETY: takes no pointer. What the parent owns is not ours to drop.
                unsafe { libc::_exit(status) }
            }
            id => Ok(Self { id, words: ours }),
        }
    }

    /// The next number that it says.
    pub(super) fn hear(&mut self) -> Result<u64, AgentError> {
        let mut poll = libc::pollfd { fd: self.words.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd is passed, and it outlives the call.
        let ready = unsafe { libc::poll(&mut poll, 1, LIMIT_MS) };
        if ready < 1 {
            return Err(AgentError::Late {
                what: "the word of a child".into(),
                seconds: LIMIT_MS as u64 / 1000,
            });
        }
        let mut bytes = [0; 8];
        self.words.read_exact(&mut bytes).doing("read from a child")?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A descriptor of its own that it says it has.
    pub(super) fn take_descriptor(&self, number: u64) -> Result<OwnedFd, AgentError> {
        // SAFETY: takes no pointer.
        let process = unsafe { libc::syscall(libc::SYS_pidfd_open, self.id, 0) };
        let process = owned(process).doing("open a child")?;
        // SAFETY: takes no pointer.
        let file = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) };
        owned(file).doing("take a descriptor of a child")
    }

    /// Kills it.
    pub(super) fn kill(&self) -> Result<(), AgentError> {
        // SAFETY: takes no pointer; it has not been waited for, so the id is still its own.
        let result = unsafe { libc::kill(self.id, libc::SIGKILL) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()).doing("kill a child") }
    }

    /// Whether it ends within so long: then it is gone, and all that it had open is closed.
    pub(super) fn ends(&mut self, limit: Duration) -> Result<bool, AgentError> {
        let end = Instant::now() + limit;
        loop {
            // SAFETY: a null status is allowed.
            match unsafe { libc::waitpid(self.id, std::ptr::null_mut(), libc::WNOHANG) } {
                0 if Instant::now() > end => return Ok(false),
                0 => std::thread::sleep(Duration::from_millis(1)),
                -1 => return Err(io::Error::last_os_error()).doing("wait for a child"),
                _ => {
                    self.id = 0;
                    return Ok(true);
                }
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.id != 0 && self.kill().is_ok() {
            let _ = self.ends(Duration::from_secs(5));
        }
    }
}

/// A process begins jobs that wait, and is killed. Its memory is looked at through a dma-buf that was taken from it.
pub(super) fn kill(jobs: u32) -> Result<Standing, AgentError> {
    let mut child = Child::start(|mut parent| {
        let mut client = Client::open()?;
        for _ in 0..jobs {
            client.submit(Until::Told)?;
        }
        client.wait_begun(1)?;
        let exported = client.export()?;
        parent.say(exported.as_raw_fd() as u64)?;
        loop {
            // SAFETY: takes no pointer.
            unsafe { libc::pause() };
        }
    })?;
    let number = child.hear()?;
    let memory = map_export(child.take_descriptor(number)?)?;
    child.kill()?;
    let begin = Instant::now();
    let mut standing = Standing { submitted: jobs, ..Standing::default() };
    if !child.ends(super::client::LIMIT)? {
        return Err(AgentError::Late {
            what: "the end of a process that was killed".into(),
            seconds: super::client::LIMIT.as_secs(),
        });
    }
    standing.waited_ns = begin.elapsed().as_nanos() as u64;
    count_pages(&mut standing, &memory.bytes());
    Ok(standing)
}

fn pipe() -> io::Result<(File, File)> {
    let mut ends = [0; 2];
    // SAFETY: there is room for two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has opened both, for us alone.
    let [ours, theirs] = ends.map(|end| File::from(unsafe { OwnedFd::from_raw_fd(end) }));
    Ok((ours, theirs))
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has opened it, for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(result as libc::c_int) })
}
