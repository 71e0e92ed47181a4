//! Handlers: scanouts, display information, capability sets.

use job_stream::{CAPSET_ID, CAPSET_VERSION, Capset};
use virtio_bindings::virtio_gpu::VIRTIO_GPU_F_VIRGL;

use super::{Answer, Device, Handled, Shown};
use crate::gpu::error::CommandError;
use crate::gpu::reply::Reply;
use crate::gpu::request::{GetCapset, GetCapsetInfo, GetEdid, Nothing, SetScanout};
use crate::gpu::ring::RingCommand;
use crate::gpu::scanout::{DisplayQuery, ScanoutSource};
use crate::jobs::program::WEDGE;

/// The fewest pixels of a scanout in either direction (QEMU's virtio-gpu refuses less).
pub const MIN_SCANOUT: u32 = 16;

impl<P> Device<P> {
    pub(super) fn display_info(&mut self, _: Nothing, _: &mut Shown) -> Handled<P> {
        Ok(Answer::Ask(DisplayQuery::Modes))
    }

    pub(super) fn edid(&mut self, request: GetEdid, _: &mut Shown) -> Handled<P> {
        let (scanout, scanouts) = (request.scanout, self.scanouts.count());
        if scanout >= scanouts {
            return Err(CommandError::NoEdid { scanout, scanouts });
        }
        Ok(Answer::Ask(DisplayQuery::Edid { scanout }))
    }

    /// In order with the transfers and flushes around it: the image is shown with what was drawn into it before, and
    /// the previous image gets its last flush.
    pub(super) fn set_scanout(&mut self, request: SetScanout, _: &mut Shown) -> Handled<P> {
        self.ring.room()?;
        let SetScanout { scanout, resource, rect } = request;
        self.check_scanout(scanout)?;
        let source = match resource {
            0 => None,
            id => {
                let picture = self.resources.get(id)?.picture()?;
                let rect = picture.bounded(rect)?;
                if rect.width < MIN_SCANOUT || rect.height < MIN_SCANOUT {
                    return Err(CommandError::ScanoutTooSmall { rect });
                }
                Some(ScanoutSource { image: picture.image.clone(), order: picture.format.order, rect })
            }
        };
        Ok(Answer::InOrder(RingCommand::Show { scanout, source }))
    }

    /// Linux shows blobs only without VIRTIO_GPU_F_VIRGL, which this device always offers together with blobs.
    pub(super) fn set_scanout_blob(&mut self, _: Nothing, _: &mut Shown) -> Handled<P> {
        Err(CommandError::BlobNotShown)
    }

    /// There is one capability set, that of the job stream.
    pub(super) fn capset_info(&mut self, request: GetCapsetInfo, _: &mut Shown) -> Handled<P> {
        if request.index != 0 || !self.has(VIRTIO_GPU_F_VIRGL) {
            return Err(CommandError::NoSuchCapset { capset: request.index });
        }
        let reply = Reply::CapsetInfo(CAPSET_ID, CAPSET_VERSION, Capset::BYTES as u32);
        Ok(Answer::Now(reply))
    }

    /// The current version contains every version that a guest may request.
    pub(super) fn capset(&mut self, request: GetCapset, _: &mut Shown) -> Handled<P> {
        if request.id != CAPSET_ID || !self.has(VIRTIO_GPU_F_VIRGL) {
            return Err(CommandError::NoSuchCapset { capset: request.id });
        }
        let max_jobs = u32::try_from(self.config.quotas.queued_jobs).unwrap_or(u32::MAX);
        let jobs = &self.config.jobs;
        let wedge = u64::try_from(WEDGE.as_nanos()).unwrap_or(u64::MAX);
        let capset = Capset::new(jobs.engines, max_jobs, jobs.default_mode, wedge, &self.limits());
        Ok(Answer::Now(Reply::Capset(capset.to_bytes())))
    }

    pub(super) fn check_scanout(&self, scanout: u32) -> Result<(), CommandError> {
        let scanouts = self.scanouts.count();
        if scanout < scanouts { Ok(()) } else { Err(CommandError::NoSuchScanout { scanout, scanouts }) }
    }
}
