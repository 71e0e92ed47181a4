//! Processes that the rig starts: owned, watched, and always cleaned up. Knows nothing of what they do.

use crate::rig::error::{Doing, RigError};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

/// How often a condition is polled that cannot be waited for.
const LOOK: Duration = Duration::from_millis(10);

/// A child process; it is killed when this is dropped, and by the kernel should the rig itself be killed.
pub struct OwnedProcess {
    name: &'static str,
    child: Child,
}

impl OwnedProcess {
    /// Starts `command`. Call it from a thread that lives as long as the child may.
    pub fn spawn(name: &'static str, command: &mut Command) -> Result<Self, RigError> {
        // SAFETY: the closure runs between fork and exec and makes only the one system call, which takes no pointer.
        let command = unsafe { command.pre_exec(die_with_parent) };
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().doing(format!("start {program}"))?;
        Ok(Self { name, child })
    }

    /// Fails if the process has ended.
    pub fn check_alive(&mut self) -> Result<(), RigError> {
        match self.child.try_wait().doing(format!("look at {}", self.name))? {
            None => Ok(()),
            Some(status) => Err(RigError::Ended { name: self.name, status: status.to_string() }),
        }
    }

    /// Waits for its end; if it is late, it is killed.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, RigError> {
        let mut status = None;
        let child = &mut self.child;
        let waited = wait_until(&format!("The end of {}", self.name), limit, || {
            status = child.try_wait().doing("wait for a process")?;
            Ok(status.is_some())
        });
        if waited.is_err() {
            self.kill();
        }
        waited.map(|()| status.unwrap_or_default())
    }

    /// Asks it to end, as a service manager would.
    pub fn terminate(&self) -> Result<(), RigError> {
        self.signal(libc::SIGTERM)
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: libc::c_int) -> Result<(), RigError> {
        // SAFETY: takes no pointer; the child has not been waited for, so the id is still its own.
        let result = unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error()).doing(format!("send the signal {signal}"))
        }
    }

    fn kill(&mut self) {
        // Errors here mean that it has already ended, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for OwnedProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: takes no pointer.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until `done` returns true; `what` names the condition in the error.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut done: impl FnMut() -> Result<bool, RigError>,
) -> Result<(), RigError> {
    let end = Instant::now() + limit;
    while !done()? {
        if Instant::now() > end {
            return Err(RigError::Late { what: what.to_owned(), limit });
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Runs a program to its end and returns its output; a failure carries its last lines.
pub(crate) fn run(command: &mut Command) -> Result<String, RigError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().doing(format!("start {program}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let mut words = String::from_utf8_lossy(&output.stdout).into_owned();
    words.push_str(&String::from_utf8_lossy(&output.stderr));
    let skipped = words.lines().count().saturating_sub(20);
    let output_end: Vec<&str> = words.lines().skip(skipped).collect();
    Err(RigError::Command { program, status: output.status.to_string(), output: output_end.join("\n") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_ends_by_itself_is_noticed() {
        let mut process = OwnedProcess::spawn("false", &mut Command::new("false")).unwrap();
        let error = loop {
            if let Err(error) = process.check_alive() {
                break error;
            }
        };
        assert_eq!(error.to_string(), "false ended by itself (exit status: 1)");
    }

    #[test]
    fn a_failure_carries_the_last_words() {
        let error = run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"])).unwrap_err();
        assert_eq!(error.to_string(), "sh failed (exit status: 3):\nout\nerr");
    }
}
