//! Runs programs that were packed with the agent, each to its end or to a limit, and returns what they have said. Their
//! output goes to memory first: written to the serial port, as much as some print would take longer than they may.

use crate::error::{AgentError, Doing};
use crate::system;
use guest_agent::protocol::{Ended, Program};
use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const OUTPUT: &str = "/tmp/output";
const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";
/// Bytes of the output's beginning and of its end that are returned.
const SHOWN: usize = 24 << 10;
/// How often a program's end is looked for.
const LOOK: Duration = Duration::from_millis(5);
/// A killed program ends within this time, unless it hangs in the kernel.
const END_LIMIT: Duration = Duration::from_secs(5);

/// What programs need in the guest, made once.
#[derive(Default)]
pub(crate) struct Programs {
    ready: bool,
}

impl Programs {
    /// Runs one.
    pub(crate) fn run(&mut self, program: &Program) -> Result<Ended, AgentError> {
        if !self.ready {
            fs::create_dir_all("/tmp").doing("create /tmp")?;
            system::mount_memory().doing("mount /tmp")?;
            self.ready = true;
        }
        if program.huge_pages > 0 {
            fs::write(HUGE_PAGES, program.huge_pages.to_string()).doing(format!("write to {HUGE_PAGES}"))?;
        }
        let output = File::create(OUTPUT).doing(format!("create {OUTPUT}"))?;
        let errors = output.try_clone().doing("duplicate a descriptor")?;
        let begin = Instant::now();
        let mut command = Command::new(&program.path);
        command.args(&program.arguments).current_dir("/tmp").process_group(0);
        let child = command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn();
        let mut child = child.doing(format!("start {}", program.path))?;
        let mut status = wait(&mut child, Duration::from_secs(program.seconds))?;
        let in_time = status.is_some();
        if status.is_none() {
            kill_group(&child)?;
            status = wait(&mut child, END_LIMIT)?;
        }
        let milliseconds = u64::try_from(begin.elapsed().as_millis()).unwrap_or(u64::MAX);
        let said = fs::read(OUTPUT).doing(format!("read {OUTPUT}"))?;
        Ok(Ended {
            code: status.filter(|_| in_time).and_then(|status| status.code()),
            signal: status.filter(|_| in_time).and_then(|status| status.signal()),
            hangs: status.is_none(),
            milliseconds,
            output: shown(&said),
        })
    }
}

fn wait(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>, AgentError> {
    let end = Instant::now() + limit;
    loop {
        let status = child.try_wait().doing("wait for a program")?;
        if status.is_some() || Instant::now() > end {
            return Ok(status);
        }
        thread::sleep(LOOK);
    }
}

/// Kills a program with those that it has started.
fn kill_group(child: &Child) -> Result<(), AgentError> {
    let group = libc::pid_t::try_from(child.id()).unwrap_or(libc::pid_t::MAX);
    // SAFETY: takes no pointer; the child leads its group and has not been waited for, so the number is still its own.
    match unsafe { libc::kill(-group, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()).doing("kill a program"),
    }
}

/// The beginning and the end.
fn shown(said: &[u8]) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match (said.get(..SHOWN), said.len().checked_sub(SHOWN)) {
        (Some(beginning), Some(end)) if end > SHOWN => {
            let left_out = end - SHOWN;
            let end = said.get(end..).unwrap_or_default();
            format!("{}\n[{left_out} bytes are left out here]\n{}", text(beginning), text(end))
        }
        _ => text(said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_output_the_beginning_and_the_end_are_shown() {
        assert_eq!(shown(b"short"), "short");
        let mut said = vec![b'a'; SHOWN];
        said.extend(vec![b'b'; SHOWN]);
        assert_eq!(shown(&said).len(), 2 * SHOWN);
        said.splice(SHOWN..SHOWN, *b"middle");
        let text = shown(&said);
        assert!(text.contains("a\n[6 bytes are left out here]\nb") && !text.contains("middle"));
    }
}
