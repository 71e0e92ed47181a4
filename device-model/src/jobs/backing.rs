//! The backing of a resource: stretches of guest memory, one after the other. Knows which address stands at which
//! offset; knows nothing of images, and never touches the memory.

use std::sync::Arc;

use crate::addr::{ByteRange, Iova};
use crate::gpu::error::CommandError;
use crate::gpu::request::RawEntry;

/// One stretch, with its place in the backing.
#[derive(Clone, Copy, Debug)]
struct BackingRange {
    /// Bytes of the backing before this one.
    offset: u64,
    range: ByteRange<Iova>,
}

/// A backing, cheap to clone: jobs share its entries.
///
/// INVARIANT: entries are in the order of their offsets, without gaps.
#[derive(Clone, Debug)]
pub(crate) struct Backing {
    entries: Arc<[BackingRange]>,
}

impl Backing {
    /// A backing of these entries. The caller has bounded their number, and there is at least one.
    pub(crate) fn new(entries: impl Iterator<Item = RawEntry>) -> Result<Self, CommandError> {
        let mut offset = 0_u64;
        let place = |(index, entry): (usize, RawEntry)| {
            let range = ByteRange::new(entry.at, u64::from(entry.len))
                .map_err(|source| CommandError::BadEntry { index, source })?;
            let placed = BackingRange { offset, range };
            // OVERFLOW: fewer than 2^32 entries of fewer than 2^32 bytes.
            offset = offset.saturating_add(u64::from(entry.len));
            Ok(placed)
        };
        Ok(Self { entries: entries.enumerate().map(place).collect::<Result<_, CommandError>>()? })
    }

    /// Bytes of all entries together.
    pub(crate) fn bytes(&self) -> u64 {
        self.entries.last().map_or(0, |last| {
            // OVERFLOW: as in `new`.
            let len = last.range.last().raw().saturating_sub(last.range.first().raw()).saturating_add(1);
            last.offset.saturating_add(len)
        })
    }

    /// How many entries there are.
    pub(crate) fn entries(&self) -> usize {
        self.entries.len()
    }

    /// The stretches of memory, in order.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = ByteRange<Iova>> + '_ {
        self.entries.iter().map(|entry| entry.range)
    }

    /// Whether anybody else, a job, shares the entries.
    pub(crate) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.entries) > 1
    }

    /// The address of the byte at `offset`, and how many bytes follow from there in the same entry, itself included;
    /// `None` past the end.
    pub(crate) fn locate(&self, offset: u64) -> Option<(Iova, u64)> {
        let after = self.entries.partition_point(|entry| entry.offset <= offset);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        let at = entry.range.first().checked_add(offset.checked_sub(entry.offset)?)?;
        let more = entry.range.last().raw().checked_sub(at.raw())?;
        Some((at, more.checked_add(1)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_offset_is_found_in_its_entry_and_none_behind_the_last() {
        let entries = [(0x5000, 0x10), (0x1000, 0x20), (u64::MAX, 1)];
        let backing =
            Backing::new(entries.into_iter().map(|(at, len)| RawEntry { at: Iova::new(at), len })).unwrap();
        assert_eq!(backing.locate(0), Some((Iova::new(0x5000), 0x10)));
        assert_eq!(backing.locate(0xf), Some((Iova::new(0x500f), 1)));
        assert_eq!(backing.locate(0x10), Some((Iova::new(0x1000), 0x20)));
        assert_eq!(backing.locate(0x2f), Some((Iova::new(0x101f), 1)));
        assert_eq!(backing.locate(0x30), Some((Iova::new(u64::MAX), 1)));
        assert_eq!(backing.locate(0x31), None);
        assert_eq!(backing.locate(u64::MAX), None);
    }
}
