//! What the session wants done, as values, in the order in which it has to be done. `T` names the message that a reply
//! belongs to.

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
    /// Send the ack of an INVALIDATE; when it is sent, call [`super::Session::replied`]. Only a drained invalidation
    /// yields the value that this carries.
    Ack {
        /// Where the ack goes; `None`: the front-end does not wait for one.
        to: Option<T>,
        /// That the invalidation went its whole way.
        ended: Ended,
    },
    /// Send a reply that waits for nothing.
    Reply {
        /// Where it goes.
        to: T,
        /// Whether the request was carried out.
        ok: bool,
    },
    /// Handle the unread message at the head of the main socket, then call [`super::Session::handed_over`].
    HandOver,
    /// End the session.
    End(End),
    /// [`super::Session::close`] has come to its end: nothing of the device uses guest memory any more.
    Closed,
    /// Replace all guest memory by zero pages, then call [`super::Session::revoked`]. If that fails, end the process.
    Revoke,
    /// An engine is stuck in memory that is about to go away, and revoking it did not help: end the process.
    Abort,
    /// The reply to a message waits for its drain: count it.
    Parked,
    /// Engines were told to leave: note their processor time, to tell one that is stuck from one that is not scheduled.
    EnginesToldToLeave,
    /// Bring a ring into this state. The queue thread serves one that is both.
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
    /// Have the queue thread look at a ring.
    ServeRing {
        /// Which ring.
        queue: usize,
    },
    /// Tell the device which features the driver has chosen.
    SetFeatures(u64),
    /// Have the queue thread forget everything that the driver built.
    ResetDevice {
        /// The features that the device has afterwards.
        features: u64,
    },
    /// The device runs from now on.
    Started,
    /// The device stands still from now on. Requests for translations that are held anywhere are void.
    Stopped,
    /// The mirror has a new translation; the waiters are told after this.
    Mapped {
        /// What was asked for.
        request: MissRequest,
        /// The range that was mapped.
        range: ByteRange<Iova>,
        /// Where it leads.
        host: HostRange,
        /// What the MISS has proved.
        permissions: Permissions,
    },
    /// Tell a waiter how a page was answered.
    MissAnswered {
        /// Who waits.
        waiter: Waiter,
        /// For what.
        request: MissRequest,
        /// How it was answered.
        answer: MissAnswer,
    },
    /// Everything that the mirror held is being invalidated for a reason of the device's own.
    MirrorEmptied,
    /// Record what happened.
    Record {
        /// When.
        at: Duration,
        /// What.
        event: Event,
    },
    /// Record a fault of a job.
    Fault(Fault),
    /// Record and report what the guest did wrong.
    Violation(Violation),
    /// The device has hung, or nearly: keep a trace of it.
    Incident(&'static str),
    /// An audit has come this far.
    AuditProgress(AuditReport),
    /// An audit has ended.
    AuditEnded(AuditReport),
}

/// Why the session ends by its own decision.
#[derive(Debug)]
pub enum End {
    /// A request was refused, and the front-end did not ask to be told.
    Refused(Refusal),
    /// An engine did not reach the end of its step: memory was revoked.
    Revoked,
}
