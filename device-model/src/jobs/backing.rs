//! The backing of a resource: ranges of guest memory, one after the other. Knows which address belongs to which offset,
//! and which offsets lie in a range of addresses; knows nothing of images, and never touches the memory.

use std::sync::Arc;

use crate::addr::{ByteRange, Iova};
use crate::jobs::error::InvalidMemory;
use crate::jobs::offsets::Offsets;

/// One entry of a backing, unchecked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawEntry {
    pub(crate) at: Iova,
    pub(crate) len: u32,
}

/// One entry, with its place in the backing.
#[derive(Clone, Copy, Debug)]
struct BackingRange {
    /// Bytes of the backing before this entry.
    offset: u64,
    range: ByteRange<Iova>,
}

/// The entries of a backing, in both orders: 56 bytes of memory for each, bounded by the quota on backing entries.
#[derive(Debug)]
pub(crate) struct Entries {
    /// INVARIANT: ordered by offset, without gaps.
    by_offset: Box<[BackingRange]>,
    by_address: Box<[Ordered]>,
}

/// An entry in the order of addresses.
#[derive(Clone, Copy, Debug)]
struct Ordered {
    entry: BackingRange,
    /// The last byte of this entry and all before it, since entries may overlap.
    reach: Iova,
}

/// A part of an entry: bytes that are contiguous in the backing and in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// Their offsets in the backing.
    pub(crate) offsets: Offsets,
    /// The address of the first.
    pub(crate) at: Iova,
}

impl Stretch {
    /// Where its bytes at `offsets` are; `None`: it has none of them.
    pub(crate) fn part(&self, offsets: Offsets) -> Option<ByteRange<Iova>> {
        let part = self.offsets.intersection(offsets)?;
        let place = |offset: u64| self.at.checked_add(offset.checked_sub(self.offsets.first)?);
        ByteRange::inclusive(place(part.first)?, place(part.last)?)
    }
}

impl Entries {
    fn new(by_offset: Box<[BackingRange]>) -> Self {
        let mut sorted = by_offset.to_vec();
        sorted.sort_by_key(|entry| entry.range);
        let mut reach = Iova::new(0);
        let ordered = sorted.into_iter().map(|entry| {
            reach = reach.max(entry.range.last());
            Ordered { entry, reach }
        });
        let by_address = ordered.collect();
        Self { by_offset, by_address }
    }

    /// The address of the byte at `offset`, and how many bytes follow from there in the same entry, itself included;
    /// `None` past the end.
    pub(crate) fn locate(&self, offset: u64) -> Option<(Iova, u64)> {
        let after = self.by_offset.partition_point(|entry| entry.offset <= offset);
        let entry = self.by_offset.get(after.checked_sub(1)?)?;
        let at = entry.range.first().checked_add(offset.checked_sub(entry.offset)?)?;
        let more = entry.range.last().raw().checked_sub(at.raw())?;
        Some((at, more.checked_add(1)?))
    }

    /// The stretches of guest memory behind these bytes, in order; it ends where the backing does.
    pub(crate) fn behind(&self, offsets: Offsets) -> impl Iterator<Item = Stretch> + '_ {
        let mut next = Some(offsets.first);
        std::iter::from_fn(move || {
            let first = next.filter(|first| *first <= offsets.last)?;
            let (at, in_entry) = self.locate(first)?;
            // OVERFLOW: `in_entry` counts the first byte.
            let last = first.saturating_add(in_entry.saturating_sub(1)).min(offsets.last);
            next = last.checked_add(1);
            Some(Stretch { offsets: Offsets::inclusive(first, last)?, at })
        })
    }

    /// What of the entries lies in a range of addresses, in address order. If entries do not overlap, this costs a
    /// search plus the length of the result.
    pub(crate) fn within(&self, range: ByteRange<Iova>) -> impl Iterator<Item = Stretch> + '_ {
        let from = self.by_address.partition_point(|ordered| ordered.reach < range.first());
        let some = self.by_address.iter().skip(from);
        let some = some.take_while(move |ordered| ordered.entry.range.first() <= range.last());
        some.filter_map(move |Ordered { entry, .. }| {
            let part = entry.range.intersection(range)?;
            let offset =
                |at: Iova| entry.offset.checked_add(at.raw().checked_sub(entry.range.first().raw())?);
            let offsets = Offsets::inclusive(offset(part.first())?, offset(part.last())?)?;
            Some(Stretch { offsets, at: part.first() })
        })
    }
}

/// A backing, cheap to clone: jobs share its entries.
#[derive(Clone, Debug)]
pub(crate) struct Backing {
    entries: Arc<Entries>,
    /// Each clone counts as a use. Bookkeeping about jobs shares only the entries, which does not count.
    users: Arc<()>,
}

impl Backing {
    /// A backing of these entries. The caller has bounded their number; there is at least one.
    pub(crate) fn new(entries: impl Iterator<Item = RawEntry>) -> Result<Self, InvalidMemory> {
        let mut offset = 0_u64;
        let place = |(index, entry): (usize, RawEntry)| {
            let range = ByteRange::new(entry.at, u64::from(entry.len))
                .map_err(|source| InvalidMemory::BadEntry { index, source })?;
            let placed = BackingRange { offset, range };
            // OVERFLOW: fewer than 2^32 entries of fewer than 2^32 bytes.
            offset = offset.saturating_add(u64::from(entry.len));
            Ok(placed)
        };
        let entries = entries.enumerate().map(place).collect::<Result<_, InvalidMemory>>()?;
        Ok(Self { entries: Arc::new(Entries::new(entries)), users: Arc::default() })
    }

    /// The length of all entries together.
    pub(crate) fn bytes(&self) -> u64 {
        self.entries.by_offset.last().map_or(0, |last| {
            // OVERFLOW: as in `new`.
            let len = last.range.last().raw().saturating_sub(last.range.first().raw()).saturating_add(1);
            last.offset.saturating_add(len)
        })
    }

    /// How many entries there are.
    pub(crate) fn entries(&self) -> usize {
        self.entries.by_offset.len()
    }

    /// The entries, for bookkeeping about jobs. Holding them does not count as a use of the backing.
    pub(crate) fn share_entries(&self) -> Arc<Entries> {
        Arc::clone(&self.entries)
    }

    /// The entries as ranges of memory, in order.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = ByteRange<Iova>> + '_ {
        self.entries.by_offset.iter().map(|entry| entry.range)
    }

    /// Whether a job uses the backing too.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.users) > 1
    }

    /// As [`Entries::locate`].
    pub(crate) fn locate(&self, offset: u64) -> Option<(Iova, u64)> {
        self.entries.locate(offset)
    }

    /// The guest memory behind these bytes, as [`Entries::behind`].
    pub(crate) fn behind(&self, offsets: Offsets) -> impl Iterator<Item = ByteRange<Iova>> + '_ {
        self.entries.behind(offsets).filter_map(move |stretch| stretch.part(offsets))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn backing(entries: &[(u64, u32)]) -> Backing {
        Backing::new(entries.iter().map(|&(at, len)| RawEntry { at: Iova::new(at), len })).unwrap()
    }

    #[test]
    fn every_offset_is_found_in_its_entry_and_none_behind_the_last() {
        let backing = backing(&[(0x5000, 0x10), (0x1000, 0x20), (u64::MAX, 1)]);
        assert_eq!(backing.locate(0), Some((Iova::new(0x5000), 0x10)));
        assert_eq!(backing.locate(0xf), Some((Iova::new(0x500f), 1)));
        assert_eq!(backing.locate(0x10), Some((Iova::new(0x1000), 0x20)));
        assert_eq!(backing.locate(0x2f), Some((Iova::new(0x101f), 1)));
        assert_eq!(backing.locate(0x30), Some((Iova::new(u64::MAX), 1)));
        assert_eq!(backing.locate(0x31), None);
        assert_eq!(backing.locate(u64::MAX), None);
    }

    #[test]
    fn sharing_the_entries_alone_is_not_a_use() {
        let backing = backing(&[(0x5000, 0x10)]);
        let entries = backing.share_entries();
        assert!(!backing.is_shared());
        let job = backing.clone();
        assert!(backing.is_shared());
        drop((job, entries));
        assert!(!backing.is_shared());
    }

    proptest! {
        /// Entries may overlap, and come in any order.
        #[test]
        fn a_byte_is_within_a_range_of_addresses_if_its_place_is(
            entries in prop::collection::vec((0_u64..64, 1_u32..20), 1..12),
            (from, len) in (0_u64..90, 1_u64..90),
        ) {
            let backing = backing(&entries);
            let range = ByteRange::new(Iova::new(from), len).unwrap();
            let mut found: Vec<(u64, u64)> = Vec::new();
            for stretch in backing.entries.within(range) {
                let offsets = stretch.offsets.first..=stretch.offsets.last;
                found.extend(offsets.zip(stretch.at.raw()..));
            }
            found.sort_unstable();
            let all = (0..backing.bytes()).map(|offset| (offset, backing.locate(offset).unwrap().0));
            let within = all.filter(|(_, at)| range.contains(*at)).map(|(offset, at)| (offset, at.raw()));
            prop_assert_eq!(found, within.collect::<Vec<_>>());
        }
    }
}
