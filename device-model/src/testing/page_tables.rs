//! Page tables of an address space, written into the memory of a test as a driver does it.

use std::collections::BTreeMap;

use job_stream::address_space::{LEVELS, pte};

use crate::addr::{ByteRange, DomainId, Iova, PAGE_SIZE};
use crate::mmu::JobMemory;
use crate::testing::memory::SparseMemory;

/// Page tables. Each table gets a page of its own, from a first one upwards.
#[derive(Clone, Debug)]
pub struct PageTables {
    root: Iova,
    next: u64,
    /// The tables below the root: level, and the part of the Gva above what the table maps.
    tables: BTreeMap<(u32, u64), Iova>,
}

impl PageTables {
    /// Empty tables; the root is at `first`.
    pub fn new(memory: &mut SparseMemory, first: u64) -> Self {
        let mut this = Self { root: Iova::new(first), next: first, tables: BTreeMap::new() };
        this.root = this.table(memory);
        this
    }

    /// The root table.
    pub fn root(&self) -> u64 {
        self.root.raw()
    }

    /// Every table.
    pub fn pages(&self) -> impl Iterator<Item = Iova> + '_ {
        std::iter::once(self.root).chain(self.tables.values().copied())
    }

    fn table(&mut self, memory: &mut SparseMemory) -> Iova {
        let at = Iova::new(self.next);
        self.next += PAGE_SIZE;
        memory.fill(ByteRange::new(at, PAGE_SIZE).expect("a page"));
        memory.write(DomainId::DEVICE, at, &[0; PAGE_SIZE as usize]).expect("it is there");
        at
    }

    /// Where the entry of this level is that maps `gva`. Missing tables above it are added, and replace leaves.
    pub fn entry(&mut self, memory: &mut SparseMemory, gva: u64, level: u32) -> Iova {
        let mut table = self.root;
        for above in (level + 1..LEVELS).rev() {
            let key = (above - 1, gva / size_of_entry(above));
            let next = match self.tables.get(&key) {
                Some(next) => *next,
                None => self.table(memory),
            };
            self.tables.insert(key, next);
            set(memory, slot(table, gva, above), next.raw() | pte::VALID);
            table = next;
        }
        slot(table, gva, level)
    }

    /// Writes the entry of this level that maps `gva`.
    pub fn map(&mut self, memory: &mut SparseMemory, gva: u64, level: u32, entry: u64) {
        let at = self.entry(memory, gva, level);
        set(memory, at, entry);
    }
}

/// Bytes that an entry of this level maps.
pub fn size_of_entry(level: u32) -> u64 {
    PAGE_SIZE * 512_u64.pow(level)
}

fn slot(table: Iova, gva: u64, level: u32) -> Iova {
    Iova::new(table.raw() + gva / size_of_entry(level) % 512 * 8)
}

fn set(memory: &SparseMemory, at: Iova, entry: u64) {
    memory.write(DomainId::DEVICE, at, &entry.to_le_bytes()).expect("the table is there");
}
