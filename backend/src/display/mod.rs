//! The display: scanouts, cursors and questions on their way to the front-end's display socket. Two threads:
//! *display* owns the socket and is the only one that ever waits for the front-end, *display-clock* answers questions
//! whose time is over. Everybody else changes a wish ([`picture`]) under a short lock and goes on.
//! Knows nothing of commands, rings and the main socket.
//!
//! A display that answers nothing costs one blocked thread and no more: questions are given up, commands replace each
//! other, and the next connection shuts the old socket down, which brings the thread back.
//!
//! LOCKING: `DisplayState` and an image are leaves. The lock on the answers comes before a mailbox (ARCHITECTURE.md,
//! "Locking order").

mod link;
mod picture;
mod pixels;
mod questions;
mod region;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use device_model::gpu::scanout::{DisplayAnswer, DisplayCommand, DisplayQuestion};
use device_model::locking::lock;
use device_model::telemetry::stats::Stats;

use picture::Picture;
use questions::{DisplayQueries, Question};

use crate::threads::{DeviceThread, ThreadFailures};

/// How long a question may wait: less than the 5 s after which Linux's driver goes on without a display.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Handle of the display. Clones are the same display; the last one to go ends its threads.
#[derive(Clone)]
pub struct Display {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    threads: Vec<DeviceThread>,
}

/// What the handles and the two threads share.
struct Shared {
    state: Mutex<DisplayState>,
    /// Something for the display thread to do.
    work: Condvar,
    /// The first question to expire has changed.
    clock: Condvar,
    answers: Mutex<Box<dyn Fn(u64, DisplayAnswer) + Send>>,
    answer_timeout: Duration,
    stats: Arc<Stats>,
}

#[derive(Default)]
struct DisplayState {
    picture: Picture,
    questions: DisplayQueries,
    connection: Connection,
    /// Counts connections, so that an end of an old one is not taken for the end of its successor.
    generation: u64,
    /// This connection's display has been late, and the log says so.
    late_reported: bool,
    quit: bool,
}

/// Where the connection to the front-end stands.
#[derive(Default)]
enum Connection {
    /// There is no display: pictures wait, questions are answered with nothing.
    #[default]
    None,
    /// The display thread has yet to take it over.
    New(UnixStream),
    /// The display thread uses it; this duplicate is there to shut it down.
    Open(UnixStream),
}

impl Display {
    /// Starts the threads. `answers` gets every question's ticket with its answer, exactly once, and must not block
    /// nor hold a [`Display`]; [`Display::reset`] alone takes questions back.
    pub fn spawn(
        stats: Arc<Stats>,
        failures: &ThreadFailures,
        answers: impl Fn(u64, DisplayAnswer) + Send + 'static,
    ) -> io::Result<Self> {
        Self::spawn_with_timeout(stats, failures, ANSWER_TIMEOUT, answers)
    }

    fn spawn_with_timeout(
        stats: Arc<Stats>,
        failures: &ThreadFailures,
        answer_timeout: Duration,
        answers: impl Fn(u64, DisplayAnswer) + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            work: Condvar::new(),
            clock: Condvar::new(),
            answers: Mutex::new(Box::new(answers)),
            answer_timeout,
            stats,
        });
        let mut inner = Inner { shared: shared.clone(), threads: Vec::new() };
        inner.threads.push(start("display", failures, shared.clone(), worker::serve)?);
        inner.threads.push(start("display-clock", failures, shared, worker::give_up_late_questions)?);
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Takes a new display socket, of which there is one at every start of the device; the old one is shut down.
    /// All that is shown is sent again.
    pub fn connect(&self, socket: UnixStream) {
        self.inner.shared.replace_connection(Connection::New(socket));
    }

    /// Goes on without a display.
    pub fn disconnect(&self) {
        self.inner.shared.replace_connection(Connection::None);
    }

    /// Takes an order. Never waits for the display: orders that it has not yet been sent are replaced by later ones.
    pub fn send(&self, command: DisplayCommand) {
        self.inner.shared.send(command);
    }

    /// Asks; the answer comes by the callback, with nothing in it if there is no display or if it takes too long.
    pub fn ask(&self, ticket: u64, question: DisplayQuestion) {
        self.inner.shared.ask(Question { ticket, what: question });
    }

    /// The device was reset: nothing is shown any more, and questions asked before get no answer from now on.
    pub fn reset(&self) {
        let mut state = self.inner.shared.lock();
        state.picture.clear();
        state.questions.clear();
        drop(state);
        self.inner.shared.work.notify_one();
    }
}

fn start(
    name: &str,
    failures: &ThreadFailures,
    shared: Arc<Shared>,
    body: fn(&Shared),
) -> io::Result<DeviceThread> {
    let body = move || {
        body(&shared);
        Ok(())
    };
    DeviceThread::spawn(name, failures, body)
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.replace_connection(Connection::None);
        self.shared.clock.notify_one();
        // The threads are waited for when the fields are dropped, but for one that drops the last handle itself.
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, DisplayState> {
        // No code under this lock can leave the state half changed in a way that matters for a picture.
        lock(&self.state)
    }

    fn replace_connection(&self, connection: Connection) {
        let mut state = self.lock();
        let old = std::mem::replace(&mut state.connection, connection);
        state.generation = state.generation.wrapping_add(1);
        drop(state);
        if let Connection::New(socket) | Connection::Open(socket) = old {
            // It fails if the front-end has closed its end: then nobody is blocked on it either.
            let _ = socket.shutdown(Shutdown::Both);
        }
        self.work.notify_one();
    }

    fn send(&self, command: DisplayCommand) {
        self.count(&command);
        let mut state = self.lock();
        let joined = state.picture.apply(command);
        let connected = !matches!(state.connection, Connection::None);
        drop(state);
        if connected {
            self.stats.flushes_coalesced.add(u64::from(joined));
            self.work.notify_one();
        }
    }

    fn count(&self, command: &DisplayCommand) {
        match command {
            DisplayCommand::SetScanout { .. } => {}
            DisplayCommand::Flush { .. } => self.stats.flushes.add(1),
            DisplayCommand::UpdateCursor { .. } | DisplayCommand::HideCursor(_) => {
                self.stats.cursor_updates.add(1);
            }
            DisplayCommand::MoveCursor(_) => self.stats.cursor_moves.add(1),
        }
    }

    fn ask(&self, question: Question) {
        let deadline = Instant::now() + self.answer_timeout;
        let added = self.lock().questions.add(question, deadline);
        match added {
            Ok(()) => {
                self.work.notify_one();
                self.clock.notify_one();
            }
            Err(question) => self.answer(question, question.unanswered()),
        }
    }

    fn answer(&self, question: Question, answer: DisplayAnswer) {
        let answers = lock(&self.answers);
        answers(question.ticket, answer);
    }
}
