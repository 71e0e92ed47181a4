//! The back-end process: built if necessary, started, watched, and ended by its process id. Knows the shape of the
//! command line and /proc; what the device does is queried over the control socket.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::control::{Control, Stats};
use super::error::{Error, Result};
use super::turn::held;
use super::wire;

/// Names a program to test instead of the one of this workspace.
pub const PROGRAM_VARIABLE: &str = "MIRRORGPU_BACKEND";

const READY: &str = "listening on ";
/// What the back-end says of a system call that its sandbox refused.
const REFUSED: &str = "the sandbox does not permit system call";
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The program that the user has named.
static NAMED: OnceLock<PathBuf> = OnceLock::new();

/// Has all back-ends of this process run this program. Only the first call counts.
pub fn use_program(program: &Path) {
    let _ = NAMED.set(program.to_owned());
}

/// The program: one that was named, from the environment, or the one next to the running test, freshly built.
pub fn program() -> Result<PathBuf> {
    static PROGRAM: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();
    if let Some(program) = NAMED.get() {
        return Ok(program.clone());
    }
    if let Some(program) = std::env::var_os(PROGRAM_VARIABLE) {
        return Ok(program.into());
    }
    let built = PROGRAM.get_or_init(build).clone();
    built.map_err(|what| Error::Backend { program: "mirrorgpu".into(), what, stderr: String::new() })
}

/// Builds the program into the directory of the profile that this test was built with.
fn build() -> std::result::Result<PathBuf, String> {
    let here = std::env::current_exe().map_err(|error| format!("cannot be looked for: {error}"))?;
    // target/PROFILE/deps/TEST-hash or target/PROFILE/PROGRAM
    let directory = here.ancestors().skip(1).find(|directory| !directory.ends_with("deps"));
    let profile = directory.ok_or("cannot be looked for: this program has no directory")?;
    let target = profile.parent().ok_or("cannot be looked for: there is no target directory")?;
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--package", "mirrorgpu", "--manifest-path"]);
    cargo.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"));
    cargo.arg("--target-dir").arg(target);
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    let output = cargo.output().map_err(|error| format!("could not be built: {error}"))?;
    if !output.status.success() {
        return Err(format!("could not be built: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(profile.join("mirrorgpu"))
}

/// A command line that did not lead to a running back-end, or the output of one that has ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// How it ended.
    pub status: ExitStatus,
    /// How long that took since the request to end, or since the start.
    pub after: Duration,
    /// All of its standard output.
    pub stdout: String,
    /// All of its standard error.
    pub stderr: String,
}

/// Runs the program to its end: for command lines that fail or only print something.
pub fn run<S: AsRef<OsStr>>(args: &[S]) -> Result<Ended> {
    let start = Instant::now();
    let child = spawn(&program()?, args, &[])?;
    let mut process = Process::watch(child)?;
    let status = process.wait(START_TIMEOUT)?;
    Ok(process.ended(status, start.elapsed()))
}

/// A running back-end.
#[derive(Debug)]
pub struct Backend {
    process: Process,
    socket: PathBuf,
    control: PathBuf,
    // Removed with its sockets when the back-end is dropped.
    directory: tempfile::TempDir,
}

impl Backend {
    /// Starts the back-end with these arguments in addition to the two sockets, and waits until it accepts
    /// connections.
    pub fn start<S: AsRef<OsStr>>(args: &[S]) -> Result<Self> {
        let directory = tempfile::tempdir().map_err(Error::io("make a temporary directory"))?;
        Self::start_in(directory, args)
    }

    /// The same for one that is asked for traces in its directory (`record`): it writes them nowhere else.
    pub fn start_recording<S: AsRef<OsStr>>(args: &[S]) -> Result<Self> {
        let directory = tempfile::tempdir().map_err(Error::io("make a temporary directory"))?;
        let folder = directory.path().to_owned();
        let mut all: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
        all.extend(["--record-dir".as_ref(), folder.as_os_str()]);
        Self::start_in(directory, &all)
    }

    /// The same in a directory that may hold a socket already.
    pub fn start_in<S: AsRef<OsStr>>(directory: tempfile::TempDir, args: &[S]) -> Result<Self> {
        let (socket, control) = (directory.path().join("gpu.sock"), directory.path().join("control.sock"));
        let sockets = ["--socket-path".as_ref(), socket.as_os_str(), "--control-socket".as_ref()];
        let all: Vec<&OsStr> = sockets.into_iter().chain([control.as_os_str()]).collect();
        let all: Vec<&OsStr> = all.into_iter().chain(args.iter().map(AsRef::as_ref)).collect();
        let mut process = Process::watch(spawn(&program()?, &all, &[])?)?;
        process.wait_for_line(READY, START_TIMEOUT)?;
        Ok(Self { process, socket, control, directory })
    }

    /// Starts the back-end on one end of a socket pair (`--fd`) and returns the other end.
    pub fn start_with_fd<S: AsRef<OsStr>>(args: &[S]) -> Result<(Self, UnixStream)> {
        let directory = tempfile::tempdir().map_err(Error::io("make a temporary directory"))?;
        let (socket, control) = (directory.path().join("gpu.sock"), directory.path().join("control.sock"));
        let (ours, theirs) = UnixStream::pair().map_err(Error::io("make a socket pair"))?;
        let fd = theirs.as_raw_fd().to_string();
        let first = ["--fd".as_ref(), fd.as_ref(), "--control-socket".as_ref(), control.as_os_str()];
        let all: Vec<&OsStr> = first.into_iter().chain(args.iter().map(AsRef::as_ref)).collect();
        let process = Process::watch(spawn(&program()?, &all, &[theirs.as_raw_fd()])?)?;
        Ok((Self { process, socket, control, directory }, ours))
    }

    /// Connects to the back-end, as a front-end.
    pub fn connect(&self) -> Result<UnixStream> {
        UnixStream::connect(&self.socket).map_err(Error::io(format!("connect to {}", self.socket.display())))
    }

    /// A new connection to the control socket.
    pub fn control(&self) -> Result<Control> {
        Control::connect(&self.control)
    }

    /// The statistics now.
    pub fn stats(&self) -> Result<Stats> {
        self.control()?.stats()
    }

    /// How often an injection took effect.
    pub fn hits(&self, injection: &str) -> Result<u64> {
        let all = self.control()?.execute("inject")?;
        let rows = all["injections"].as_array().into_iter().flatten();
        let hits = rows.filter(|row| row["name"] == injection).find_map(|row| row["hits"].as_u64());
        hits.ok_or_else(|| Error::Control { command: format!("inject ({injection})"), got: all.to_string() })
    }

    /// Waits until the statistics satisfy `until`; `false` after `timeout`.
    pub fn wait_for_stats(&self, timeout: Duration, until: impl Fn(&Stats) -> bool) -> Result<bool> {
        let mut control = self.control()?;
        let deadline = Instant::now() + timeout;
        while !until(&control.stats()?) {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            wire::wait_readable(&[], Some(Duration::from_millis(1))).map_err(Error::io("wait"))?;
        }
        Ok(true)
    }

    /// CPU time that the process uses while `wall` passes: close to none when idle.
    pub fn cpu_time_in(&self, wall: Duration) -> Result<Duration> {
        let before = self.cpu_time()?;
        wire::wait_readable(&[], Some(wall)).map_err(Error::io("wait"))?;
        Ok(self.cpu_time()?.saturating_sub(before))
    }

    /// The vhost-user socket.
    pub fn socket_path(&self) -> &Path {
        &self.socket
    }

    /// The directory of both sockets.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        self.process.stderr.text()
    }

    /// Whether it writes this to standard error; waits for it, as what it has written arrives a little later.
    pub fn has_said(&self, part: &str) -> bool {
        self.process.stderr.wait_for(part, START_TIMEOUT)
    }

    /// Whether the process is still there.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.child.try_wait(), Ok(None))
    }

    /// How many descriptors the process has open.
    pub fn descriptors(&self) -> Result<usize> {
        self.entries_of("fd")
    }

    /// How many threads the process has.
    pub fn threads(&self) -> Result<usize> {
        self.entries_of("task")
    }

    /// Waits until the process has this many descriptors and threads (a session ends a little after its
    /// connection), and gives the last counts seen, which differ if that took longer than `timeout`.
    pub fn settled(&self, wanted: (usize, usize), timeout: Duration) -> Result<(usize, usize)> {
        let deadline = Instant::now() + timeout;
        loop {
            let counts = (self.descriptors()?, self.threads()?);
            if counts == wanted || Instant::now() >= deadline {
                return Ok(counts);
            }
            wire::wait_readable(&[], Some(Duration::from_millis(1))).map_err(Error::io("wait"))?;
        }
    }

    fn entries_of(&self, what: &str) -> Result<usize> {
        let directory = format!("/proc/{}/{what}", self.pid());
        Ok(std::fs::read_dir(&directory).map_err(Error::io(format!("read {directory}")))?.count())
    }

    /// Resident memory in KiB.
    pub fn resident_kib(&self) -> Result<u64> {
        let file = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(&file).map_err(Error::io(format!("read {file}")))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
        number.ok_or_else(|| Error::Reply { message: "VmRSS", got: status.clone() })
    }

    /// CPU time that the process has used: to see that it does not spin.
    pub fn cpu_time(&self) -> Result<Duration> {
        let file = format!("/proc/{}/stat", self.pid());
        let stat = std::fs::read_to_string(&file).map_err(Error::io(format!("read {file}")))?;
        // Fields 14 and 15, counted after the name, which may contain anything.
        let fields: Vec<_> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let ticks: u64 = fields.iter().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        // SAFETY: sysconf takes a number and touches no memory.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        Ok(Duration::from_millis(ticks * 1000 / u64::try_from(per_second).unwrap_or(100).max(1)))
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: i32) -> Result<()> {
        self.process.signal(signal)
    }

    /// Asks it to end (SIGTERM) and waits until it has, no longer than `timeout`.
    pub fn terminate(self, timeout: Duration) -> Result<Ended> {
        let start = Instant::now();
        self.signal(libc::SIGTERM)?;
        self.wait_for_end(start, timeout)
    }

    /// Ends it with SIGKILL, and returns the directory with what it has left.
    pub fn kill(mut self) -> Result<tempfile::TempDir> {
        self.signal(libc::SIGKILL)?;
        self.process.wait(START_TIMEOUT)?;
        Ok(self.directory)
    }

    /// Waits until the process has ended by itself.
    pub fn wait(self, timeout: Duration) -> Result<Ended> {
        self.wait_for_end(Instant::now(), timeout)
    }

    fn wait_for_end(mut self, start: Instant, timeout: Duration) -> Result<Ended> {
        let status = self.process.wait(timeout)?;
        Ok(self.process.ended(status, start.elapsed()))
    }
}

fn spawn<S: AsRef<OsStr>>(program: &Path, args: &[S], inherited: &[RawFd]) -> Result<Child> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let inherited = inherited.to_vec();
    let prepare = move || prepare_child(&inherited);
    // SAFETY: between fork and exec only prctl and fcntl are called, which are async-signal-safe.
    unsafe { command.pre_exec(prepare) };
    let failed = |what: String| Error::Backend { program: program.into(), what, stderr: String::new() };
    command.spawn().map_err(|error| failed(format!("could not be started: {error}")))
}

fn prepare_child(inherited: &[RawFd]) -> io::Result<()> {
    // It must not outlive the thread that started it, however that one ends.
    // SAFETY: PR_SET_PDEATHSIG takes a number.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } < 0 {
        return Err(io::Error::last_os_error());
    }
    for &fd in inherited {
        // SAFETY: F_SETFD takes two numbers; the descriptor is this process' own copy.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A child process whose output is collected; killed when dropped.
#[derive(Debug)]
struct Process {
    child: Child,
    end: OwnedFd,
    stdout: Collected,
    stderr: Collected,
}

impl Process {
    fn watch(mut child: Child) -> Result<Self> {
        let end = pidfd(child.id())?;
        let stdout = Collected::start(child.stdout.take())?;
        let stderr = Collected::start(child.stderr.take())?;
        Ok(Self { child, end, stdout, stderr })
    }

    fn wait_for_line(&mut self, part: &str, timeout: Duration) -> Result<()> {
        if self.stderr.wait_for(part, timeout) {
            return Ok(());
        }
        let what = match self.child.try_wait() {
            Ok(Some(status)) => format!("ended at once with {status}"),
            _ => format!("did not say \"{part}\" within {timeout:?}"),
        };
        Err(self.failed(what))
    }

    fn failed(&self, what: String) -> Error {
        let program = program().unwrap_or_else(|_| "mirrorgpu".into());
        Error::Backend { program, what, stderr: self.stderr.text() }
    }

    fn signal(&self, signal: i32) -> Result<()> {
        let pid = i32::try_from(self.child.id()).unwrap_or(i32::MAX);
        // SAFETY: kill takes two numbers; the child has not been waited for, so that the id is still its own.
        if unsafe { libc::kill(pid, signal) } < 0 {
            return Err(Error::io("signal the back-end")(io::Error::last_os_error()));
        }
        Ok(())
    }

    fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let ended = wire::wait_readable(&[self.end.as_raw_fd()], Some(timeout));
        if ended.map_err(Error::io("wait for the back-end"))?.is_none() {
            return Err(self.failed(format!("did not end within {timeout:?}")));
        }
        self.child.wait().map_err(Error::io("wait for the back-end"))
    }

    fn ended(&self, status: ExitStatus, after: Duration) -> Ended {
        self.stdout.wait_for_end();
        self.stderr.wait_for_end();
        Ended { status, after, stdout: self.stdout.text(), stderr: self.stderr.text() }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails if it has ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.stderr.wait_for_end();
        // No test may pass in which the back-end made a system call that its sandbox has no row for.
        let refused = self.stderr.text().lines().find(|line| line.contains(REFUSED)).map(str::to_owned);
        if let Some(line) = refused.filter(|_| !thread::panicking()) {
            panic!("{line}");
        }
    }
}

fn pidfd(pid: u32) -> Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(Error::io("open a pidfd")(io::Error::last_os_error()));
    }
    // SAFETY: pidfd_open has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a pipe has delivered so far.
#[derive(Clone, Debug)]
struct Collected(Arc<(Mutex<Heard>, Condvar)>);

#[derive(Debug, Default)]
struct Heard {
    text: String,
    ended: bool,
}

impl Collected {
    fn start(pipe: Option<impl Read + Send + 'static>) -> Result<Self> {
        let this = Self(Arc::default());
        let heard = this.clone();
        let body = move || {
            let mut lines = pipe.map(BufReader::new);
            let mut line = String::new();
            while lines.as_mut().is_some_and(|lines| lines.read_line(&mut line).is_ok_and(|n| n != 0)) {
                held(&heard.0.0).text.push_str(&line);
                heard.0.1.notify_all();
                line.clear();
            }
            held(&heard.0.0).ended = true;
            heard.0.1.notify_all();
        };
        thread::Builder::new().name("collect".into()).spawn(body).map_err(Error::io("start a thread"))?;
        Ok(this)
    }

    fn text(&self) -> String {
        held(&self.0.0).text.clone()
    }

    fn wait_for(&self, part: &str, timeout: Duration) -> bool {
        let waiting = |heard: &mut Heard| !heard.text.contains(part) && !heard.ended;
        let waited = self.0.1.wait_timeout_while(held(&self.0.0), timeout, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.text.contains(part)
    }

    fn wait_for_end(&self) {
        let waiting = |heard: &mut Heard| !heard.ended;
        drop(self.0.1.wait_while(held(&self.0.0), waiting).unwrap_or_else(PoisonError::into_inner));
    }
}
