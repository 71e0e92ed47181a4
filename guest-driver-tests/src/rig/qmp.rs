//! QEMU's control socket (QMP): greeting, requests and replies; events are skipped. Knows the few requests that the
//! rig makes; knows nothing of the guest.

use crate::rig::error::RigError;
use crate::rig::json_lines::JsonLines;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

const PEER: &str = "QEMU's control socket";
/// QEMU answers within milliseconds, but an INVALIDATE that is not acked freezes it: then this timeout expires.
const REPLY_LIMIT: Duration = Duration::from_secs(20);

/// The connection, past its negotiation.
pub struct Qmp {
    lines: JsonLines,
}

impl Qmp {
    /// Connects and leaves negotiation mode.
    pub fn connect(path: &Path, alive: impl FnMut() -> Result<(), RigError>) -> Result<Self, RigError> {
        let mut lines = JsonLines::connect(PEER, path, REPLY_LIMIT, alive)?;
        let _greeting: Value = lines.receive("QEMU's greeting", REPLY_LIMIT, || Ok(()))?;
        let mut qmp = Self { lines };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Makes a request and waits for its reply.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, RigError> {
        self.lines.send(&json!({ "execute": command, "arguments": arguments }))?;
        let what = format!("QEMU's reply to `{command}`");
        loop {
            let mut reply: Value = self.lines.receive(&what, REPLY_LIMIT, || Ok(()))?;
            if let Some(result) = reply.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = reply.get("error") {
                let reason = error.get("desc").and_then(Value::as_str).unwrap_or("without a reason");
                let (request, reason) = (command.to_owned(), reason.to_owned());
                return Err(RigError::Refused { peer: PEER, request, reason });
            }
        }
    }

    /// Stops the virtual machine.
    pub fn stop(&mut self) -> Result<(), RigError> {
        self.execute("stop", json!({})).map(drop)
    }

    /// Resumes the virtual machine.
    pub fn cont(&mut self) -> Result<(), RigError> {
        self.execute("cont", json!({})).map(drop)
    }

    /// Writes the screen to `path`, in `format` (`ppm` or `png`).
    pub fn screendump(&mut self, path: &Path, format: &str) -> Result<(), RigError> {
        self.execute("screendump", json!({ "filename": path, "format": format })).map(drop)
    }

    /// Whether a reboot of the guest resets the machine; otherwise it ends QEMU.
    pub fn allow_reboot(&mut self, allowed: bool) -> Result<(), RigError> {
        let action = if allowed { "reset" } else { "shutdown" };
        self.execute("set-action", json!({ "reboot": action })).map(drop)
    }

    /// Ends QEMU.
    pub fn quit(&mut self) -> Result<(), RigError> {
        self.execute("quit", json!({})).map(drop)
    }
}
