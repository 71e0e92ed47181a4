//! Unlinked tables that a section may still see: they wait here until every section that was open at their unlinking
//! has left. There is one writer, so one epoch per slot is enough.

use std::collections::VecDeque;

use super::entry::TableEntry;
use super::page_table::Owner;
use super::section::{OpenSections, Slots};

/// Tables that were unlinked together, and the sections that may see them.
struct Batch {
    tables: Vec<TableEntry>,
    seen_by: OpenSections,
}

/// All unlinked tables, oldest first.
#[derive(Default)]
pub(super) struct Limbo {
    batches: VecDeque<Batch>,
    tables: usize,
}

impl Limbo {
    /// Takes tables that are not linked any more. `open` was taken after the unlinking.
    pub(super) fn retire(&mut self, tables: Vec<TableEntry>, open: OpenSections) {
        if !tables.is_empty() {
            self.tables += tables.len();
            self.batches.push_back(Batch { tables, seen_by: open });
        }
    }

    /// Frees what no section can see any more.
    pub(super) fn collect(&mut self, slots: &Slots, owner: &mut Owner) {
        while let Some(batch) = self.batches.front_mut() {
            // A later batch waits for the same sections and possibly more: it cannot be ready before this one.
            if !batch.seen_by.have_left(slots) {
                return;
            }
            self.tables -= batch.tables.len();
            batch.tables.drain(..).for_each(|table| owner.free(table));
            self.batches.pop_front();
        }
    }

    /// How many tables wait.
    pub(super) fn tables(&self) -> usize {
        self.tables
    }

    /// Gives up all tables, to an owner who frees them when no reader is left.
    pub(super) fn into_tables(self) -> Vec<TableEntry> {
        self.batches.into_iter().flat_map(|batch| batch.tables).collect()
    }
}
