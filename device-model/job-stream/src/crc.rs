//! CRC-32C, the checksum of CHECKSUM, in steps. Knows bytes; knows nothing of where they come from.

/// The reflected Castagnoli polynomial.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// What each of the 256 bytes does to the checksum if so many bytes (0 to 7) follow it.
const TABLES: [[u32; 256]; 8] = tables();

#[expect(
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    reason = "runs in the compiler, which checks every index and sum"
)]
const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 0 { crc >> 1 } else { crc >> 1 ^ POLYNOMIAL };
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut index = 256;
    while index < 8 * 256 {
        let before = tables[index / 256 - 1][index % 256];
        tables[index / 256][index % 256] = before >> 8 ^ tables[0][(before & 0xff) as usize];
        index += 1;
    }
    tables
}

/// A checksum of the bytes so far. It can be kept between two steps of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crc32c(u32);

impl Crc32c {
    /// The checksum of no bytes.
    pub const fn new() -> Self {
        Self(u32::MAX)
    }

    /// Goes on with `bytes`.
    pub fn update(&mut self, bytes: &[u8]) {
        let (chunks, rest) = bytes.as_chunks::<8>();
        for chunk in chunks {
            let whole = u64::from_le_bytes(*chunk) ^ u64::from(self.0);
            let bytes = whole.to_le_bytes();
            self.0 = TABLES.iter().rev().zip(bytes).fold(0, |crc, (table, byte)| crc ^ entry(table, byte));
        }
        for byte in rest {
            let [low, ..] = self.0.to_le_bytes();
            self.0 = self.0 >> 8 ^ TABLES.first().map_or(0, |table| entry(table, low ^ byte));
        }
    }

    /// The checksum of all bytes so far.
    pub const fn value(self) -> u32 {
        !self.0
    }

    /// The checksum of `bytes`.
    pub fn of(bytes: &[u8]) -> u32 {
        let mut crc = Self::new();
        crc.update(bytes);
        crc.value()
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

/// A byte always finds its entry: there are 256 of both.
fn entry(table: &[u32; 256], byte: u8) -> u32 {
    table.get(usize::from(byte)).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, bit by bit.
    fn twin(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(u32::MAX, |crc, byte| {
            (0..8)
                .fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 })
        })
    }

    #[test]
    fn the_check_value_is_that_of_crc_32c() {
        assert_eq!(Crc32c::of(b"123456789"), 0xe306_9283);
        assert_eq!(Crc32c::of(b""), 0);
        assert_eq!(Crc32c::of(&[0; 32]), 0x8a91_36aa); // RFC 3720, B.4
    }

    proptest! {
        #[test]
        fn a_checksum_in_steps_is_that_of_the_definition(bytes: std::vec::Vec<u8>, cut: prop::sample::Index) {
            let (first, second) = bytes.split_at(cut.index(bytes.len() + 1));
            let mut crc = Crc32c::new();
            crc.update(first);
            crc.update(second);
            prop_assert_eq!(crc.value(), twin(&bytes));
        }
    }
}
