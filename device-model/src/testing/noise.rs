//! Initial inputs for fuzz targets whose bytes only their decoder can read.

/// Random seeds, the same each time; the decoder determines which actions they stand for.
pub fn noise(count: u32, bytes: usize) -> Vec<(String, Vec<u8>)> {
    let of = |seed: u32| {
        let mut state = seed.wrapping_mul(0x9e37_79b9);
        let next = move || {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            Some(state as u8)
        };
        (format!("noise-{seed}"), std::iter::from_fn(next).take(bytes).collect())
    };
    (1..=count).map(of).collect()
}
