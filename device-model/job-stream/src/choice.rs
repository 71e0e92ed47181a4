//! The named values of packets: modes, priorities, comparisons and so on. Each is one table, of which the enum, its
//! names and its rows in the manual and the C header come. Knows names and numbers; knows nothing of their use.

use alloc::vec::Vec;

use crate::error::Problem;
use crate::field::{Field, Kind, Words};

/// One of the values of a choice, for the manual and the C header.
#[derive(Clone, Copy, Debug)]
pub struct ChoiceInfo {
    /// The name of the choice.
    pub name: &'static str,
    /// What it decides.
    pub text: &'static str,
    /// The number, name and meaning of each value.
    pub values: &'static [(u32, &'static str, &'static str)],
}

/// A word that has one of some named values. None of them is 0.
pub trait Choice: Copy + 'static {
    /// The table that it comes from.
    const INFO: ChoiceInfo;

    /// The value with this number.
    fn from_raw(raw: u32) -> Option<Self>;
    /// The number of the value.
    fn raw(self) -> u32;
    /// The name of the value, in small letters.
    fn name(self) -> &'static str;

    /// The value with this name.
    fn from_name(name: &str) -> Option<Self> {
        let (raw, ..) = Self::INFO.values.iter().find(|(_, known, _)| *known == name)?;
        Self::from_raw(*raw)
    }
}

macro_rules! choices {
    ($(
        #[doc = $text:literal]
        $Choice:ident { $($(#[doc = $value_text:literal])+ $Value:ident = $number:literal, $name:literal;)* }
    )*) => {$(
        #[doc = $text]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u32)]
        pub enum $Choice {
            $($(#[doc = $value_text])+ $Value = $number,)*
        }

        impl $Choice {
            /// All values, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$Value),*];
        }

        impl Choice for $Choice {
            const INFO: ChoiceInfo = ChoiceInfo {
                name: stringify!($Choice),
                text: $text,
                values: &[$(($number, $name, concat!($($value_text),+))),*],
            };

            fn from_raw(raw: u32) -> Option<Self> {
                match raw {
                    $($number => Some(Self::$Value),)*
                    _ => None,
                }
            }

            fn raw(self) -> u32 {
                self as u32
            }

            fn name(self) -> &'static str {
                match self {
                    $(Self::$Value => $name,)*
                }
            }
        }

        impl core::fmt::Display for $Choice {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl Field for $Choice {
            const KIND: Kind = Kind::Choice(&Self::INFO);

            fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
                let value = u32::decode(words)?;
                Self::from_raw(value).ok_or(Problem::Choice { choice: Self::INFO.name, value })
            }

            fn encode(&self, words: &mut Vec<u32>) {
                words.push(self.raw());
            }
        }

        impl Field for Option<$Choice> {
            const KIND: Kind = Kind::OptionalChoice(&$Choice::INFO);

            fn decode(words: &mut Words<'_>) -> Result<Self, Problem> {
                let value = u32::decode(words)?;
                let known = || $Choice::from_raw(value).ok_or(Problem::Choice { choice: $Choice::INFO.name, value });
                if value == 0 { Ok(None) } else { known().map(Some) }
            }

            fn encode(&self, words: &mut Vec<u32>) {
                words.push(self.map_or(0, $Choice::raw));
            }
        }
    )*};
}

choices! {
    /// What an invalidation means to the jobs of a context.
    Mode {
        /// Every access is translated at the moment it is made. An invalidation waits for the access in progress.
        /// An access to a page that is gone is fatal: the context is lost.
        Strict = 1, "strict";
        /// All that a job may touch is pinned while it runs. An invalidation waits for the fence of the job.
        Fence = 2, "fence";
        /// All that a job may touch is pinned while it is on an engine. An invalidation takes the job off the
        /// engine; the job goes on when its memory is there again.
        Preempt = 3, "preempt";
        /// As in strict mode, but an access to a page that is gone faults, and the packet is resumed where it
        /// faulted when the page is there again.
        Fault = 4, "fault";
        /// A running job keeps the pages that it started with. An invalidation does not wait for it: incoherent
        /// by definition, and offered only if the device was told to.
        RegistrationCache = 5, "registration-cache";
    }

    /// Whose turn it is when several contexts have work.
    Priority {
        /// Runs when nobody else wants the engine, or after having waited long.
        Low = 1, "low";
        /// What a context has that asks for nothing.
        Normal = 2, "normal";
        /// Runs before the others.
        High = 3, "high";
    }

    /// How WAIT compares the value in memory, masked, with the value of the packet. All numbers are unsigned.
    Compare {
        /// Memory is equal to the value.
        Equal = 1, "eq";
        /// Memory is not equal to the value.
        NotEqual = 2, "ne";
        /// Memory is less than the value.
        Less = 3, "lt";
        /// Memory is less than or equal to the value.
        LessOrEqual = 4, "le";
        /// Memory is greater than the value.
        Greater = 5, "gt";
        /// Memory is greater than or equal to the value.
        GreaterOrEqual = 6, "ge";
    }

    /// What ATOMIC does.
    AtomicOperation {
        /// Adds the operand to the value in memory; the sum wraps.
        Add = 1, "add";
        /// Replaces the value in memory by the operand if it is equal to what is expected.
        CompareAndSwap = 2, "cas";
    }

    /// What SPIN does when the engine is wanted for something else.
    SpinBehaviour {
        /// It leaves the engine at the end of the step, and comes back for the rest of its time.
        Preemptible = 1, "preemptible";
        /// It stays on the engine until its time is over, whoever asks.
        Stubborn = 2, "stubborn";
        /// It never ends. The device takes it off by force, after a time of the device's own, and the job fails.
        Wedged = 3, "wedged";
    }
}

impl Compare {
    /// Whether the comparison holds between the value in memory and the value of the packet.
    pub const fn holds(self, memory: u64, value: u64) -> bool {
        match self {
            Self::Equal => memory == value,
            Self::NotEqual => memory != value,
            Self::Less => memory < value,
            Self::LessOrEqual => memory <= value,
            Self::Greater => memory > value,
            Self::GreaterOrEqual => memory >= value,
        }
    }
}

/// A set of modes: bit n is the mode with the number n.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ModeSet(u32);

impl ModeSet {
    /// The modes that keep coherence: all but the registration cache.
    pub const COHERENT: Self = Self(
        1 << Mode::Strict as u32
            | 1 << Mode::Fence as u32
            | 1 << Mode::Preempt as u32
            | 1 << Mode::Fault as u32,
    );

    /// The set with these bits.
    pub const fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    /// The bits of the set.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The set with `mode` too.
    #[must_use]
    pub const fn with(self, mode: Mode) -> Self {
        Self(self.0 | 1 << mode as u32)
    }

    /// Whether `mode` is in the set.
    pub const fn contains(self, mode: Mode) -> bool {
        self.0 & 1 << mode as u32 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_found_again_by_its_number_and_by_its_name() {
        for mode in Mode::ALL {
            assert_eq!(Mode::from_raw(mode.raw()), Some(*mode));
            assert_eq!(Mode::from_name(mode.name()), Some(*mode));
        }
        assert_eq!(Mode::from_raw(0), None);
        assert_eq!(Mode::from_name("Strict"), None);
    }

    #[test]
    fn comparisons_hold_as_they_are_named() {
        let holding = |memory| Compare::ALL.iter().filter(move |c| c.holds(memory, 5)).map(|c| c.name());
        assert!(holding(4).eq(["ne", "lt", "le"]));
        assert!(holding(5).eq(["eq", "le", "ge"]));
        assert!(holding(u64::MAX).eq(["ne", "gt", "ge"]));
    }

    #[test]
    fn the_registration_cache_is_offered_only_when_asked_for() {
        assert!(!ModeSet::COHERENT.contains(Mode::RegistrationCache));
        assert!(ModeSet::COHERENT.with(Mode::RegistrationCache).contains(Mode::RegistrationCache));
        assert_eq!(ModeSet::COHERENT.bits(), 0b11110);
    }
}
