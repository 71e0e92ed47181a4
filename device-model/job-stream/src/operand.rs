//! What a packet points at: {space, address, length}. A space is a resource, and then the address is an offset in it; or
//! it is an address space whose page tables the guest writes, and then the address is a Gva. Knows numbers and whether
//! ranges overlap; knows nothing of what a space holds.

use core::fmt;

/// A space of addresses, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Space(u32);

impl Space {
    /// No space: refused wherever an operand is needed, and how an operand that is not there is written.
    pub const NONE: Self = Self(0);
    /// The number of address space 0. Those of the others follow, up to 2^32 - 1.
    pub const FIRST_ADDRESS_SPACE: u32 = 0x8000_0000;

    /// The space that the resource with this virtio id is. Ids from [`Self::FIRST_ADDRESS_SPACE`] up cannot be named.
    pub const fn resource(id: u32) -> Self {
        Self(id)
    }

    /// The address space with this asid, which is below 2^31; the highest bit of others is ignored.
    pub const fn address_space(asid: u32) -> Self {
        Self(Self::FIRST_ADDRESS_SPACE | asid)
    }

    /// The asid of the address space, if it is one.
    pub const fn asid(self) -> Option<u32> {
        self.0.checked_sub(Self::FIRST_ADDRESS_SPACE)
    }

    /// The number of the space.
    pub const fn raw(self) -> u32 {
        self.0
    }

    /// Whether the number is one that a resource can have.
    pub const fn is_resource(self) -> bool {
        0 < self.0 && self.0 < Self::FIRST_ADDRESS_SPACE
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.asid() {
            Some(asid) => write!(f, "address space {asid}"),
            None if self.is_resource() => write!(f, "resource {}", self.0),
            None => f.write_str("no space"),
        }
    }
}

/// A place in a space. How many bytes are meant there, the packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct At {
    /// The space.
    pub space: Space,
    /// The address in it: of a resource, the offset in bytes; of an address space, the Gva.
    pub address: u64,
}

impl At {
    /// The place at `address` of `space`.
    pub const fn new(space: Space, address: u64) -> Self {
        Self { space, address }
    }

    /// The place `bytes` further on; at the end of the address space it wraps, which no stream survives.
    pub const fn plus(self, bytes: u64) -> Self {
        Self { address: self.address.wrapping_add(bytes), ..self }
    }

    /// The `length` bytes from here on.
    pub const fn range(self, length: u64) -> Range {
        Range { space: self.space, address: self.address, length }
    }

    /// The value that lies here: 64 bits if `wide`, else 32.
    pub const fn value(self, wide: bool) -> Range {
        self.range(if wide { 8 } else { 4 })
    }
}

/// Some bytes of a space, as a packet gives them: only verification says that they are no nonsense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Range {
    /// The space.
    pub space: Space,
    /// The address of the first byte.
    pub address: u64,
    /// How many bytes.
    pub length: u64,
}

impl Range {
    /// The `length` bytes from `address` of `space` on.
    pub const fn new(space: Space, address: u64, length: u64) -> Self {
        Self { space, address, length }
    }

    /// Where the range begins.
    pub const fn at(self) -> At {
        At { space: self.space, address: self.address }
    }

    /// The address of the last byte; `None` if there is none, or if it lies past 2^64 - 1.
    pub const fn last(self) -> Option<u64> {
        match self.length.checked_sub(1) {
            Some(more) => self.address.checked_add(more),
            None => None,
        }
    }

    /// Whether the two share a byte. One that is no range shares none.
    pub fn overlaps(self, other: Self) -> bool {
        let (Some(last), Some(other_last)) = (self.last(), other.last()) else { return false };
        self.space == other.space && self.address <= other_last && other.address <= last
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x} of {}", self.address, self.length, self.space)
    }
}

/// What a packet does to an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It reads it.
    Reads,
    /// It writes it.
    Writes,
    /// It reads it and writes it, in one.
    Updates,
}

impl Access {
    /// Whether it reads.
    pub const fn reads(self) -> bool {
        matches!(self, Self::Reads | Self::Updates)
    }

    /// Whether it writes.
    pub const fn writes(self) -> bool {
        matches!(self, Self::Writes | Self::Updates)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reads => "read",
            Self::Writes => "written",
            Self::Updates => "read and written",
        })
    }
}

/// Memory that a packet touches, all of it known before the job starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// The field that names it.
    pub field: &'static str,
    /// The bytes.
    pub range: Range,
    /// What happens to them.
    pub access: Access,
    /// What address and length are multiples of, in bytes.
    pub alignment: u64,
    /// Whether it is one value, which is accessed in one piece.
    pub is_value: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_overlap_only_within_a_space_and_only_if_they_share_a_byte() {
        let range = |space, address, length| Range::new(Space::resource(space), address, length);
        assert!(range(1, 0, 8).overlaps(range(1, 7, 1)));
        assert!(!range(1, 0, 8).overlaps(range(1, 8, 1)));
        assert!(!range(1, 0, 8).overlaps(range(2, 0, 8)));
        assert!(!range(1, 0, 0).overlaps(range(1, 0, 8)));
        assert!(range(1, u64::MAX, 1).overlaps(range(1, u64::MAX - 1, 2)));
    }

    #[test]
    fn a_range_ends_at_the_last_byte_of_its_space_or_nowhere() {
        let space = Space::resource(1);
        assert_eq!(Range::new(space, u64::MAX, 1).last(), Some(u64::MAX));
        assert_eq!(Range::new(space, u64::MAX, 2).last(), None);
        assert_eq!(Range::new(space, 0, 0).last(), None);
    }

    #[test]
    fn the_upper_half_of_the_spaces_are_address_spaces() {
        let first = Space::FIRST_ADDRESS_SPACE;
        let spaces = [0, 1, first - 1, first, u32::MAX].map(Space::resource);
        assert_eq!(spaces.map(Space::is_resource), [false, true, true, false, false]);
        assert_eq!(spaces.map(Space::asid), [None, None, None, Some(0), Some(0x7fff_ffff)]);
        assert_eq!(Space::address_space(5).asid(), Some(5));
    }
}
