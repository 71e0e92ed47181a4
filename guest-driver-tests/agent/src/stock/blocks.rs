//! Blocks of memory that come and go while the kernel runs: it uses them once it is told to. Knows sysfs; knows nothing of
//! who uses the memory.

use super::client::LIMIT;
use crate::error::{AgentError, Doing};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const BLOCKS: &str = "/sys/devices/system/memory";
/// How often is looked for them.
const LOOK: Duration = Duration::from_millis(20);

/// Waits until so many MiB are there that the kernel does not use, and has it use them, for anything.
pub(super) fn use_all(mib: u32) -> Result<io::Result<()>, AgentError> {
    let size =
        fs::read_to_string(Path::new(BLOCKS).join("block_size_bytes")).doing("ask for a block's size")?;
    let size = u64::from_str_radix(size.trim(), 16).unwrap_or(u64::MAX);
    let end = Instant::now() + LIMIT;
    let mut found = unused()?;
    while found.len() as u64 * size < u64::from(mib) << 20 {
        if Instant::now() > end {
            return Err(AgentError::Late { what: format!("{mib} MiB of memory"), seconds: LIMIT.as_secs() });
        }
        thread::sleep(LOOK);
        found = unused()?;
    }
    Ok(found.iter().try_for_each(|block| fs::write(block.join("state"), "online_kernel")))
}

/// Blocks that the kernel does not use.
fn unused() -> Result<Vec<PathBuf>, AgentError> {
    let entries = fs::read_dir(BLOCKS).doing(format!("read {BLOCKS}"))?;
    let is_unused = |block: &PathBuf| {
        fs::read_to_string(block.join("state")).is_ok_and(|state| state.trim() == "offline")
    };
    Ok(entries.flatten().map(|entry| entry.path()).filter(is_unused).collect())
}
