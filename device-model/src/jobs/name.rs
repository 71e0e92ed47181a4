//! A job as records name it: a value that outlives the job.

use job_stream::{Mode, Priority};

use crate::jobs::job::JobId;

/// The most operands of a job that get a name.
pub(crate) const OPERANDS: usize = 64;

/// An operand of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperandName {
    /// The packet, counted from 0.
    pub packet: usize,
    /// Its name.
    pub opcode: &'static str,
    /// Whether it reads or writes.
    pub access: job_stream::Access,
    /// The resource.
    pub resource: u32,
    /// First and last byte of the resource.
    pub bytes: (u64, u64),
}

/// A job, and what it may touch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobName {
    /// Its number.
    pub id: JobId,
    /// Its context; a 2D transfer has none.
    pub context: Option<u32>,
    /// How invalidations treat it.
    pub mode: Mode,
    /// Its scheduling priority.
    pub priority: Priority,
    /// Its first operands.
    pub operands: Vec<OperandName>,
}
