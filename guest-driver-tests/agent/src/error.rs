//! What can go wrong inside the guest.

use guest_agent::jobs::{Case, Difference};
use guest_agent::protocol::Event;
use job_stream::{CapsetError, Mode};
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
    #[error("No render node whose driver takes jobs: does the device offer VIRTIO_GPU_F_VIRGL?")]
    NoRenderNode,
    #[error("The device's capability set is not understood: {0}")]
    Capset(CapsetError),
    #[error("The device does not offer the mode {mode}")]
    NoMode { mode: Mode },
    #[error("No fence of the case {case}, mode {mode}, within {seconds} s: it is lost, or the job is stuck")]
    NoFence { case: &'static str, mode: Mode, seconds: u64 },
    #[error(
        "After the case {case}, mode {mode}, byte {at:#x} of buffer {buffer} is {found:#04x}, not {wanted:#04x}: \
         a packet did not do what the manual says, or the job was killed",
        buffer = difference.buffer,
        at = difference.at,
        found = difference.found,
        wanted = difference.wanted
    )]
    WrongByte { case: &'static str, mode: Mode, difference: Difference },
    #[error("In mode {mode} {found:?} ns lie between two times, where a spin of {least} ns lay between them")]
    WrongTime { mode: Mode, found: Option<u64>, least: u64 },
    #[error("The job of the case {case}, mode {mode}, was answered with {response:#x}")]
    JobFailed { case: &'static str, mode: Mode, response: u32 },
    #[error("A job in mode {mode} has not begun within {seconds} s")]
    NoStart { mode: Mode, seconds: u64 },
    #[error(
        "Byte {at:#x} of memory was written in mode {mode} after it was unmapped: a translation was used after its end"
    )]
    LateTouch { mode: Mode, at: usize },
    #[error("The device has no virtio structures in its configuration space")]
    NotVirtio,
    #[error("The device agreed on the features {found:#x}, not on {wanted:#x}")]
    Features { wanted: u64, found: u64 },
    #[error("The device has not reset within {seconds} s")]
    NoReset { seconds: u64 },
    #[error("A command of {bytes} bytes finds no room among {slots} slots")]
    QueueFull { slots: usize, bytes: usize },
    #[error("The device has not answered within {seconds} s")]
    NoAnswer { seconds: u64 },
    #[error("The device answered the command {command:#x} with {response:#x}")]
    Refused { command: u32, response: u32 },
    #[error("Unmapped {found:#x} bytes at {iova:#x}, not {wanted:#x}")]
    UnmappedOther { iova: u64, wanted: u64, found: u64 },
    #[error("No disk at /dev/vda after {seconds} s: does the kernel have virtio-blk?")]
    NoDisk { seconds: u64 },
    #[error("The root file system has none of {tried}")]
    NoInit { tried: String },
    #[error("There is no area {area}")]
    NoArea { area: u32 },
    #[error("Byte {at:#x} lies past the end of its area")]
    PastTheEnd { at: usize },
    #[error("There is no ticket {ticket}")]
    NoTicket { ticket: u64 },
    #[error("The driver in the agent does not have the device: it has to be taken first")]
    NotTaken,
    #[error("Nothing has begun: `begin` has to come first")]
    NothingBegun,
    #[error("{jobs} jobs are too many for one context of a scenario: {limit} more find room")]
    TooMany { jobs: u32, limit: u32 },
    #[error("{what} did not come within {seconds} s")]
    Late { what: String, seconds: u64 },
    #[error("A thread of the agent has panicked")]
    Thread,
    #[error("The driver's tracepoint has told of {found} answers, where {wanted} were due")]
    Answers { found: usize, wanted: usize },
    #[error("The kernel was told to crash, and goes on")]
    Survived,
    #[error("The dump has no memory at {address:#x}")]
    NotInTheDump { address: u64 },
    #[error("Not a command: {line:?}: {source}")]
    BadCommand { line: String, source: serde_json::Error },
    #[error("The rig has closed the port")]
    PortClosed,
}

impl AgentError {
    pub(crate) fn wrong_byte(case: &Case, mode: Mode, difference: Difference) -> Self {
        Self::WrongByte { case: case.name, mode, difference }
    }

    /// As the rig is told of it.
    pub(crate) fn event(&self) -> Event {
        let what = self.to_string();
        match self {
            Self::WrongByte { .. } | Self::LateTouch { .. } => Event::Corrupted { what },
            _ => Event::Failed { what },
        }
    }
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
