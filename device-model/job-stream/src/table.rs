//! What the table of packets is made of, and the macro that makes everything else out of it: opcodes, names, native
//! packets, decoder, encoder, rules, and the rows of the manual. Knows the shape of packets; the rows themselves
//! stand in `packets`.

use crate::error::Problem;
use crate::field::Kind;
use crate::limits::Limits;
use crate::operand::{Access, Operand};
use crate::packets::{Opcode, Packet};

/// Words of a packet's header: bits 0 to 7 are the opcode, 8 to 15 the flags, 16 to 31 the length of the packet in
/// words, the header included.
pub(crate) const HEADER_WORDS: u16 = 1;

/// Operands of a packet, at the most.
pub(crate) const MAX_OPERANDS: usize = 2;

/// The row of a packet.
#[derive(Clone, Copy, Debug)]
pub struct PacketInfo {
    /// Its opcode.
    pub opcode: Opcode,
    /// Its name.
    pub name: &'static str,
    /// What it does, in lines of Markdown; the first one is the summary.
    pub text: &'static [&'static str],
    /// Its flags.
    pub flags: &'static [FlagInfo],
    /// Its body.
    pub fields: &'static [FieldInfo],
    /// Which of the fields name memory.
    pub operands: &'static [OperandInfo],
    /// What else has to hold.
    pub rules: &'static [RuleInfo],
    /// An example.
    pub example: fn() -> Packet,
}

/// A flag of a packet.
#[derive(Clone, Copy, Debug)]
pub struct FlagInfo {
    /// Its name.
    pub name: &'static str,
    /// Its bit among the flags.
    pub bit: u8,
    /// What it means.
    pub text: &'static str,
}

/// A field of a packet's body.
#[derive(Clone, Copy, Debug)]
pub struct FieldInfo {
    /// Its name.
    pub name: &'static str,
    /// How it is written.
    pub kind: Kind,
    /// What it means.
    pub text: &'static str,
}

/// A field that names memory.
#[derive(Clone, Copy, Debug)]
pub struct OperandInfo {
    /// The name of the field.
    pub field: &'static str,
    /// What the packet does to the memory.
    pub access: Access,
    /// What it is made of: `Bytes`, `Words`, one `Value32` or `Value64`, or a `Value` of which a flag says how wide.
    pub unit: &'static str,
}

/// A rule that a packet has to keep.
#[derive(Clone, Copy, Debug)]
pub struct RuleInfo {
    /// The field that it is about; `header` for the first word.
    pub field: &'static str,
    /// What the field must do.
    pub text: &'static str,
}

impl PacketInfo {
    /// Words of the packet, the header included, and whether more may follow.
    pub fn length(&self) -> (u16, bool) {
        let body = self.fields.iter().fold(0_u16, |sum, field| sum.saturating_add(field.kind.words()));
        (
            body.saturating_add(HEADER_WORDS),
            self.fields.iter().any(|field| matches!(field.kind, Kind::Payload)),
        )
    }

    /// The word of the packet, header included, where a field begins. What is no field begins with the header.
    pub fn offset(&self, field: &str) -> u16 {
        let before = self.fields.iter().take_while(|known| known.name != field);
        let offset = before.fold(HEADER_WORDS, |sum, field| sum.saturating_add(field.kind.words()));
        if self.fields.iter().any(|known| known.name == field) { offset } else { 0 }
    }

    /// The flags that mean something.
    pub fn known_flags(&self) -> u8 {
        self.flags.iter().fold(0, |known, flag| known | 1_u8.checked_shl(u32::from(flag.bit)).unwrap_or(0))
    }
}

/// Where a packet stands when its rules are looked at.
pub(crate) struct Place<'a> {
    pub(crate) index: usize,
    pub(crate) limits: &'a Limits,
}

/// What is wrong with which field.
pub(crate) type Fault = (&'static str, Problem);

/// What an operand is made of.
#[derive(Clone, Copy)]
pub(crate) enum Unit {
    Bytes,
    Words,
    Value32,
    Value64,
    /// A value of 64 bits if so, else of 32.
    Value(bool),
}

impl Unit {
    pub(crate) const fn bytes(self) -> u64 {
        match self {
            Self::Bytes => 1,
            Self::Words | Self::Value32 | Self::Value(false) => 4,
            Self::Value64 | Self::Value(true) => 8,
        }
    }

    pub(crate) const fn is_value(self) -> bool {
        !matches!(self, Self::Bytes | Self::Words)
    }
}

/// The memory that a packet touches.
pub(crate) type Operands = [Option<Operand>; MAX_OPERANDS];

/// The table of packets. A row has the number, name and type of a packet, and names for the packet and its [`Place`];
/// then its flags, its fields in the order of their words, its operands (what happens to them, what they are made of,
/// the bytes), its rules (what must be so, and whether it is), and an example.
macro_rules! packets {
    ($(
        $(#[doc = $text:literal])+
        $opcode:literal $NAME:ident $Packet:ident |$p:ident, $place:ident| {
            flags { $($flag:ident = $bit:literal, $flag_text:literal;)* }
            fields { $($field:ident: $kind:ty, $field_text:literal;)* }
            operands { $($operand:ident $access:ident $unit:ident $(($wide:expr))? => $range:expr;)* }
            rules { $($subject:ident $rule:literal => $holds:expr;)* }
            example { $($example:ident: $value:expr,)* }
        }
    )*) => {
        /// The numbers of the packets.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Opcode {
            $($(#[doc = $text])+ $Packet = $opcode,)*
        }

        impl Opcode {
            /// The opcode with this number.
            pub const fn from_raw(raw: u8) -> Option<Self> {
                match raw {
                    $($opcode => Some(Self::$Packet),)*
                    _ => None,
                }
            }

            /// The name of the packet, in capitals.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$Packet => stringify!($NAME),)*
                }
            }

            /// The row of the packet.
            pub const fn info(self) -> &'static PacketInfo {
                match self {
                    $(Self::$Packet => &$Packet::INFO,)*
                }
            }
        }

        /// The table, in the order of the manual.
        pub const PACKETS: &[PacketInfo] = &[$($Packet::INFO),*];

        /// A packet.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Packet {
            $($(#[doc = $text])+ $Packet($Packet),)*
        }

        impl Packet {
            /// The opcode of the packet.
            pub const fn opcode(&self) -> Opcode {
                match self {
                    $(Self::$Packet(_) => Opcode::$Packet,)*
                }
            }

            pub(crate) fn decode(opcode: Opcode, flags: u8, body: &[u32]) -> Result<Self, Fault> {
                let mut body = Words::new(body);
                match opcode {
                    $(Opcode::$Packet => $Packet::decode(flags, &mut body).map(Self::$Packet),)*
                }
            }

            /// Appends the words of the packet.
            pub fn encode(&self, words: &mut Vec<u32>) {
                match self {
                    $(Self::$Packet(packet) => packet.encode(words),)*
                }
            }

            /// The memory that the packet touches, all of it.
            pub fn operands(&self) -> impl Iterator<Item = Operand> + use<> {
                let operands = match self {
                    $(Self::$Packet(packet) => packet.operands(),)*
                };
                operands.into_iter().flatten()
            }

            /// The first of its rules that the packet breaks: the field, and the rule.
            pub(crate) fn broken_rule(&self, place: &Place<'_>) -> Option<RuleInfo> {
                match self {
                    $(Self::$Packet(packet) => packet.broken_rule(place),)*
                }
            }
        }

        $(
            $(#[doc = $text])+
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
            pub struct $Packet {
                $(#[doc = $flag_text] pub $flag: bool,)*
                $(#[doc = $field_text] pub $field: $kind,)*
            }

            impl From<$Packet> for Packet {
                fn from(packet: $Packet) -> Self {
                    Self::$Packet(packet)
                }
            }

            impl $Packet {
                const INFO: PacketInfo = PacketInfo {
                    opcode: Opcode::$Packet,
                    name: stringify!($NAME),
                    text: &[$($text),+],
                    flags: &[$(FlagInfo { name: stringify!($flag), bit: $bit, text: $flag_text }),*],
                    fields: &[$(FieldInfo {
                        name: stringify!($field),
                        kind: <$kind as Field>::KIND,
                        text: $field_text,
                    }),*],
                    operands: &[$(OperandInfo {
                        field: stringify!($operand),
                        access: Access::$access,
                        unit: stringify!($unit),
                    }),*],
                    rules: &[$(RuleInfo { field: stringify!($subject), text: $rule }),*],
                    example: || Packet::$Packet($Packet { $($example: $value),* }),
                };

                fn decode(flags: u8, body: &mut Words<'_>) -> Result<Self, Fault> {
                    let _ = (flags, &body);
                    Ok(Self {
                        $($flag: flags & 1 << $bit != 0,)*
                        $($field: Field::decode(body).map_err(|problem| (stringify!($field), problem))?,)*
                    })
                }

                fn encode(&self, words: &mut Vec<u32>) {
                    let length = HEADER_WORDS $(.saturating_add(self.$field.words()))*;
                    let flags = 0 $(| u8::from(self.$flag) << $bit)*;
                    words.push(header(Opcode::$Packet, flags, length));
                    $(self.$field.encode(words);)*
                }

                fn operands(&self) -> Operands {
                    const { assert!(Self::INFO.operands.len() <= MAX_OPERANDS) };
                    let $p = self;
                    let _ = $p;
                    let mut operands: Operands = [None; MAX_OPERANDS];
                    let found: &[Option<Operand>] = &[$(
                        Option::<Range>::from($range).map(|range| Operand {
                            field: stringify!($operand),
                            range,
                            access: Access::$access,
                            alignment: Unit::$unit $(($wide))?.bytes(),
                            is_value: Unit::$unit $(($wide))?.is_value(),
                        })
                    ),*];
                    operands.iter_mut().zip(found).for_each(|(slot, operand)| *slot = *operand);
                    operands
                }

                fn broken_rule(&self, $place: &Place<'_>) -> Option<RuleInfo> {
                    let $p = self;
                    let _ = ($p, $place);
                    $(if !$holds {
                        return Some(RuleInfo { field: stringify!($subject), text: $rule });
                    })*
                    None
                }
            }
        )*
    };
}
pub(crate) use packets;

/// The first word of a packet.
pub(crate) fn header(opcode: Opcode, flags: u8, length: u16) -> u32 {
    let [low, high] = length.to_le_bytes();
    u32::from_le_bytes([opcode as u8, flags, low, high])
}
