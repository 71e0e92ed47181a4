//! The session with the front-end, without its I/O: messages and times go in, effects come out.
//!
//! Everything that a session decides is decided here: which ring runs ([`rings`]), what an UPDATE, a MISS and an
//! INVALIDATE do ([`iotlb`]), in which order messages are answered and what has to be drained before ([`reply`], with
//! the ladder of [`drain`]), and what an INVALIDATE meant ([`verdicts`]). The back-end carries the effects out with
//! sockets, descriptors and maps; the simulation carries them out on a model, so that what it proves is this code.
//!
//! # How to drive it
//!
//! 1. While [`Session::may_read`], hand over the next message of the main socket: [`Session::message`].
//! 2. Hand over answers from the back-end channel ([`Session::channel_answered`]) before the message that follows them.
//! 3. Pass on what other threads miss ([`Session::next_request`], [`Session::ask`]), and send what
//!    [`Session::next_miss`] gives.
//! 4. When woken, and at [`Session::next_deadline`]: [`Session::poll`], [`Session::expire`].
//! 5. After each call, carry out every [`Session::next_effect`], in order.
//!
//! Nothing here waits, and no time is read: `now` is the device's clock, which does not go back.

mod audits;
pub mod drain;
mod effect;
mod features;
mod iotlb;
mod jobs;
#[cfg(all(test, loom))]
mod loom_models;
mod message;
pub mod miss_port;
mod refusal;
mod reply;
mod rings;
#[cfg(all(test, not(loom)))]
mod tests;
mod verdicts;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use self::drain::Draining;
pub use self::effect::{Effect, End};
use self::features::Features;
pub use self::features::{ACCESS_PLATFORM, BACKEND_REQ, Offer, REPLY_ACK, VHOST_USER_PROTOCOL_FEATURES};
pub use self::iotlb::{Settled, Unasked};
pub use self::jobs::Jobs;
pub use self::message::{Message, Unread, Update};
use self::miss_port::{MissPort, Waiter};
pub use self::refusal::Refusal;
use self::reply::Pending;
use self::rings::Rings;
pub use self::rings::{CONTROL_QUEUE, QUEUES};
use self::verdicts::Invalidations;
use crate::addr::{ByteRange, DomainId, Iova};
use crate::mmu::miss::MissTable;
use crate::mmu::{HostRange, InFlight, MirrorWriter};
use crate::telemetry::audit::Audit;
use crate::telemetry::record::Event;
use crate::telemetry::stats::Stats;

/// The session's settings.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// How long a drain waits for jobs before they are preempted.
    pub drain_timeout: Duration,
    /// How long an answer to a MISS may take.
    pub miss_timeout: Duration,
    /// The features that the front-end may choose from.
    pub offer: Offer,
}

/// Guest memory as the device addresses it without an IOMMU.
#[derive(Clone, Copy, Debug)]
pub struct PhysicalRegion {
    /// Guest-physical addresses, which the driver uses as they are.
    pub range: ByteRange<Iova>,
    /// The same memory in this process. It stays there until the next memory table, or the end of the session.
    pub host: HostRange,
}

/// The session of one connection. `T` identifies a message that waits for a reply, `J` are the jobs.
pub struct Session<T, J> {
    config: Config,
    features: Features,
    rings: Rings,
    /// The control queue is started and enabled.
    running: bool,
    mirror: MirrorWriter,
    regions: Vec<PhysicalRegion>,
    misses: MissTable<Waiter>,
    port: MissPort,
    has_channel: bool,
    jobs: J,
    pending: Pending<T>,
    /// Guest memory was revoked.
    is_revoked: bool,
    invalidations: Invalidations,
    audit: Option<Audit>,
    stats: Arc<Stats>,
    effects: VecDeque<Effect<T>>,
}

impl<T, J: Jobs> Session<T, J> {
    /// A session whose front-end has sent nothing yet. Jobs are paused until the control queue runs; other threads
    /// request translations on `port`.
    pub fn new(config: Config, mirror: MirrorWriter, jobs: J, port: MissPort, stats: Arc<Stats>) -> Self {
        Self {
            config,
            features: Features::new(config.offer),
            rings: Rings::default(),
            running: false,
            mirror,
            regions: Vec::new(),
            misses: MissTable::new(config.miss_timeout),
            port,
            has_channel: false,
            jobs,
            pending: Pending::Nothing,
            is_revoked: false,
            invalidations: Invalidations::default(),
            audit: None,
            stats,
            effects: VecDeque::new(),
        }
    }

    /// Takes the next effect.
    pub fn next_effect(&mut self) -> Option<Effect<T>> {
        self.effects.pop_front()
    }

    /// Takes the next effect if `which` accepts it.
    pub fn next_effect_if(&mut self, which: impl FnOnce(&Effect<T>) -> bool) -> Option<Effect<T>> {
        self.effects.front().is_some_and(which).then(|| self.effects.pop_front())?
    }

    /// The effects that have not been taken.
    pub fn effects(&self) -> impl Iterator<Item = &Effect<T>> {
        self.effects.iter()
    }

    /// Whether the next message may be handed over: no reply is pending. Replies go out in the order of the messages.
    pub fn may_read(&self) -> bool {
        matches!(self.pending, Pending::Nothing)
    }

    /// When to call [`Self::poll`] and [`Self::expire`] if nothing else happens earlier.
    pub fn next_deadline(&self) -> Option<Duration> {
        let drain = self.draining().map(Draining::deadline);
        let audit = self.audit.as_ref().and_then(Audit::deadline);
        [drain, self.misses.next_deadline(), audit].into_iter().flatten().min()
    }

    /// What the current drain waits for; `None`: there is no drain.
    pub fn in_flight(&self) -> Option<InFlight> {
        self.draining().map(|draining| draining.invalidation.in_flight())
    }

    /// When the message arrived whose drain is under way.
    pub fn waits_since(&self) -> Option<Duration> {
        self.draining().map(|draining| draining.summary().since)
    }

    /// Whether the device runs: the control queue is started and enabled.
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// Whether addresses of the driver are IOVAs. Without an IOMMU they are guest-physical, and the mirror holds the
    /// memory table.
    pub fn has_iommu(&self) -> bool {
        self.features.has_iommu()
    }

    /// Whether the front-end can be told of a refusal.
    pub fn has_reply_ack(&self) -> bool {
        self.features.has_reply_ack()
    }

    /// The features that the driver has chosen.
    pub fn driver_features(&self) -> u64 {
        self.features.virtio()
    }

    /// The features that the front-end may choose from.
    pub fn offer(&self) -> Offer {
        self.features.offer()
    }

    /// The mirror.
    pub fn mirror(&self) -> &MirrorWriter {
        &self.mirror
    }

    /// The mirror, for tests that put a wrong translation into it.
    pub fn mirror_mut(&mut self) -> &mut MirrorWriter {
        &mut self.mirror
    }

    /// The misses.
    pub fn misses(&self) -> &MissTable<Waiter> {
        &self.misses
    }

    /// The jobs.
    pub fn jobs(&self) -> &J {
        &self.jobs
    }

    /// The jobs.
    pub fn jobs_mut(&mut self) -> &mut J {
        &mut self.jobs
    }

    /// Whether no miss is open and no reply is pending.
    pub fn is_idle(&self) -> bool {
        self.may_read() && self.misses.is_idle() && self.port.is_empty() && self.effects.is_empty()
    }

    /// Records an event.
    fn record(&mut self, at: Duration, event: Event) {
        self.effects.push_back(Effect::Record { at, event });
    }

    fn effect(&mut self, effect: Effect<T>) {
        self.effects.push_back(effect);
    }

    /// The connection is over: stops and drains everything, as for a reset, without a message that waits for it.
    /// [`Effect::Closed`] says that nothing of the device uses guest memory any more.
    pub fn close(&mut self, now: Duration) {
        self.stop_all(now);
        self.interrupt_audit(now);
        self.jobs.pause(now);
        self.jobs.discard();
        self.drain_to_close(now);
    }
}

/// The device's whole address space.
fn everything() -> (DomainId, ByteRange<Iova>) {
    (DomainId::DEVICE, ByteRange::everything())
}
