//! What an INVALIDATE meant for a job, as values. Their texts in reports are in `telemetry::violation`; how a verdict is
//! reached is in [`schedule`](crate::jobs::schedule).

use std::time::Duration;

use serde::Serialize;

use crate::addr::{ByteRange, Iova};

/// What an INVALIDATE turned out to mean for a page that a job used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The same page is mapped again: the guest flushed more than it unmapped. Harmless.
    Benign,
    /// Another page is mapped: the guest unmapped memory of a job in flight, and mapped other memory in its place.
    Moved,
    /// Nothing is mapped: the guest unmapped memory of a job in flight.
    Gone,
}

/// How sure a verdict is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Confidence {
    /// No correct driver causes this.
    Certain,
    /// A correct driver causes this only by a coincidence that the record cannot exclude.
    Likely,
    /// The record does not show who is at fault.
    CannotTell,
}

/// The INVALIDATE that a violation is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InvalidationInfo {
    /// Its number, counted from 1 over a connection.
    pub number: u64,
    /// The range that the guest unmapped.
    pub range: ByteRange<Iova>,
    /// When the message was read.
    pub begun: Duration,
    /// When it was acked; `None`: not before the record was made.
    pub acked: Option<Duration>,
}
