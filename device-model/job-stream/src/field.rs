//! What a packet's body is made of: fields of one word or more, each with its way to and from words. Knows how many
//! words a type takes and in which order; knows nothing of what packets use it for.

use alloc::vec::Vec;

use crate::choice::ChoiceInfo;
use crate::error::Problem;
use crate::operand::{At, Range, Space};

/// How a field is written, for the manual and the C header.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A number of one word.
    U32,
    /// A number of two words, the lower first.
    U64,
    /// A set of bits over eight words, bit 0 of the first word first.
    Bits256,
    /// A place: space, address.
    At,
    /// A place, or three words 0 if there is none.
    OptionalAt,
    /// Bytes: space, address, length.
    Range,
    /// One of some named values.
    Choice(&'static ChoiceInfo),
    /// One of some named values, or 0 for none of them.
    OptionalChoice(&'static ChoiceInfo),
    /// All further words of the packet, which mean nothing.
    Payload,
}

impl Kind {
    /// The words of the field, by name; what is appended to the name of the field.
    pub const fn parts(self) -> &'static [&'static str] {
        match self {
            Self::U32 | Self::Choice(_) | Self::OptionalChoice(_) => &[""],
            Self::U64 => &[" (low)", " (high)"],
            Self::At | Self::OptionalAt => &[".space", ".address (low)", ".address (high)"],
            Self::Range => {
                &[".space", ".address (low)", ".address (high)", ".length (low)", ".length (high)"]
            }
            Self::Bits256 => &["[0]", "[1]", "[2]", "[3]", "[4]", "[5]", "[6]", "[7]"],
            Self::Payload => &[],
        }
    }

    /// How many words the field takes; of a payload, the least.
    pub const fn words(self) -> u16 {
        match self {
            Self::Payload => 0,
            Self::U32 | Self::Choice(_) | Self::OptionalChoice(_) => 1,
            Self::U64 => 2,
            Self::At | Self::OptionalAt => 3,
            Self::Range => 5,
            Self::Bits256 => 8,
        }
    }
}

/// Words of a packet that mean nothing. Only their number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Payload(u16);

impl Payload {
    /// The most words that fit in a packet behind its header.
    pub const MAX: u16 = u16::MAX - 1;

    /// So many words, or [`Self::MAX`] if that is less.
    pub const fn of(words: u16) -> Self {
        Self(if words > Self::MAX { Self::MAX } else { words })
    }

    /// How many words.
    pub const fn len(self) -> u16 {
        self.0
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The words of a body that are still to be read.
pub(crate) struct Words<'a>(&'a [u32]);

impl<'a> Words<'a> {
    pub(crate) const fn new(words: &'a [u32]) -> Self {
        Self(words)
    }

    fn word(&mut self) -> Result<u32, Problem> {
        let (first, rest) = self.0.split_first().ok_or(Problem::Truncated { missing: 1 })?;
        self.0 = rest;
        Ok(*first)
    }

    fn long(&mut self) -> Result<u64, Problem> {
        let low = self.word()?;
        Ok(u64::from(low) | u64::from(self.word()?) << 32)
    }

    /// Takes all that is left, and says how much it was.
    fn rest(&mut self) -> usize {
        core::mem::take(&mut self.0).len()
    }
}

/// A type of field.
pub(crate) trait Field: Sized {
    const KIND: Kind;
    /// How many words it takes; of a payload, the least.
    const WORDS: u16 = Self::KIND.words();

    fn decode(words: &mut Words<'_>) -> Result<Self, Problem>;
    fn encode(&self, words: &mut Vec<u32>);

    /// How many words this very value takes.
    fn words(&self) -> u16 {
        Self::WORDS
    }
}

impl Field for u32 {
    const KIND: Kind = Kind::U32;

    fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
        words.word()
    }

    fn encode(&self, words: &mut Vec<u32>) {
        words.push(*self);
    }
}

impl Field for u64 {
    const KIND: Kind = Kind::U64;

    fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
        words.long()
    }

    fn encode(&self, words: &mut Vec<u32>) {
        let [a, b, c, d, e, f, g, h] = self.to_le_bytes();
        words.push(u32::from_le_bytes([a, b, c, d]));
        words.push(u32::from_le_bytes([e, f, g, h]));
    }
}

impl Field for At {
    const KIND: Kind = Kind::At;

    fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
        Ok(Self::new(Space::resource(words.word()?), words.long()?))
    }

    fn encode(&self, words: &mut Vec<u32>) {
        self.space.raw().encode(words);
        self.address.encode(words);
    }
}

impl Field for Option<At> {
    const KIND: Kind = Kind::OptionalAt;

    fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
        match At::decode(words)? {
            At { space: Space::NONE, address: 0 } => Ok(None),
            At { space: Space::NONE, address } => Err(Problem::AddressWithoutSpace { address }),
            at => Ok(Some(at)),
        }
    }

    fn encode(&self, words: &mut Vec<u32>) {
        self.unwrap_or(At::new(Space::NONE, 0)).encode(words);
    }
}

impl Field for Range {
    const KIND: Kind = Kind::Range;

    fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
        let at = At::decode(words)?;
        Ok(at.range(words.long()?))
    }

    fn encode(&self, words: &mut Vec<u32>) {
        self.at().encode(words);
        self.length.encode(words);
    }
}

impl Field for Payload {
    const KIND: Kind = Kind::Payload;

    fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
        Ok(Self::of(u16::try_from(words.rest()).unwrap_or(Self::MAX)))
    }

    fn encode(&self, words: &mut Vec<u32>) {
        words.extend(core::iter::repeat_n(0, usize::from(self.0)));
    }

    fn words(&self) -> u16 {
        self.0
    }
}

impl Field for [u32; 8] {
    const KIND: Kind = Kind::Bits256;

    fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
        let mut bits = [0; 8];
        bits.iter_mut().try_for_each(|word| words.word().map(|read| *word = read))?;
        Ok(bits)
    }

    fn encode(&self, words: &mut Vec<u32>) {
        words.extend(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::Mode;

    #[test]
    fn a_kind_has_a_name_for_each_of_its_words() {
        let info = &<Mode as crate::Choice>::INFO;
        let kinds = [
            Kind::U32,
            Kind::U64,
            Kind::Bits256,
            Kind::At,
            Kind::OptionalAt,
            Kind::Range,
            Kind::Choice(info),
            Kind::OptionalChoice(info),
            Kind::Payload,
        ];
        for kind in kinds {
            assert_eq!(kind.parts().len(), usize::from(kind.words()), "{kind:?}");
        }
    }

    #[test]
    fn an_operand_that_is_not_there_has_no_address() {
        let take = |words: [u32; 3]| Option::<At>::decode(&mut Words::new(&words));
        assert_eq!(take([0, 0, 0]), Ok(None));
        assert_eq!(take([0, 0, 1]), Err(Problem::AddressWithoutSpace { address: 1 << 32 }));
        assert_eq!(take([7, 1, 2]), Ok(Some(At::new(Space::resource(7), 2 << 32 | 1))));
    }

    #[test]
    fn a_payload_never_outgrows_its_packet() {
        assert_eq!(Payload::of(u16::MAX).len(), Payload::MAX);
    }
}
