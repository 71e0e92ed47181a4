//! Bytes of a backing by their offsets, and sets of them: what a job touches of a resource, wherever that lies in guest
//! memory. Knows numbers; knows nothing of jobs and of addresses.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::unwrap_used
    )
)]

use crate::addr::PAGE_SIZE;

/// Contiguous bytes of a backing, with both ends included.
///
/// INVARIANT: `first` is not above `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Offsets {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

impl Offsets {
    /// The bytes from `first` to `last`; `None` if `last` is below `first`.
    pub(crate) fn inclusive(first: u64, last: u64) -> Option<Self> {
        (first <= last).then_some(Self { first, last })
    }

    /// The bytes that are in both.
    pub(crate) fn intersection(self, other: Self) -> Option<Self> {
        Self::inclusive(self.first.max(other.first), self.last.min(other.last))
    }
}

/// Sorts, and joins what touches or overlaps.
pub(crate) fn joined(mut all: Vec<Offsets>) -> Vec<Offsets> {
    // The stable sort takes little longer for a few sorted lists in a row than for one list.
    all.sort();
    let mut joined: Vec<Offsets> = Vec::new();
    for next in all {
        match joined.last_mut() {
            Some(last) if next.first <= last.last.saturating_add(1) => last.last = next.last.max(last.last),
            _ => joined.push(next),
        }
    }
    joined
}

/// A set of bytes of a backing: pieces in order, no two of which touch.
#[derive(Clone, Debug)]
pub(crate) enum OffsetSet {
    /// Explicit pieces.
    Pieces(Box<[Offsets]>),
    /// The rows of a rectangle.
    Rows(Rows),
}

/// Pieces of equal length at equal distances.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    /// The first row.
    pub(crate) row: Offsets,
    /// From the start of one row to that of the next. It is more than the length of a row.
    pub(crate) stride: u64,
    /// The number of rows.
    pub(crate) count: u64,
}

impl Rows {
    fn get(&self, index: u64) -> Option<Offsets> {
        let skipped = self.stride.checked_mul(index).filter(|_| index < self.count)?;
        Offsets::inclusive(self.row.first.checked_add(skipped)?, self.row.last.checked_add(skipped)?)
    }

    /// The first row that does not end before this byte.
    fn first_up_to(&self, offset: u64) -> u64 {
        offset.saturating_sub(self.row.last).div_ceil(self.stride.max(1))
    }

    /// The last row that begins at or before this byte; `None`: none does.
    fn last_from(&self, offset: u64) -> Option<u64> {
        let rows = offset.checked_sub(self.row.first)?.checked_div(self.stride)?;
        Some(rows.min(self.count.checked_sub(1)?))
    }

    /// Whether the gap between two rows is less than a page.
    fn is_dense(&self) -> bool {
        let len = self.row.last.saturating_sub(self.row.first).saturating_add(1);
        self.stride.saturating_sub(len) < PAGE_SIZE
    }

    /// From the first byte of a row in `within` to the last one.
    fn outline(&self, within: Offsets) -> Option<Offsets> {
        let first = self.get(self.first_up_to(within.first))?.intersection(within)?;
        let last = self.get(self.last_from(within.last)?)?.intersection(within)?;
        Offsets::inclusive(first.first, last.last)
    }
}

impl Default for OffsetSet {
    fn default() -> Self {
        Self::Pieces(Box::default())
    }
}

impl OffsetSet {
    /// The set of these bytes.
    pub(crate) fn new(all: Vec<Offsets>) -> Self {
        Self::Pieces(joined(all).into())
    }

    /// The number of pieces of [`Self::outline`].
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Pieces(pieces) => pieces.len(),
            Self::Rows(rows) if rows.is_dense() => 1,
            Self::Rows(rows) => usize::try_from(rows.count).unwrap_or(usize::MAX),
        }
    }

    /// Pieces, in order, that contain the set; where they contain more, that is less than a page in one place.
    pub(crate) fn outline(&self) -> impl Iterator<Item = Offsets> + '_ {
        self.within(Offsets { first: 0, last: u64::MAX })
    }

    /// The part of the set in `within`, piece by piece. Where the pieces contain more than the set, the excess lies
    /// between two bytes of the set and is less than a page in one place. So if these bytes are contiguous in memory,
    /// the pieces lie on the same pages as the set. Costs a search plus the length of the result.
    pub(crate) fn within(&self, within: Offsets) -> impl Iterator<Item = Offsets> + '_ {
        let (pieces, rows, dense): (&[Offsets], _, _) = match self {
            Self::Pieces(pieces) => {
                let from = pieces.partition_point(|piece| piece.last < within.first);
                (pieces.get(from..).unwrap_or_default(), None, None)
            }
            Self::Rows(rows) if rows.is_dense() => (&[], None, rows.outline(within)),
            Self::Rows(rows) => (&[], Some(rows), None),
        };
        let rows = rows.into_iter().flat_map(move |rows| {
            (rows.first_up_to(within.first)..rows.count).map_while(|index| rows.get(index))
        });
        let pieces = pieces.iter().copied().chain(rows);
        pieces.map_while(move |piece| piece.intersection(within)).chain(dense)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn bytes(pieces: impl Iterator<Item = Offsets>) -> Vec<u64> {
        pieces.flat_map(|piece| piece.first..=piece.last).collect()
    }

    proptest! {
        #[test]
        fn a_set_has_the_bytes_that_were_put_in(
            pieces in prop::collection::vec((0_u64..100, 0_u64..12), 0..12),
            (from, more) in (0_u64..120, 0_u64..120),
        ) {
            let piece = |(first, more): &(u64, u64)| Offsets { first: *first, last: first + more };
            let pieces: Vec<_> = pieces.iter().map(piece).collect();
            let wanted: BTreeSet<u64> = bytes(pieces.iter().copied()).into_iter().collect();
            let set = OffsetSet::new(pieces);
            prop_assert_eq!(bytes(set.outline()), wanted.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.len(), set.outline().count());
            let within = wanted.range(from..=from + more).copied().collect::<Vec<_>>();
            prop_assert_eq!(bytes(set.within(Offsets { first: from, last: from + more })), within);
        }

        #[test]
        fn rows_are_as_the_pieces_that_they_stand_for(
            (first, more, gap, count) in (0_u64..9000, 0_u64..9000, 1_u64..9000, 0_u64..9),
            (from, len) in (0_u64..120_000, 0_u64..120_000),
        ) {
            let (row, stride) = (Offsets { first, last: first + more }, more + 1 + gap);
            let all = (0..count).map(|row| Offsets { first: first + row * stride, last: first + row * stride + more });
            let (rows, pieces) = (Rows { row, stride, count }, OffsetSet::new(all.collect()));
            let (set, within) = (OffsetSet::Rows(rows), Offsets { first: from, last: from + len });
            let wanted: Vec<_> = pieces.within(within).collect();
            let found: Vec<_> = set.within(within).collect();
            if rows.is_dense() {
                let ends = wanted.first().map(|piece| piece.first).zip(wanted.last().map(|piece| piece.last));
                prop_assert_eq!(found, ends.map(|(first, last)| Offsets { first, last }).into_iter().collect::<Vec<_>>());
            } else {
                prop_assert_eq!(found, wanted);
            }
        }
    }
}
