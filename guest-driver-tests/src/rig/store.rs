//! The folder of what was fetched, under .cache: each thing is unpacked into a folder of its own there, and used once it
//! is complete. Knows the folder and the releases of Debian that fill it; knows nothing of what is fetched.

use crate::rig::apt::Apt;
use crate::rig::error::{Doing, RigError};
use crate::rig::workspace;
use std::fs;
use std::path::{Path, PathBuf};

/// This file marks a folder of unpacked packages as complete.
const COMPLETE: &str = "complete";

/// The folder of what was fetched.
pub(crate) struct Store {
    folder: PathBuf,
}

/// A release of Debian to fetch from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Release {
    /// This system's own.
    Own,
    /// The one after it.
    Newer,
}

impl Release {
    /// Both, in the order in which they are searched.
    pub(crate) const ALL: [Self; 2] = [Self::Own, Self::Newer];
}

impl Store {
    /// The checkout's.
    pub(crate) fn of_this_checkout() -> Self {
        Self { folder: workspace().join(".cache/rig") }
    }

    /// Where the thing called `name` is, or would be.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Where it is, if it is complete.
    pub(crate) fn complete(&self, name: &str) -> Option<PathBuf> {
        let root = self.path(name);
        root.join(COMPLETE).exists().then_some(root)
    }

    /// Fills the folder `name` again; only a complete one is used later.
    pub(crate) fn fill(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<(), RigError>,
    ) -> Result<PathBuf, RigError> {
        let to = self.path(name);
        if to.exists() {
            fs::remove_dir_all(&to).doing(format!("remove {}", to.display()))?;
        }
        fs::create_dir_all(&to).doing(format!("create {}", to.display()))?;
        fill(&to)?;
        fs::write(to.join(COMPLETE), "").doing(format!("write to {}", to.display()))?;
        Ok(to)
    }

    /// The packages of a release, with lists that are up to date; nothing where this system is not Debian.
    pub(crate) fn apt(&self, release: Release) -> Result<Option<Apt>, RigError> {
        let apt = match release {
            Release::Own => Apt::of_this_system(&self.path("apt")),
            Release::Newer => Apt::newer(&self.path("apt-stable")),
        };
        apt.map(|apt| apt.update().map(|()| apt)).transpose()
    }

    /// The first release that has this package.
    pub(crate) fn apt_with(&self, package: &str) -> Result<Option<Apt>, RigError> {
        for release in Release::ALL {
            if let Some(apt) = self.apt(release)?
                && apt.named(package)?.iter().any(|name| name == package)
            {
                return Ok(Some(apt));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_could_not_be_filled_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store { folder: folder.path().to_owned() };
        assert!(store.fill("x", |_| Err(RigError::check("no"))).is_err());
        assert!(store.path("x").is_dir() && store.complete("x").is_none());
        let root = store.fill("x", |to| fs::write(to.join("file"), "").doing("write")).unwrap();
        assert_eq!(store.complete("x"), Some(root));
        store.fill("x", |_| Ok(())).unwrap();
        assert!(!store.path("x").join("file").exists(), "what an earlier one left is gone");
    }
}
