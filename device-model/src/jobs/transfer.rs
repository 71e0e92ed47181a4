//! TRANSFER_TO_HOST_2D: copies the rows of a rect from the backing of a resource into its image. Knows which byte goes
//! where and how far it has come; knows nothing of commands, sections or pins.
//!
//! Row `n` of the rect comes from `offset + n * stride` of the backing, where `stride` is that of the *image*, as in
//! QEMU's virtio-gpu. Rows, or ends of rows, beyond the end of the backing are left unchanged in the image: the image
//! holds the guest's bytes or zeros, never host data.

use std::sync::Arc;

use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use crate::image::BYTES_PER_PIXEL;
use crate::image::{Image, Rect};
use crate::jobs::backing::Backing;
use crate::jobs::error::InvalidMemory;
use crate::jobs::job::{JobError, Step};
use crate::jobs::offsets::{OffsetSet, Offsets, Rows};
use crate::jobs::working_set::{BackingPart, WorkingSet};
use crate::mmu::{JobMemory, MemoryError, PinRange};

/// The least that a run of contiguous bytes costs of a step's budget: looking it up takes as long as copying this many
/// bytes, and a rect one pixel wide has one run per row.
const RUN_COST: usize = 256;

/// A transfer that can be resumed after every run.
#[derive(Debug)]
pub(crate) struct Transfer {
    image: Arc<Image>,
    plan: Plan,
}

impl Transfer {
    /// The transfer of `rect`, which lies in `image` and is not empty, from `offset` of `backing` on.
    pub(crate) fn new(
        image: Arc<Image>,
        backing: Backing,
        rect: Rect,
        offset: u64,
    ) -> Result<Self, InvalidMemory> {
        let plan = Plan::new(&image, backing, rect, offset).ok_or(InvalidMemory::OffsetWraps { offset })?;
        Ok(Self { image, plan })
    }

    /// The image that it writes.
    pub(crate) fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Bytes copied so far.
    pub(crate) fn bytes_moved(&self) -> u64 {
        self.plan.done
    }

    /// What it still has to read, merged where pages are equal or adjacent.
    pub(crate) fn working_set(&self) -> Vec<PinRange> {
        let pin = |range| PinRange { space: DomainId::DEVICE, range, access: Access::Read };
        merged(self.plan.pieces().collect()).into_iter().map(pin).collect()
    }

    /// All that it reads, in compact form.
    pub(crate) fn touches(&self) -> WorkingSet {
        let (entries, reads) = (self.plan.backing.share_entries(), self.plan.touches());
        WorkingSet::new(std::iter::once(BackingPart { entries, reads, writes: OffsetSet::default() }))
    }

    /// Copies up to `budget` bytes. It does not wait: if another thread has the image, it yields at once.
    pub(crate) fn step(&mut self, memory: &impl JobMemory, budget: usize) -> Step {
        let Some(mut pixels) = self.image.try_lock() else { return Step::Yield };
        let mut left = budget.max(1);
        while left > 0 {
            let Some(run) = self.plan.next_run(left) else { return Step::Done };
            let Some(into) = pixels.get_mut(run.target..).and_then(|rest| rest.get_mut(..run.len)) else {
                // The rect was checked against the image.
                debug_assert!(false, "{run:?} lies outside of {:?}", self.image);
                return Step::Error(JobError::OutsideImage);
            };
            match memory.read(DomainId::DEVICE, run.source, into) {
                Ok(()) => self.plan.advance(run.len),
                Err(MemoryError::Missing(missing)) => return Step::Missing(missing),
                Err(bug) => return Step::Error(JobError::Memory(bug)),
            }
            left = left.saturating_sub(run.len.max(RUN_COST));
        }
        if self.plan.next_run(1).is_none() { Step::Done } else { Step::Yield }
    }
}

/// Bytes that are contiguous in the guest and in the image, within one page of the guest.
#[derive(Debug)]
struct Run {
    source: Iova,
    target: usize,
    len: usize,
}

/// Which bytes go where. All numbers are bytes.
///
/// OVERFLOW: `new` has computed the ends of source and target without overflow; all that the other functions compute
/// lies below those. They saturate where the compiler cannot prove it.
#[derive(Debug)]
struct Plan {
    backing: Backing,
    /// Offset of the first row in the backing.
    source: u64,
    /// Offset of the first row in the image.
    target: u64,
    /// From one row to the next, in source and target.
    stride: u64,
    /// Length of a row.
    row: u64,
    /// Length of all rows.
    total: u64,
    /// How much of `total` has been copied.
    done: u64,
}

impl Plan {
    /// `None` if the last row ends past 2^64 - 1 in the backing.
    fn new(image: &Image, backing: Backing, rect: Rect, offset: u64) -> Option<Self> {
        let stride = image.stride() as u64;
        let row = u64::from(rect.width).checked_mul(BYTES_PER_PIXEL)?;
        let total = row.checked_mul(rect.height.into())?;
        let left = u64::from(rect.x).checked_mul(BYTES_PER_PIXEL)?;
        let target = stride.checked_mul(rect.y.into())?.checked_add(left)?;
        stride.checked_mul(rect.height.into())?.checked_add(offset)?;
        // Rows without gaps between them are one row.
        let row = if row == stride { total } else { row };
        Some(Self { backing, source: offset, target, stride, row, total, done: 0 })
    }

    /// How far the byte `done` of the copy is from the first one, and how many bytes follow in its row.
    fn place(&self, done: u64) -> (u64, u64) {
        let row = done.checked_div(self.row).unwrap_or(0);
        let column = done.checked_rem(self.row).unwrap_or(0);
        (row.saturating_mul(self.stride).saturating_add(column), self.row.saturating_sub(column))
    }

    /// The next bytes to copy, at most `limit`, which is not 0; `None`: all are done.
    fn next_run(&self, limit: usize) -> Option<Run> {
        if self.done >= self.total {
            return None;
        }
        let (distance, in_row) = self.place(self.done);
        let (source, in_entry) = self.backing.locate(self.source.saturating_add(distance))?;
        let in_page = PAGE_SIZE.saturating_sub(source.page_offset());
        let len = in_row.min(in_entry).min(in_page);
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(limit);
        let target = usize::try_from(self.target.saturating_add(distance)).ok()?;
        Some(Run { source, target, len })
    }

    /// All bytes that are copied. Offsets beyond the end of the backing are included; no memory lies behind them.
    fn touches(&self) -> OffsetSet {
        let last = self.row.saturating_sub(1).saturating_add(self.source);
        let Some(row) = Offsets::inclusive(self.source, last) else { return OffsetSet::default() };
        match self.total.checked_div(self.row).unwrap_or(0) {
            1 => OffsetSet::new(vec![row]),
            count => OffsetSet::Rows(Rows { row, stride: self.stride, count }),
        }
    }

    fn advance(&mut self, len: usize) {
        self.done = self.done.saturating_add(len as u64);
    }

    /// What it still has to read, entry by entry. Rows in the same entry form one piece if no whole page lies between
    /// them, so there are not many more pieces than pages and entries.
    fn pieces(&self) -> impl Iterator<Item = ByteRange<Iova>> + '_ {
        let mut done = self.done;
        std::iter::from_fn(move || {
            let (piece, next) = self.piece(done)?;
            done = next;
            Some(piece)
        })
    }

    /// The piece that begins with the byte `done` of the copy, and the first byte of the copy after it.
    fn piece(&self, done: u64) -> Option<(ByteRange<Iova>, u64)> {
        if done >= self.total {
            return None;
        }
        let (distance, in_row) = self.place(done);
        let (at, in_entry) = self.backing.locate(self.source.saturating_add(distance))?;
        let next = if self.stride.saturating_sub(self.row) < PAGE_SIZE {
            self.copied_within(distance.saturating_add(in_entry))
        } else {
            done.saturating_add(in_row.min(in_entry))
        };
        let (last, _) = self.place(next.saturating_sub(1));
        let len = last.saturating_sub(distance).saturating_add(1);
        Some((ByteRange::new(at, len).ok()?, next))
    }

    /// How many bytes of the copy lie in the first `distance` bytes of the source.
    fn copied_within(&self, distance: u64) -> u64 {
        if self.row >= self.total {
            return distance.min(self.total);
        }
        let rows = distance.checked_div(self.stride).unwrap_or(0);
        let column = distance.checked_rem(self.stride).unwrap_or(0).min(self.row);
        rows.saturating_mul(self.row).saturating_add(column).min(self.total)
    }
}

/// The ranges in order, those that touch the same or adjacent pages merged.
pub(crate) fn merged(mut ranges: Vec<ByteRange<Iova>>) -> Vec<ByteRange<Iova>> {
    ranges.sort_unstable();
    // In place: these lists may be long, and allocating memory costs more than the rest.
    ranges.dedup_by(|range, last| {
        let joins = touch(*last, *range);
        if joins {
            *last = ByteRange::inclusive(last.first(), last.last().max(range.last())).unwrap_or(*last);
        }
        joins
    });
    ranges
}

/// Whether no page lies between `low` and `high`, which begins no lower.
fn touch(low: ByteRange<Iova>, high: ByteRange<Iova>) -> bool {
    match low.last().page().checked_add(PAGE_SIZE) {
        Some(next) => high.first().page() <= next,
        None => true,
    }
}

#[cfg(test)]
mod tests;
