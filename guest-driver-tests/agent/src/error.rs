//! What can go wrong inside the guest.

use std::io;
use std::path::PathBuf;

/// An error of the agent; the rig prints it as it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    #[error("Cannot {what}: {source}")]
    System { what: String, source: io::Error },
    #[error("No display device under /dev/dri after {seconds} s: did the driver's probe fail?")]
    NoCard { seconds: u64 },
    #[error("No connected connector with a mode")]
    NoConnector,
    #[error("No page-flip event within {seconds} s: a fence of the device is lost, or the device is stuck")]
    NoFlipEvent { seconds: u64 },
    #[error("No device is bound to the driver at {}", .0.display())]
    NotBound(PathBuf),
    #[error("Not a command: {line:?}: {source}")]
    BadCommand { line: String, source: serde_json::Error },
    #[error("The rig has closed the port")]
    PortClosed,
}

/// Names what was being done when a system call failed.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl Into<String>) -> Result<T, AgentError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl Into<String>) -> Result<T, AgentError> {
        self.map_err(|source| AgentError::System { what: what.into(), source })
    }
}
