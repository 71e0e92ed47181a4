//! Where clients connect: a socket with a path, or an inherited one. Knows files and sockets; knows nothing of the
//! protocols on them.
//!
//! The stale socket of a dead process is replaced; a live one, or a file that is not a socket, never is. A SEQPACKET
//! connect tests whether it is live, which a live STREAM socket does not notice (EPROTOTYPE). The test, the replacement
//! and bind happen under a lock on the directory, so that two back-ends that start at the same time do not remove each
//! other's socket.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, StatxFlags, flock, statx, unlinkat};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::wake;

/// How long another process may hold the lock on a socket's directory.
const LOCK_PATIENCE: Duration = Duration::from_millis(300);
/// Interval between attempts to take the lock.
const LOCK_RETRY: Duration = Duration::from_millis(5);

/// Why listening is not possible.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process listens there.
    #[error("Socket {0} is in use: end the process that listens on it, or give another path")]
    InUse(PathBuf),
    /// The path is a file of another kind.
    #[error("{0} exists and is not a socket: remove it if it is not needed, or give another path")]
    NotASocket(PathBuf),
    /// An operation on the path failed.
    #[error("Cannot listen on {path} ({step}): make sure that its directory exists and may be written to")]
    Path {
        /// The socket's path.
        path: PathBuf,
        /// The operation that failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The inherited descriptor is not a usable socket.
    #[error("File descriptor {fd} {problem}: pass a UNIX stream socket that is connected or listening")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Numbers of a device (major, minor) and of an inode on it.
type Identity = (u32, u32, u64);

/// A listening socket with a path. Dropping it removes the path if it still belongs to this socket.
#[derive(Debug)]
pub struct PathListener {
    listener: UnixListener,
    path: PathBuf,
    /// The path's directory. It stays open because the sandbox lets nothing be opened.
    directory: File,
    /// Device and inode of the path; the inode cannot be reused while the socket is open.
    identity: Identity,
}

/// An inherited socket.
#[derive(Debug)]
pub enum Inherited {
    /// It accepts clients.
    Listening(UnixListener),
    /// It is already connected to a client.
    Connected(UnixStream),
}

impl PathListener {
    /// Listens on `path`, and replaces a stale socket there.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let failed = |step| move |source| ListenError::Path { path: path.to_owned(), step, source };
        let directory = open_directory(path).map_err(failed("locking its directory"))?;
        lock(&directory).map_err(failed("locking its directory"))?;
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(ListenError::NotASocket(path.to_owned()));
            }
            Ok(_) if is_alive(path).map_err(failed("asking who listens there"))? => {
                return Err(ListenError::InUse(path.to_owned()));
            }
            Ok(_) => fs::remove_file(path).map_err(failed("removing the stale socket"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("looking at it")(error)),
        }
        let listener = UnixListener::bind(path).map_err(failed("binding it"))?;
        let identity = identity(&directory, path).map_err(failed("looking at it"))?;
        flock(&directory, FlockOperation::Unlock)
            .map_err(|error| failed("unlocking its directory")(error.into()))?;
        Ok(Self { listener, path: path.to_owned(), directory, identity })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// The socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl AsFd for PathListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl AsRawFd for PathListener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Drop for PathListener {
    fn drop(&mut self) {
        // Without the lock, another's socket could be mistaken for this one.
        if lock(&self.directory).is_ok()
            && identity(&self.directory, &self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = unlinkat(&self.directory, name(&self.path), AtFlags::empty())
        {
            log::warn!("Socket {} could not be removed: {error}", self.path.display());
        }
    }
}

impl Inherited {
    /// Takes over a descriptor that the parent process left open.
    ///
    /// # Safety
    /// Nothing else in this process owns `fd`: call it once for a number, before other files are opened.
    pub unsafe fn adopt(fd: RawFd) -> Result<Self, ListenError> {
        let wrong = |problem| ListenError::Descriptor { fd, problem };
        // SAFETY: fcntl with F_SETFD touches no memory; it fails for a number that is not open.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(wrong("is not open"));
        }
        // SAFETY: the descriptor is open, as F_SETFD succeeded, and the caller guarantees that nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let domain = sockopt::socket_domain(&socket).map_err(|_| wrong("is not a socket"))?;
        let kind = sockopt::socket_type(&socket);
        if domain != AddressFamily::UNIX || kind != Ok(SocketType::STREAM) {
            return Err(wrong("is a socket of another kind"));
        }
        let listens = sockopt::socket_acceptconn(&socket) == Ok(true);
        if listens {
            return Ok(Self::Listening(socket.into()));
        }
        let stream = UnixStream::from(socket);
        if stream.peer_addr().is_err() {
            return Err(wrong("is a socket that is neither connected nor listening"));
        }
        Ok(Self::Connected(stream))
    }
}

/// Whether a process listens, or is about to listen, on the socket at `path`.
fn is_alive(path: &Path) -> io::Result<bool> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let probe = net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    match net::connect(&probe, &SocketAddrUnix::new(path)?) {
        // A SEQPACKET listener accepts the connect itself; with EAGAIN its queue is full.
        Ok(()) | Err(Errno::PROTOTYPE | Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn open_directory(path: &Path) -> io::Result<File> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))
}

/// Locks the directory against other processes that bind there, until it is unlocked or closed.
fn lock(directory: &File) -> io::Result<()> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => {}
            Err(error) => return Err(error.into()),
        }
        // The kernel has no flock with a timeout, and a back-end holds the lock for less than this.
        wake::sleep(LOCK_RETRY);
    }
}

/// The path's last component: its name in its directory.
fn name(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_default()
}

fn identity(directory: &File, path: &Path) -> io::Result<Identity> {
    let status = statx(directory, name(path), AtFlags::SYMLINK_NOFOLLOW, StatxFlags::INO)?;
    Ok((status.stx_dev_major, status.stx_dev_minor, status.stx_ino))
}

#[cfg(test)]
mod tests {
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixDatagram;
    use std::sync::{Arc, Barrier};
    use std::thread;

    use super::*;

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    #[test]
    fn a_socket_is_there_while_it_is_listened_on_and_gone_afterwards() {
        let directory = directory();
        let path = directory.path().join("gpu.sock");
        let bound = PathListener::bind(&path).unwrap();
        assert_eq!(bound.path(), path);
        let _client = UnixStream::connect(&path).unwrap();
        bound.listener().accept().unwrap();
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let directory = directory();
        let path = directory.path().join("gpu.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _bound = PathListener::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_live_socket_is_an_error_and_sees_nothing_of_the_question() {
        let directory = directory();
        let path = directory.path().join("gpu.sock");
        let live = UnixListener::bind(&path).unwrap();
        live.set_nonblocking(true).unwrap();
        let error = PathListener::bind(&path).unwrap_err();
        assert!(matches!(&error, ListenError::InUse(found) if *found == path), "{error:?}");
        assert_eq!(live.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let error = PathListener::bind(&path).unwrap_err().to_string();
        let expected = format!(
            "Socket {} is in use: end the process that listens on it, or give another path",
            path.display()
        );
        assert_eq!(error, expected);
    }

    #[test]
    fn what_is_not_a_socket_is_never_removed() {
        let directory = directory();
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path().join("stale"), &link).unwrap();
        drop(UnixListener::bind(directory.path().join("stale")).unwrap());
        for path in [&file, &link] {
            let error = PathListener::bind(path).unwrap_err();
            assert!(matches!(&error, ListenError::NotASocket(found) if found == path), "{error:?}");
        }
        assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
        assert!(link.is_symlink());
    }

    #[test]
    fn a_path_that_somebody_else_has_taken_over_is_left_alone() {
        let directory = directory();
        let path = directory.path().join("gpu.sock");
        let first = PathListener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _second = PathListener::bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn of_many_that_start_at_once_over_a_stale_socket_one_wins() {
        const CONTENDERS: usize = 8;
        let directory = directory();
        let path = directory.path().join("gpu.sock");
        drop(UnixListener::bind(&path).unwrap());
        let start = Arc::new(Barrier::new(CONTENDERS));
        let contenders: Vec<_> = (0..CONTENDERS)
            .map(|_| {
                let (path, start) = (path.clone(), start.clone());
                thread::spawn(move || {
                    start.wait();
                    PathListener::bind(&path)
                })
            })
            .collect();
        let results: Vec<_> = contenders.into_iter().map(|contender| contender.join().unwrap()).collect();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
        UnixStream::connect(&path).unwrap();
    }

    /// Even a shared lock blocks binding, so two back-ends exclude each other.
    #[test]
    fn nothing_is_changed_while_another_holds_the_directory() {
        let directory = directory();
        let path = directory.path().join("gpu.sock");
        drop(UnixListener::bind(&path).unwrap());
        let other = File::open(directory.path()).unwrap();
        let before = identity(&other, &path).unwrap();
        flock(&other, FlockOperation::LockShared).unwrap();
        let error = PathListener::bind(&path).unwrap_err();
        assert!(matches!(&error, ListenError::Path { step: "locking its directory", .. }), "{error:?}");
        assert_eq!(identity(&other, &path).unwrap(), before);
        drop(other);
        PathListener::bind(&path).unwrap();
    }

    #[test]
    fn a_path_of_no_use_is_an_error_that_says_why() {
        let directory = directory();
        let missing = directory.path().join("missing/gpu.sock");
        let long = directory.path().join("x".repeat(200));
        for (path, step) in [(&missing, "locking its directory"), (&long, "binding it")] {
            let error = PathListener::bind(path).unwrap_err();
            assert!(matches!(&error, ListenError::Path { step: found, .. } if *found == step), "{error:?}");
        }
    }

    fn adopt(fd: impl IntoRawFd) -> Result<Inherited, ListenError> {
        // SAFETY: `into_raw_fd` has given up the ownership.
        unsafe { Inherited::adopt(fd.into_raw_fd()) }
    }

    fn problem(result: Result<Inherited, ListenError>) -> &'static str {
        match result {
            Err(ListenError::Descriptor { problem, .. }) => problem,
            other => panic!("no problem: {other:?}"),
        }
    }

    #[test]
    fn an_inherited_socket_may_be_connected_or_listening() {
        let directory = directory();
        let listener = UnixListener::bind(directory.path().join("gpu.sock")).unwrap();
        assert!(matches!(adopt(listener), Ok(Inherited::Listening(_))));
        let (stream, _peer) = UnixStream::pair().unwrap();
        assert!(matches!(adopt(stream), Ok(Inherited::Connected(_))));
    }

    #[test]
    fn an_inherited_descriptor_of_another_kind_is_refused_with_its_reason() {
        assert_eq!(problem(adopt(File::open("/dev/null").unwrap())), "is not a socket");
        let (datagram, _peer) = UnixDatagram::pair().unwrap();
        assert_eq!(problem(adopt(datagram)), "is a socket of another kind");
        let internet = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert_eq!(problem(adopt(internet)), "is a socket of another kind");
        let unconnected = net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        assert_eq!(problem(adopt(unconnected)), "is a socket that is neither connected nor listening");
        // SAFETY: a number that is not open has no owner.
        let closed = unsafe { Inherited::adopt(1_000_000) };
        assert_eq!(problem(closed), "is not open");
    }
}
