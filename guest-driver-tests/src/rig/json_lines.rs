//! A UNIX socket that carries one JSON object per line, both ways, with a deadline on every wait. Knows nothing of
//! what the objects mean.

use crate::rig::error::{Doing, RigError};
use crate::rig::process::wait_until;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest single wait, so that `alive` is called in between.
const SLICE: Duration = Duration::from_millis(100);

/// The connection.
pub struct JsonLines {
    peer: &'static str,
    stream: UnixStream,
    unread: Vec<u8>,
}

impl JsonLines {
    /// Connects to `path` as soon as a server listens there; `alive` fails if none ever will.
    pub fn connect(
        peer: &'static str,
        path: &Path,
        limit: Duration,
        mut alive: impl FnMut() -> Result<(), RigError>,
    ) -> Result<Self, RigError> {
        let mut connected = None;
        wait_until(&format!("The socket of {peer}"), limit, || {
            alive()?;
            connected = UnixStream::connect(path).ok();
            Ok(connected.is_some())
        })?;
        let stream = connected.ok_or(RigError::Closed { peer })?;
        stream.set_read_timeout(Some(SLICE)).doing("set a socket's timeout")?;
        Ok(Self { peer, stream, unread: Vec::new() })
    }

    /// Sends one object.
    pub fn send(&mut self, object: &impl Serialize) -> Result<(), RigError> {
        let mut line = serde_json::to_vec(object).map_err(io::Error::from).doing("write an object down")?;
        line.push(b'\n');
        self.stream.write_all(&line).doing(format!("write to {}", self.peer))
    }

    /// The next object; `alive` is called now and then, and ends the wait if it fails. `what` names what is waited
    /// for.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        what: &str,
        limit: Duration,
        mut alive: impl FnMut() -> Result<(), RigError>,
    ) -> Result<T, RigError> {
        let end = Instant::now() + limit;
        loop {
            if let Some(line) = self.take_line() {
                return self.parse(&line);
            }
            if Instant::now() > end {
                return Err(RigError::Late { what: what.to_owned(), limit });
            }
            self.fill(&mut alive)?;
        }
    }

    fn fill(&mut self, alive: &mut impl FnMut() -> Result<(), RigError>) -> Result<(), RigError> {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => {
                alive()?;
                Err(RigError::Closed { peer: self.peer })
            }
            Ok(count) => {
                self.unread.extend_from_slice(bytes.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                alive()
            }
            Err(error) => Err(error).doing(format!("read from {}", self.peer)),
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let end = self.unread.iter().position(|&byte| byte == b'\n')?;
        Some(self.unread.drain(..=end).collect())
    }

    fn parse<T: DeserializeOwned>(&self, line: &[u8]) -> Result<T, RigError> {
        serde_json::from_slice(line).map_err(|source| {
            let line = String::from_utf8_lossy(line).trim().to_owned();
            RigError::NotUnderstood { peer: self.peer, line, source }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    fn serve(lines: &'static [u8]) -> JsonLines {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || listener.accept().unwrap().0.write_all(lines).unwrap());
        JsonLines::connect("peer", &path, Duration::from_secs(5), || Ok(())).unwrap()
    }

    #[test]
    fn objects_come_one_a_line_and_the_end_is_an_error() {
        let mut lines = serve(b"1\n2\n");
        let limit = Duration::from_secs(5);
        assert_eq!(lines.receive::<u32>("a number", limit, || Ok(())).unwrap(), 1);
        assert_eq!(lines.receive::<u32>("a number", limit, || Ok(())).unwrap(), 2);
        let error = lines.receive::<u32>("a number", limit, || Ok(())).unwrap_err();
        assert!(matches!(error, RigError::Closed { peer: "peer" }));
    }

    #[test]
    fn a_peer_that_died_is_named_rather_than_its_socket() {
        let mut lines = serve(b"");
        let dead = || Err(RigError::Ended { name: "peer", status: "exit status: 1".into() });
        let error = lines.receive::<u32>("a number", Duration::from_secs(5), dead).unwrap_err();
        assert!(matches!(error, RigError::Ended { name: "peer", .. }));
    }
}
