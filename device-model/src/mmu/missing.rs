//! What an access or a pin was missing: values to send MISSes for. Knows nothing of how they are sent.

use std::fmt;

use crate::addr::{Access, ByteRange, DomainId, Iova};

/// The most missing pages that one answer names. It bounds what is requested at once, since the channel to the
/// front-end is bounded too (278 messages fill its socket).
pub const MISSING_PAGES: u64 = 256;

/// Pages that the mirror does not map with the permission for an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Missing {
    /// The address space.
    pub space: DomainId,
    /// Whole pages.
    pub range: ByteRange<Iova>,
    /// The access.
    pub access: Access,
}

impl Missing {
    /// The first address of each page.
    pub fn pages(self) -> impl Iterator<Item = Iova> {
        self.range.pages()
    }

    /// Both as one, if `next` starts where `self` ends.
    fn merged(self, next: Self) -> Option<Self> {
        let follows = self.space == next.space
            && self.access == next.access
            && self.range.last().checked_add(1) == Some(next.range.first());
        let range = ByteRange::inclusive(self.range.first(), next.range.last());
        range.filter(|_| follows).map(|range| Self { range, ..self })
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for {}", self.range, self.access)
    }
}

/// Collects missing pages in address order, merged and capped.
#[derive(Default)]
pub(super) struct MissingList {
    list: Vec<Missing>,
    pages: u64,
}

impl MissingList {
    /// Adds `missing`, which is one page.
    pub(super) fn push(&mut self, missing: Missing) {
        if self.is_full() {
            return;
        }
        self.pages += 1;
        match self.list.last_mut().and_then(|last| Some((last.merged(missing)?, last))) {
            Some((merged, last)) => *last = merged,
            None => self.list.push(missing),
        }
    }

    /// Whether the cap is reached.
    pub(super) fn is_full(&self) -> bool {
        self.pages >= MISSING_PAGES
    }

    pub(super) fn into_vec(self) -> Vec<Missing> {
        self.list
    }
}
