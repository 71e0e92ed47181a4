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
const READY_LIMIT: Duration = Duration::from_secs(5);
const REPLY_LIMIT: Duration = Duration::from_secs(5);
/// It promises to end within 1 s of SIGTERM; the rest is for a busy machine.
const END_LIMIT: Duration = Duration::from_secs(5);

/// A running back-end.
pub struct Backend {
    process: OwnedProcess,
    control: JsonLines,
    socket: PathBuf,
}

impl Backend {
    /// Starts `program` with its sockets and its log in `folder`, and waits until it accepts connections.
    pub fn start(program: &Path, folder: &Path) -> Result<Self, RigError> {
        let (socket, control) = (folder.join("gpu.sock"), folder.join("control.sock"));
        let log = folder.join("backend.log");
        let file = File::create(&log).doing(format!("create {}", log.display()))?;
        let mut command = Command::new(program);
        command.arg("--socket-path").arg(&socket).arg("--control-socket").arg(&control);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        let mut process = OwnedProcess::spawn(NAME, &mut command)?;
        wait_until("The back-end's word that it listens", READY_LIMIT, || {
            process.check_alive()?;
            Ok(fs::read_to_string(&log).unwrap_or_default().contains("listening on"))
        })?;
        let mut control = JsonLines::connect(CONTROL, &control, READY_LIMIT, || process.check_alive())?;
        let _greeting: Value = control.receive("The back-end's greeting", REPLY_LIMIT, || Ok(()))?;
        Ok(Self { process, control, socket })
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
        self.control.send(&json!({ "execute": "stats" }))?;
        let mut reply = loop {
            let line: Value =
                self.control.receive("The back-end's counts", REPLY_LIMIT, || self.process.check_alive())?;
            // What happened meanwhile is told between answers.
            if line.get("event").is_none() {
                break line;
            }
        };
        let counts = reply.get_mut("return").map(Value::take).unwrap_or_default();
        serde_json::from_value(counts).map_err(|source| RigError::NotUnderstood {
            peer: CONTROL,
            line: reply.to_string(),
            source,
        })
    }

    /// Asks it to end, and fails if it does not end well.
    pub fn end(mut self) -> Result<(), RigError> {
        self.process.terminate()?;
        let status = self.process.wait(END_LIMIT)?;
        if status.success() {
            Ok(())
        } else {
            Err(RigError::Ended { name: NAME, status: status.to_string() })
        }
    }
}
