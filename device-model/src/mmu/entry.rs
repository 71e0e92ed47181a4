//! One word of a page table: a host page with its permissions, the next table, or nothing. Knows bits; knows nothing of
//! tables, threads or where a word is stored.

use std::fmt;

use serde::Serialize;

use crate::addr::Access;

/// The permissions of a translation. Only what a MISS has proved is ever set (I7).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Permissions {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

impl Permissions {
    /// Reading only.
    pub const READ: Self = Self { read: true, write: false };
    /// Writing only.
    pub const WRITE: Self = Self { read: false, write: true };
    /// Reading and writing.
    pub const READ_WRITE: Self = Self { read: true, write: true };

    /// Whether `access` is allowed.
    pub const fn allow(self, access: Access) -> bool {
        match access {
            Access::Read => self.read,
            Access::Write => self.write,
        }
    }

    /// Whether nothing is allowed.
    pub const fn is_none(self) -> bool {
        !self.read && !self.write
    }
}

impl From<Access> for Permissions {
    fn from(access: Access) -> Self {
        match access {
            Access::Read => Self::READ,
            Access::Write => Self::WRITE,
        }
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.read, self.write) {
            (false, false) => "--",
            (true, false) => "r-",
            (false, true) => "-w",
            (true, true) => "rw",
        })
    }
}

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const TABLE: u64 = 1 << 2;
/// Flag bits of a leaf: the low bits of a page-aligned host address.
const LEAF_FLAGS: u64 = (1 << 12) - 1;
/// The alignment of a table: a pointer to one has the bits below for flags.
pub(super) const TABLE_ALIGN: usize = 64;
const TABLE_FLAGS: u64 = TABLE_ALIGN as u64 - 1;

/// The word itself. INVARIANT: 0, or a leaf (page-aligned host address, at least one permission), or the address of a
/// table with the tag. The flags alone tell which, so that a reader needs one load per entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct TableEntry(u64);

impl TableEntry {
    pub(super) const EMPTY: Self = Self(0);

    pub(super) const fn from_word(word: u64) -> Self {
        Self(word)
    }

    pub(super) const fn word(self) -> u64 {
        self.0
    }

    /// `host` is page-aligned and `permissions` are not empty: `MirrorWriter::map` has checked both.
    pub(super) fn leaf(host: u64, permissions: Permissions) -> Self {
        debug_assert!(host & LEAF_FLAGS == 0 && !permissions.is_none());
        Self(host | if permissions.read { READ } else { 0 } | if permissions.write { WRITE } else { 0 })
    }

    pub(super) fn table(address: u64) -> Self {
        debug_assert!(address & TABLE_FLAGS == 0);
        Self(address | TABLE)
    }

    pub(super) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(super) const fn is_table(self) -> bool {
        self.0 & TABLE != 0
    }

    /// The address of the table; meaningful only if [`TableEntry::is_table`].
    pub(super) const fn table_address(self) -> u64 {
        self.0 & !TABLE_FLAGS
    }

    /// The host address; meaningful only in a leaf.
    pub(super) const fn host(self) -> u64 {
        self.0 & !LEAF_FLAGS
    }

    pub(super) const fn permissions(self) -> Permissions {
        Permissions { read: self.0 & READ != 0, write: self.0 & WRITE != 0 }
    }

    /// Whether this is a leaf that allows `access`: an empty word and a table allow nothing.
    pub(super) const fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self.0 & (READ | TABLE) == READ,
            Access::Write => self.0 & (WRITE | TABLE) == WRITE,
        }
    }

    /// This leaf after a MISS proved `permissions` for `host`: adds them if the leaf has the same frame, otherwise
    /// replaces it (I7).
    pub(super) fn proved(self, host: u64, permissions: Permissions) -> Self {
        let new = Self::leaf(host, permissions);
        if !self.is_empty() && self.host() == host { Self(self.0 | new.0) } else { new }
    }

    /// The leaf for the memory `bytes` further on in the same block.
    pub(super) fn advanced(self, bytes: u64) -> Self {
        Self::leaf(self.host() + bytes, self.permissions())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_permission_is_added_for_the_same_frame_only() {
        let read = TableEntry::EMPTY.proved(0x7000, Permissions::READ);
        assert_eq!(read.permissions(), Permissions::READ);
        assert_eq!(read.proved(0x7000, Permissions::WRITE).permissions(), Permissions::READ_WRITE);
        let moved = read.proved(0x8000, Permissions::WRITE);
        assert_eq!((moved.host(), moved.permissions()), (0x8000, Permissions::WRITE));
    }

    #[test]
    fn an_empty_word_and_a_table_allow_nothing() {
        for access in [Access::Read, Access::Write] {
            assert!(!TableEntry::EMPTY.allows(access));
            assert!(!TableEntry::table(0x7fff_0000_0040).allows(access));
            assert!(TableEntry::leaf(0x1000, access.into()).allows(access));
        }
        assert!(!TableEntry::leaf(0x1000, Permissions::READ).allows(Access::Write));
        assert!(!TableEntry::leaf(0x1000, Permissions::WRITE).allows(Access::Read));
    }
}
