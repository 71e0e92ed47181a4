//! What the session does to the mirror, beside the list of all that ever happened: `device_model::testing::mirror`
//! plays the script that the input becomes.

use arbitrary::{Result, Unstructured};
use device_model::addr::{ByteRange, Iova, PAGE_SHIFT, PAGE_SIZE};
use device_model::mmu::Permissions;
use device_model::testing::mirror::{ALL_PAGES, Operation, play};
use device_model::testing::noise::noise;

/// Most operations of a script: each page is looked up by replaying all of them.
const OPERATIONS: usize = 120;
/// Shifts of the pages at which tables begin.
const EDGES: [u32; 8] = [0, 9, 10, 18, 27, 36, 45, 52];

/// Plays `bytes`.
pub fn run(bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let mut script = Vec::new();
    while !u.is_empty() && script.len() < OPERATIONS {
        let Ok(next) = operation(&mut u) else { break };
        script.push(next);
    }
    play(script);
}

fn operation(u: &mut Unstructured<'_>) -> Result<Operation> {
    Ok(match u.int_in_range(0..=8)? {
        0..=4 => {
            let (first, pages) = (page(u)?, length(u)?);
            let both = [Permissions::READ, Permissions::WRITE, Permissions::READ_WRITE];
            let (frame, permissions) = (u.int_in_range(0..=2)?, *u.choose(&both)?);
            Operation::Map { first, pages: pages.min(ALL_PAGES - first), frame, permissions }
        }
        5..=6 => Operation::Begin { range: range(u)? },
        _ => Operation::End { which: u.int_in_range(0..=3)? },
    })
}

/// A page near the beginning of a table.
fn page(u: &mut Unstructured<'_>) -> Result<u64> {
    let (edge, offset): (u64, i8) = (1 << u.choose(&EDGES)?, u.arbitrary()?);
    Ok(edge.saturating_add_signed(i64::from(offset >> 4)).min(ALL_PAGES - 1))
}

fn length(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=8)? {
        0..=3 => u.int_in_range(1..=5)?,
        4..=5 => 512,
        6 => u.int_in_range(500..=1600)?,
        7 => 1 << 18,
        _ => 1 << 28,
    })
}

fn range(u: &mut Unstructured<'_>) -> Result<ByteRange<Iova>> {
    let first = (page(u)? << PAGE_SHIFT) + u64::from(u.arbitrary::<u16>()?) % PAGE_SIZE;
    let len = match u.int_in_range(0..=3)? {
        0 => u64::from(u.arbitrary::<u32>()?),
        1 => u64::MAX,
        _ => u64::from(u.arbitrary::<u16>()?),
    };
    let last = Iova::new(first.saturating_add(len));
    Ok(ByteRange::inclusive(Iova::new(first), last).expect("The last byte is not below the first"))
}

/// Scripts to begin with.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    noise(4, 600)
}
