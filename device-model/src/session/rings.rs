//! Which rings run, and with them the device: start, stop, reset. A stop is not a reset: GET_VRING_BASE comes for a
//! QMP `stop`, a migration and a reset alike, so jobs stay and go on after the next start, unless a reset comes first.

use std::time::Duration;

use super::effect::Effect;
use super::refusal::Refusal;
use super::{Jobs, PhysicalRegion, Session};
use crate::addr::DomainId;
use crate::mmu::{MapError, Permissions};
use crate::telemetry::record::Event;

/// Queues of a virtio-gpu device (virtio 1.3, 5.7.2).
pub const QUEUES: usize = 2;
/// The control queue.
pub const CONTROL_QUEUE: usize = 0;

/// What the front-end has said about a ring.
#[derive(Clone, Copy, Debug, Default)]
struct Ring {
    /// It has a kick eventfd, and has not been stopped since.
    started: bool,
    enabled: bool,
    /// The index that the last GET_VRING_BASE returned, if no reset has come since.
    base: Option<u16>,
}

impl Ring {
    /// Whether the queue thread takes commands from it.
    fn is_served(self) -> bool {
        self.started && self.enabled
    }
}

/// The rings of the device.
#[derive(Debug, Default)]
pub(super) struct Rings([Ring; QUEUES]);

impl Rings {
    fn is_served(&self, queue: usize) -> bool {
        self.0.get(queue).is_some_and(|ring| ring.is_served())
    }

    fn any_started(&self) -> bool {
        self.0.iter().any(|ring| ring.started)
    }
}

impl<T, J: Jobs> Session<T, J> {
    /// The ring of this number.
    pub fn ring(&self, index: u32) -> Result<usize, Refusal> {
        let queue = usize::try_from(index).ok().filter(|queue| *queue < QUEUES);
        queue.ok_or(Refusal::NoRing { index, rings: QUEUES })
    }

    /// The ring of this number, which must not be started.
    pub fn stopped_ring(&self, index: u32) -> Result<usize, Refusal> {
        let queue = self.ring(index)?;
        match self.rings.0.get(queue) {
            Some(ring) if ring.started => Err(Refusal::RingStarted { index }),
            _ => Ok(queue),
        }
    }

    /// SET_VRING_KICK: the ring is set up, and starts.
    pub fn start_ring(&mut self, now: Duration, queue: usize) {
        let enables = !self.features.enables_rings();
        if let Some(ring) = self.rings.0.get_mut(queue) {
            ring.started = true;
            // If rings are not enabled by a message of their own, a started one is enabled.
            ring.enabled |= enables;
        }
        self.ring_changed(now, queue);
    }

    /// SET_VRING_ENABLE.
    pub fn enable_ring(&mut self, now: Duration, queue: usize, enabled: bool) {
        if let Some(ring) = self.rings.0.get_mut(queue) {
            ring.enabled = enabled;
        }
        self.ring_changed(now, queue);
    }

    /// GET_VRING_BASE was answered with this index. The ring had been stopped and drained.
    pub fn base_given(&mut self, queue: usize, base: u16) {
        if let Some(ring) = self.rings.0.get_mut(queue) {
            ring.base = Some(base);
        }
        self.effect(Effect::ForgetKick { queue });
    }

    /// SET_VRING_BASE: where a stopped ring goes on. If the index is not the one returned at the stop, the driver has
    /// reset the device without a message from the front-end: what the old driver set up is discarded.
    pub fn set_base(&mut self, now: Duration, index: u32, base: u32) -> Result<u16, Refusal> {
        let queue = self.stopped_ring(index)?;
        let base = u16::try_from(base).map_err(|_| Refusal::RingIndex { index: base })?;
        if self.rings.0.get(queue).and_then(|ring| ring.base).is_some_and(|given| given != base) {
            self.discard_device(now);
        }
        Ok(base)
    }

    /// SET_FEATURES, after its drain.
    pub fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        self.features.choose(features, self.rings.any_started())?;
        self.effect(Effect::SetFeatures(features));
        Ok(())
    }

    /// SET_PROTOCOL_FEATURES.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<(), Refusal> {
        self.features.choose_protocol(features)
    }

    /// RESET_DEVICE or RESET_OWNER, after its drain: forgets everything that the driver set up.
    pub fn reset_device(&mut self, now: Duration) {
        self.stop_all(now);
        for queue in 0..QUEUES {
            self.effect(Effect::ForgetKick { queue });
            if let Some(ring) = self.rings.0.get_mut(queue) {
                ring.enabled = false;
            }
            self.show_ring(queue);
        }
        self.discard_device(now);
    }

    /// Sets where guest memory is, while a message is handled ([`Effect::HandOver`]). A drain of everything forgets it,
    /// so that memory that is gone cannot be mapped again.
    pub fn memory_is_here(&mut self, regions: Vec<PhysicalRegion>) {
        self.regions = regions;
        // After a drain, the mirror accepts mappings only once the invalidation has ended.
        if self.running && self.is_handing_over_undrained() {
            self.map_physical();
        }
    }

    /// Takes a ring out of service. Once a drain is over, nothing of it is read or written any more.
    pub(super) fn stop_ring(&mut self, now: Duration, queue: usize) {
        if let Some(ring) = self.rings.0.get_mut(queue) {
            ring.started = false;
            self.show_ring(queue);
            self.update_running(now);
        }
    }

    /// Takes all rings out of service.
    pub(super) fn stop_all(&mut self, now: Duration) {
        (0..QUEUES).for_each(|queue| self.stop_ring(now, queue));
    }

    /// Updates the ring's shared state.
    fn show_ring(&mut self, queue: usize) {
        if let Some(&Ring { started, enabled, .. }) = self.rings.0.get(queue) {
            self.effect(Effect::SetRing { queue, started, enabled });
        }
    }

    fn ring_changed(&mut self, now: Duration, queue: usize) {
        self.show_ring(queue);
        self.update_running(now);
        if self.rings.is_served(queue) {
            self.effect(Effect::ServeRing { queue });
        }
    }

    /// Lets the engines run if and only if the control queue does.
    fn update_running(&mut self, now: Duration) {
        let running = self.rings.is_served(CONTROL_QUEUE);
        if running == self.running {
            return;
        }
        self.running = running;
        if running { self.start(now) } else { self.stop(now) }
    }

    fn start(&mut self, now: Duration) {
        self.record(now, Event::Start {});
        self.effect(Effect::Started);
        self.map_physical();
        self.jobs.resume(now);
        // Requests that another ring made before this moment were not passed on.
        (0..QUEUES).for_each(|queue| self.effect(Effect::ServeRing { queue }));
    }

    /// The device stops: drops all misses and waits, since the front-end refuses MISSes from here on.
    fn stop(&mut self, now: Duration) {
        self.record(now, Event::Stop {});
        self.jobs.pause(now);
        self.effect(Effect::Stopped);
        self.port.clear();
        self.misses.clear();
        self.interrupt_audit(now);
    }

    /// Forgets what the driver set up, and leaves the rings as they are: SET_VRING_BASE of one ring may reveal a reset
    /// that was not announced when another ring is started already.
    fn discard_device(&mut self, now: Duration) {
        self.record(now, Event::Reset {});
        self.jobs.discard();
        self.rings.0.iter_mut().for_each(|ring| ring.base = None);
        self.effect(Effect::ResetDevice { features: self.features.virtio() });
        for queue in (0..QUEUES).filter(|queue| self.rings.is_served(*queue)) {
            self.effects.push_back(Effect::ServeRing { queue });
        }
    }

    /// Without an IOMMU, the mirror holds the memory table itself.
    pub(super) fn map_physical(&mut self) {
        if self.has_iommu() {
            return;
        }
        for region in self.regions.clone() {
            if let Err(e) = self.map_region(region) {
                log::warn!("Guest memory at {} cannot be used: {e}", region.range);
            }
        }
    }

    pub(super) fn map_region(&mut self, region: PhysicalRegion) -> Result<(), MapError> {
        self.mirror.map(DomainId::DEVICE, region.range, region.host, Permissions::READ_WRITE).map(drop)
    }
}
