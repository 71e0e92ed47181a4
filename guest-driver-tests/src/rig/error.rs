//! What can go wrong in the rig. Each message is a sentence for a person: what happened, to what, and what to do.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// The exit code if the rig itself failed, or was called wrongly: `git bisect run` ends at it and blames no revision.
pub const RIG_FAILED: u8 = 128;

/// An error of the rig.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say what the variants and their fields are")]
pub enum RigError {
    #[error("Cannot {what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("{program} failed ({status}):\n{output}")]
    Command { program: String, status: String, output: String },
    #[error("{0}")]
    Missing(String),
    #[error(
        "QEMU {found} at {} is too old: QEMU {oldest} or newer is needed. Behind an IOMMU `vhost-user-gpu-pci` needs 10, \
         and the test device 11. Give another with --qemu, or leave --qemu out to have one fetched",
        path.display()
    )]
    QemuTooOld { path: PathBuf, found: String, oldest: u32 },
    #[error(
        "QEMU at {} has no `vhost-user-gpu-pci` device. Some systems pack it apart \
         (`qemu-device-display-vhost-user-gpu` or the like): install that, or give another QEMU with --qemu",
        .0.display()
    )]
    QemuWithoutDevice(PathBuf),
    #[error("{} is not a Linux kernel image for x86 (bzImage)", .0.display())]
    NotAKernel(PathBuf),
    #[error(
        "The modules of the kernel {release} are not under {}: say with --modules where they are",
        modules.display()
    )]
    NoModules { release: String, modules: PathBuf },
    #[error(
        "The kernel {release} has no module `{module}` under {}. It has to be a stock kernel with DRM \
         (Debian's cloud kernels have none)",
        modules.display()
    )]
    NoModule { module: String, release: String, modules: PathBuf },
    #[error("The module in {} cannot be built for {release}:\n{words}", folder.display())]
    Build { folder: PathBuf, release: String, words: String },
    #[error("The module {} cannot be read: {why}", path.display())]
    BadModule { path: PathBuf, why: String },
    #[error("The agent at {} is not static, and would not start as /init: RUSTFLAGS was overridden", .0.display())]
    AgentNotStatic(PathBuf),
    #[error("The topology file {} says in line {line}: {text:?}, which is not understood", path.display())]
    Topology { path: PathBuf, line: usize, text: String },
    #[error("There is no topology {name:?}. The topologies are: {known}")]
    NoSuchTopology { name: String, known: String },
    #[error(
        "The disk with {} is full ({left} bytes are left), so that logs end early and nothing can be judged: make room, or \
         set TMPDIR to a folder on another disk",
        folder.display()
    )]
    DiskFull { folder: PathBuf, left: u64 },
    #[error("{what} did not come within {} s", limit.as_secs())]
    Late { what: String, limit: Duration },
    #[error("{name} ended by itself ({status})")]
    Ended { name: &'static str, status: String },
    #[error("{peer} has closed its connection")]
    Closed { peer: &'static str },
    #[error("{peer} said {line:?}, which is not understood: {source}")]
    NotUnderstood { peer: &'static str, line: String, source: serde_json::Error },
    #[error("{peer} refused {request}: {reason}")]
    Refused { peer: &'static str, request: String, reason: String },
    #[error("The guest failed: {0}")]
    Guest(String),
    #[error("The guest's kernel panicked: {0}")]
    Panic(String),
    #[error("The guest said {0}, which was not its turn")]
    Unexpected(String),
    #[error("{0}")]
    Check(String),
    #[error("{0}")]
    Corrupted(String),
    #[error("{cause}{evidence}")]
    Explained { cause: Box<RigError>, evidence: String },
    #[error("{0}")]
    Skip(String),
    #[error("{0} checks failed")]
    Failed(usize),
}

impl RigError {
    /// A check that failed.
    pub fn check(text: impl Into<String>) -> Self {
        Self::Check(text.into())
    }

    /// This error, with its evidence.
    pub(crate) fn with_evidence(self, evidence: String) -> Self {
        Self::Explained { cause: Box::new(self), evidence }
    }

    /// This error, without its evidence.
    pub(crate) fn cause(&self) -> &Self {
        match self {
            Self::Explained { cause, .. } => cause.cause(),
            error => error,
        }
    }
}

/// Names the operation during which an I/O error occurred.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl Into<String>) -> Result<T, RigError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl Into<String>) -> Result<T, RigError> {
        self.map_err(|source| RigError::Io { what: what.into(), source })
    }
}
