//! The back-end is killed, and comes back. Knows what stock QEMU makes of it.

use super::platform::{JOBS, release_screen};
use super::{begin, in_flight, standing};
use crate::rig::error::RigError;
use crate::rig::run::Run;
use crate::rig::scenario::same;
use crate::rig::variation::Variation;
use guest_agent::stock_words::{StockCommand, Until};
use serde_json::{Value, json};

/// The guest has no device afterwards.
pub(crate) const ALONE: Variation = Variation { alone: true, ..Variation::NONE };
/// Time for a front-end that reconnects, and for fences that must not come.
const PATIENCE_MS: u64 = 2_000;

/// The back-end is killed with jobs in flight, and restarted. Stock QEMU (10 and 11) does not connect a second time:
/// the guest has lost its device, and nothing else. Its programs wait and can be ended; QEMU runs and answers.
pub(crate) fn backend_killed(run: &mut Run<'_>) -> Result<(), RigError> {
    release_screen(run)?;
    begin(run, JOBS, Until::Told)?;
    run.kill_backend()?;
    in_flight(standing(run, StockCommand::Look { wait_ms: PATIENCE_MS / 2 })?, JOBS)?;
    run.restart_backend()?;
    in_flight(standing(run, StockCommand::Look { wait_ms: PATIENCE_MS })?, JOBS)?;
    let connections = run.stats()?.unwrap_or_default().connections;
    same("connections to a back-end that was started again", "the back-end", connections, 0)?;
    standing(run, StockCommand::Forget)?;
    let status = run.qemu().qmp().execute("query-status", json!({}))?;
    match status.get("status").and_then(Value::as_str) {
        Some("running") => Ok(()),
        _ => Err(RigError::check(format!("QEMU does not run after its back-end was killed: {status}"))),
    }
}
