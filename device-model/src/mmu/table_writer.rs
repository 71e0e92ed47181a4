//! The writing half of the page tables: maps, zaps, evicts, splits and joins leaves, and keeps within its memory limit.
//! Owned by one thread. Of sections it knows only that unlinked tables go to [`super::limbo`].

use std::mem;

use super::entry::{Permissions, TableEntry};
use super::limbo::Limbo;
use super::page_table::{
    FANOUT, HIGH_LEVELS, LOW_END, LOW_LEVELS, NODE_BYTES, Node, Owner, Roots, pages_under,
};
use super::section::Slots;
use crate::addr::PAGE_SHIFT;

/// Whole pages by number, with both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pages {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Pages {
    fn count(self) -> u64 {
        self.last - self.first + 1
    }

    fn intersection(self, other: Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (first <= last).then_some(Self { first, last })
    }

    /// The part under each root, and the most tables that mapping it can need: a path for each of its two ends.
    fn by_root(self) -> impl Iterator<Item = (Self, usize)> {
        let low = Self { first: 0, last: LOW_END - 1 };
        let high = Self { first: LOW_END, last: u64::MAX >> PAGE_SHIFT };
        [(low, LOW_LEVELS), (high, HIGH_LEVELS)]
            .into_iter()
            .filter_map(move |(root, levels)| Some((self.intersection(root)?, 2 * (levels as usize - 1))))
    }

    /// Each entry of a node at `level` that covers some of these pages: its block, and which of them.
    fn blocks(self, level: u32) -> impl Iterator<Item = (Self, Self)> {
        let size = pages_under(level);
        let blocks = self.first / size..=self.last / size;
        blocks.filter_map(move |number| {
            let block = Self { first: number * size, last: number * size + (size - 1) };
            Some((block, self.intersection(block)?))
        })
    }
}

/// A range of pages and the host memory that it maps to.
#[derive(Clone, Copy)]
pub(super) struct Mapping {
    pub(super) pages: Pages,
    /// Host address of the first page.
    pub(super) host: u64,
    pub(super) permissions: Permissions,
}

impl Mapping {
    fn host_of(&self, number: u64) -> u64 {
        self.host + ((number - self.pages.first) << PAGE_SHIFT)
    }
}

/// Why there is no table for a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoTable {
    /// The limit is below what this mapping alone may need.
    Limit {
        /// Bytes that it may need.
        needed: usize,
    },
    /// Sections that do not end keep too many unlinked tables alive.
    Limbo,
}

/// The bookkeeping of the tables, without the right to follow and free them ([`Owner`]).
#[derive(Default)]
struct Books {
    /// Tables that are linked.
    linked: usize,
    /// Tables that the current operation has unlinked.
    unlinked: Vec<TableEntry>,
    /// Pages whose frame the current operation has replaced.
    replaced: u64,
}

impl Books {
    fn unlink(&mut self, table: TableEntry) {
        self.linked -= 1;
        self.unlinked.push(table);
    }
}

/// The one writer of a mirror's tables.
pub(super) struct TableWriter {
    owner: Owner,
    books: Books,
    limbo: Limbo,
    /// The most tables that may be linked.
    limit: usize,
    /// The page at which the next eviction starts its search for a table.
    cursor: u64,
}

impl TableWriter {
    pub(super) fn new(limit_bytes: usize) -> Self {
        Self {
            owner: Owner::new(),
            books: Books::default(),
            limbo: Limbo::default(),
            limit: limit_bytes / NODE_BYTES,
            cursor: 0,
        }
    }

    /// Bytes of tables, including those in limbo, without the roots.
    pub(super) fn bytes(&self) -> usize {
        (self.books.linked + self.limbo.tables()) * NODE_BYTES
    }

    /// Maps; returns how many pages had another frame before.
    pub(super) fn map(&mut self, roots: &Roots, slots: &Slots, mapping: Mapping) -> Result<u64, NoTable> {
        self.limbo.collect(slots, &mut self.owner);
        let needed = mapping.pages.by_root().map(|(_, tables)| tables).sum();
        self.make_room(roots, slots, needed)?;
        for (pages, _) in mapping.pages.by_root() {
            let (root, level) = roots.root_of(pages.first);
            map_under(&self.owner, &mut self.books, (root, level), pages, &mapping);
        }
        self.retire(slots);
        Ok(mem::take(&mut self.books.replaced))
    }

    /// Removes all translations of `pages`, and of the large leaves that contain some of them.
    pub(super) fn zap(&mut self, roots: &Roots, pages: Pages) {
        for (pages, _) in pages.by_root() {
            let (root, level) = roots.root_of(pages.first);
            zap_under(&self.owner, &mut self.books, root, level, pages);
        }
    }

    /// Moves what was unlinked since the last call to limbo, and frees what no section can see any more. Zaps and
    /// unlinkings come before the sections are read.
    pub(super) fn retire(&mut self, slots: &Slots) {
        if !self.books.unlinked.is_empty() {
            self.limbo.retire(mem::take(&mut self.books.unlinked), slots.open());
        }
        self.limbo.collect(slots, &mut self.owner);
    }

    /// Calls `found` for every leaf that contains some of `pages`, in address order: which of them, host address and
    /// permissions. Visits at most `budget` entries; returns the page from which to go on, if there are more.
    pub(super) fn leaves(
        &self,
        roots: &Roots,
        pages: Pages,
        mut budget: usize,
        found: &mut dyn FnMut(Mapping),
    ) -> Option<u64> {
        for (pages, _) in pages.by_root() {
            let at = roots.root_of(pages.first);
            if let Err(next) = leaves_under(&self.owner, at, pages, &mut budget, found) {
                return Some(next);
            }
        }
        None
    }

    /// Hands over what sections may still see to an owner that outlives them.
    pub(super) fn take_limbo(&mut self) -> Vec<TableEntry> {
        mem::take(&mut self.limbo).into_tables()
    }

    fn make_room(&mut self, roots: &Roots, slots: &Slots, needed: usize) -> Result<(), NoTable> {
        if needed > self.limit {
            return Err(NoTable::Limit { needed: needed * NODE_BYTES });
        }
        while self.books.linked + needed > self.limit {
            self.evict(roots);
        }
        self.retire(slots);
        if self.books.linked + self.limbo.tables() + needed > 2 * self.limit {
            return Err(NoTable::Limbo);
        }
        Ok(())
    }

    /// Evicts one lowest table, round-robin through the space. This needs no drain: an invalidation checks sections and
    /// pins whether or not the tables still have the range.
    fn evict(&mut self, roots: &Roots) {
        let starts =
            if self.cursor < LOW_END { [self.cursor, LOW_END, 0] } else { [self.cursor, 0, LOW_END] };
        let found = starts.into_iter().find_map(|from| {
            let (root, level) = roots.root_of(from);
            evict_under(&self.owner, &mut self.books, root, level, from)
        });
        self.cursor = found.unwrap_or(0);
    }
}

/// Maps `pages` (a part of `mapping`) under a node.
fn map_under(owner: &Owner, books: &mut Books, at: (&Node, u32), pages: Pages, mapping: &Mapping) {
    let (node, level) = at;
    for (block, part) in pages.blocks(level) {
        let entry = node.get(part.first, level);
        let whole = block == part;
        match owner.child(entry) {
            Some(child) => {
                map_under(owner, books, (child, level - 1), part, mapping);
                if whole {
                    join(owner, books, node, level, block);
                }
            }
            None if whole => {
                let host = mapping.host_of(block.first);
                if !entry.is_empty() && entry.host() != host {
                    books.replaced += block.count();
                }
                node.set(block.first, level, entry.proved(host, mapping.permissions));
            }
            None => {
                let table = split(owner, entry, level, block);
                books.linked += 1;
                if let Some(child) = owner.child(table) {
                    map_under(owner, books, (child, level - 1), part, mapping);
                }
                // Linked last: a reader finds either the complete table or what was there before.
                node.set(block.first, level, table);
            }
        }
    }
}

/// A new table with the same translations as `entry`, which is empty or a leaf at `level`.
fn split(owner: &Owner, entry: TableEntry, level: u32, block: Pages) -> TableEntry {
    let table = owner.allocate();
    if let Some(child) = owner.child(table).filter(|_| !entry.is_empty()) {
        for (index, (part, _)) in block.blocks(level - 1).enumerate() {
            let offset = (index as u64 * pages_under(level - 1)) << PAGE_SHIFT;
            child.set(part.first, level - 1, entry.advanced(offset));
        }
    }
    table
}

/// Replaces a table by one leaf with the same translations.
fn join(owner: &Owner, books: &mut Books, node: &Node, level: u32, block: Pages) {
    let table = node.get(block.first, level);
    let Some(child) = owner.child(table) else { return };
    let first = child.get(block.first, level - 1);
    if first.is_empty() || first.is_table() {
        return;
    }
    let uniform = block.blocks(level - 1).enumerate().all(|(index, (part, _))| {
        let offset = (index as u64 * pages_under(level - 1)) << PAGE_SHIFT;
        child.get(part.first, level - 1) == first.advanced(offset)
    });
    if uniform {
        node.set(block.first, level, first);
        books.unlink(table);
    }
}

fn zap_under(owner: &Owner, books: &mut Books, node: &Node, level: u32, pages: Pages) {
    for (block, part) in pages.blocks(level) {
        let entry = node.get(part.first, level);
        let Some(child) = owner.child(entry) else {
            if !entry.is_empty() {
                node.set(part.first, level, TableEntry::EMPTY);
            }
            continue;
        };
        if block != part {
            zap_under(owner, books, child, level - 1, part);
        }
        if block == part || child.is_empty() {
            unlink_subtree(owner, books, node, level, block);
        }
    }
}

/// Unlinks the table for `block` from `node`, with all tables below it.
fn unlink_subtree(owner: &Owner, books: &mut Books, node: &Node, level: u32, block: Pages) {
    let entry = node.get(block.first, level);
    let Some(child) = owner.child(entry) else { return };
    node.set(block.first, level, TableEntry::EMPTY);
    let before = books.unlinked.len();
    owner.tables_under(child, level - 1, &mut books.unlinked);
    books.unlinked.push(entry);
    books.linked -= books.unlinked.len() - before;
}

/// Unlinks the first table at or after page `from` that has no tables below it; returns the page after it.
fn evict_under(owner: &Owner, books: &mut Books, node: &Node, level: u32, from: u64) -> Option<u64> {
    if level == 0 {
        return None;
    }
    let reach = pages_under(level) * FANOUT;
    let base = from & !(reach - 1);
    for (block, part) in (Pages { first: from, last: base + (reach - 1) }).blocks(level) {
        let entry = node.get(block.first, level);
        let Some(child) = owner.child(entry) else { continue };
        let below = evict_under(owner, books, child, level - 1, part.first);
        // A table that has tables only before `from` is left to the next round.
        let childless = !has_tables(child, level - 1, block);
        if below.is_none() && !childless {
            continue;
        }
        if below.is_none() || child.is_empty() {
            node.set(block.first, level, TableEntry::EMPTY);
            books.unlink(entry);
        }
        return below.or(Some(block.last + 1));
    }
    None
}

fn has_tables(node: &Node, level: u32, block: Pages) -> bool {
    level > 0 && block.blocks(level).any(|(part, _)| node.get(part.first, level).is_table())
}

/// The leaves of `pages` under a node. `Err`: the budget was used up before this page.
fn leaves_under(
    owner: &Owner,
    (node, level): (&Node, u32),
    pages: Pages,
    budget: &mut usize,
    found: &mut dyn FnMut(Mapping),
) -> Result<(), u64> {
    for (block, part) in pages.blocks(level) {
        *budget = budget.checked_sub(1).ok_or(part.first)?;
        let entry = node.get(part.first, level);
        if let Some(child) = owner.child(entry) {
            leaves_under(owner, (child, level - 1), part, budget, found)?;
        } else if !entry.is_empty() {
            let whole = Mapping { pages: block, host: entry.host(), permissions: entry.permissions() };
            found(Mapping { pages: part, host: whole.host_of(part.first), ..whole });
        }
    }
    Ok(())
}
