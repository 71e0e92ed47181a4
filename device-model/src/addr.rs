//! Addresses, ranges and permissions. A newtype for every address space, and no conversion between them: the
//! mirror (`crate::mmu`) translates [`Iova`]s, the memory table translates [`Gpa`]s and [`FrontendVa`]s.
//! Knows nothing of page tables, sockets or virtio.

use std::fmt;

use serde::Serialize;

/// Bytes in a page of every address space here: the smallest unit that an IOMMU maps.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u32 = 12;

/// An address of one of the address spaces: what a range is made of.
pub trait Address: Copy + Ord + fmt::Display {
    /// The address with this number.
    fn new(raw: u64) -> Self;
    /// The number of this address.
    fn raw(self) -> u64;
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address with this number.
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The number of this address.
            pub const fn raw(self) -> u64 {
                self.0
            }

            /// The address `offset` bytes above, or `None` past 2^64.
            pub fn checked_add(self, offset: u64) -> Option<Self> {
                self.0.checked_add(offset).map(Self)
            }

            /// The first byte of the page that this address lies in.
            pub const fn page(self) -> Self {
                Self(self.0 & !(PAGE_SIZE - 1))
            }

            /// The page that this address lies in, whole.
            pub const fn page_range(self) -> ByteRange<Self> {
                ByteRange { first: self.page(), last: Self(self.0 | (PAGE_SIZE - 1)) }
            }

            /// The distance in bytes from the start of the page.
            pub const fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
        }

        impl Address for $name {
            fn new(raw: u64) -> Self {
                Self(raw)
            }

            fn raw(self) -> u64 {
                self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// What the device uses to address memory: an I/O virtual address behind an IOMMU, a guest-physical address
    /// without one (then the mirror holds the memory table itself).
    Iova
}
address! {
    /// A guest-physical address, as in the memory table.
    Gpa
}
address! {
    /// An address in the virtual address space of the front-end (vhost-user "user address"): the memory table's
    /// second name for a page, and what IOTLB UPDATEs point at.
    FrontendVa
}

address! {
    /// An address in an address space whose page tables the guest writes (48 bits). A walk of those tables makes an
    /// [`Iova`] of it, and the mirror a host address of that.
    Gva
}

/// The number of such an address space: the guest's choice, below 2^31. No two address spaces have the same one at a
/// time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Asid(u32);

impl Asid {
    /// The address space with this number.
    pub const fn new(raw: u32) -> Self {
        Self(raw)
    }

    /// The number.
    pub const fn raw(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Asid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A domain of the guest's IOMMU: a space of [`Iova`]s that it gives to the device. There is one so far,
/// [`DomainId::DEVICE`]; every call of the mirror takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct DomainId(u32);

impl DomainId {
    /// The domain that the guest's IOMMU gives to the virtio device as a whole.
    pub const DEVICE: Self = Self(0);

    /// The number of the domain.
    pub const fn raw(self) -> u32 {
        self.0
    }
}

/// What an access does, and what one MISS asks for: never both at once (QEMU checks a request for both as a
/// write only).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// The device reads guest memory.
    Read,
    /// The device writes guest memory.
    Write,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Read => "read",
            Self::Write => "write",
        })
    }
}

/// Why an address and a length do not make a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// The length is 0.
    #[error("Range at {start:#x} is empty")]
    Empty {
        /// First address.
        start: u64,
    },
    /// The last byte would lie past 2^64 - 1.
    #[error("Range {start:#x}+{len:#x} wraps around the end of the address space")]
    Wraps {
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
}

/// A range of bytes that is not empty and does not wrap. The end is inclusive, so that a range may reach
/// 2^64 - 1; `start + len` is computed nowhere else in the project.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRange<A> {
    first: A,
    last: A,
}

impl<A: Address> ByteRange<A> {
    /// The `len` bytes from `start` on.
    pub fn new(start: A, len: u64) -> Result<Self, RangeError> {
        let raw = start.raw();
        let more = len.checked_sub(1).ok_or(RangeError::Empty { start: raw })?;
        let last = raw.checked_add(more).ok_or(RangeError::Wraps { start: raw, len })?;
        Ok(Self { first: start, last: A::new(last) })
    }

    /// All bytes from `first` to `last`, both included; `None` if `last` lies below `first`.
    pub fn inclusive(first: A, last: A) -> Option<Self> {
        (first <= last).then_some(Self { first, last })
    }

    /// The whole address space, 0 to 2^64 - 1.
    pub fn everything() -> Self {
        Self { first: A::new(0), last: A::new(u64::MAX) }
    }

    /// The first byte.
    pub fn first(self) -> A {
        self.first
    }

    /// The last byte.
    pub fn last(self) -> A {
        self.last
    }

    /// The length in bytes: a `u128`, since the whole space has 2^64 bytes.
    pub fn len(self) -> u128 {
        u128::from(self.last.raw() - self.first.raw()) + 1
    }

    /// Never: an empty range cannot be built.
    pub fn is_empty(self) -> bool {
        false
    }

    /// Whether `address` is in the range.
    pub fn contains(self, address: A) -> bool {
        self.first <= address && address <= self.last
    }

    /// Whether all of `other` is in the range.
    pub fn covers(self, other: Self) -> bool {
        self.first <= other.first && other.last <= self.last
    }

    /// Whether the two ranges share a byte.
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The bytes that are in both ranges.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::inclusive(self.first.max(other.first), self.last.min(other.last))
    }

    /// The range grown to whole pages.
    pub fn page_aligned(self) -> Self {
        let mask = PAGE_SIZE - 1;
        Self { first: A::new(self.first.raw() & !mask), last: A::new(self.last.raw() | mask) }
    }

    /// The whole pages in the range, if there is one.
    pub fn whole_pages(self) -> Option<Self> {
        let mask = PAGE_SIZE - 1;
        let first = self.first.raw().checked_add(mask)? & !mask;
        // The byte after the range, rounded down, is where the last whole page ends.
        let last = match self.last.raw().checked_add(1) {
            Some(end) => (end & !mask).checked_sub(1)?,
            None => u64::MAX,
        };
        Self::inclusive(A::new(first), A::new(last))
    }

    /// The first address of every page that the range touches. The caller bounds the range.
    pub fn pages(self) -> impl Iterator<Item = A> {
        let aligned = self.page_aligned();
        let (first, last) = (aligned.first.raw() >> PAGE_SHIFT, aligned.last.raw() >> PAGE_SHIFT);
        (first..=last).map(|number| A::new(number << PAGE_SHIFT))
    }
}

impl<A: Address> fmt::Display for ByteRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{:#x}", self.first, self.len())
    }
}

impl<A: Address> Serialize for ByteRange<A> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Range = ByteRange<Iova>;

    #[test]
    fn a_range_of_no_bytes_cannot_be_built() {
        assert_eq!(Range::new(Iova::new(0x1000), 0), Err(RangeError::Empty { start: 0x1000 }));
    }

    #[test]
    fn a_range_may_end_at_the_last_byte_but_not_wrap() {
        let start = Iova::new(0xfef0_0000);
        let len = 0xffff_ffff_0110_0000;
        assert_eq!(Range::new(start, len).unwrap().last(), Iova::new(u64::MAX));
        assert_eq!(Range::new(start, len + 1), Err(RangeError::Wraps { start: 0xfef0_0000, len: len + 1 }));
    }

    #[test]
    fn the_whole_space_has_two_to_the_sixty_four_bytes() {
        assert_eq!(Range::everything().len(), 1 << 64);
        assert_eq!(Range::everything().page_aligned(), Range::everything());
        assert_eq!(Range::everything().whole_pages(), Some(Range::everything()));
    }

    #[test]
    fn neighbours_do_not_overlap() {
        let low = Range::new(Iova::new(0), 0x1000).unwrap();
        let high = Range::new(Iova::new(0x1000), 0x1000).unwrap();
        assert!(!low.overlaps(high) && low.intersection(high).is_none());
        assert!(low.overlaps(Range::everything()));
    }

    #[test]
    fn an_address_lies_in_one_whole_page() {
        for (address, first, last) in [(0, 0, 0xfff), (0x1fff, 0x1000, 0x1fff), (u64::MAX, !0xfff, u64::MAX)]
        {
            let page = Range::inclusive(Iova::new(first), Iova::new(last)).unwrap();
            assert_eq!(Iova::new(address).page_range(), page);
            assert_eq!(page.pages().collect::<Vec<_>>(), [page.first()]);
        }
    }

    #[test]
    fn whole_pages_leaves_out_what_is_cut() {
        let range = Range::new(Iova::new(0x800), 0x2000).unwrap();
        assert_eq!(range.whole_pages(), Range::new(Iova::new(0x1000), 0x1000).ok());
        assert_eq!(Range::new(Iova::new(0x10), 0x20).unwrap().whole_pages(), None);
        assert_eq!(range.pages().map(Iova::raw).collect::<Vec<_>>(), [0, 0x1000, 0x2000]);
    }
}
