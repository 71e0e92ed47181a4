//! A host that is short of descriptors, threads or memory: a session that cannot start leaves nothing behind, its
//! front-end is let go, the log says why, and the next one is served as soon as there is enough.

use std::os::fd::AsRawFd;
use std::time::Duration;

use guest_driver_tests::soft_guest::backend::program;
use guest_driver_tests::soft_guest::wire::{self, REPLY, VERSION};
use guest_driver_tests::soft_guest::*;
use rustix::process::{Pid, Resource, Rlimit, prlimit};

const GET_FEATURES: u32 = 1;
/// How long a front-end waits that is not taken: longer than the back-end pauses after a failed accept.
const NOT_TAKEN: Duration = Duration::from_millis(300);
const SETTLED: Duration = Duration::from_secs(5);

/// What became of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It waits in the listener's queue.
    NotTaken,
    /// The back-end took it and closed it.
    LetGo,
    Served,
}

struct Victim {
    backend: Backend,
    idle: (usize, usize),
}

impl Victim {
    fn new() -> Self {
        let backend = Backend::start(&["--log-level", "warn"]).unwrap();
        let this = Self { backend, idle: (0, 0) };
        let idle = (this.backend.descriptors().unwrap(), this.backend.threads().unwrap());
        Self { idle, ..this }
    }

    /// Sets the soft limit of the running process; the hard one stays what it inherited from this process.
    fn limit(&self, what: Resource, most: Option<u64>) {
        let pid = Pid::from_raw(self.backend.pid().cast_signed()).unwrap();
        let maximum = rustix::process::getrlimit(what).maximum;
        prlimit(Some(pid), what, Rlimit { current: most, maximum }).unwrap();
    }

    /// The soft limit that the process has: the number after this name in /proc; `None`: there is none.
    fn soft_limit(&self, name: &str) -> Option<u64> {
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", self.backend.pid())).unwrap();
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().ok()
    }

    /// Bytes of address space that the process has taken, once that no longer changes: threads may still start or end.
    fn settled_address_space(&self) -> u64 {
        let mut sizes = vec![self.address_space()];
        while sizes.len() < 5 || sizes.iter().rev().take(5).any(|size| Some(size) != sizes.last()) {
            assert!(sizes.len() < 500, "the address space does not settle: {sizes:?}");
            std::thread::sleep(Duration::from_millis(10));
            sizes.push(self.address_space());
        }
        self.address_space()
    }

    fn address_space(&self) -> u64 {
        let sizes = std::fs::read_to_string(format!("/proc/{}/statm", self.backend.pid())).unwrap();
        let pages: u64 = sizes.split_whitespace().next().unwrap().parse().unwrap();
        pages * rustix::param::page_size() as u64
    }

    fn connect(&self) -> Outcome {
        let stream = self.backend.connect().unwrap();
        // Fails if the back-end has closed the connection already.
        let _ = wire::send(&stream, GET_FEATURES, VERSION, &[], &[]);
        if wire::wait_readable(&[stream.as_raw_fd()], Some(NOT_TAKEN)).unwrap().is_none() {
            return Outcome::NotTaken;
        }
        match wire::receive(&stream) {
            Ok(Some(reply)) if reply.flags == VERSION | REPLY => Outcome::Served,
            _ => Outcome::LetGo,
        }
    }

    fn must_be_idle(&mut self, when: &str) {
        assert!(self.backend.is_running(), "{when}: the process has ended\n{}", self.backend.stderr());
        let settled = self.backend.settled(self.idle, SETTLED).unwrap();
        assert_eq!(settled, self.idle, "descriptors and threads {when}\n{}", self.backend.stderr());
    }

    /// A guest gets its picture.
    fn must_serve(&mut self, when: &str) {
        let mut guest = SoftGuest::boot(&self.backend, GuestConfig::default())
            .unwrap_or_else(|error| panic!("{when}: {error}\n{}", self.backend.stderr()));
        let image = picture(64, 64, 1);
        let surface = guest.surface(Format::B8G8R8X8, 64, 64).unwrap();
        surface.draw(&image).unwrap();
        guest.must_show(&surface, &image).unwrap();
    }
}

#[test]
fn a_start_that_lacks_descriptors_leaves_nothing_behind_and_the_next_one_is_served() {
    let mut victim = Victim::new();
    let plenty = victim.soft_limit("Max open files");
    let (mut outcomes, mut served) = (Vec::new(), 0);
    // From a limit at which no connection can be taken to the second one at which there is enough.
    // The process has numbers to spare below its highest descriptor: the first limits leave none of them free.
    for most in victim.idle.0 as u64 - 3.. {
        let when = format!("at a limit of {most} descriptors");
        victim.limit(Resource::Nofile, Some(most));
        let outcome = victim.connect();
        outcomes.push((most, outcome));
        victim.must_be_idle(&when);
        victim.limit(Resource::Nofile, plenty);
        victim.must_serve(&format!("after a session {when}"));
        victim.must_be_idle(&format!("after what came {when}"));
        served += u32::from(outcome == Outcome::Served);
        if served == 2 {
            break;
        }
        assert!(outcomes.len() < 40, "{outcomes:?}");
    }
    println!("{outcomes:?}");
    assert_eq!(outcomes[0].1, Outcome::NotTaken);
    let let_go = outcomes.iter().filter(|(_, outcome)| *outcome == Outcome::LetGo).count();
    assert!(let_go >= 3, "{outcomes:?}");
    let said = victim.backend.stderr().matches("cannot be served").count();
    assert_eq!(said, let_go, "{}", victim.backend.stderr());
}

#[test]
fn a_session_that_runs_out_of_descriptors_ends_and_leaves_nothing_behind() {
    let mut victim = Victim::new();
    let plenty = victim.soft_limit("Max open files");
    let mut refused = 0;
    // From a limit at which a session can just begin to one at which a guest boots.
    for most in victim.idle.0 as u64 + 5.. {
        let when = format!("at a limit of {most} descriptors");
        victim.limit(Resource::Nofile, Some(most));
        let booted = SoftGuest::boot(&victim.backend, GuestConfig::default()).map(drop);
        victim.must_be_idle(&when);
        victim.limit(Resource::Nofile, plenty);
        victim.must_serve(&format!("after a session {when}"));
        victim.must_be_idle(&format!("after what came {when}"));
        let Err(error) = booted else { break };
        println!("{when}: {error}");
        refused += 1;
        assert!(refused < 40, "no guest boots {when}: {error}");
    }
    assert!(refused > 0, "a guest boots with as many descriptors as a session needs to begin");
}

/// All threads are started with the process, which would otherwise find out in the first session.
#[test]
fn a_process_that_lacks_threads_does_not_start_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("gpu.sock");
    // A thread's stack is 2 MiB, so there is no room for those of all engines.
    let limited = "ulimit -v 98304; exec \"$0\" \"$@\"";
    let mut command = std::process::Command::new("sh");
    command.args(["-c", limited]).arg(program().unwrap()).arg("--socket-path").arg(&socket);
    let output = command.args(["--engines", "64", "--log-level", "off"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Thread engine-") && said.contains("cannot be started"), "{said}");
    assert!(!socket.exists());
}

#[test]
fn a_resource_that_the_host_has_no_memory_for_is_refused_and_the_session_goes_on() {
    let mut victim = Victim::new();
    let mut guest = SoftGuest::boot(&victim.backend, GuestConfig::headless()).unwrap();
    let room = victim.settled_address_space() + (64 << 20);
    victim.limit(Resource::As, Some(room));
    // 128 MiB.
    let large = Command::create_2d(7, Format::B8G8R8X8, 8192, 4096);
    assert_eq!(guest.driver.run(&large).unwrap().kind(), kind::ERR_OUT_OF_MEMORY);
    victim.limit(Resource::As, None);
    guest.driver.ok(&large).unwrap();
    drop(guest);
    victim.must_be_idle("after a resource that was refused");
}
