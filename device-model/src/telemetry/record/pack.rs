//! Packs the fields of an event into a few words, so that a record is a few stores. Numbers that are too large for
//! their bits are saturated. Knows bits; knows nothing of events.

use std::time::Duration;

use job_stream::{Choice, Mode};
use serde::Serialize;

use crate::addr::{Access, Asid, ByteRange, Gva, Iova, PAGE_SHIFT, PAGE_SIZE};
use crate::jobs::address_space::FaultKind;
use crate::jobs::job::JobId;
use crate::jobs::verdict::Verdict;

/// Words per event.
pub(super) const WORDS: usize = 4;

/// Fields in sequence; one that would straddle two words starts in the next.
#[derive(Default)]
pub(super) struct Bits {
    pub(super) words: [u64; WORDS],
    at: u32,
}

impl Bits {
    pub(super) fn of(words: [u64; WORDS]) -> Self {
        Self { words, at: 0 }
    }

    /// The position of the next `width` bits: their word, and the offset in it.
    #[inline(always)]
    fn place(&mut self, width: u32) -> (usize, u32) {
        if self.at % u64::BITS + width > u64::BITS {
            self.at = self.at.next_multiple_of(u64::BITS);
        }
        let place = ((self.at / u64::BITS) as usize, self.at % u64::BITS);
        self.at += width;
        place
    }

    #[inline(always)]
    pub(super) fn push(&mut self, width: u32, value: u64) {
        let (word, shift) = self.place(width);
        if let Some(word) = self.words.get_mut(word) {
            *word |= value.min(most(width)) << shift;
        }
    }

    #[inline(always)]
    pub(super) fn take(&mut self, width: u32) -> Option<u64> {
        let (word, shift) = self.place(width);
        Some(self.words.get(word)? >> shift & most(width))
    }

    /// Bits that the fields so far need.
    #[cfg(test)]
    pub(super) fn used(&self) -> u32 {
        self.at
    }
}

#[inline(always)]
const fn most(width: u32) -> u64 {
    u64::MAX >> (u64::BITS - width)
}

/// A type that can be a field of an event.
pub(super) trait Packed: Sized {
    fn pack(self, bits: &mut Bits);
    fn unpack(bits: &mut Bits) -> Option<Self>;
}

macro_rules! packed_numbers {
    ($($Type:ty: $width:literal;)*) => {$(
        impl Packed for $Type {
            #[inline(always)]
            fn pack(self, bits: &mut Bits) {
                bits.push($width, self as u64);
            }

            fn unpack(bits: &mut Bits) -> Option<Self> {
                <$Type>::try_from(bits.take($width)?).ok()
            }
        }
    )*};
}

packed_numbers! {
    u32: 32;
    u64: 64;
    usize: 24;
}

impl Packed for bool {
    #[inline(always)]
    fn pack(self, bits: &mut Bits) {
        bits.push(1, self.into());
    }

    fn unpack(bits: &mut Bits) -> Option<Self> {
        Some(bits.take(1)? == 1)
    }
}

impl<T: Packed + Default> Packed for Option<T> {
    #[inline(always)]
    fn pack(self, bits: &mut Bits) {
        self.is_some().pack(bits);
        self.unwrap_or_default().pack(bits);
    }

    fn unpack(bits: &mut Bits) -> Option<Self> {
        let is_some = bool::unpack(bits)?;
        let value = T::unpack(bits)?;
        Some(is_some.then_some(value))
    }
}

/// A duration of up to 18 minutes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Nanoseconds(u64);

impl From<Duration> for Nanoseconds {
    fn from(duration: Duration) -> Self {
        Self(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
    }
}

impl From<Nanoseconds> for Duration {
    fn from(Nanoseconds(count): Nanoseconds) -> Self {
        Self::from_nanos(count)
    }
}

impl Packed for Nanoseconds {
    #[inline(always)]
    fn pack(self, bits: &mut Bits) {
        bits.push(40, self.0);
    }

    fn unpack(bits: &mut Bits) -> Option<Self> {
        bits.take(40).map(Self)
    }
}

impl Packed for Asid {
    #[inline(always)]
    fn pack(self, bits: &mut Bits) {
        bits.push(32, self.raw().into());
    }

    fn unpack(bits: &mut Bits) -> Option<Self> {
        u32::try_from(bits.take(32)?).ok().map(Self::new)
    }
}

impl Packed for Gva {
    #[inline(always)]
    fn pack(self, bits: &mut Bits) {
        bits.push(48, self.raw());
    }

    fn unpack(bits: &mut Bits) -> Option<Self> {
        bits.take(48).map(Self::new)
    }
}

impl Packed for JobId {
    #[inline(always)]
    fn pack(self, bits: &mut Bits) {
        bits.push(48, self.raw());
    }

    fn unpack(bits: &mut Bits) -> Option<Self> {
        bits.take(48).map(Self::new)
    }
}

impl Packed for Mode {
    #[inline(always)]
    fn pack(self, bits: &mut Bits) {
        bits.push(4, self.raw().into());
    }

    fn unpack(bits: &mut Bits) -> Option<Self> {
        Self::from_raw(u32::try_from(bits.take(4)?).ok()?)
    }
}

/// Whole pages.
impl Packed for ByteRange<Iova> {
    #[inline(always)]
    fn pack(self, bits: &mut Bits) {
        bits.push(52, self.first().raw() >> PAGE_SHIFT);
        bits.push(52, self.last().raw() >> PAGE_SHIFT);
    }

    fn unpack(bits: &mut Bits) -> Option<Self> {
        let first = Iova::new(bits.take(52)? << PAGE_SHIFT);
        let last = Iova::new(bits.take(52)? << PAGE_SHIFT | (PAGE_SIZE - 1));
        Self::inclusive(first, last)
    }
}

/// Enums with few values, in the order of the list.
macro_rules! packed_enums {
    ($($Type:ty: $($Value:ident),+;)*) => {$(
        impl $crate::telemetry::record::pack::Packed for $Type {
            #[inline(always)]
            fn pack(self, bits: &mut $crate::telemetry::record::pack::Bits) {
                bits.push(4, self as u64);
            }

            fn unpack(bits: &mut $crate::telemetry::record::pack::Bits) -> Option<Self> {
                let value = bits.take(4)?;
                [$(Self::$Value),+].into_iter().find(|known| *known as u64 == value)
            }
        }
    )*};
}
pub(super) use packed_enums;

packed_enums! {
    Access: Read, Write;
    FaultKind: NotPresent, ReadDenied, WriteDenied, AtomicDenied, ReservedBits, Refused, Moved, NotFlushed;
    Verdict: Benign, Moved, Gone;
}
