//! Whether the disk with a guest's logs has room: on a full disk they end early, and a missing line proves nothing.
//! Knows nothing of what is written.

use crate::rig::error::{Doing, RigError};
use rustix::fs::statvfs;
use std::path::Path;

/// Bytes that have to be free: more than a guest writes between two checks.
const LEAST: u64 = 1 << 20;

/// Checks that the disk under this folder has room for logs.
pub(crate) fn has_room(folder: &Path) -> Result<(), RigError> {
    let disk =
        statvfs(folder).map_err(std::io::Error::from).doing(format!("look at {}", folder.display()))?;
    let left = disk.f_bavail.saturating_mul(disk.f_frsize);
    if left >= LEAST { Ok(()) } else { Err(RigError::DiskFull { folder: folder.to_owned(), left }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_without_a_byte_left_is_full_and_one_that_is_used_is_not() {
        // A virtual file system: it has no blocks at all.
        let full = has_room(Path::new("/proc")).unwrap_err();
        assert!(full.to_string().starts_with("The disk with /proc is full (0 bytes are left)"), "{full}");
        assert!(has_room(&std::env::temp_dir()).is_ok());
    }
}
