//! The radix page tables: nodes of atomic words, and the walk through them. Readers walk without locks, inside a
//! section; the one writer ([`super::table_writer`]) changes words and frees nodes that no section can see any more.
//! Knows nothing of the protocol of sections, of invalidations or guests.
//!
//! A space has two roots: one of three levels for the lowest 512 GiB, where guests put nearly everything, and one of
//! six levels for the rest of the 64 bits. A lookup of a low address is thus always three loads.

use std::sync::atomic::AtomicU32;

use super::entry::{TABLE_ALIGN, TableEntry};
use super::section::Inside;
use crate::addr::{Access, PAGE_SHIFT};
use crate::sync::{AtomicU64, Ordering};

/// log2 of the entries in a node. Loom's models need the smallest trees that still have levels.
pub(super) const LEVEL_BITS: u32 = if cfg!(loom) { 1 } else { 9 };
/// Entries in a node.
pub(super) const FANOUT: u64 = 1 << LEVEL_BITS;
/// Levels below the root for low addresses.
pub(super) const LOW_LEVELS: u32 = 3;
/// Levels below the root for all 64 bits.
pub(super) const HIGH_LEVELS: u32 = (u64::BITS - PAGE_SHIFT).div_ceil(LEVEL_BITS);
/// The first page number that is not low.
pub(super) const LOW_END: u64 = 1 << (LOW_LEVELS * LEVEL_BITS);

/// Pages under one entry of a node at `level`; nodes of level 0 hold single pages.
pub(super) const fn pages_under(level: u32) -> u64 {
    1 << (level * LEVEL_BITS)
}

/// One table.
#[repr(align(64))]
pub(super) struct Node {
    entries: [AtomicU64; FANOUT as usize],
    /// How many entries are not empty. Only the writer accesses it: plain std, also under loom.
    used: AtomicU32,
    life: Life,
}

const _: () = assert!(align_of::<Node>() >= TABLE_ALIGN);

/// Bytes that a table costs.
pub(super) const NODE_BYTES: usize = size_of::<Node>();

impl Node {
    pub(super) fn new() -> Self {
        Self {
            entries: std::array::from_fn(|_| AtomicU64::new(0)),
            used: AtomicU32::new(0),
            life: Life::new(),
        }
    }

    const fn index(number: u64, level: u32) -> usize {
        ((number >> (level * LEVEL_BITS)) & (FANOUT - 1)) as usize
    }

    /// The entry for page `number`, as the writer sees it.
    pub(super) fn get(&self, number: u64, level: u32) -> TableEntry {
        // ORDERING: only the one writer calls this, and only it stores.
        TableEntry::from_word(self.entries[Self::index(number, level)].load(Ordering::Relaxed))
    }

    /// Sets the entry for page `number`. Only the writer calls this.
    pub(super) fn set(&self, number: u64, level: u32, entry: TableEntry) {
        let slot = &self.entries[Self::index(number, level)];
        // ORDERING: only the one writer touches `used` and stores entries.
        let was_empty = slot.load(Ordering::Relaxed) == 0;
        let used = self.used.load(Ordering::Relaxed);
        match (was_empty, entry.is_empty()) {
            (true, false) => self.used.store(used + 1, Ordering::Relaxed),
            (false, true) => self.used.store(used - 1, Ordering::Relaxed),
            _ => {}
        }
        // ORDERING: Release pairs with the Acquire of `Roots::walk`: a reader that sees a table sees its contents.
        slot.store(entry.word(), Ordering::Release);
    }

    /// Whether it has no entries.
    pub(super) fn is_empty(&self) -> bool {
        // ORDERING: only the writer accesses it.
        self.used.load(Ordering::Relaxed) == 0
    }
}

/// The result of a walk: a leaf, and the size of the block that it maps.
#[derive(Clone, Copy)]
pub(super) struct Leaf {
    entry: TableEntry,
    level: u32,
}

impl Leaf {
    pub(super) fn allows(self, access: Access) -> bool {
        self.entry.allows(access)
    }

    /// The host address of the byte `raw`, and the bytes from there to the end of the block.
    pub(super) fn resolve(self, raw: u64) -> (u64, u64) {
        let size = pages_under(self.level) << PAGE_SHIFT;
        let offset = raw & (size - 1);
        (self.entry.host() + offset, size - offset)
    }
}

/// The two roots of one space. They always exist and are never freed.
pub(super) struct Roots {
    low: Node,
    high: Node,
}

impl Roots {
    pub(super) fn new() -> Self {
        Self { low: Node::new(), high: Node::new() }
    }

    /// The root for page `number`, and its level.
    pub(super) fn root_of(&self, number: u64) -> (&Node, u32) {
        if number < LOW_END { (&self.low, LOW_LEVELS - 1) } else { (&self.high, HIGH_LEVELS - 1) }
    }

    /// The walk. `inside` proves that a section is open while the tables are read.
    #[inline]
    pub(super) fn walk(&self, number: u64, inside: Inside<'_>) -> Option<Leaf> {
        // Two calls, so that each is unrolled for its number of levels.
        if number < LOW_END {
            descend(&self.low, LOW_LEVELS, number, inside)
        } else {
            descend(&self.high, HIGH_LEVELS, number, inside)
        }
    }
}

#[inline(always)]
fn descend(root: &Node, levels: u32, number: u64, _inside: Inside<'_>) -> Option<Leaf> {
    let mut node = root;
    for level in (0..levels).rev() {
        // ORDERING: Acquire pairs with the Release of `Node::set`.
        let entry = TableEntry::from_word(node.entries[Node::index(number, level)].load(Ordering::Acquire));
        if !entry.is_table() {
            return (!entry.is_empty()).then_some(Leaf { entry, level });
        }
        // SAFETY: the entry was linked when this section, or an earlier part of it, could see it, and a node is
        // freed only after all sections that were open when it was unlinked have left (`limbo`).
        node = unsafe { node_at(entry) };
        node.life.check();
    }
    // Not reached: there are no tables below level 0.
    None
}

/// The right to follow tables outside a section and to free them: only the writer has it. Freeing takes it by `&mut`,
/// so that no reference of the writer outlives a node.
pub(super) struct Owner(());

impl Owner {
    /// The one owner of a mirror's tables; called once, when the mirror is made.
    pub(super) fn new() -> Self {
        Self(())
    }

    /// A new, empty table that nothing links to yet.
    pub(super) fn allocate(&self) -> TableEntry {
        let address = Box::into_raw(Box::new(Node::new()));
        TableEntry::table(address.expose_provenance() as u64)
    }

    /// The table that `entry` links to.
    pub(super) fn child(&self, entry: TableEntry) -> Option<&Node> {
        // SAFETY: table entries are made by `allocate` alone, and are freed only through `&mut self`, after they
        // were unlinked; the writer reads entries from linked tables.
        entry.is_table().then(|| unsafe { node_at(entry) })
    }

    /// Frees a table that was unlinked, once no section can see it. Called once for each table.
    pub(super) fn free(&mut self, entry: TableEntry) {
        let address = std::ptr::with_exposed_provenance_mut::<Node>(entry.table_address() as usize);
        // SAFETY: `limbo` passes each unlinked table once, after every section open at its unlinking has left; it
        // came from `Box::into_raw` in `allocate`.
        let node = unsafe { Box::from_raw(address) };
        Life::end(node);
    }

    /// Frees everything under `roots`, when nothing can see it any more.
    pub(super) fn free_all(&mut self, roots: &Roots) {
        for (root, level) in [(&roots.low, LOW_LEVELS - 1), (&roots.high, HIGH_LEVELS - 1)] {
            let mut tables = Vec::new();
            self.tables_under(root, level, &mut tables);
            tables.into_iter().for_each(|table| self.free(table));
        }
    }

    /// Appends all tables below `node`, which is at `level`, lowest first.
    pub(super) fn tables_under(&self, node: &Node, level: u32, into: &mut Vec<TableEntry>) {
        if level == 0 {
            return;
        }
        for index in 0..FANOUT {
            let entry = node.get(index * pages_under(level), level);
            if let Some(child) = self.child(entry) {
                self.tables_under(child, level - 1, into);
                into.push(entry);
            }
        }
    }
}

/// # Safety
/// `entry` is a table of [`Owner::allocate`] that is not freed during `'a`.
unsafe fn node_at<'a>(entry: TableEntry) -> &'a Node {
    let address = std::ptr::with_exposed_provenance::<Node>(entry.table_address() as usize);
    // SAFETY: the caller's promise; a node is only ever changed through its atomics.
    unsafe { &*address }
}

/// Loom's check that a node is not walked while or after it is freed. Otherwise empty.
#[cfg(not(loom))]
struct Life;

#[cfg(not(loom))]
impl Life {
    fn new() -> Self {
        Self
    }

    #[inline]
    fn check(&self) {}

    fn end(node: Box<Node>) {
        drop(node);
    }
}

/// Under loom a freed node is kept and marked, so that a walk that reaches it is reported instead of undefined.
#[cfg(loom)]
struct Life(loom::cell::UnsafeCell<bool>);

#[cfg(loom)]
impl Life {
    fn new() -> Self {
        Self(loom::cell::UnsafeCell::new(false))
    }

    fn check(&self) {
        // SAFETY: loom's own cell; it reports a write at the same time.
        self.0.with(|freed| assert!(!unsafe { *freed }, "A walk met a table that was freed"));
    }

    fn end(node: Box<Node>) {
        // SAFETY: as above.
        node.life.0.with_mut(|freed| unsafe { *freed = true });
        std::mem::forget(node);
    }
}
