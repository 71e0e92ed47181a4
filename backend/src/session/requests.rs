//! The vhost-user requests that the `vhost` crate parses. Those that remove memory or stop a ring arrive here only
//! after their drain (see [`super::Session`]). A refused request changes nothing.

use std::fs::File;
use std::io;
use std::iter::repeat;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;

use device_model::addr::FrontendVa;
use epoll::Events;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VringT;
use virtio_bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use device_model::session::{ACCESS_PLATFORM, Offer, QUEUES, Refusal};

use super::state::SessionState;
use crate::queues::MAX_QUEUE_SIZE;
use crate::queues::mailbox::QueueMessage;
use crate::queues::ring::SharedRing;
use crate::vhost_user::memory::table::MAX_REGIONS;
use crate::vhost_user::memory::{MemoryTable, RegionSpec};

/// What ACCESS_PLATFORM depends on: the IOTLB needs acks and a channel for misses.
const IOTLB_NEEDS: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::REPLY_ACK.union(VhostUserProtocolFeatures::BACKEND_REQ);

/// The protocol features that are implemented.
const PROTOCOL_FEATURES: VhostUserProtocolFeatures = IOTLB_NEEDS
    .union(VhostUserProtocolFeatures::MQ)
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE);

/// Bits that QEMU's vhost-user-gpu passes on from the driver without checking that they were offered. The first two are
/// implemented (and offered); a queue reset has no vhost-user message, so it needs no work.
const UNASKED: u64 =
    1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_F_RING_RESET;

/// The features that the front-end may choose from, for a device with these device features.
pub(super) fn offer(device_features: u64) -> Offer {
    let transport = 1 << VIRTIO_F_VERSION_1
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | ACCESS_PLATFORM
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    Offer { virtio: transport | device_features, passed_on: UNASKED, protocol: PROTOCOL_FEATURES.bits() }
}

impl SessionState {
    /// Refuses a request that has changed nothing. The front-end gets an error reply, if it asked for one.
    fn refuse<T>(&mut self, refusal: Refusal) -> Result<T> {
        let error = io::Error::new(io::ErrorKind::InvalidInput, refusal.to_string());
        self.refusal = Some(refusal);
        Err(Error::ReqHandlerError(error))
    }

    fn or_refuse<T>(&mut self, result: std::result::Result<T, Refusal>) -> Result<T> {
        result.or_else(|refusal| self.refuse(refusal))
    }

    /// Carries out the effects of a request.
    fn follow(&mut self) {
        let now = self.now();
        self.carry_out(now);
    }

    fn stopped_ring(&mut self, index: u32) -> Result<usize> {
        let queue = self.core.stopped_ring(index);
        self.or_refuse(queue)
    }

    fn ring(&mut self, index: u32) -> Result<usize> {
        let queue = self.core.ring(index);
        self.or_refuse(queue)
    }

    fn shared_ring(&self, queue: usize) -> &SharedRing {
        // PANIC: `queue` comes from the session, which has checked it against the number of rings.
        &self.queue.rings[queue]
    }

    /// The driver's address of the ring at the front-end address `address`.
    fn ring_address(&mut self, address: u64) -> Result<u64> {
        if self.core.has_iommu() {
            return Ok(address);
        }
        match self.memory.gpa_of(FrontendVa::new(address)) {
            Some(gpa) => Ok(gpa.raw()),
            None => self.refuse(Refusal::RingAddress { address }),
        }
    }

    fn start_ring(&mut self, queue: usize, kick: File) -> Result<()> {
        self.forget_kick(queue);
        let fd = kick.as_raw_fd();
        if let Err(e) = self.shared_ring(queue).kick.set(Some(kick)) {
            return self.refuse(Refusal::other(e));
        }
        let events = Events::EPOLLIN | Events::EPOLLET;
        if let Err(e) = self.queue.poller.add(fd, queue as u64, events) {
            let _ = self.shared_ring(queue).kick.set(None);
            return self
                .refuse(Refusal::other(format!("Kick descriptor of ring {queue} cannot be polled: {e}")));
        }
        let ring = self.shared_ring(queue);
        // ORDERING: Release pairs with the queue thread's Acquire.
        ring.fresh.store(true, Ordering::Release);
        let now = self.now();
        self.core.start_ring(now, queue);
        self.follow();
        Ok(())
    }
}

/// What the driver's choice means for the mirror.
fn said_of(features: u64) -> &'static str {
    if features & ACCESS_PLATFORM != 0 {
        "The driver has accepted VIRTIO_F_ACCESS_PLATFORM: the device is behind the guest's IOMMU, and mirrors it"
    } else {
        "The driver has not accepted VIRTIO_F_ACCESS_PLATFORM: addresses are guest-physical, and no IOMMU is mirrored (QEMU \
         offers it with iommu_platform=on)"
    }
}

fn spec_of(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        gpa: region.guest_phys_addr,
        size: region.memory_size,
        user_address: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

impl VhostUserBackendReqHandlerMut for SessionState {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        let now = self.now();
        self.core.reset_device(now);
        self.follow();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.core.offer().virtio)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let before = self.core.driver_features();
        let chosen = self.core.set_features(features);
        self.or_refuse(chosen)?;
        self.follow();
        if features != before {
            log::info!("{}", said_of(features));
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let specs: Vec<_> = regions.iter().map(spec_of).collect();
        match MemoryTable::map(&specs, &files) {
            Ok(table) => self.memory = table,
            Err(e) => return self.refuse(Refusal::other(e)),
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let queue = self.stopped_ring(index)?;
        match u16::try_from(num) {
            Ok(size) if size.is_power_of_two() && size <= MAX_QUEUE_SIZE => {
                self.shared_ring(queue).vring.set_queue_size(size);
                Ok(())
            }
            _ => self.refuse(Refusal::RingSize { size: num, most: MAX_QUEUE_SIZE }),
        }
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let queue = self.stopped_ring(index)?;
        let [descriptor, available, used] =
            [self.ring_address(descriptor)?, self.ring_address(available)?, self.ring_address(used)?];
        match self.shared_ring(queue).vring.set_queue_info(descriptor, available, used) {
            Ok(()) => Ok(()),
            Err(e) => self.refuse(Refusal::other(format!("Ring {index} cannot lie there: {e}"))),
        }
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let queue = self.stopped_ring(index)?;
        let now = self.now();
        let base = self.core.set_base(now, index, base);
        let base = self.or_refuse(base)?;
        self.follow();
        self.shared_ring(queue).vring.set_queue_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = usize::try_from(index).unwrap_or(usize::MAX);
        if queue >= QUEUES {
            // The crate has no negative reply here, and the front-end waits for a reply: the session ends.
            return Err(Error::InvalidParam);
        }
        let base = self.shared_ring(queue).vring.queue_next_avail();
        self.core.base_given(queue, base);
        self.follow();
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let queue = self.stopped_ring(u32::from(index))?;
        match file {
            Some(kick) => self.start_ring(queue, kick),
            None => self.refuse(Refusal::NoKick { index: u32::from(index) }),
        }
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let queue = self.ring(u32::from(index))?;
        match self.shared_ring(queue).call.set(file) {
            Ok(_) if self.shared_ring(queue).is_started() => {
                self.queue.mailbox.post(QueueMessage::CallReplaced(queue));
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(e) => self.refuse(Refusal::other(e)),
        }
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let queue = self.ring(u32::from(index))?;
        match self.shared_ring(queue).error.set(file) {
            Ok(_) => Ok(()),
            Err(e) => self.refuse(Refusal::other(e)),
        }
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(PROTOCOL_FEATURES)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let chosen = self.core.set_protocol_features(features);
        self.or_refuse(chosen)
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let queue = self.ring(index)?;
        let now = self.now();
        self.core.enable_ring(now, queue, enable);
        self.follow();
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        // The crate limits the size to 4 KiB.
        let (start, size) = (offset as usize, size as usize);
        match self.config_space.get(start..) {
            // A newer front-end requests fields that this device does not have: they read as 0. (QEMU 11 does so, and
            // takes a shorter answer for an error.)
            Some(bytes @ [_, ..]) => Ok(bytes.iter().copied().chain(repeat(0)).take(size).collect()),
            // The crate reports this to the front-end as an empty payload.
            _ => Err(Error::InvalidParam),
        }
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        // The only field that a driver may write clears events, and the device raises none.
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        // The session handles GPU_SET_SOCKET itself, to keep a duplicate of the socket.
        Err(Error::InvalidOperation("GPU_SET_SOCKET is taken by the session"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("there are no shared objects"))
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("in-flight descriptors are not offered"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("in-flight descriptors are not offered"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if let Err(e) = self.memory.add(spec_of(region), &file) {
            return self.refuse(Refusal::other(e));
        }
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        match self.memory.remove(spec_of(region)) {
            // Dropping it unmaps the region, which was drained before.
            Ok(region) => drop(region),
            Err(e) => return self.refuse(Refusal::other(e)),
        }
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("the device state cannot be transferred"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("the device state cannot be transferred"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("there is no shared memory"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("dirty logging is not offered"))
    }
}
