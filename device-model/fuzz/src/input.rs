//! From bytes to values that are plausible more often than noise is. Streams of packets are built from the table of
//! packets, so a new packet is fuzzed without a line here.

use arbitrary::{Result, Unstructured};
use job_stream::{FieldInfo, Kind, PACKETS, PacketInfo, Space};

/// Spaces that a stream may name: resources with memory, and some that have none.
const SPACES: u32 = 5;
/// Address spaces that a stream may name.
const ASIDS: u32 = 2;

/// A number that is small more often than not.
pub fn number(u: &mut Unstructured<'_>) -> Result<u32> {
    match u.int_in_range(0..=7)? {
        0 => u.arbitrary(),
        1 => Ok(u32::from(u.arbitrary::<u16>()?)),
        2 => Ok(u32::MAX - u32::from(u.arbitrary::<u8>()?)),
        _ => u.int_in_range(0..=8),
    }
}

/// As [`number`], in 64 bits.
pub fn long(u: &mut Unstructured<'_>) -> Result<u64> {
    match u.int_in_range(0..=7)? {
        0 => u.arbitrary(),
        1 => Ok(u64::MAX - u64::from(u.arbitrary::<u8>()?)),
        _ => Ok(number(u)?.into()),
    }
}

/// A stream of packets: most of them have the right shape, and operands in small resources.
pub fn stream(u: &mut Unstructured<'_>, most: usize) -> Result<Vec<u32>> {
    let mut words = Vec::new();
    for _ in 0..u.int_in_range(0..=most)? {
        if u.is_empty() {
            break;
        }
        let info = u.choose(PACKETS)?;
        packet(u, info, &mut words)?;
    }
    Ok(words)
}

fn packet(u: &mut Unstructured<'_>, info: &PacketInfo, words: &mut Vec<u32>) -> Result<()> {
    let start = words.len();
    let shape: u8 = u.arbitrary()?;
    let known = info.flags.iter().fold(0, |flags, flag| flags | 1_u8 << flag.bit);
    words.push(0);
    for field in info.fields {
        self::field(u, field, words)?;
    }
    // One packet in eight has a length or flags that its row does not know.
    let broken = shape >> 5 == 0;
    let flags = if broken { u.arbitrary()? } else { shape & known };
    let length = if broken { u.arbitrary()? } else { (words.len() - start) as u16 };
    words[start] = u32::from_le_bytes([info.opcode.raw(), flags, length as u8, (length >> 8) as u8]);
    Ok(())
}

fn field(u: &mut Unstructured<'_>, field: &FieldInfo, words: &mut Vec<u32>) -> Result<()> {
    match field.kind {
        Kind::U32 => words.push(number(u)?),
        Kind::U64 => push_long(words, long(u)?),
        Kind::Bits256 => words.extend([0; 8].map(|_: u32| number(u).unwrap_or_default())),
        Kind::At => place(u, words)?,
        Kind::OptionalAt if u.arbitrary()? => place(u, words)?,
        Kind::OptionalAt => words.extend([0; 3]),
        Kind::Range => {
            place(u, words)?;
            push_long(words, offset(u)?);
        }
        Kind::Choice(info) => words.push(choice(u, info.values)?),
        Kind::OptionalChoice(info) if u.arbitrary()? => words.push(choice(u, info.values)?),
        Kind::OptionalChoice(_) => words.push(0),
        Kind::Payload => words.extend(vec![0; u.int_in_range(0..=4)?]),
    }
    Ok(())
}

fn choice(u: &mut Unstructured<'_>, values: &[(u32, &str, &str)]) -> Result<u32> {
    if u.ratio(1, 16)? { number(u) } else { Ok(u.choose(values)?.0) }
}

fn place(u: &mut Unstructured<'_>, words: &mut Vec<u32>) -> Result<()> {
    words.push(match u.int_in_range(0..=15)? {
        0 => number(u)?,
        1..=4 => Space::address_space(u.int_in_range(1..=ASIDS)?).raw(),
        _ => u.int_in_range(1..=SPACES)?,
    });
    push_long(words, offset(u)?);
    Ok(())
}

/// An offset in a resource, or a length: aligned more often than not.
fn offset(u: &mut Unstructured<'_>) -> Result<u64> {
    let raw = u64::from(u.arbitrary::<u16>()?);
    Ok(match u.int_in_range(0..=7)? {
        0 => long(u)?,
        1 => raw,
        2 => raw & 0xfff,
        3 => raw & 0xffc,
        4 => raw & 0x38,
        _ => raw & 0x1ff8,
    })
}

fn push_long(words: &mut Vec<u32>, value: u64) {
    words.extend([value as u32, (value >> 32) as u32]);
}
