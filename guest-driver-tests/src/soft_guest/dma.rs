//! Buffers that a driver shares with its device: frames, and the addresses at which the device sees them. Behind an
//! IOMMU, scattered frames get contiguous IOVAs, as dma-iommu does; without one, the address is that of the frame.
//! Unmapping is in `dma_api`, which invalidates.

use std::sync::Arc;

use super::addr::{Gpa, Iova, PAGE, Permission};
use super::error::Result;
use super::frames::Frames;
use super::iommu::Iommu;
use super::memory::GuestRam;

/// A piece of a buffer that is contiguous for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where the device finds it.
    pub at: Iova,
    /// Length in bytes.
    pub len: u32,
}

impl Segment {
    /// As an entry of a backing (struct virtio_gpu_mem_entry).
    pub fn words(&self) -> [u32; 4] {
        [self.at.0 as u32, (self.at.0 >> 32) as u32, self.len, 0]
    }
}

/// Makes buffers.
#[derive(Clone, Debug)]
pub struct DmaSpace {
    frames: Arc<Frames>,
    iommu: Arc<Iommu>,
    translated: bool,
}

impl DmaSpace {
    /// Buffers out of these frames, behind this IOMMU if `translated`.
    pub fn new(frames: Arc<Frames>, iommu: Arc<Iommu>, translated: bool) -> Self {
        Self { frames, iommu, translated }
    }

    /// A buffer of `pages` pages in scattered frames.
    pub fn allocate(&self, pages: usize, permission: Permission) -> Result<DmaBuffer> {
        Ok(self.map(self.frames.take(pages)?, permission))
    }

    /// A buffer in frames that follow one another: a huge page, or a ring without an IOMMU.
    pub fn allocate_run(&self, pages: usize, permission: Permission) -> Result<DmaBuffer> {
        Ok(self.map(self.frames.take_run(pages)?, permission))
    }

    /// A buffer that is contiguous for the device: scattered frames where an IOMMU makes them so.
    pub fn allocate_coherent(&self, pages: usize, permission: Permission) -> Result<DmaBuffer> {
        if self.translated { self.allocate(pages, permission) } else { self.allocate_run(pages, permission) }
    }

    /// Maps these frames, in this order.
    pub fn map(&self, frames: Vec<Gpa>, permission: Permission) -> DmaBuffer {
        let iova = self.translated.then(|| {
            let iova = self.iommu.allocate(frames.len());
            for (page, &frame) in frames.iter().enumerate() {
                self.iommu.map(iova.plus(page as u64 * PAGE), frame, permission);
            }
            iova
        });
        DmaBuffer { ram: self.frames.ram().clone(), frames, iova, permission }
    }

    /// The frames that it allocates from and frees to.
    pub fn frames(&self) -> &Arc<Frames> {
        &self.frames
    }

    /// The IOMMU, which without `translated` maps nothing.
    pub fn iommu(&self) -> &Arc<Iommu> {
        &self.iommu
    }
}

/// A buffer in guest memory that the device may use.
#[derive(Debug)]
pub struct DmaBuffer {
    ram: Arc<GuestRam>,
    frames: Vec<Gpa>,
    iova: Option<Iova>,
    permission: Permission,
}

impl DmaBuffer {
    /// Length in pages.
    pub fn pages(&self) -> usize {
        self.frames.len()
    }

    /// The frames, in order.
    pub fn frames(&self) -> &[Gpa] {
        &self.frames
    }

    /// What the device may do with it.
    pub fn permission(&self) -> Permission {
        self.permission
    }

    /// The contiguous IOVAs, if there is an IOMMU.
    pub fn iova(&self) -> Option<Iova> {
        self.iova
    }

    /// Where a byte is in guest memory.
    pub fn gpa(&self, offset: u64) -> Gpa {
        self.frames[(offset / PAGE) as usize].plus(offset % PAGE)
    }

    /// Where the device finds a byte.
    pub fn address(&self, offset: u64) -> Iova {
        match self.iova {
            Some(iova) => iova.plus(offset),
            None => Iova(self.gpa(offset).0),
        }
    }

    /// The pieces of `len` bytes from `offset` on that are contiguous for the device.
    pub fn segments(&self, offset: u64, len: u64) -> Vec<Segment> {
        let mut segments: Vec<Segment> = Vec::new();
        for (at, piece) in pieces(offset, len) {
            let at = self.address(at);
            match segments.last_mut() {
                Some(last) if last.at.plus(last.len.into()) == at => last.len += piece as u32,
                _ => segments.push(Segment { at, len: piece as u32 }),
            }
        }
        segments
    }

    /// Reads as the CPU does.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        for (at, piece) in pieces(offset, into.len() as u64) {
            let start = (at - offset) as usize;
            self.ram.read(self.gpa(at), &mut into[start..start + piece as usize])?;
        }
        Ok(())
    }

    /// Writes as the CPU does.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        for (at, piece) in pieces(offset, from.len() as u64) {
            let start = (at - offset) as usize;
            self.ram.write(self.gpa(at), &from[start..start + piece as usize])?;
        }
        Ok(())
    }

    /// Reads an index of a ring.
    pub fn load(&self, offset: u64) -> Result<u16> {
        self.ram.load(self.gpa(offset))
    }

    /// Writes an index of a ring.
    pub fn store(&self, offset: u64, value: u16) -> Result<()> {
        self.ram.store(self.gpa(offset), value)
    }

    /// Replaces the frame of a page without notifying the device; returns the old one.
    pub fn replace_frame(&mut self, page: usize, frame: Gpa) -> Gpa {
        std::mem::replace(&mut self.frames[page], frame)
    }
}

fn pieces(offset: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = offset + len;
    let mut at = offset;
    std::iter::from_fn(move || {
        let piece = (PAGE - at % PAGE).min(end - at);
        let start = at;
        at += piece;
        (piece != 0).then_some((start, piece))
    })
}

#[cfg(test)]
mod tests {
    use super::super::memory::RamConfig;
    use super::*;

    fn space(translated: bool) -> DmaSpace {
        let ram = Arc::new(GuestRam::new(RamConfig::default()).unwrap());
        DmaSpace::new(Arc::new(Frames::new(ram, 3)), Arc::new(Iommu::default()), translated)
    }

    #[test]
    fn scattered_frames_are_one_segment_behind_an_iommu_and_many_without() {
        let buffer = space(true).allocate(4, Permission::ReadWrite).unwrap();
        assert_eq!(buffer.segments(100, 9000), [Segment { at: buffer.address(100), len: 9000 }]);
        let buffer = space(false).allocate(4, Permission::ReadWrite).unwrap();
        let segments = buffer.segments(100, 9000);
        assert_eq!(segments.iter().map(|segment| segment.len).collect::<Vec<_>>(), [3996, 4096, 908]);
        assert_eq!(segments[1].at.0, buffer.frames()[1].0);
    }

    #[test]
    fn bytes_come_back_across_pages() {
        let buffer = space(true).allocate(3, Permission::ReadWrite).unwrap();
        let bytes: Vec<u8> = (0..8000_u32).map(|i| i as u8).collect();
        buffer.write(50, &bytes).unwrap();
        let mut back = vec![0; 8000];
        buffer.read(50, &mut back).unwrap();
        assert_eq!(back, bytes);
    }
}
