//! The agent in the guest, as seen from the host: requests and their answers over the guest's second serial port.
//! Knows the agent's protocol; knows nothing of what the requests cause.

use crate::rig::error::RigError;
use crate::rig::json_lines::JsonLines;
use guest_agent::protocol::{Command, Drawn, Event};
use std::path::Path;
use std::time::Duration;

const PEER: &str = "The guest's serial port";
const CONNECT_LIMIT: Duration = Duration::from_secs(20);

/// The connection to the agent.
pub struct Guest {
    lines: JsonLines,
    limit: Duration,
}

impl Guest {
    /// Connects to the port; the agent itself may start much later. `limit` is for each wait from here on.
    pub fn connect(
        path: &Path,
        limit: Duration,
        alive: impl FnMut() -> Result<(), RigError>,
    ) -> Result<Self, RigError> {
        Ok(Self { lines: JsonLines::connect(PEER, path, CONNECT_LIMIT, alive)?, limit })
    }

    /// Sends a command without waiting for its result.
    pub fn send(&mut self, command: Command) -> Result<(), RigError> {
        self.lines.send(&command)
    }

    /// Waits for the agent's next event; a failure that it reports is an error.
    pub fn event(
        &mut self,
        what: &str,
        alive: impl FnMut() -> Result<(), RigError>,
    ) -> Result<Event, RigError> {
        match self.lines.receive(what, self.limit, alive)? {
            Event::Failed { what } => Err(RigError::Guest(what)),
            Event::Corrupted { what } => Err(RigError::Corrupted(what)),
            event => Ok(event),
        }
    }

    /// Waits for the end of the boot, and returns the kernel's release.
    pub fn ready(&mut self, alive: impl FnMut() -> Result<(), RigError>) -> Result<String, RigError> {
        match self.event("The guest's agent", alive)? {
            Event::Ready { kernel } => Ok(kernel),
            other => Err(unexpected(&other)),
        }
    }

    /// Waits for the result of drawing.
    pub fn drawn(&mut self, alive: impl FnMut() -> Result<(), RigError>) -> Result<Drawn, RigError> {
        match self.event("The guest's word that it has drawn", alive)? {
            Event::Drawn(drawn) => Ok(drawn),
            other => Err(unexpected(&other)),
        }
    }
}

/// The error for an unexpected event.
pub fn unexpected(event: &Event) -> RigError {
    RigError::Unexpected(format!("{event:?}"))
}
