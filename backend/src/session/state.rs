//! The session's state apart from the sockets: the session core, and what its effects need within the device: rings,
//! memory, threads, telemetry. Makes no decisions: [`device_model::session`] does.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use device_model::addr::{ByteRange, Iova};
use device_model::jobs::scheduler::Scheduler;
use device_model::mmu::HostRange;
use device_model::session::miss_port::{MissAnswer, Waiter};
use device_model::session::{Effect, PhysicalRegion, QUEUES, Refusal, Session};
use device_model::telemetry::stats::Stats;
use log::warn;
use vhost_user_backend::VringT;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;

use super::injected::InjectedFaults;
use super::jobs::DeviceJobs;
use super::queries::Queries;
use crate::display::Display;
use crate::engines::Engines;
use crate::fault_injection::{Bug, Injection};
use crate::front_end_check::FrontEndCheck;
use crate::queues::QueueHandle;
use crate::queues::mailbox::{QueueMessage, Side};
use crate::telemetry::instruments::{EventSink, Instruments};
use crate::threads::ThreadFailures;
use crate::threads::starvation::Turns;
use crate::vhost_user::Header;
use crate::vhost_user::channel::Channel;
use crate::vhost_user::memory::MemoryTable;

/// The session core. The header of a message identifies its reply.
pub(super) type Core = Session<Header, DeviceJobs>;

/// The state of one connection.
pub struct SessionState {
    /// Makes the session's decisions.
    pub(super) core: Core,
    /// The back-end channel, once the front-end has sent it.
    pub(super) channel: Option<Channel>,
    /// The queue thread.
    pub(crate) queue: QueueHandle,
    /// The engine threads.
    pub(super) engines: Engines,
    /// The engines' processor time since they were asked to leave their jobs.
    pub(super) turns: Turns,
    /// The jobs of the engines, and the device's clock.
    pub(crate) scheduler: Arc<Scheduler>,
    /// The display.
    pub(super) display: Display,
    /// The counters.
    pub(super) stats: Arc<Stats>,
    /// The faults that `--inject` has turned on.
    pub(super) injection: Arc<Injection>,
    /// Their effect on the session.
    pub(super) faults: InjectedFaults,
    /// Content of the device's configuration space.
    pub(super) config_space: Vec<u8>,
    /// Why the request that the `vhost` crate is handling was refused.
    pub(super) refusal: Option<Refusal>,
    /// Where the session records what it does.
    pub(super) sink: EventSink,
    /// Where a thread of the device reports that it has failed.
    pub(super) failures: ThreadFailures,
    /// The queries of the control thread.
    pub(super) queries: Queries,
    /// The front-end checker, if it is enabled.
    pub(super) front_end_check: Option<FrontEndCheck>,
    /// The front-end's memory. Dropped last, should this thread unwind: the threads above use it until they have ended.
    pub(super) memory: MemoryTable,
}

impl SessionState {
    /// The device's clock.
    pub(super) fn now(&self) -> Duration {
        self.scheduler.now()
    }

    /// Carries out the session's effects up to the next one that concerns the main socket.
    pub(super) fn carry_out(&mut self, now: Duration) {
        while let Some(effect) = self.core.next_effect_if(|effect| !is_for_the_socket(effect)) {
            self.carry_out_one(now, effect);
        }
    }

    fn carry_out_one(&mut self, now: Duration, effect: Effect<Header>) {
        match effect {
            Effect::SetRing { queue, started, enabled } => self.set_ring(queue, started, enabled),
            Effect::ForgetKick { queue } => self.forget_kick(queue),
            Effect::ServeRing { queue } => self.queue.mailbox.post(QueueMessage::RingReady(queue)),
            Effect::SetFeatures(features) => self.set_device_features(features),
            Effect::ResetDevice { features } => self.reset_queues(features),
            Effect::Started => (0..QUEUES).for_each(|queue| self.name_ring(queue)),
            Effect::Stopped => self.stopped(),
            Effect::Parked if self.faults.has_acked_early() => {}
            Effect::Parked => self.stats.acks_parked.add(1),
            Effect::EnginesToldToLeave => self.turns.told(now),
            Effect::Mapped { request, range, host, permissions } => {
                let mapping = (range, host, permissions);
                self.faults.mapped(self.core.mirror_mut(), request.iova, mapping);
            }
            Effect::MissAnswered { waiter, request, answer } => match waiter {
                Waiter::Job(wait) => self.scheduler.miss_answered(wait, request, answer.for_job(request)),
                Waiter::RingInput(wait) => self.tell_ring(wait, Side::Input, answer),
                Waiter::RingOutput(wait) => self.tell_ring(wait, Side::Output, answer),
                // These do not wait for an answer.
                Waiter::Ahead(_) | Waiter::Audit(_) => {}
            },
            Effect::MirrorEmptied => {
                self.faults.forget();
                self.forget_suspicions();
            }
            Effect::Record { at, event } => self.sink.record_at(at, event),
            Effect::Fault(fault) => self.sink.instruments().fault(fault),
            // The reporter writes and prints it: this thread has to serve the front-end.
            Effect::Violation(violation) => drop(self.sink.instruments().violation(violation)),
            Effect::Incident(what) => self.sink.instruments().incident(what),
            Effect::AuditProgress(report) => self.audit_progress(report),
            Effect::AuditEnded(report) => self.audit_ended(report),
            Effect::Ack { .. }
            | Effect::Reply { .. }
            | Effect::HandOver
            | Effect::End(_)
            | Effect::Closed
            | Effect::Revoke
            | Effect::Abort => unreachable!("Effects for the socket are not taken here"),
        }
    }

    fn tell_ring(&self, wait: device_model::session::miss_port::RingWait, side: Side, answer: MissAnswer) {
        self.queue.mailbox.post(QueueMessage::MissAnswered { wait, side, answer });
    }

    /// Updates the ring state that the queue thread sees to what the session core has decided.
    fn set_ring(&self, queue: usize, started: bool, enabled: bool) {
        let Some(ring) = self.queue.rings.get(queue) else { return };
        // LOCKING: waits for the queue thread's current copy, which itself does not wait for the session.
        ring.vring.set_queue_ready(started);
        ring.vring.set_enabled(enabled);
        if !started || !enabled {
            ring.await_interrupt();
        }
    }

    /// Stops watching a ring's kick eventfd.
    pub(super) fn forget_kick(&self, queue: usize) {
        let Some(ring) = self.queue.rings.get(queue) else { return };
        if let Ok(Some(kick)) = ring.kick.set(None) {
            // Fails only if the front-end sent the same descriptor twice and it was already removed.
            let _ = self.queue.poller.remove(kick.as_raw_fd());
        }
    }

    fn set_device_features(&self, features: u64) {
        for ring in self.queue.rings.iter() {
            ring.vring.set_queue_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        }
        self.queue.mailbox.post(QueueMessage::Features(features));
    }

    fn reset_queues(&self, features: u64) {
        for ring in self.queue.rings.iter() {
            // ORDERING: Release: a ring started after this is not served before the queue thread sees the reset.
            ring.resets.fetch_add(1, Ordering::Release);
        }
        self.queue.mailbox.post(QueueMessage::Reset);
        self.queue.mailbox.post(QueueMessage::Features(features));
    }

    fn stopped(&mut self) {
        self.faults.forget_misses();
        if self.injection.fires(Bug::LoseJobOverStop) {
            self.scheduler.discard();
        }
    }

    /// Records where a ring lies, for the names of addresses.
    fn name_ring(&self, queue: usize) {
        let Some(ring) = self.queue.rings.get(queue) else { return };
        let (places, size) = {
            let vring = ring.vring.get_ref();
            let queue = vring.get_queue();
            ([queue.desc_table(), queue.avail_ring(), queue.used_ring()], u64::from(queue.size()))
        };
        // virtio 1.3, 2.7: a descriptor has 16 bytes, an available entry 2, a used one 8; each ring 6 around them.
        let bytes = [16 * size, 6 + 2 * size, 6 + 8 * size];
        let parts = ["descriptors", "available ring", "used ring"].into_iter().zip(places).zip(bytes);
        let parts = parts
            .filter_map(|((part, place), bytes)| Some((part, ByteRange::new(Iova::new(place), bytes).ok()?)));
        let instruments = self.sink.instruments();
        let name = Instruments::ring_name(queue);
        instruments.names().ring_placed(instruments.clock().now(), name, parts.collect());
    }

    /// Passes the current location of guest memory to the session core.
    pub(super) fn memory_is_here(&mut self) {
        let regions = self.memory.regions().iter().filter_map(|region| {
            // Without an IOMMU the device uses guest-physical addresses as I/O addresses: this is the only place that
            // converts one to the other.
            let gpa = region.gpa();
            let range = ByteRange::inclusive(Iova::new(gpa.first().raw()), Iova::new(gpa.last().raw()))?;
            let len = usize::try_from(region.spec().size).ok()?;
            // SAFETY: INVARIANT: the region stays mapped here until it is dropped, which happens only after everything
            // in the mirror was invalidated and drained, and this list was replaced.
            let host = unsafe { HostRange::new(region.host_at(0), len) };
            Some(PhysicalRegion { range, host })
        });
        let regions = regions.collect();
        self.core.memory_is_here(regions);
    }

    /// Replaces all guest memory by zero pages, or ends the process.
    pub(super) fn revoke_memory(&self) -> device_model::mmu::MemoryRevoked {
        log::error!(
            "An engine does not reach the end of its step: revoking all guest memory. This is a bug of MirrorGPU"
        );
        if self.memory.revoke().is_err() {
            log::error!(
                "Guest memory cannot be revoked: ending the process, so that nothing touches it any more"
            );
            std::process::abort();
        }
        device_model::mmu::MemoryRevoked::all_regions_replaced()
    }

    /// When the next action is due, if nothing else happens before.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let queries = self.queries.deadline(self.now());
        let front_end_check = self.front_end_check.as_ref().and_then(FrontEndCheck::deadline);
        [self.core.next_deadline(), self.faults.next_due(), queries, front_end_check]
            .into_iter()
            .flatten()
            .min()
    }
}

/// Whether an effect is carried out by the thread that owns the main socket.
fn is_for_the_socket(effect: &Effect<Header>) -> bool {
    matches!(
        effect,
        Effect::Ack { .. }
            | Effect::Reply { .. }
            | Effect::HandOver
            | Effect::End(_)
            | Effect::Closed
            | Effect::Revoke
            | Effect::Abort
    )
}

/// Ends the process: an engine is stuck in memory that is being removed.
pub(super) fn abort() -> ! {
    warn!("An engine is stuck, and its memory goes away: ending the process");
    std::process::abort()
}
