//! The state of one vhost-user session: features, memory, rings, the mirror. The vhost-user requests that change
//! it are in [`super::requests`], the IOTLB in [`super::iommu`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use device_model::addr::{ByteRange, Iova, SpaceId};
use device_model::jobs::scheduler::Scheduler;
use device_model::mmu::miss::{MissRequest, MissTable};
use device_model::mmu::{Drained, Ended, HostRange, Invalidation, MirrorWriter, Permissions};
use device_model::telemetry::record::Event;
use device_model::telemetry::stats::Stats;
use log::warn;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VringT;
use virtio_queue::QueueT;

use super::questions::Questions;
use super::seeded::Seeded;
use super::verdicts::TakenAway;
use crate::display::Display;
use crate::engines::starvation::Turns;
use crate::faults::Bug;
use crate::front_end_check::Referee;
use crate::queues::mailbox::Mail;
use crate::queues::{CONTROL_QUEUE, QUEUES, QueueHandle};
use crate::telemetry::instruments::{EventSink, Instruments};
use crate::vhost_user::channel::Channel;
use crate::vhost_user::memory::{MemoryTable, Region};
use device_model::session::miss_port::{MissPort, Waiter};

/// VIRTIO_F_ACCESS_PLATFORM: every address of the driver is an IOVA.
pub(super) const ACCESS_PLATFORM: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_IOMMU_PLATFORM;

/// Everything that a vhost-user request can change.
pub struct SessionState {
    /// Virtio features that the driver chose.
    pub features: u64,
    /// Protocol features that the front-end chose.
    pub protocol_features: u64,
    /// The front-end's memory.
    pub memory: MemoryTable,
    /// The only writer of the mirror.
    pub mirror: MirrorWriter,
    /// Misses on their way.
    pub misses: MissTable<Waiter>,
    /// Requests for misses.
    pub miss_port: MissPort,
    /// Pages that were asked for, for which the table of misses has no room yet.
    pub backlog: VecDeque<(MissRequest, Waiter)>,
    /// Where misses go, once the front-end has sent it.
    pub channel: Option<Channel>,
    /// The queue thread.
    pub queue: QueueHandle,
    /// The engine threads.
    pub engines: Vec<std::thread::JoinHandle<()>>,
    /// The engines' turns on the processors.
    pub turns: Turns,
    /// The engines' work.
    pub scheduler: Arc<Scheduler>,
    /// The display.
    pub display: Display,
    /// What is counted.
    pub stats: Arc<Stats>,
    /// What misbehaves.
    pub seeded: Seeded,
    /// Content of the device's configuration space.
    pub config_space: Vec<u8>,
    /// Features that the device offers.
    pub device_features: u64,
    /// Whether the device runs: the control queue is started and enabled.
    pub running: bool,
    /// The index that GET_VRING_BASE gave, by queue: a start with another one is the start of a new device.
    pub bases: [Option<u16>; QUEUES],
    /// The INVALIDATE messages so far.
    pub taken: TakenAway,
    /// Why the last request was refused.
    pub refusal: Option<String>,
    /// Where the session's doings are recorded.
    pub sink: EventSink,
    /// What the control thread asks.
    pub questions: Questions,
    /// Judges the front-end, if that is wanted.
    pub referee: Option<Referee>,
}

impl SessionState {
    /// Whether addresses are IOVAs. Without, they are guest-physical, and the mirror holds the memory table.
    pub fn has_iommu(&self) -> bool {
        self.features & ACCESS_PLATFORM != 0
    }

    /// Whether a refusal can be told.
    pub fn has_reply_ack(&self) -> bool {
        self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// Begins to invalidate everything.
    pub fn begin_everything(&mut self) -> Invalidation {
        let everything = ByteRange::<Iova>::everything();
        self.scheduler.forget_suspects();
        self.sink.record(Event::Invalidation { number: 0, range: everything });
        self.misses.invalidate(SpaceId::DEVICE, everything);
        if let Some(audit) = self.questions.audit() {
            audit.invalidated(everything);
        }
        self.seeded.forget();
        self.forget_suspicions();
        // No mode goes on with memory that goes away.
        self.mirror.begin_for_good(SpaceId::DEVICE, everything)
    }

    /// Ends an invalidation: whoever waited for that may go on.
    pub fn end(&mut self, drained: Drained) -> Ended {
        let ended = self.mirror.end(drained);
        self.seeded.undo_zap(&mut self.mirror);
        self.scheduler.invalidation_ended();
        ended
    }

    /// Takes a ring out of service, so that nothing of it is read or written any more once a drain is over.
    pub fn stop_ring(&mut self, queue: usize) {
        let Some(ring) = self.queue.rings.get(queue) else { return };
        // LOCKING: waits for the queue thread's copy in progress, and for nothing that waits for us.
        ring.vring.set_queue_ready(false);
        self.update_running();
    }

    /// Takes all rings out of service.
    pub fn stop_all(&mut self) {
        for queue in 0..QUEUES {
            self.stop_ring(queue);
        }
    }

    fn is_served(&self, queue: usize) -> bool {
        self.queue.rings.get(queue).is_some_and(|ring| {
            let vring = ring.vring.get_ref();
            vring.is_enabled() && vring.get_queue().ready()
        })
    }

    /// A ring was started or enabled.
    pub fn ring_changed(&mut self, queue: usize) {
        self.update_running();
        if self.is_served(queue) {
            self.queue.mailbox.post(Mail::RingReady(queue));
        }
    }

    /// Lets the engines run exactly while the control queue does.
    fn update_running(&mut self) {
        let running = self.is_served(CONTROL_QUEUE);
        if running == self.running {
            return;
        }
        self.running = running;
        self.sink.record(if running { Event::Start {} } else { Event::Stop {} });
        if running {
            (0..QUEUES).for_each(|queue| self.name_ring(queue));
            self.map_physical();
            self.scheduler.resume();
            // What another ring asked for before this moment was not passed on.
            (0..QUEUES).for_each(|queue| self.queue.mailbox.post(Mail::RingReady(queue)));
        } else {
            // Nothing is asked for and nothing is waited for: the front-end refuses misses from here on.
            self.scheduler.pause();
            if self.seeded.injection.fires(Bug::LoseJobOverStop) {
                self.scheduler.discard();
            }
            self.seeded.forget_misses();
            self.miss_port.clear();
            self.backlog.clear();
            self.misses.clear();
            let now = self.scheduler.now();
            self.interrupt_audit(now);
        }
    }

    /// Tells the names of addresses where a ring lies.
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

    /// Without an IOMMU, the mirror holds the memory table itself.
    pub fn map_physical(&mut self) {
        if self.has_iommu() {
            return;
        }
        for region in self.memory.regions() {
            if let Err(e) = map_region(&mut self.mirror, region) {
                warn!("Guest memory at {} cannot be used: {}", region.gpa(), crate::error::chain(&e));
            }
        }
    }

    /// Forgets everything that the driver built: resources, jobs, commands in flight. Rings are stopped, and
    /// everything is drained.
    pub fn reset_device(&mut self) {
        self.stop_all();
        for (queue, ring) in self.queue.rings.iter().enumerate() {
            self.forget_kick(queue);
            ring.vring.set_enabled(false);
        }
        self.discard_device();
    }

    /// Forgets what the driver built, and leaves the rings as they are: of a reset that nobody announced, one ring may
    /// tell when another is started already.
    pub fn discard_device(&mut self) {
        self.sink.record(Event::Reset {});
        if !self.seeded.injection.fires(Bug::KeepJobsOverReset) {
            self.scheduler.discard();
        }
        self.bases = [None; QUEUES];
        for ring in self.queue.rings.iter() {
            // ORDERING: Release: a ring that is started after this is not served before the reset is heard of.
            ring.resets.fetch_add(1, Ordering::Release);
        }
        self.queue.mailbox.post(Mail::Reset);
        self.queue.mailbox.post(Mail::Features(self.features));
        for queue in (0..QUEUES).filter(|queue| self.is_served(*queue)) {
            self.queue.mailbox.post(Mail::RingReady(queue));
        }
    }

    /// The next moment at which a miss is overdue, one that was held back is due, or something is to be done for whoever
    /// watches.
    pub fn next_deadline(&mut self) -> Option<Duration> {
        let questions = self.questions.deadline(self.scheduler.now());
        let referee = self.referee.as_ref().and_then(Referee::deadline);
        [self.misses.next_deadline(), self.seeded.next_due(), questions, referee].into_iter().flatten().min()
    }
}

/// Enters a region of guest memory under its guest-physical addresses.
pub(super) fn map_region(
    mirror: &mut MirrorWriter,
    region: &Region,
) -> Result<(), device_model::mmu::MapError> {
    let gpa = region.gpa();
    // A guest-physical address is what the device uses as an address without an IOMMU: this is the one place
    // where the one becomes the other.
    let range = ByteRange::inclusive(Iova::new(gpa.first().raw()), Iova::new(gpa.last().raw()));
    let Some(range) = range else { return Ok(()) };
    let Ok(len) = usize::try_from(region.spec().size) else { return Ok(()) };
    // SAFETY: INVARIANT: the region lies at this place until it is dropped, which happens only after everything
    // in the mirror was invalidated and drained.
    let host = unsafe { HostRange::new(region.host_at(0), len) };
    mirror.map(SpaceId::DEVICE, range, host, Permissions { read: true, write: true }).map(drop)
}
