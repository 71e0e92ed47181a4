//! The display: sends scanouts, cursors and queries to the front-end's display socket. Two threads: *display* owns the
//! socket and is the only one that waits for the front-end, *display-clock* answers queries that have timed out. All
//! other threads change the wanted state ([`picture`]) under a short lock and continue. Knows nothing of commands,
//! rings and the main socket.
//!
//! A display that does not answer costs one blocked thread and no more: queries time out, later commands replace
//! earlier ones, and the next connection shuts the old socket down, which unblocks the thread.
//!
//! LOCKING: `DisplayState` and an image are leaves. The lock on the answers comes before a mailbox (ARCHITECTURE.md,
//! "Locking order").

mod link;
mod picture;
mod pixels;
mod queries;
mod region;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use device_model::gpu::scanout::{DisplayAnswer, DisplayCommand, DisplayQuery};
use device_model::locking::lock;
use device_model::telemetry::stats::Stats;

use picture::Picture;
use queries::{DisplayQueries, QueuedQuery};

use crate::thread_kind::ThreadKind;
use crate::threads::{DeviceThread, ThreadFailures};

/// Time limit of a query: less than the 5 s after which Linux's driver continues without a display.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Handle of the display. Clones refer to the same display; dropping the last one ends its threads.
#[derive(Clone)]
pub struct Display {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    threads: Vec<DeviceThread>,
}

/// State shared by the handles and the two threads.
struct Shared {
    state: Mutex<DisplayState>,
    /// Signalled when the display thread has work to do.
    work: Condvar,
    /// Signalled when the earliest deadline of a query has changed.
    clock: Condvar,
    answers: Mutex<Box<dyn Fn(u64, DisplayAnswer) + Send>>,
    answer_timeout: Duration,
    stats: Arc<Stats>,
}

#[derive(Default)]
struct DisplayState {
    picture: Picture,
    queries: DisplayQueries,
    connection: Connection,
    /// Counts connections, so that the end of an old one is not mistaken for the end of its successor.
    generation: u64,
    /// A query of this connection has timed out, and that was logged.
    late_reported: bool,
    quit: bool,
}

/// State of the connection to the front-end.
#[derive(Default)]
enum Connection {
    /// There is no connection: pictures are kept, queries get an empty answer, and no thread waits for a display.
    #[default]
    None,
    /// The front-end has sent a socket that the display thread has not taken yet: nothing was sent on it.
    New(UnixStream),
    /// The display thread owns the connection and may block on it; this duplicate can shut it down.
    Open(UnixStream),
}

impl Display {
    /// Starts the threads. `answers` is called exactly once for each query, with its ticket and answer; it must not
    /// block nor hold a [`Display`]. Only [`Display::reset`] cancels queries.
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
        inner.threads.push(start(ThreadKind::Display, failures, shared.clone(), worker::serve)?);
        inner.threads.push(start(
            ThreadKind::DisplayClock,
            failures,
            shared,
            worker::give_up_late_questions,
        )?);
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Installs a new display socket, which arrives at every start of the device; the old one is shut down. Everything
    /// that is shown is sent again.
    pub fn connect(&self, socket: UnixStream) {
        self.inner.shared.replace_connection(Connection::New(socket));
    }

    /// Continues without a display.
    pub fn disconnect(&self) {
        self.inner.shared.replace_connection(Connection::None);
    }

    /// Adds a command. Never waits for the display: a later command replaces earlier ones that are not sent yet.
    pub fn send(&self, command: DisplayCommand) {
        self.inner.shared.send(command);
    }

    /// Sends a query; the callback gets the answer, which is empty if there is no display or it takes too long.
    pub fn ask(&self, ticket: u64, query: DisplayQuery) {
        self.inner.shared.ask(QueuedQuery { ticket, what: query });
    }

    /// The device was reset: nothing is shown any more, and earlier queries get no answer from now on.
    pub fn reset(&self) {
        let mut state = self.inner.shared.lock();
        state.picture.clear();
        state.queries.clear();
        drop(state);
        self.inner.shared.work.notify_one();
    }
}

fn start(
    kind: ThreadKind,
    failures: &ThreadFailures,
    shared: Arc<Shared>,
    body: fn(&Shared),
) -> io::Result<DeviceThread> {
    let body = move || {
        body(&shared);
        Ok(())
    };
    DeviceThread::spawn((kind, kind.name()), failures, body)
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.lock().quit = true;
        self.shared.replace_connection(Connection::None);
        self.shared.clock.notify_one();
        // The fields join the threads when they are dropped, except for a thread that drops the last handle itself.
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, DisplayState> {
        // Poison is ignored: no code under this lock can leave the state inconsistent in a way that matters.
        lock(&self.state)
    }

    fn replace_connection(&self, connection: Connection) {
        let mut state = self.lock();
        let old = std::mem::replace(&mut state.connection, connection);
        state.generation = state.generation.wrapping_add(1);
        drop(state);
        if let Connection::New(socket) | Connection::Open(socket) = old {
            // Fails if the front-end has closed its end; then no thread is blocked on it either.
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

    fn ask(&self, query: QueuedQuery) {
        let deadline = Instant::now() + self.answer_timeout;
        let added = self.lock().queries.add(query, deadline);
        match added {
            Ok(()) => {
                self.work.notify_one();
                self.clock.notify_one();
            }
            Err(query) => self.answer(query, query.unanswered()),
        }
    }

    fn answer(&self, query: QueuedQuery, answer: DisplayAnswer) {
        let answers = lock(&self.answers);
        answers(query.ticket, answer);
    }
}
