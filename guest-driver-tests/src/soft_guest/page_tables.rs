//! A driver of page tables: address spaces of the device in pages of guest memory. Written after the manual of the job
//! stream, independently of the device's own walk. Knows tables and entries; what they map is the caller's business.

use std::collections::BTreeMap;

use job_stream::{At, Space};

use super::addr::{Iova, PAGE, Permission};
use super::dma::{DmaBuffer, DmaSpace};
use super::dma_api::DmaApi;
use super::driver::GpuDriver;
use super::error::Result;
use super::gpu::Command;
use super::link::Ack;

/// Bits of an entry.
#[expect(missing_docs, reason = "the names are those of the manual")]
pub mod pte {
    pub const VALID: u64 = 1;
    pub const READ: u64 = 1 << 1;
    pub const WRITE: u64 = 1 << 2;
    pub const ATOMIC: u64 = 1 << 3;
    pub const NULL: u64 = 1 << 5;
    pub const LEAF: u64 = 1 << 6;
    /// A page for every use.
    pub const ALL: u64 = VALID | READ | WRITE | ATOMIC;
}

/// The page tables of an address space, each in a page that the device can read.
#[derive(Debug)]
pub struct PageTables {
    space: DmaSpace,
    /// By level, and by which table of that level it is; the root is of level 3.
    tables: BTreeMap<(u32, u64), DmaBuffer>,
}

/// Bytes that an entry of this level maps.
pub fn entry_size(level: u32) -> u64 {
    PAGE << (9 * level)
}

impl PageTables {
    /// Tables that map nothing.
    pub fn new(space: &DmaSpace) -> Result<Self> {
        let mut this = Self { space: space.clone(), tables: BTreeMap::new() };
        this.table(3, 0)?;
        Ok(this)
    }

    /// The root table, for AS_CREATE.
    pub fn root(&self) -> Iova {
        self.tables[&(3, 0)].address(0)
    }

    /// How many tables there are.
    pub fn count(&self) -> usize {
        self.tables.len()
    }

    fn table(&mut self, level: u32, number: u64) -> Result<Iova> {
        if let Some(table) = self.tables.get(&(level, number)) {
            return Ok(table.address(0));
        }
        let table = self.space.allocate(1, Permission::ReadOnly)?;
        table.write(0, &[0; PAGE as usize])?;
        let at = table.address(0);
        self.tables.insert((level, number), table);
        Ok(at)
    }

    /// Writes an entry of this level; the tables above it are made, and point to it.
    pub fn set(&mut self, gva: u64, level: u32, entry: u64) -> Result<()> {
        for above in (level + 1..=3).rev() {
            let next = self.table(above - 1, gva / entry_size(above))?;
            self.write(gva, above, next.0 | pte::VALID)?;
        }
        self.write(gva, level, entry)
    }

    fn write(&mut self, gva: u64, level: u32, entry: u64) -> Result<()> {
        self.table(level, gva / entry_size(level + 1))?;
        let table = &self.tables[&(level, gva / entry_size(level + 1))];
        table.write(gva / entry_size(level) % 512 * 8, &entry.to_le_bytes())
    }

    /// Maps the pages of a buffer one after the other, from `gva` on.
    pub fn map_pages(&mut self, gva: u64, buffer: &DmaBuffer, bits: u64) -> Result<()> {
        (0..buffer.pages() as u64 * PAGE)
            .step_by(PAGE as usize)
            .try_for_each(|offset| self.set(gva + offset, 0, buffer.address(offset).0 | bits))
    }

    /// Maps the large page around a buffer, at `gva`; returns where the buffer is.
    pub fn map_around(&mut self, gva: u64, level: u32, buffer: &DmaBuffer, bits: u64) -> Result<u64> {
        let (at, size) = (buffer.address(0).0, entry_size(level));
        self.set(gva, level, (at - at % size) | bits | pte::LEAF)?;
        Ok(gva + at % size)
    }

    /// Puts another frame with the same entries behind a table, the `which`th, while it stays mapped.
    pub fn move_table(&mut self, dma: &DmaApi, which: usize) -> Result<Ack> {
        let frame = self.space.frames().take(1)?[0];
        let mut entries = [0; PAGE as usize];
        let count = self.tables.len();
        // PANIC: test code: there is a root.
        let table = self.tables.values_mut().nth(which % count).expect("a table");
        table.read(0, &mut entries)?;
        self.space.frames().ram().write(frame, &entries)?;
        dma.swap_page(table, 0, frame)
    }

    /// The table of this level that `gva` leads to, which the tables no longer know.
    pub fn take_table(&mut self, gva: u64, level: u32) -> Option<DmaBuffer> {
        self.tables.remove(&(level, gva / entry_size(level + 1)))
    }

    /// Gives all tables back, as after AS_DESTROY.
    pub fn free(self, dma: &DmaApi) -> Result<()> {
        self.tables.into_values().try_for_each(|table| dma.unmap(table).map(drop))
    }
}

/// A byte of an address space, to a job.
pub fn in_space(asid: u32, gva: u64) -> At {
    At::new(Space::address_space(asid), gva)
}

/// Sends a few flushes of nothing at once: the device then has translations of what commands are in, and flushes that
/// follow need no MISS.
pub fn warm_up(driver: &mut GpuDriver, asid: u32) -> Result<()> {
    let flush = Command::as_invalidate(1, asid, false, (0, 0));
    let tickets = (0..8).map(|_| driver.submit(&flush)).collect::<Result<Vec<_>>>()?;
    tickets.into_iter().try_for_each(|ticket| driver.wait_ok(ticket).map(drop))
}
