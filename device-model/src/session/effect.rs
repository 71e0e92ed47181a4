//! What the session's user has to do, as values, in the order in which it has to be done. `T` identifies the message
//! that a reply belongs to.

use std::time::Duration;

use super::miss_port::{MissAnswer, Waiter};
use super::refusal::Refusal;
use crate::addr::{ByteRange, Iova};
use crate::mmu::miss::MissRequest;
use crate::mmu::{Ended, HostRange, Permissions};
use crate::telemetry::audit::AuditReport;
use crate::telemetry::record::Event;
use crate::telemetry::violation::{Fault, Violation};

/// Something for the session's user to do. All but the first five stay within the device.
#[derive(Debug)]
pub enum Effect<T> {
    /// Send the ack of an INVALIDATE, then call [`super::Session::replied`]. Only a drained invalidation yields the
    /// value that this carries.
    Ack {
        /// Where the ack goes; `None`: the front-end does not wait for one.
        to: Option<T>,
        /// Proof that the invalidation was drained and ended.
        ended: Ended,
    },
    /// Send a reply that did not wait for a drain.
    Reply {
        /// The message to reply to.
        to: T,
        /// Whether the request was carried out.
        ok: bool,
    },
    /// Handle the unread message at the head of the main socket, then call [`super::Session::handed_over`].
    HandOver,
    /// End the session.
    End(End),
    /// [`super::Session::close`] has finished: nothing of the device uses guest memory any more.
    Closed,
    /// Replace all guest memory by zero pages, then call [`super::Session::revoked`]. If that fails, end the process.
    Revoke,
    /// An engine is stuck in memory that is about to be unmapped, and revoking it did not help: end the process.
    Abort,
    /// A message's reply waits for its drain: count it.
    Parked,
    /// Engines were told to leave: note their processor time, to tell a stuck engine from one that is not scheduled.
    EnginesToldToLeave,
    /// Bring a ring into this state. The queue thread serves a ring that is both started and enabled.
    SetRing {
        /// Which ring.
        queue: usize,
        /// Whether it is set up and started.
        started: bool,
        /// Whether it is enabled.
        enabled: bool,
    },
    /// Forget the kick eventfd of a ring.
    ForgetKick {
        /// Which ring.
        queue: usize,
    },
    /// Have the queue thread check a ring for work.
    ServeRing {
        /// Which ring.
        queue: usize,
    },
    /// Tell the device which features the driver has chosen.
    SetFeatures(u64),
    /// Have the queue thread forget everything that the driver set up.
    ResetDevice {
        /// The features that the device has afterwards.
        features: u64,
    },
    /// The device runs from now on.
    Started,
    /// The device is stopped from now on. Requests for translations that any thread still holds are void.
    Stopped,
    /// The mirror has a new translation; the waiters are notified after this.
    Mapped {
        /// What was requested.
        request: MissRequest,
        /// The range that was mapped.
        range: ByteRange<Iova>,
        /// Where it points.
        host: HostRange,
        /// The permissions that the MISS has proved.
        permissions: Permissions,
    },
    /// Tell a waiter how a page was answered.
    MissAnswered {
        /// Who waits.
        waiter: Waiter,
        /// The page it waits for.
        request: MissRequest,
        /// How it was answered.
        answer: MissAnswer,
    },
    /// The device invalidates everything in the mirror for a reason of its own.
    MirrorEmptied,
    /// Record what happened.
    Record {
        /// When.
        at: Duration,
        /// What.
        event: Event,
    },
    /// Record a job fault.
    Fault(Fault),
    /// Record and report a guest violation.
    Violation(Violation),
    /// The device hung, or nearly did: keep a trace.
    Incident(&'static str),
    /// Progress of an audit.
    AuditProgress(AuditReport),
    /// An audit has ended.
    AuditEnded(AuditReport),
}

/// Why the session ends itself.
#[derive(Debug)]
pub enum End {
    /// A request was refused, and the front-end asked for no reply.
    Refused(Refusal),
    /// An engine did not reach the end of its step, so memory was revoked.
    Revoked,
}
