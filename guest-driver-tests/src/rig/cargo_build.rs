//! Builds what the rig runs: the back-end, and the agent as a static program. Knows cargo; knows nothing of what the
//! programs do.

use crate::rig::error::{Doing, RigError};
use crate::rig::process::run;
use crate::rig::workspace;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Program header of an ELF file that names its loader.
const PT_INTERP: u32 = 3;

/// Builds the back-end and returns its path.
pub fn backend() -> Result<PathBuf, RigError> {
    let folder = target_folder();
    run(cargo(&["build", "--release", "--package", "mirrorgpu", "--bin", "mirrorgpu"])
        .env("CARGO_TARGET_DIR", &folder))?;
    Ok(folder.join("release/mirrorgpu"))
}

/// Builds the agent and returns its bytes. It has its own target folder, because it has its own compiler flags; and
/// it is built with --target, or the flags would reach the procedural macros, which cannot be static.
pub fn agent() -> Result<Vec<u8>, RigError> {
    let folder = target_folder().join("agent");
    let mut build = cargo(&["build", "--release", "--package", "guest-agent", "--target", TARGET]);
    build.env("CARGO_TARGET_DIR", &folder).env("CARGO_PROFILE_RELEASE_STRIP", "symbols");
    build.env_remove("CARGO_ENCODED_RUSTFLAGS").env("RUSTFLAGS", "-C target-feature=+crt-static");
    run(&mut build)?;
    let path = folder.join(TARGET).join("release/guest-agent");
    let bytes = fs::read(&path).doing(format!("read {}", path.display()))?;
    match has_loader(&bytes) {
        Some(false) => Ok(bytes),
        _ => Err(RigError::AgentNotStatic(path)),
    }
}

fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(workspace());
    command
}

/// Whether an ELF file asks for a loader; `None` if it is not one (64-bit, little-endian).
fn has_loader(elf: &[u8]) -> Option<bool> {
    let number = |at: usize, size: usize| {
        let bytes = elf.get(at..at.checked_add(size)?)?;
        Some(bytes.iter().rev().fold(0, |sum: u64, &byte| sum << 8 | u64::from(byte)))
    };
    (elf.get(..6)? == b"\x7fELF\x02\x01").then_some(())?;
    let (offset, size, count) = (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?);
    for index in 0..count {
        let at = usize::try_from(offset.checked_add(index * size)?).ok()?;
        if number(at, 4)? == u64::from(PT_INTERP) {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        let mut elf = vec![0; 0x80];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[0x20] = 0x40;
        elf[0x36] = 56;
        elf[0x38] = 1;
        elf[0x40] = 1;
        assert_eq!(has_loader(&elf), Some(false));
        elf[0x40] = 3;
        assert_eq!(has_loader(&elf), Some(true));
        assert_eq!(has_loader(&elf[..0x42]), None);
        assert_eq!(has_loader(b"#!/bin/sh\n"), None);
    }
}
