//! The two threads of the display. Knows the order of their work; the protocol is in [`super::link`], the content in
//! [`super::picture`].

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::link::Link;
use super::picture::DisplayUpdate;
use super::queries::QueuedQuery;
use super::{Connection, DisplayState, Shared};

/// What the display thread does next.
enum Next {
    /// Negotiate on a new socket.
    Open(UnixStream),
    /// Answer a query: with the display's answer if there is one.
    Ask(QueuedQuery),
    /// Send an update to the display.
    Tell(DisplayUpdate),
    /// End the thread.
    Quit,
}

/// The display thread: serves one connection after another, and answers queries while there is none.
pub(super) fn serve(shared: &Shared) {
    let mut link: Option<Link> = None;
    loop {
        let (next, generation) = shared.wait_for_work(&mut link);
        let served = match next {
            Next::Quit => return,
            Next::Open(socket) => open(shared, socket, &mut link),
            Next::Ask(query) => ask(shared, query, link.as_mut()),
            Next::Tell(work) => link.as_mut().map_or(Ok(()), |link| link.tell(work)),
        };
        if let Err(error) = served {
            link = None;
            shared.lost(generation, &error);
        }
    }
}

fn open(shared: &Shared, socket: UnixStream, link: &mut Option<Link>) -> io::Result<()> {
    *link = Some(Link::open(socket, Arc::clone(&shared.stats))?);
    Ok(())
}

fn ask(shared: &Shared, query: QueuedQuery, link: Option<&mut Link>) -> io::Result<()> {
    let answered = link.map(|link| link.ask(query.what)).transpose();
    if shared.lock().queries.take(query) {
        let answer = answered.as_ref().ok().and_then(Option::clone);
        shared.answer(query, answer.unwrap_or_else(|| query.unanswered()));
    }
    answered.map(drop)
}

/// The clock thread: answers the queries that have timed out. Sleeps while none is pending.
pub(super) fn give_up_late_questions(shared: &Shared) {
    while let Some(query) = shared.wait_for_expiry() {
        shared.report_late(query);
        shared.answer(query, query.unanswered());
    }
}

impl Shared {
    /// Waits for work; drops `link` when its connection was replaced.
    fn wait_for_work(&self, link: &mut Option<Link>) -> (Next, u64) {
        let mut state = self.lock();
        loop {
            if let Some(next) = next(&mut state, link) {
                return (next, state.generation);
            }
            state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for a query that has timed out; `None` when the display ends.
    fn wait_for_expiry(&self) -> Option<QueuedQuery> {
        let mut state = self.lock();
        while !state.quit {
            let now = Instant::now();
            if let Some(query) = state.queries.take_expired(now) {
                return Some(query);
            }
            state = match state.queries.time_left(now) {
                None => self.clock.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(left) => self.clock.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        None
    }

    /// A connection has ended. If it is still the current one, the device continues without a display.
    fn lost(&self, generation: u64, error: &io::Error) {
        let mut state = self.lock();
        if state.generation != generation {
            return; // A newer connection has replaced it.
        }
        let connection = std::mem::take(&mut state.connection);
        drop(state);
        match connection {
            Connection::Open(socket) if closed_by_peer(&socket) => {
                log::info!("The front-end closed the display socket; the device goes on without a display");
            }
            _ => log::warn!("The display socket failed: {error}; the device goes on without a display"),
        }
    }

    /// Logs a timed-out query once per connection: the guest controls how often it happens.
    fn report_late(&self, query: QueuedQuery) {
        if !std::mem::replace(&mut self.lock().late_reported, true) {
            log::warn!(
                "The display has not answered {:?} within {:?}; the device answers from what it knows",
                query.what,
                self.answer_timeout
            );
        }
    }
}

/// The most urgent work, if any: new sockets before queries before pictures.
fn next(state: &mut DisplayState, link: &mut Option<Link>) -> Option<Next> {
    if state.quit {
        return Some(Next::Quit);
    }
    state.connection = match std::mem::take(&mut state.connection) {
        Connection::New(socket) => match socket.try_clone() {
            Ok(duplicate) => {
                *link = None;
                state.picture.forget_told();
                state.late_reported = false;
                state.connection = Connection::Open(duplicate);
                return Some(Next::Open(socket));
            }
            Err(error) => {
                log::warn!(
                    "The display socket cannot be duplicated: {error}; the device goes on without a display"
                );
                Connection::None
            }
        },
        other => other,
    };
    if matches!(state.connection, Connection::None) {
        *link = None;
    }
    if let Some(query) = state.queries.next() {
        return Some(Next::Ask(query));
    }
    link.as_ref().and_then(|_| state.picture.next()).map(Next::Tell)
}

/// Whether the other end of an unused socket is closed.
fn closed_by_peer(socket: &UnixStream) -> bool {
    socket.set_nonblocking(true).is_ok() && rustix::io::read(socket, &mut [0; 1]) == Ok(0)
}
