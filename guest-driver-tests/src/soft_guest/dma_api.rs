//! How a kernel unmaps: first the IOMMU's table, then INVALIDATE, and only after the ack does another owner, here the
//! late-touch oracle, get the frames. Strict (at once) and lazy (everything, now and then).

use std::sync::{Arc, Mutex};

use super::addr::{Gpa, Iova, PAGE};
use super::dma::{DmaBuffer, DmaSpace};
use super::error::{Error, Result};
use super::front_end::FrontEnd;
use super::link::Ack;
use super::oracle::LateTouch;
use super::turn::held;

/// The two ranges of a VT-d global flush, as QEMU sends them: all but the interrupt messages.
pub const WHOLE_DOMAIN: [(Iova, u64); 2] =
    [(Iova(0), 0xfee0_0000), (Iova(0xfef0_0000), 0xffff_ffff_0110_0000)];

/// The about thirty power-of-two blocks that QEMU invalidates when translation is switched off: here 28, from a
/// page up to 2^39 bytes.
pub fn burst() -> Vec<(Iova, u64)> {
    (0..28).map(|i| (Iova(PAGE << i), PAGE << i)).collect()
}

/// Unmaps, with everything that it involves. Usable from any thread.
#[derive(Clone, Debug)]
pub struct DmaApi {
    space: DmaSpace,
    front_end: Arc<FrontEnd>,
    oracle: Arc<LateTouch>,
    flush_queue: Arc<Mutex<Vec<DmaBuffer>>>,
}

impl DmaApi {
    /// For the device behind this front-end.
    pub fn new(space: DmaSpace, front_end: Arc<FrontEnd>, oracle: Arc<LateTouch>) -> Self {
        Self { space, front_end, oracle, flush_queue: Arc::default() }
    }

    /// Where buffers come from.
    pub fn space(&self) -> &DmaSpace {
        &self.space
    }

    /// Where frames go.
    pub fn oracle(&self) -> &Arc<LateTouch> {
        &self.oracle
    }

    fn invalidate(&self, iova: Iova, size: u64) -> Result<Ack> {
        must_be_zero(self.front_end.invalidate(iova, size)?)
    }

    /// Strict mode: unmaps a buffer, and retires its frames once the device has acked.
    pub fn unmap(&self, buffer: DmaBuffer) -> Result<Ack> {
        let iova = mapped(&buffer)?;
        self.space.iommu().unmap(iova, buffer.pages());
        let ack = self.invalidate(iova, buffer.pages() as u64 * PAGE)?;
        self.retire(buffer)?;
        Ok(ack)
    }

    /// Strict mode on VT-d: the range is rounded up to an aligned power of two, which may hit neighbours in use.
    pub fn unmap_rounded(&self, buffer: DmaBuffer) -> Result<Ack> {
        let iova = mapped(&buffer)?;
        self.space.iommu().unmap(iova, buffer.pages());
        let (mut order, last) = (0, iova.plus(buffer.pages() as u64 * PAGE - 1));
        while (iova.0 ^ last.0) >> (12 + order) != 0 {
            order += 1;
        }
        let size = PAGE << order;
        let ack = self.invalidate(Iova(iova.0 & !(size - 1)), size)?;
        self.retire(buffer)?;
        Ok(ack)
    }

    fn retire(&self, buffer: DmaBuffer) -> Result<()> {
        if let Some(iova) = buffer.iova() {
            self.space.iommu().release(iova, buffer.pages());
        }
        self.oracle.retire(buffer.frames())
    }

    /// Unmaps a page and maps another frame in its place, as when an IOVA is reused at once (scenario 15). The new
    /// frame holds zeros. In between, the page is not mapped: a device that uses it just then gets a fault.
    pub fn move_page(&self, buffer: &mut DmaBuffer, page: usize) -> Result<Ack> {
        let frame = self.space.frames().take(1)?[0];
        let iova = mapped(buffer)?.plus(page as u64 * PAGE);
        self.space.iommu().unmap(iova, 1);
        let ack = self.invalidate(iova, PAGE)?;
        self.space.iommu().map(iova, frame, buffer.permission());
        self.oracle.retire(&[buffer.replace_frame(page, frame)])?;
        Ok(ack)
    }

    /// Replaces the frame of a page that stays mapped all the time.
    pub fn swap_page(&self, buffer: &mut DmaBuffer, page: usize, frame: Gpa) -> Result<Ack> {
        let iova = mapped(buffer)?.plus(page as u64 * PAGE);
        self.space.iommu().map(iova, frame, buffer.permission());
        let ack = self.invalidate(iova, PAGE)?;
        self.oracle.retire(&[buffer.replace_frame(page, frame)])?;
        Ok(ack)
    }

    /// Lazy mode: unmaps a buffer, but leaves the device its translations until [`Self::flush`].
    pub fn unmap_later(&self, buffer: DmaBuffer) -> Result<()> {
        self.space.iommu().unmap(mapped(&buffer)?, buffer.pages());
        held(&self.flush_queue).push(buffer);
        Ok(())
    }

    /// Lazy mode: flushes the whole domain, and retires what was unmapped before.
    pub fn flush(&self) -> Result<Vec<Ack>> {
        let unmapped = std::mem::take(&mut *held(&self.flush_queue));
        let acks = self.front_end.invalidate_all(&WHOLE_DOMAIN)?;
        for &ack in &acks {
            must_be_zero(ack)?;
        }
        for buffer in unmapped {
            self.retire(buffer)?;
        }
        Ok(acks)
    }
}

fn mapped(buffer: &DmaBuffer) -> Result<Iova> {
    buffer.iova().ok_or_else(|| Error::NotMapped(buffer.address(0)))
}

fn must_be_zero(ack: Ack) -> Result<Ack> {
    if ack.status == 0 {
        return Ok(ack);
    }
    Err(Error::Reply { message: "IOTLB INVALIDATE", got: format!("status {}", ack.status) })
}
