//! The back-end as a process: start, readiness, counts, end. Knows its command line and its control socket.

use crate::rig::error::{Doing, RigError};
use crate::rig::json_lines::JsonLines;
use crate::rig::process::{OwnedProcess, wait_until};
use crate::rig::stats::Stats;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

const NAME: &str = "The back-end";
const CONTROL: &str = "The back-end's control socket";
/// The class of the error for an unknown command.
const UNKNOWN_COMMAND: &str = "CommandNotFound";
/// Its exit code if it has found a violation by the front-end.
const FOUND_FAULT: i32 = 1;
const READY_LIMIT: Duration = Duration::from_secs(5);
/// A trace of everything that was recorded takes its time on a busy machine.
const REPLY_LIMIT: Duration = Duration::from_secs(20);
/// It promises to end within 1 s of SIGTERM; the rest is for a busy machine.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A running back-end.
pub struct Backend {
    process: OwnedProcess,
    control: JsonLines,
    /// Commands that were sent to it.
    asked: u64,
    socket: PathBuf,
    launch: Launch,
}

/// How it is started, and restarted.
#[derive(Clone)]
struct Launch {
    program: PathBuf,
    folder: PathBuf,
    inject: Vec<String>,
    arguments: &'static [&'static str],
    /// Whether it checks QEMU.
    judges: bool,
}

impl Backend {
    /// Starts `program` with its sockets and its log in `folder`, with the fault injection `inject` and these
    /// additional `arguments`, and waits until it accepts connections. It checks QEMU if requested.
    pub fn start(
        program: &Path,
        folder: &Path,
        inject: &[String],
        arguments: &'static [&'static str],
        judges: bool,
    ) -> Result<Self, RigError> {
        let (program, folder, inject) = (program.to_owned(), folder.to_owned(), inject.to_vec());
        Launch { program, folder, inject, arguments, judges }.start()
    }

    /// Kills it, as the kernel does when memory is short: it cannot clean up.
    pub fn kill(&mut self) -> Result<(), RigError> {
        self.process.signal(libc::SIGKILL)?;
        self.process.wait(END_LIMIT).map(drop)
    }

    /// Starts it again where it was.
    pub fn restart(&mut self) -> Result<(), RigError> {
        *self = self.launch.clone().start()?;
        Ok(())
    }

    /// Where QEMU connects.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Fails if it has ended.
    pub fn check_alive(&mut self) -> Result<(), RigError> {
        self.process.check_alive()
    }

    /// What it has counted so far.
    pub fn stats(&mut self) -> Result<Stats, RigError> {
        let counts = self.raw_stats()?;
        let line = counts.to_string();
        serde_json::from_value(counts).map_err(|source| RigError::NotUnderstood {
            peer: CONTROL,
            line,
            source,
        })
    }

    /// The same under its own names, including those that the rig does not know.
    pub fn raw_stats(&mut self) -> Result<Value, RigError> {
        Ok(self.control("stats", json!({}))?.unwrap_or_default())
    }

    /// Sends a command to its control socket; `None` if it does not know the command.
    pub fn control(&mut self, command: &str, arguments: Value) -> Result<Option<Value>, RigError> {
        self.asked += 1;
        let id = self.asked;
        self.control.send(&json!({ "execute": command, "arguments": arguments, "id": id }))?;
        let what = format!("The back-end's answer to `{command}`");
        loop {
            let mut reply: Value = self.control.receive(&what, REPLY_LIMIT, || self.process.check_alive())?;
            // A late answer to a request that was given up may still come.
            if reply.get("id").and_then(Value::as_u64) != Some(id) {
                continue;
            }
            if let Some(answer) = reply.get_mut("return") {
                return Ok(Some(answer.take()));
            }
            if let Some(error) = reply.get("error") {
                return refusal(command, error);
            }
        }
    }

    /// Asks it to end, and fails if it does not end cleanly, or has found a violation by QEMU.
    pub fn end(mut self) -> Result<(), RigError> {
        let judges = self.launch.judges;
        let findings = if judges { self.control("findings", json!({}))? } else { None };
        self.process.terminate()?;
        let status = self.process.wait(END_LIMIT)?;
        match status.code() {
            Some(0) => Ok(()),
            Some(FOUND_FAULT) if judges => {
                let reports = accusations(&findings.unwrap_or_default());
                Err(RigError::check(format!("The back-end has found fault with QEMU.\n{reports}")))
            }
            _ => Err(RigError::Ended { name: NAME, status: status.to_string() }),
        }
    }
}

/// The reports of findings that count against QEMU.
fn accusations(findings: &Value) -> String {
    let all = findings.get("findings").and_then(Value::as_array).into_iter().flatten();
    let accuses = |finding: &&Value| finding.get("severity").is_some_and(|severity| severity != "note");
    let reports: Vec<_> =
        all.filter(accuses).filter_map(|finding| finding.get("report").and_then(Value::as_str)).collect();
    if reports.is_empty() {
        "It was found at the very end: --keep keeps its log".to_owned()
    } else {
        reports.join("\n")
    }
}

impl Launch {
    fn start(self) -> Result<Backend, RigError> {
        let Self { program, folder, inject, arguments, judges } = &self;
        let (socket, control) = (folder.join("gpu.sock"), folder.join("control.sock"));
        let log = folder.join("backend.log");
        let file = File::options().create(true).append(true).open(&log);
        let file = file.doing(format!("open {}", log.display()))?;
        let earlier = file.metadata().doing(format!("look at {}", log.display()))?.len() as usize;
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(&socket).arg("--control-socket").arg(&control);
        // The one folder into which its sandbox lets it write traces.
        command.arg("--record-dir").arg(folder);
        // All modes are shown, including the one without coherence.
        command.arg("--allow-incoherent");
        for bug in inject {
            command.arg("--inject").arg(bug);
        }
        if *judges {
            command.arg("--check-front-end");
        }
        command.args(*arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let mut process = OwnedProcess::spawn(NAME, &mut command)?;
        wait_until("The back-end's word that it listens", READY_LIMIT, || {
            process.check_alive()?;
            let text = fs::read_to_string(&log).unwrap_or_default();
            Ok(text.get(earlier..).is_some_and(|new| new.contains("listening on")))
        })?;
        let mut control = JsonLines::connect(CONTROL, &control, READY_LIMIT, || process.check_alive())?;
        let _greeting: Value = control.receive("The back-end's greeting", REPLY_LIMIT, || Ok(()))?;
        Ok(Backend { process, control, asked: 0, socket, launch: self })
    }
}

/// A command that the back-end does not know is no error: it may be older than the rig.
fn refusal(command: &str, error: &Value) -> Result<Option<Value>, RigError> {
    let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or("without a reason").to_owned();
    if text("class") == UNKNOWN_COMMAND {
        return Ok(None);
    }
    Err(RigError::Refused { peer: CONTROL, request: command.to_owned(), reason: text("desc") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_no_accusation() {
        let finding = |severity: &str, report: &str| json!({ "severity": severity, "report": report });
        let found =
            json!({ "findings": [finding("note", "a"), finding("likely", "b"), finding("certain", "c")] });
        assert_eq!(accusations(&found), "b\nc");
        assert!(
            accusations(&json!({ "findings": [finding("note", "a")] }))
                .starts_with("It was found at the very end")
        );
    }

    #[test]
    fn only_a_command_that_is_not_known_is_no_error() {
        let unknown = json!({ "class": "CommandNotFound", "desc": "There is no command record" });
        assert!(refusal("record", &unknown).unwrap().is_none());
        let failed = json!({ "class": "GenericError", "desc": "Cannot write /none" });
        let error = refusal("record", &failed).unwrap_err().to_string();
        assert_eq!(error, "The back-end's control socket refused record: Cannot write /none");
    }
}
