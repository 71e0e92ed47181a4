//! Why a scenario failed: because of what it tests, because of the rig, or because it cannot run here.

use crate::rig::error::RigError;
use crate::soft_guest;
use crate::suite::results::Outcome;

/// Result of everything that a scenario does.
pub type Result<T> = std::result::Result<T, Failure>;

/// Why a scenario ended early.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Its promise does not hold.
    #[error("{0}")]
    Check(String),
    /// Memory has contents that it must not have: the worst failure, and never caused by a busy machine.
    #[error("{0}")]
    Corrupted(String),
    /// There is no result: the rig itself failed.
    #[error("The rig failed: {0}")]
    Rig(String),
    /// This place cannot run it.
    #[error("{0}")]
    Skip(String),
}

impl Failure {
    /// A promise that does not hold.
    pub fn check(text: impl Into<String>) -> Self {
        Self::Check(text.into())
    }
}

impl From<Result<()>> for Outcome {
    fn from(result: Result<()>) -> Self {
        result.map_or_else(Self::from, |()| Self::Passed)
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Check(text) | Failure::Corrupted(text) => Self::Failed(text),
            Failure::Skip(text) => Self::Skipped(text),
            Failure::Rig(text) => Self::Broken(text),
        }
    }
}

impl From<soft_guest::Error> for Failure {
    fn from(error: soft_guest::Error) -> Self {
        use soft_guest::Error;
        let text = with_sources(&error);
        match error {
            // A back-end that has hung up is not the rig's failure: for instance, revoked memory ends the session.
            Error::Io { source, .. } if is_hang_up(source.kind()) => Self::Check(text),
            // A system call of the test itself, or a program that does not exist.
            Error::Io { .. } | Error::Backend { .. } | Error::OutOfFrames { .. } => Self::Rig(text),
            _ => Self::Check(text),
        }
    }
}

impl From<RigError> for Failure {
    fn from(error: RigError) -> Self {
        let text = error.to_string();
        match error.cause() {
            RigError::Check(_)
            | RigError::Guest(_)
            | RigError::Panic(_)
            | RigError::Late { .. }
            | RigError::Ended { .. }
            | RigError::Closed { .. }
            | RigError::Refused { .. }
            | RigError::Unexpected(_) => Self::Check(text),
            RigError::Corrupted(_) => Self::Corrupted(text),
            RigError::Skip(_) => Self::Skip(text),
            _ => Self::Rig(text),
        }
    }
}

fn is_hang_up(kind: std::io::ErrorKind) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    text
}

/// Fails with a text unless something holds.
macro_rules! ensure {
    ($holds:expr, $($text:tt)+) => {
        if !$holds {
            return Err($crate::suite::failure::Failure::check(format!($($text)+)));
        }
    };
}

pub(crate) use ensure;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn a_failed_system_call_is_the_rigs_failure_and_a_lost_fence_is_not() {
        let broken = soft_guest::Error::io("make a socket")(io::Error::other("none left"));
        assert_eq!(Failure::from(broken), Failure::Rig("Could not make a socket: none left".into()));
        let hung_up =
            soft_guest::Error::io("exchange IOTLB INVALIDATE")(io::ErrorKind::ConnectionReset.into());
        assert!(matches!(Failure::from(hung_up), Failure::Check(_)));
        let lost = soft_guest::Error::NotInFlight { index: 1, head: 2 };
        assert!(matches!(Failure::from(lost), Failure::Check(_)));
        assert!(matches!(Failure::from(RigError::Guest("x".into())), Failure::Check(_)));
        assert!(matches!(Failure::from(RigError::Missing("x".into())), Failure::Rig(_)));
        let full = RigError::Io { what: "write it".into(), source: io::ErrorKind::StorageFull.into() };
        let full = full.with_evidence("\n--- The console is empty".into());
        assert_eq!(
            Failure::from(full),
            Failure::Rig("Cannot write it: no storage space\n--- The console is empty".into())
        );
    }
}
