//! The folder of `--record-dir`, opened before the sandbox permits to open nothing else. Knows nothing of what is written.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open, openat};

/// How a trace is opened: as `File::create` does, and never through a symbolic link. The sandbox compares all of the flags;
/// `rustix` would add the last one.
pub const CREATE: OFlags = OFlags::WRONLY
    .union(OFlags::CREATE)
    .union(OFlags::TRUNC)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::LARGEFILE);

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("Cannot open the folder {path} (--record-dir): give one that exists")]
pub struct RecordDirError {
    path: PathBuf,
    source: io::Error,
}

/// A folder that stays open.
#[derive(Debug)]
pub struct RecordDir {
    /// As the user gave it.
    path: PathBuf,
    /// The same from the root.
    absolute: PathBuf,
    directory: OwnedFd,
}

impl RecordDir {
    /// Opens the folder.
    pub fn open(path: &Path) -> Result<Self, RecordDirError> {
        let failed = |source| RecordDirError { path: path.to_owned(), source };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let absolute = std::path::absolute(path).map_err(failed)?;
        Ok(Self { path: path.to_owned(), absolute, directory })
    }

    /// The path of a file in it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The name that `path` has in this folder, if it is a path to a file right in it.
    fn name_of<'a>(&self, path: &'a Path) -> Option<&'a OsStr> {
        let parent = path.parent()?;
        path.file_name().filter(|_| parent == self.path || parent == self.absolute)
    }

    fn create(&self, name: &OsStr) -> io::Result<File> {
        Ok(openat(&self.directory, name, CREATE, Mode::from_raw_mode(0o666))?.into())
    }
}

impl AsFd for RecordDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl AsRawFd for RecordDir {
    fn as_raw_fd(&self) -> RawFd {
        self.directory.as_raw_fd()
    }
}

/// Creates or overwrites the file `path`. If `is_confined`, as by the sandbox, it must be right in the folder.
pub(crate) fn create(folder: Option<&RecordDir>, path: &Path, is_confined: bool) -> io::Result<File> {
    if let Some((folder, name)) = folder.and_then(|folder| Some((folder, folder.name_of(path)?))) {
        return folder.create(name);
    }
    if is_confined {
        let why = "the sandbox permits files right in the folder of --record-dir only";
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    }
    File::create(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_right_in_the_folder_has_a_name_in_it_and_no_other_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sub/..");
        std::fs::create_dir(folder.path().join("sub")).unwrap();
        let record = RecordDir::open(&path).unwrap();
        assert_eq!(record.name_of(&path.join("a.json")), Some(OsStr::new("a.json")));
        assert_eq!(record.name_of(&path.join("sub/a.json")), None);
        assert_eq!(record.name_of(&path.join("..")), None);
        assert_eq!(record.name_of(Path::new("a.json")), None);
        create(Some(&record), &path.join("a.json"), false).unwrap();
        assert!(folder.path().join("a.json").is_file());
        std::os::unix::fs::symlink("a.json", folder.path().join("link")).unwrap();
        assert!(create(Some(&record), &path.join("link"), false).is_err());
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error_that_names_it() {
        let error = RecordDir::open(Path::new("/nonexistent/traces")).unwrap_err().to_string();
        assert_eq!(error, "Cannot open the folder /nonexistent/traces (--record-dir): give one that exists");
    }
}
