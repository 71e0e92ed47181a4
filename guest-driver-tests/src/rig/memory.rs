//! The guest's physical memory as QEMU shows it, and what the writer ([`WRITER`]) has left there: memory that no
//! program in the guest can inspect any more is inspected from outside. Knows physical addresses; knows nothing of
//! what is where.

use crate::rig::error::{Doing, RigError};
use crate::rig::run::Run;
use guest_agent::stock_words::WRITER;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;

const PAGE: usize = 4096;
/// How much is examined at once.
const PIECE: u64 = 64 << 20;
/// This many equal words in a row are no coincidence.
const RUN: usize = 4;

/// Pages with contents of the writer: physical address, and one of its values.
pub(super) type Pages = BTreeMap<u64, u32>;

/// Pages in the first `mib` MiB of physical memory that have contents of the writer.
pub(super) fn written(run: &mut Run<'_>, mib: u32) -> Result<Pages, RigError> {
    let path = run.folder().join("memory");
    let mut pages = Pages::new();
    for start in (0..u64::from(mib) << 20).step_by(PIECE as usize) {
        let request = json!({ "val": start, "size": PIECE, "filename": path });
        run.qemu().qmp().execute("pmemsave", request)?;
        let bytes = fs::read(&path).doing(format!("read {}", path.display()))?;
        pages.extend(find(start, &bytes));
    }
    fs::remove_file(&path).doing(format!("remove {}", path.display()))?;
    Ok(pages)
}

/// The same in these bytes, of which the first lies at `start`.
fn find(start: u64, bytes: &[u8]) -> impl Iterator<Item = (u64, u32)> {
    let addresses = (start..).step_by(PAGE);
    addresses.zip(bytes.chunks(PAGE)).filter_map(|(address, page)| Some((address, value(page)?)))
}

/// The writer's value in a page, if there is a run of one.
fn value(page: &[u8]) -> Option<u32> {
    let (words, _) = page.as_chunks::<4>();
    let is_run = |run: &&[[u8; 4]]| run.iter().all(|word| Some(word) == run.first());
    let runs = words.windows(RUN).filter(is_run).filter_map(<[_]>::first);
    runs.map(|word| u32::from_le_bytes(*word)).find(|value| WRITER.pass(*value).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_the_writers_if_its_value_stands_there_in_a_row() {
        let mut bytes = vec![0; 3 * PAGE];
        let mut put = |at: usize, value: u32, count: usize| {
            let words = value.to_le_bytes().repeat(count);
            bytes[at..at + words.len()].copy_from_slice(&words);
        };
        put(PAGE + 0x40, WRITER.value + 7, RUN);
        put(2 * PAGE, WRITER.value + 7, RUN - 1);
        put(2 * PAGE + 0x100, WRITER.value + WRITER.passes, RUN);
        let start = 0x10_0000;
        assert_eq!(find(start, &bytes).collect::<Vec<_>>(), [(start + PAGE as u64, WRITER.value + 7)]);
    }
}
