//! The threads on which sessions run, one session after another. The process starts them before its sandbox, which
//! permits no new threads, and they last as long as the process. Knows nothing of what they do.
//!
//! LOCKING: the list of idle threads is a leaf.

use std::io;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::{self, JoinHandle};

use device_model::locking::lock;

use super::interrupt;
use crate::allocator;
use crate::sandbox;
use crate::thread_kind::ThreadKind;
use crate::threads::starvation;

/// What a thread does for one session.
pub(super) type Body = Box<dyn FnOnce() + Send>;

/// A thread that waits for work.
#[derive(Debug)]
pub(super) struct Worker {
    name: String,
    bodies: Sender<Body>,
    handle: JoinHandle<()>,
}

impl Worker {
    pub(super) fn run(&self, body: Body) -> io::Result<()> {
        // A body catches its panics, so the thread is there.
        self.bodies.send(body).map_err(|_| io::Error::other("the thread has ended"))
    }

    pub(super) fn handle(&self) -> &JoinHandle<()> {
        &self.handle
    }
}

static IDLE: Mutex<Vec<Worker>> = Mutex::new(Vec::new());

/// Starts the threads that a session with this many engines needs.
pub fn start(engines: usize) -> io::Result<()> {
    // Before a thread is confined that would do it later.
    let _ = thread::Builder::new().spawn(allocator::settle)?.join();
    let one_each = [ThreadKind::Queue, ThreadKind::Display, ThreadKind::DisplayClock];
    let engines = (0..engines).map(|index| (ThreadKind::Engine, engine_name(index)));
    for (kind, name) in one_each.map(|kind| (kind, kind.name().to_owned())).into_iter().chain(engines) {
        give_back(start_worker(kind, &name)?);
    }
    Ok(())
}

/// The name of an engine's thread.
pub fn engine_name(index: usize) -> String {
    format!("{}-{index}", ThreadKind::Engine.name())
}

/// The idle thread of this name. A new one if there is none: only tests do without [`start`].
pub(super) fn take(kind: ThreadKind, name: &str) -> io::Result<Worker> {
    let idle = {
        let mut idle = lock(&IDLE);
        idle.iter().position(|worker| worker.name == name).map(|index| idle.swap_remove(index))
    };
    idle.map_or_else(|| start_worker(kind, name), Ok)
}

pub(super) fn give_back(worker: Worker) {
    lock(&IDLE).push(worker);
}

fn start_worker(kind: ThreadKind, name: &str) -> io::Result<Worker> {
    interrupt::install()?;
    let (bodies, work) = channel::<Body>();
    let handle = spawn_confined(kind, name, move || work.into_iter().for_each(|body| body()))?;
    Ok(Worker { name: name.to_owned(), bodies, handle })
}

/// Starts a thread in the sandbox of its kind, and returns when it is there.
pub fn spawn_confined(
    kind: ThreadKind,
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (entered, outcome) = sync_channel(1);
    let run = move || {
        // The allocator gives the thread an arena, which takes system calls.
        drop(std::hint::black_box(Box::new(0_u8)));
        if kind == ThreadKind::Engine {
            // A file, which cannot be opened any more in the sandbox.
            starvation::know_this_thread();
        }
        let result = sandbox::enter(kind);
        let is_confined = result.is_ok();
        // The receiver waits for it.
        let _ = entered.send(result);
        if is_confined {
            body();
        }
    };
    let started = thread::Builder::new().name(name.to_owned()).spawn(run);
    let handle = started
        .map_err(|error| io::Error::new(error.kind(), format!("Thread {name} cannot be started: {error}")))?;
    outcome.recv().map_err(io::Error::other)?.map_err(io::Error::other)?;
    Ok(handle)
}
