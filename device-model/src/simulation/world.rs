//! The world of one schedule: all parts of the model, one clock, and the effect of each operation.

use std::collections::BTreeMap;
use std::time::Duration;

use job_stream::Mode;

use super::bug::Bug;
use super::checked::Copies;
use super::engines::{Around, Engine};
use super::front_end::{FrontEnd, Message};
use super::guest::Guest;
use super::memory::Memory;
use super::ops::{Op, Serve, Shape, TOUCHED};
use super::oracle::{Invariant, Oracle, Violation, violation};
use super::queue::{Queue, answers_page};
use super::session::{Session, Wake};
use super::suspicions::Suspicions;
use super::trace::{Counts, Trace};
use crate::jobs::job::JobId;
use crate::mmu::{MirrorConfig, Permissions, Pin, Reader, mirror};

/// Pages that the guest may map.
pub(super) const PAGES: usize = 20;
/// Devices.
pub(super) const DEVICES: usize = 2;
/// Resources of a device: pictures first, then buffers.
pub(super) const RESOURCES: usize = 6;
/// The number of pictures.
pub(super) const PICTURES: usize = 3;
/// Contexts of a device.
pub(super) const CONTEXTS: usize = 2;
/// Engines.
pub(super) const ENGINES: usize = 2;

/// When a drain preempts jobs.
pub(super) const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);
/// When a miss times out.
pub(super) const MISS_TIMEOUT: Duration = Duration::from_millis(300);
/// The duration of an operation.
const MOMENT: Duration = Duration::from_micros(10);
/// While time passes, each engine makes one step per slice.
const SLICE: Duration = Duration::from_millis(5);
/// The duration of a round in which an engine spins.
const SPIN_ROUND: Duration = Duration::from_millis(1);
/// How long a drain may exceed its timeout: one step of each engine, nested.
pub(super) const SLACK: Duration = Duration::from_millis(25);
/// Rounds in which everything must end once every reply is sent.
const ROUNDS: usize = 4000;

/// The properties of a schedule besides its operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Flavor {
    /// The limit on bytes of tables.
    pub(super) table_limit: usize,
    /// The front-end does not wait for the acks of INVALIDATEs.
    pub(super) pipelined: bool,
    /// UPDATEs claim both permissions.
    pub(super) overclaims: bool,
    /// The front-end makes errors.
    pub(super) faulty: bool,
    /// The driver is correct: it does not unmap a page that an unanswered command of its own may use, and does not map
    /// one again before the device has acked the INVALIDATE.
    pub(super) careful: bool,
    /// The mode of contexts that request none.
    pub(super) default_mode: Mode,
}

/// The readers of the mirror: separate from the world, because a step that is under way borrows one.
#[derive(Debug)]
pub(super) struct Readers {
    pub(super) engines: [Reader; ENGINES],
    pub(super) queue: Reader,
}

/// The remaining operations.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    pub(super) ops: &'a [Op],
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) flavor: Flavor,
    pub(super) bug: Option<Bug>,
    pub(super) now: Duration,
    /// How long the device has been running.
    pub(super) ran: Duration,
    /// Counts operations: used as a time stamp of changes.
    pub(super) stamp: u64,
    pub(super) guest: Guest,
    pub(super) front_end: FrontEnd,
    pub(super) session: Session,
    pub(super) queue: Queue,
    pub(super) engines: [Engine; ENGINES],
    pub(super) oracle: Oracle,
    pub(super) suspicions: Suspicions,
    pub(super) copies: BTreeMap<JobId, Copies>,
    /// Pins that a seeded bug holds for waiting jobs.
    pub(super) held: BTreeMap<JobId, Vec<Pin>>,
    pub(super) counts: Counts,
    pub(super) trace: Trace,
    pub(super) violation: Option<Violation>,
    /// Memory was revoked.
    pub(super) over: bool,
    /// The page that the device touched last.
    pub(super) touched: usize,
    /// Dropped last: the mirror has its addresses.
    pub(super) memory: Memory,
}

impl World {
    pub(super) fn new(flavor: Flavor, bug: Option<Bug>, watched: bool) -> (Self, Readers) {
        let wake = Wake::new(bug == Some(Bug::LoseDrainWakeUp));
        let config = MirrorConfig { readers: ENGINES + 1, table_limit: flavor.table_limit };
        let (writer, mut readers) = mirror(config, std::sync::Arc::new(wake.clone()));
        let mut reader = || readers.pop().expect("The mirror was asked for that many");
        let readers = Readers { engines: [reader(), reader()], queue: reader() };
        let world = Self {
            flavor,
            bug,
            now: Duration::ZERO,
            ran: Duration::ZERO,
            stamp: 0,
            guest: Guest::new(),
            front_end: FrontEnd::default(),
            session: Session::new(writer, wake, bug),
            queue: Queue::new(flavor.default_mode),
            engines: Default::default(),
            oracle: Oracle::default(),
            suspicions: Suspicions::default(),
            copies: BTreeMap::new(),
            held: BTreeMap::new(),
            counts: Counts { schedules: 1, ..Counts::default() },
            trace: Trace::new(watched),
            violation: None,
            over: false,
            touched: 0,
            memory: Memory::new(),
        };
        (world, readers)
    }

    pub(super) fn is(&self, bug: Bug) -> bool {
        self.bug == Some(bug)
    }

    pub(super) fn event(&mut self, what: &str, a: u64, b: u64) {
        self.trace.event(self.now.as_micros(), what, a, b);
    }

    /// Records a violation; only the first counts.
    pub(super) fn fail(&mut self, violation: Violation) {
        self.event("violation", 0, 0);
        self.violation.get_or_insert(violation);
    }

    /// Advances the clock.
    fn passes(&mut self, time: Duration) {
        self.now += time;
        if self.session.core.is_running() {
            self.ran += time;
        }
    }

    fn is_done(&self) -> bool {
        self.over || self.violation.is_some()
    }

    /// Plays all operations, then lets everything end.
    pub(super) fn play(&mut self, readers: &Readers, ops: &[Op]) {
        let mut cursor = Cursor { ops };
        while !cursor.ops.is_empty() && !self.is_done() {
            self.next_operation(readers, &mut cursor, false);
        }
        if !self.is_done() {
            self.settle(readers);
        }
    }

    /// Plays the next operation. `within`: in the middle of an engine's step.
    pub(super) fn next_operation(&mut self, readers: &Readers, cursor: &mut Cursor<'_>, within: bool) {
        if self.is_done() {
            return;
        }
        let Some((&op, rest)) = cursor.ops.split_first() else { return };
        cursor.ops = rest;
        self.counts.operations += 1;
        self.stamp += 1;
        self.passes(MOMENT);
        if self.trace.is_watched() {
            println!("{:>9} µs {}{op:?}", self.now.as_micros(), if within { "  within: " } else { "" });
        }
        self.operation(readers, cursor, op, within);
        if let Some(frame) = self.guest.touched_late.take() {
            let what =
                format!("Frame {frame} was written to after its last mapping was taken away and acked");
            self.fail(violation(Invariant::I1, what));
        }
        self.check_session();
    }

    fn operation(&mut self, readers: &Readers, cursor: &mut Cursor<'_>, op: Op, within: bool) {
        match op {
            Op::Map { .. } | Op::Unmap { .. } | Op::Remap { .. } | Op::Flush { .. } | Op::Write { .. } => {
                self.change_table(op);
            }
            Op::Step { engine, budget } => {
                self.engine_turn((readers, cursor), engine.into(), budget.into(), None);
            }
            Op::StepAround { engine, budget, access, take } => {
                let around = Some(Around { access, take });
                self.engine_turn((readers, cursor), engine.into(), budget.into(), around);
            }
            Op::Wedge { engine } => self.engines[usize::from(engine)].wedge(),
            Op::Queue => self.queue_turn(readers),
            Op::Session => self.session_turn(),
            Op::FrontEnd { serve } => self.front_end_turn(serve),
            Op::Exchange { turns } => {
                for _ in 0..turns {
                    self.session_turn();
                    self.front_end_turn(Serve::Honest);
                }
            }
            Op::Unasked { page } => {
                self.send_unasked(if page == TOUCHED { self.touched } else { page.into() })
            }
            Op::Unexpected => self.send_unexpected(),
            Op::NewChannel => self.front_end.wants(Message::NewChannel),
            // A step does not take longer.
            Op::Wait { .. } if within => self.passes(Duration::from_millis(1)),
            Op::Wait { millis, slowly } => {
                self.wait(readers, Duration::from_millis(millis.into()), if slowly { 1 } else { 0x1000 });
            }
            Op::Stop | Op::Cont | Op::Reset | Op::ChangeMemory => self.monitor(op),
            command => self.drive(command),
        }
    }

    fn change_table(&mut self, op: Op) {
        if self.front_end.holds_the_guest() {
            return;
        }
        let (stamp, touched) = (self.stamp, self.touched);
        let at = |page: u8| if page == TOUCHED { touched } else { page.into() };
        if self.flavor.careful && !self.is_right(op, &at) {
            self.counts.events_left_out += 1;
            return;
        }
        match op {
            Op::Map { page, permissions } => {
                let permissions = Permissions { read: permissions & 1 != 0, write: permissions & 2 != 0 };
                self.guest.map(at(page), permissions, stamp, &mut self.memory);
            }
            Op::Unmap { page, shape } => self.unmap(at(page), shape),
            Op::Remap { page, back, shape } => self.remap(at(page), back, shape),
            Op::Flush { page, shape } => self.invalidate_page(at(page), shape),
            Op::Write { page } => {
                self.oracle.disturb_page(at(page));
                self.guest.write(at(page), stamp, &mut self.memory);
            }
            _ => {}
        }
    }

    /// Whether a correct driver may do this.
    fn is_right(&self, op: Op, at: &impl Fn(u8) -> usize) -> bool {
        let is_for_answers = |page| (0..DEVICES).any(|device| answers_page(device) == page);
        match op {
            Op::Map { page, permissions } => {
                !self.guest.is_being_taken(at(page)) && (permissions == 3 || !is_for_answers(at(page)))
            }
            Op::Unmap { page, .. } => !self.oracle.is_in_use(at(page)) && !is_for_answers(at(page)),
            Op::Remap { back, .. } => back,
            _ => true,
        }
    }

    fn unmap(&mut self, page: usize, shape: Shape) {
        if self.guest.unmap(page, self.stamp).is_some() {
            self.oracle.disturb_page(page);
            self.invalidate_page(page, shape);
        }
    }

    fn remap(&mut self, page: usize, back: bool, shape: Shape) {
        if self.guest.remap(page, back, self.stamp, &mut self.memory) {
            self.counts.remaps += 1;
            self.counts.remaps_and_back += u64::from(back);
            if !back {
                self.oracle.disturb_page(page);
            }
            self.invalidate_page(page, shape);
        }
    }

    fn invalidate_page(&mut self, page: usize, shape: Shape) {
        if let Some((id, range)) = self.guest.invalidate(page, shape) {
            self.front_end.wants(Message::Invalidate { id, range });
        }
    }

    fn monitor(&mut self, op: Op) {
        let held = self.front_end.holds_the_guest();
        match op {
            Op::Stop if !held => self.front_end.wants(Message::Stop),
            Op::Cont if self.front_end.stopped && self.front_end.is_idle() => {
                self.front_end.wants(Message::Start);
            }
            Op::Reset if !held => {
                self.guest.forget_device();
                [Message::Stop, Message::Reset, Message::Start]
                    .into_iter()
                    .for_each(|message| self.front_end.wants(message));
            }
            Op::ChangeMemory => self.front_end.wants(Message::ChangeMemory),
            _ => {}
        }
    }

    /// Time passes: engines make steps, and the session wakes at its deadlines.
    fn wait(&mut self, readers: &Readers, time: Duration, budget: usize) {
        let end = self.now + time;
        while self.now < end && !self.is_done() {
            self.passes(SLICE.min(end - self.now));
            self.session_turn();
            for engine in 0..ENGINES {
                self.engine_turn((readers, &mut Cursor { ops: &[] }), engine, budget, None);
            }
            self.session_turn();
            self.check_session();
        }
    }

    /// All replies are sent and answers flow: everything ends.
    fn settle(&mut self, readers: &Readers) {
        self.event("settles", 0, 0);
        self.engines.iter_mut().for_each(Engine::unwedge);
        if self.front_end.out_of_step {
            self.front_end.wants(Message::NewChannel);
        }
        self.invalidate_page(0, Shape::Domain);
        let mut before = None;
        for _ in 0..ROUNDS {
            if self.front_end.is_idle() && self.front_end.stopped {
                self.front_end.wants(Message::Start);
            }
            self.map_answers();
            self.round(readers);
            if self.is_done() {
                return;
            }
            if self.is_quiet() && self.front_end.is_idle() && !self.front_end.stopped {
                return self.check_end(readers);
            }
            let now = self.trace.hash();
            if before.replace(now) == Some(now) {
                // Nothing happened: only time can help.
                let poll = self.session.schedule().next_poll();
                match [self.session.core.next_deadline(), poll].into_iter().flatten().min() {
                    Some(deadline) => self.passes(deadline.saturating_sub(self.now)),
                    None => break,
                }
            }
        }
        let waits: Vec<_> = self.oracle.unseen().take(4).collect();
        let what = format!("Nothing moves any more, and commands {waits:?} are not answered");
        self.fail(violation(Invariant::I4, what));
    }

    /// The guest maps a page for the answers.
    fn map_answers(&mut self) {
        if self.front_end.holds_the_guest() {
            return;
        }
        for page in (0..DEVICES).map(answers_page) {
            let good = self.guest.mapping(page).is_some_and(|mapping| mapping.permissions.write);
            if !good {
                self.unmap(page, Shape::Exact);
                self.guest.map(page, Permissions::READ_WRITE, self.stamp, &mut self.memory);
            }
        }
    }

    fn round(&mut self, readers: &Readers) {
        self.stamp += 1;
        let spins = self.engines.iter().any(Engine::spins);
        self.passes(if spins { SPIN_ROUND } else { 10 * MOMENT });
        self.front_end_turn(Serve::Honest);
        self.session_turn();
        for engine in 0..ENGINES {
            self.engine_turn((readers, &mut Cursor { ops: &[] }), engine, 0x4000, None);
        }
        self.session_turn();
        self.queue_turn(readers);
        self.check_session();
    }

    /// What must hold when everything has ended.
    fn check_end(&mut self, readers: &Readers) {
        let unseen: Vec<_> = self.oracle.unseen().chain(self.oracle.unended()).take(4).collect();
        if !unseen.is_empty() {
            let what =
                format!("All is quiet, and commands {unseen:?} are not answered, or their jobs not ended");
            return self.fail(violation(Invariant::I5, what));
        }
        self.invalidate_page(0, Shape::Domain);
        for _ in 0..4 {
            self.round(readers);
        }
        let (idle, bytes) = (self.front_end.is_idle(), self.session.core.mirror().table_bytes());
        if !idle || bytes != 0 {
            let what = format!("Nothing runs; all is invalidated: {idle}; bytes of tables left: {bytes}");
            self.fail(violation(Invariant::I3, what));
        }
    }
}
