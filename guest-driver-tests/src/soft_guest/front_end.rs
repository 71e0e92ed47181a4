//! The front-end: QEMU's order of messages, without QEMU. Ordinary messages go through the `vhost` crate's front-end;
//! IOTLB messages and the display socket, which it lacks, are sent raw. Knows rings by their addresses only; their
//! contents belong to the driver.

use std::fmt;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::addr::{Gpa, Iova, UserAddr};
use super::error::{Error, Result};
use super::handshake::{Negotiated, negotiate};
use super::iommu::Iommu;
use super::link::{Ack, Link};
use super::memory::{GuestRam, Region};
use super::misses::{self, Miss, MissCounts, MissDesk, MissService, Policy};
use super::turn::{Turn, TurnLock, held};
use super::wire::{self, IotlbMessage, Message, VERSION, request};

/// Virtio feature bits that matter here.
pub mod feature {
    /// VIRTIO_GPU_F_VIRGL: here, job streams.
    pub const VIRGL: u64 = 1;
    /// VIRTIO_GPU_F_EDID.
    pub const EDID: u64 = 1 << 1;
    /// VIRTIO_GPU_F_RESOURCE_BLOB.
    pub const RESOURCE_BLOB: u64 = 1 << 3;
    /// VIRTIO_GPU_F_CONTEXT_INIT.
    pub const CONTEXT_INIT: u64 = 1 << 4;
    /// VIRTIO_RING_F_INDIRECT_DESC.
    pub const INDIRECT: u64 = 1 << 28;
    /// VIRTIO_RING_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_ACCESS_PLATFORM: the device is behind an IOMMU.
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    /// VIRTIO_F_RING_RESET.
    pub const RING_RESET: u64 = 1 << 40;
}

/// Queues of a virtio-gpu device: control and cursor.
pub const QUEUES: usize = 2;

/// What kind of front-end this is.
#[derive(Clone, Copy, Debug)]
pub struct FrontEndConfig {
    /// Whether the device is behind an IOMMU.
    pub iommu: bool,
    /// Features of the GPU that the front-end passes on, where they are offered.
    pub gpu_features: u64,
    /// Ring features of the guest (INDIRECT, EVENT_IDX, RING_RESET): QEMU sets them without asking the back-end.
    pub ring_features: u64,
    /// Whether CONFIGURE_MEM_SLOTS is used where it is offered, as QEMU does.
    pub memory_slots: bool,
    /// Whether a reset is announced (RESET_DEVICE), where that is offered. Otherwise the rings stop, and start at
    /// index 0.
    pub announce_reset: bool,
    /// How long a reply may take before the connection is given up. QEMU has no such limit.
    pub reply_timeout: Duration,
}

impl Default for FrontEndConfig {
    fn default() -> Self {
        Self {
            iommu: true,
            gpu_features: feature::VIRGL | feature::EDID,
            ring_features: feature::INDIRECT | feature::EVENT_IDX | feature::RING_RESET,
            memory_slots: true,
            announce_reset: true,
            reply_timeout: Duration::from_secs(10),
        }
    }
}

/// A ring, as the back-end sees it.
#[derive(Debug)]
pub struct QueueSetup<'a> {
    /// Entries.
    pub size: u16,
    /// Descriptor table, as the device addresses it.
    pub descriptors: Iova,
    /// Available ring.
    pub available: Iova,
    /// Used ring.
    pub used: Iova,
    /// Signalled by the driver.
    pub kick: &'a EventFd,
    /// Signalled by the device.
    pub call: &'a EventFd,
    /// Signalled by the device when the ring is broken.
    pub error: &'a EventFd,
}

/// What a stop returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stopped {
    /// Where each ring continues: index of the next available entry.
    pub bases: [u16; QUEUES],
    /// How long each GET_VRING_BASE took.
    pub waits: [Duration; QUEUES],
}

/// What the main socket and the miss service share.
pub(super) struct Core {
    pub(super) link: TurnLock<Link>,
    pub(super) desk: MissDesk,
    pub(super) ram: Arc<GuestRam>,
    pub(super) iommu: Arc<Iommu>,
    /// The memory table as the back-end has it. Taken only while the big lock is held.
    table: Mutex<Vec<Region>>,
    started: AtomicBool,
}

impl Core {
    pub(super) fn is_started(&self) -> bool {
        // ORDERING: written and read with the big lock held.
        self.started.load(Ordering::Relaxed)
    }

    /// The address under which the back-end knows a guest-physical address, and how far it extends; `None` if the
    /// memory table has no such address.
    pub(super) fn user_addr(&self, at: Gpa) -> Option<(UserAddr, u64)> {
        let table = held(&self.table);
        let offset = |region: &Region| at.0.checked_sub(region.gpa.0).filter(|offset| *offset < region.len);
        table
            .iter()
            .find_map(|region| offset(region).map(|offset| (region.user.plus(offset), region.len - offset)))
    }
}

/// A front-end, connected.
pub struct FrontEnd {
    // Dropped first: it joins its thread, which uses the core.
    service: Option<MissService>,
    core: Arc<Core>,
    negotiated: Negotiated,
    stream: UnixStream,
    // Taken only while the big lock is held.
    sent: Mutex<Sent>,
}

#[derive(Default)]
struct Sent {
    bases: [u16; QUEUES],
    error_fds: bool,
}

impl fmt::Debug for FrontEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontEnd").field("features", &self.negotiated.features).finish_non_exhaustive()
    }
}

impl FrontEnd {
    /// Connects, as QEMU does when the device is realized: negotiation, back-end channel, owner.
    pub fn connect(
        stream: UnixStream,
        ram: Arc<GuestRam>,
        iommu: Arc<Iommu>,
        config: FrontEndConfig,
    ) -> Result<Self> {
        let watched = stream.try_clone().map_err(Error::io("duplicate the main socket"))?;
        let mut link = Link::new(stream, QUEUES as u64, config.reply_timeout)?;
        let negotiated = negotiate(&mut link, config)?;
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("make a socket pair"))?;
        let channel = negotiated.protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ);
        if channel {
            link.ask("SET_BACKEND_REQ_FD", |front_end| front_end.set_backend_request_fd(&theirs))?;
        }
        link.tell("SET_OWNER", |front_end| front_end.set_owner())?;
        let (desk, started) = (MissDesk::new(), AtomicBool::new(false));
        let (link, table) = (TurnLock::new(link), Mutex::default());
        let core = Arc::new(Core { link, desk, ram, iommu, table, started });
        let service = if channel { Some(MissService::start(core.clone(), ours)?) } else { None };
        Ok(Self { service, core, negotiated, stream: watched, sent: Mutex::default() })
    }

    /// The features that the guest and the device run with.
    pub fn features(&self) -> u64 {
        self.negotiated.features
    }

    /// The protocol features in use.
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.negotiated.protocol
    }

    /// Whether the device is behind an IOMMU.
    pub fn has_iommu(&self) -> bool {
        self.negotiated.config.iommu
    }

    /// The 16 bytes of the device's configuration space.
    pub fn config_space(&self) -> Result<[u8; 16]> {
        let flags = VhostUserConfigFlags::WRITABLE;
        let mut link = self.core.link.lock();
        let (_, bytes) = link.tell("GET_CONFIG", |front_end| front_end.get_config(0, 16, flags, &[0; 16]))?;
        let got = bytes.len();
        bytes.try_into().map_err(|_| Error::Reply { message: "GET_CONFIG", got: format!("{got} bytes") })
    }

    /// DRIVER_OK, or the end of a stop: everything that the back-end needs to run, in QEMU's order.
    pub fn start(&self, queues: &[QueueSetup<'_>; QUEUES], display: Option<&UnixStream>) -> Result<()> {
        let mut link = self.core.link.lock();
        let mut sent = held(&self.sent);
        self.send_error_fds(&mut link, &mut sent, queues)?;
        if let Some(display) = display {
            link.send(request::GPU_SET_SOCKET, VERSION, &[], &[display.as_raw_fd()])?;
        }
        for (index, queue) in queues.iter().enumerate() {
            link.tell("SET_VRING_CALL", |front_end| front_end.set_vring_call(index, queue.call))?;
        }
        let features = self.negotiated.features;
        link.tell("SET_FEATURES", |front_end| front_end.set_features(features))?;
        let table = self.core.ram.regions().to_vec();
        self.send_table(&mut link, table)?;
        for (index, queue) in queues.iter().enumerate() {
            self.send_ring(&mut link, index, queue, sent.bases[index])?;
        }
        for index in 0..QUEUES {
            link.ask("SET_VRING_ENABLE", |front_end| front_end.set_vring_enable(index, true))?;
        }
        // ORDERING: the big lock is held.
        self.core.started.store(true, Ordering::Relaxed);
        if self.has_iommu() {
            self.announce_used_rings(&mut link, queues)?;
        }
        Ok(())
    }

    // QEMU sends the error eventfds once, when the device is made.
    fn send_error_fds(&self, link: &mut Link, sent: &mut Sent, queues: &[QueueSetup<'_>]) -> Result<()> {
        if sent.error_fds {
            return Ok(());
        }
        for (index, queue) in queues.iter().enumerate() {
            link.tell("SET_VRING_ERR", |front_end| front_end.set_vring_err(index, queue.error))?;
        }
        sent.error_fds = true;
        Ok(())
    }

    fn send_ring(&self, link: &mut Link, index: usize, queue: &QueueSetup<'_>, base: u16) -> Result<()> {
        let addresses = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: self.ring_address(queue.descriptors)?,
            used_ring_addr: self.ring_address(queue.used)?,
            avail_ring_addr: self.ring_address(queue.available)?,
            log_addr: None,
        };
        link.tell("SET_VRING_NUM", |front_end| front_end.set_vring_num(index, queue.size))?;
        link.tell("SET_VRING_BASE", |front_end| front_end.set_vring_base(index, base))?;
        link.tell("SET_VRING_ADDR", |front_end| front_end.set_vring_addr(index, &addresses))?;
        // QEMU's notifiers start rung.
        queue.kick.write(1).map_err(Error::io("ring a kick eventfd"))?;
        link.tell("SET_VRING_KICK", |front_end| front_end.set_vring_kick(index, queue.kick))
    }

    // Without an IOMMU, rings are given by the front-end's own addresses.
    fn ring_address(&self, at: Iova) -> Result<u64> {
        if self.has_iommu() { Ok(at.0) } else { Ok(self.core.ram.user_addr(Gpa(at.0))?.0) }
    }

    fn announce_used_rings(&self, link: &mut Link, queues: &[QueueSetup<'_>]) -> Result<()> {
        for queue in queues {
            let update = misses::update_for(&self.core, queue.used, true, false);
            let update = update.ok_or(Error::NotMapped(queue.used))?;
            let ack = link.acked("IOTLB UPDATE", request::IOTLB_MSG, update.as_bytes())?;
            if ack.status != 0 {
                return Err(Error::Reply { message: "IOTLB UPDATE", got: format!("status {}", ack.status) });
            }
        }
        Ok(())
    }

    /// QMP `stop`: the rings stop, the device keeps everything, and [`Self::start`] lets it continue.
    pub fn stop(&self, queues: &[QueueSetup<'_>; QUEUES]) -> Result<Stopped> {
        let mut link = self.core.link.lock();
        self.stop_rings(&mut link, queues)
    }

    fn stop_rings(&self, link: &mut Link, queues: &[QueueSetup<'_>; QUEUES]) -> Result<Stopped> {
        for index in 0..QUEUES {
            link.ask("SET_VRING_ENABLE", |front_end| front_end.set_vring_enable(index, false))?;
        }
        let mut stopped = Stopped { bases: [0; QUEUES], waits: [Duration::ZERO; QUEUES] };
        for index in 0..QUEUES {
            let start = Instant::now();
            let base = link.tell("GET_VRING_BASE", |front_end| front_end.get_vring_base(index))?;
            stopped.waits[index] = start.elapsed();
            let got = || Error::Reply { message: "GET_VRING_BASE", got: format!("base {base:#x}") };
            stopped.bases[index] = u16::try_from(base).map_err(|_| got())?;
        }
        // ORDERING: the big lock is held.
        self.core.started.store(false, Ordering::Relaxed);
        for (index, queue) in queues.iter().enumerate() {
            link.tell("SET_VRING_CALL", |front_end| front_end.set_vring_call(index, queue.call))?;
        }
        held(&self.sent).bases = stopped.bases;
        Ok(stopped)
    }

    /// Reset: the rings stop, and RESET_DEVICE (if it was negotiated) discards what the device has.
    pub fn reset(&self, queues: &[QueueSetup<'_>; QUEUES]) -> Result<Stopped> {
        let mut link = self.core.link.lock();
        let stopped = self.stop_rings(&mut link, queues)?;
        if self.negotiated.protocol.contains(VhostUserProtocolFeatures::RESET_DEVICE) {
            link.tell("RESET_DEVICE", |front_end| front_end.reset_device())?;
        }
        held(&self.sent).bases = [0; QUEUES];
        Ok(stopped)
    }

    /// Tells the back-end that the memory table has changed, as QEMU does while the device runs: all of it, or the
    /// differences (CONFIGURE_MEM_SLOTS).
    pub fn set_memory(&self, regions: &[Region]) -> Result<()> {
        let mut link = self.core.link.lock();
        self.send_table(&mut link, regions.to_vec())
    }

    fn send_table(&self, link: &mut Link, table: Vec<Region>) -> Result<()> {
        let mut sent = held(&self.core.table);
        let info = |region: &Region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.gpa.0,
            memory_size: region.len,
            userspace_addr: region.user.0,
            mmap_offset: region.offset,
            mmap_handle: self.core.ram.fd(),
        };
        if self.uses_memory_slots() {
            for gone in sent.iter().filter(|region| !table.contains(region)) {
                link.ask("REM_MEM_REG", |front_end| front_end.remove_mem_region(&info(gone)))?;
            }
            for new in table.iter().filter(|region| !sent.contains(region)) {
                link.ask("ADD_MEM_REG", |front_end| front_end.add_mem_region(&info(new)))?;
            }
        } else {
            let infos: Vec<_> = table.iter().map(info).collect();
            link.ask("SET_MEM_TABLE", |front_end| front_end.set_mem_table(&infos))?;
        }
        *sent = table;
        Ok(())
    }

    /// Whether memory changes are sent region by region.
    pub fn uses_memory_slots(&self) -> bool {
        self.negotiated.config.memory_slots
            && self.negotiated.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    /// INVALIDATE, with any numbers: waits for the acknowledgement, while no miss is served.
    pub fn invalidate(&self, iova: Iova, size: u64) -> Result<Ack> {
        let message = IotlbMessage::invalidate(iova, size);
        self.core.link.lock().acked("IOTLB INVALIDATE", request::IOTLB_MSG, message.as_bytes())
    }

    /// INVALIDATE without waiting for the ack: the connection is closed for good at once.
    pub fn invalidate_and_vanish(&self, iova: Iova, size: u64) -> Result<()> {
        let message = IotlbMessage::invalidate(iova, size);
        let mut link = self.core.link.lock();
        link.send(request::IOTLB_MSG, VERSION | wire::NEED_REPLY, message.as_bytes(), &[])?;
        self.stream.shutdown(std::net::Shutdown::Both).map_err(Error::io("shut the main socket down"))
    }

    /// Several INVALIDATEs in a row under one hold of the big lock, as when translation is switched off.
    pub fn invalidate_all(&self, ranges: &[(Iova, u64)]) -> Result<Vec<Ack>> {
        let mut link = self.core.link.lock();
        let one = |&(iova, size): &(Iova, u64)| {
            let message = IotlbMessage::invalidate(iova, size);
            link.acked("IOTLB INVALIDATE", request::IOTLB_MSG, message.as_bytes())
        };
        ranges.iter().map(one).collect()
    }

    /// An UPDATE that answers no MISS, with any numbers.
    pub fn update(&self, message: &IotlbMessage) -> Result<Ack> {
        self.core.link.lock().acked("IOTLB UPDATE", request::IOTLB_MSG, message.as_bytes())
    }

    /// Any message at all, and its reply if `flags` ask for one or the message has one.
    pub fn raw(&self, request: u32, flags: u32, body: &[u8], fds: &[i32]) -> Result<Message> {
        self.core.link.lock().exchange("raw", request, flags, body, fds)
    }

    /// The main socket itself, for measurements: nothing else may be sent meanwhile.
    pub fn main_socket(&self) -> Result<UnixStream> {
        self.stream.try_clone().map_err(Error::io("duplicate the main socket"))
    }

    /// Holds the big lock until dropped: QEMU stands still, and serves no miss.
    pub fn freeze(&self) -> Frozen<'_> {
        Frozen { _lock: self.core.link.lock() }
    }

    /// Whether the back-end has closed the main socket, waited for up to `timeout`. Misses are served meanwhile.
    pub fn is_closed_within(&self, timeout: Duration) -> Result<bool> {
        wire::wait_hang_up(&self.stream, timeout).map_err(Error::io("poll the main socket"))
    }

    /// Decides how misses are answered from now on.
    pub fn on_miss(&self, policy: Policy) {
        self.core.desk.set_policy(policy);
    }

    /// Answers misses as QEMU does from now on.
    pub fn serve_misses(&self) {
        self.on_miss(Box::new(|_| misses::Answer::Serve));
    }

    /// Lets misses wait (`true`), or go on.
    pub fn hold_misses(&self, yes: bool) {
        self.core.desk.hold_back(yes);
    }

    /// Sends the replies that [`misses::Answer::ServeTorn`] keeps back, these and all later ones, until the answer
    /// mode is set again.
    pub fn release_replies(&self) {
        self.core.desk.release_replies();
    }

    /// What came over the back-end channel so far.
    pub fn miss_counts(&self) -> MissCounts {
        self.core.desk.counts()
    }

    /// The latest misses, oldest first.
    pub fn recent_misses(&self) -> Vec<Miss> {
        self.core.desk.recent()
    }

    /// Waits until the counts of the back-end channel satisfy `until`; `false` after `timeout`.
    pub fn wait_for_misses(&self, timeout: Duration, until: impl Fn(&MissCounts) -> bool) -> bool {
        self.core.desk.wait(timeout, until)
    }
}

impl Drop for FrontEnd {
    fn drop(&mut self) {
        self.service = None;
    }
}

/// The big lock, held on purpose.
pub struct Frozen<'a> {
    _lock: Turn<'a, Link>,
}

impl fmt::Debug for Frozen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Frozen")
    }
}

#[cfg(test)]
#[path = "front_end_tests.rs"]
mod tests;
