//! The model's engines: each has a reader and at most one job, and does one step when it is told to. What happens
//! within a step happens at one of its accesses, with the section open or the pin held. Every access is shown to the
//! oracle before it is made.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::ControlFlow;

use super::bug::Bug;
use super::guest::page_at;
use super::oracle::{Invariant, violation};
use super::queue::Mail;
use super::session::Waiter;
use super::world::{Cursor, Readers, World};
use crate::addr::{Access, ByteRange, Iova, SpaceId};
use crate::engine::{EngineHost, Leaves, Left, Running};
use crate::job::{Job, JobId, JobOutcome, Step};
use crate::mmu::{AtomicOperation, JobMemory, MemoryError, Missing, PinRange, Reader, Width};
use crate::schedule::{Disposed, Turn, Work};

/// What an engine has.
#[derive(Debug, Default)]
enum Slot {
    #[default]
    Nothing,
    Job(Box<Running>),
    /// A job that is in the middle of a step.
    Stepping,
}

#[derive(Debug, Default)]
pub(super) struct Engine {
    slot: Slot,
    /// What its last job lacks, not yet asked for.
    asks: Vec<(Waiter, Missing)>,
    /// It hangs.
    wedged: bool,
}

impl Engine {
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.slot, Slot::Nothing) && self.asks.is_empty()
    }

    pub(super) fn is_wedged(&self) -> bool {
        self.wedged
    }

    pub(super) fn has_job(&self) -> bool {
        !matches!(self.slot, Slot::Nothing)
    }

    pub(super) fn wedge(&mut self) {
        self.wedged = matches!(&self.slot, Slot::Job(running) if running.is_pinned());
    }

    pub(super) fn unwedge(&mut self) {
        self.wedged = false;
    }
}

/// What a seeded bug copies out of the pins of a job.
#[derive(Debug, Default)]
pub(super) struct Copies {
    places: BTreeMap<(usize, bool), u64>,
    evicted: bool,
}

/// What happens within a step: from access number `access` on, so many operations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around {
    pub(super) access: u8,
    pub(super) take: u8,
}

impl World {
    pub(super) fn engines_busy(&self) -> usize {
        self.engines.iter().filter(|engine| engine.has_job()).count()
    }

    pub(super) fn is_wedged(&self) -> bool {
        self.engines.iter().any(Engine::is_wedged)
    }

    /// An engine does what comes next: it asks for what its last job lacked, takes a job, or makes a step.
    pub(super) fn engine_turn(
        &mut self,
        (readers, cursor): (&Readers, &mut Cursor<'_>),
        number: usize,
        budget: usize,
        around: Option<Around>,
    ) {
        let engine = &mut self.engines[number];
        if engine.wedged {
            return;
        }
        if !engine.asks.is_empty() {
            self.session.port.extend(engine.asks.drain(..));
            return self.wake();
        }
        let reader = &readers.engines[number];
        let flow = match std::mem::take(&mut engine.slot) {
            Slot::Stepping => {
                engine.slot = Slot::Stepping;
                return;
            }
            Slot::Nothing => match self.session.schedule.turn() {
                Turn::Run(work) => {
                    self.held.remove(&work.job.id());
                    Running::start(reader, work)
                }
                Turn::Wait | Turn::Close => return,
            },
            Slot::Job(running) => {
                engine.slot = Slot::Stepping;
                let pinned = running.is_pinned();
                let host = Host { world: self, readers, cursor, budget, around, accesses: 0, pinned };
                running.step(reader, &mut { host })
            }
        };
        match flow {
            ControlFlow::Continue(running) => {
                self.event("on engine", number as u64, running.job().id().raw());
                self.engines[number].slot = Slot::Job(Box::new(running));
            }
            ControlFlow::Break(left) => {
                self.engines[number].slot = Slot::Nothing;
                if self.is(Bug::HoldAndWait) {
                    self.hold(reader, &left);
                }
                self.dispose(number, left);
            }
        }
    }

    /// The seeded bug: pins what there is while the rest is asked for.
    fn hold(&mut self, reader: &Reader, left: &Left) {
        if matches!(left.leaves, Leaves::Missing(_) | Leaves::Faulted { .. }) {
            let wanted = left.work.job.working_set();
            let pages = wanted.iter().flat_map(|all| {
                let pin = |at| Some(PinRange { range: ByteRange::new(at, 1).ok()?, ..*all });
                all.range.pages().filter_map(pin).collect::<Vec<_>>()
            });
            let pins = pages.filter_map(|page| reader.pin(&[page]).ok()).collect();
            self.held.insert(left.work.job.id(), pins);
        }
    }

    fn dispose(&mut self, number: usize, left: Left) {
        let id = left.work.job.id();
        self.event("off engine", id.raw(), leaves_code(&left.leaves));
        match &left.leaves {
            Leaves::Missing(_) | Leaves::Faulted { .. } => self.counts.parked_for_misses += 1,
            Leaves::Invalidating => self.counts.parked_for_invalidations += 1,
            Leaves::Evicted => {
                self.counts.evictions += 1;
                self.copies.entry(id).or_default().evicted = true;
            }
            Leaves::Finished(JobOutcome::Done) => self.counts.jobs_done += 1,
            Leaves::Finished(JobOutcome::Failed(_)) => self.counts.jobs_failed += 1,
            Leaves::TakenOff | Leaves::SliceOver | Leaves::Waiting { .. } => {}
        }
        let taken_off = matches!(left.leaves, Leaves::TakenOff | Leaves::Evicted);
        if taken_off && !self.session.running && self.is(Bug::LoseJobOverStop) {
            return;
        }
        match self.session.schedule.dispose(left) {
            Disposed::Finished(finished) => {
                self.copies.remove(&id);
                self.queue.mailbox.push_back(Mail::JobFinished(finished));
            }
            Disposed::Missing { job, missing, ahead } => {
                let waits = missing.into_iter().map(|missing| (Waiter::Job(job), missing));
                self.engines[number].asks =
                    waits.chain(ahead.into_iter().map(|ahead| (Waiter::Ahead(job), ahead))).collect();
            }
            Disposed::Stale => self.counts.stale_jobs += 1,
            Disposed::Waits => {}
        }
    }

    /// Shows the oracle an access before it is made. (Where there is no translation, none will be made.)
    pub(super) fn check_access(&mut self, memory: &impl JobMemory, at: Iova, len: usize, access: Access) {
        let Ok(range) = ByteRange::new(at, len as u64) else { return };
        for page in range.pages() {
            let first = page.max(at);
            let Some(address) = memory.locate(SpaceId::DEVICE, first, access) else { return };
            self.check_place(first, address, access);
        }
    }

    fn check_place(&mut self, at: Iova, address: u64, access: Access) {
        self.counts.accesses += 1;
        let (page, place) = (page_at(at), self.memory.place(address));
        let (Some(page), Some(place)) = (page, place) else {
            return self.fail(violation(Invariant::I1, format!("{at} leads outside of all memory")));
        };
        self.touched = page;
        self.event("access", page as u64, (place.frame as u64) << 1 | access as u64);
        if self.over {
            // Memory is revoked.
        } else if !place.current {
            let what = format!("A {access} at {at} reaches memory that is not in the memory table any more");
            self.fail(violation(Invariant::I1, what));
        } else if !self.guest.allows(page, place.frame, None) {
            let what =
                format!("A {access} at {at} reaches frame {}, which is not there any more", place.frame);
            self.fail(violation(Invariant::I1, what));
        } else if !self.guest.allows(page, place.frame, Some(access)) {
            let what = format!("A {access} at {at} is more than the guest's page table allows");
            self.fail(violation(Invariant::I7, what));
        }
    }
}

/// What carries out the steps of an engine.
struct Host<'a, 'o> {
    world: &'a mut World,
    readers: &'a Readers,
    cursor: &'a mut Cursor<'o>,
    budget: usize,
    around: Option<Around>,
    accesses: u8,
    pinned: bool,
}

impl EngineHost for Host<'_, '_> {
    fn step(&mut self, job: &mut Job, memory: &impl JobMemory) -> Step {
        self.world.counts.steps += 1;
        self.world.counts.section_steps += u64::from(!self.pinned);
        if let Err(violation) = self.world.oracle.job_touches(job.id()) {
            self.world.fail(violation);
        }
        let (id, budget) = (job.id(), self.budget);
        let step = job.step(&Checked { memory, job: id, host: RefCell::new(self) }, budget);
        match step {
            Step::Yield if self.world.is(Bug::SignalBeforeWrite) => Step::Done,
            step => step,
        }
    }

    fn must_leave(&self, work: &Work) -> bool {
        let schedule = &self.world.session.schedule;
        let is_old = schedule.life() != work.life();
        schedule.is_stopped() || is_old && !self.world.is(Bug::RunOnAfterReset)
    }
}

/// Memory as a job sees it, with everything else that happens meanwhile.
struct Checked<'a, 'h, 'o, M> {
    memory: &'a M,
    job: JobId,
    host: RefCell<&'a mut Host<'h, 'o>>,
}

impl<M: JobMemory> Checked<'_, '_, '_, M> {
    /// Lets happen what happens during this access: after its translation, before its copy. Both are shown to the
    /// oracle. Some: where a seeded bug goes instead.
    fn before(&self, at: Iova, len: usize, access: Access) -> Option<u64> {
        let mut host = self.host.borrow_mut();
        if let Some(around) = host.around.filter(|around| around.access == host.accesses) {
            host.around = None;
            let translated = self.memory.locate(SpaceId::DEVICE, at, access);
            for _ in 0..around.take {
                let Host { world, readers, cursor, .. } = &mut **host;
                world.counts.within_steps += 1;
                world.next_operation(readers, cursor, true);
            }
            if let Some(address) = translated {
                host.world.check_place(at, address, access);
            }
        }
        host.accesses = host.accesses.saturating_add(1);
        if let Some(address) = self.stale(&mut host, at, access) {
            host.world.check_place(at, address, access);
            return Some(address);
        }
        host.world.check_access(self.memory, at, len, access);
        None
    }

    /// The seeded bug: keeps what the pin had, and goes by it once the pin was evicted.
    fn stale(&self, host: &mut Host<'_, '_>, at: Iova, access: Access) -> Option<u64> {
        if !host.world.is(Bug::StalePinAfterEviction) {
            return None;
        }
        let copies = host.world.copies.entry(self.job).or_default();
        let key = (page_at(at)?, access == Access::Write);
        if copies.evicted {
            return copies.places.get(&key).map(|page| page + at.page_offset());
        }
        if let Some(address) = self.memory.locate(SpaceId::DEVICE, at, access) {
            copies.places.insert(key, address - at.page_offset());
        }
        None
    }
}

impl<M: JobMemory> JobMemory for Checked<'_, '_, '_, M> {
    fn read(&self, space: SpaceId, at: Iova, into: &mut [u8]) -> Result<(), MemoryError> {
        match self.before(at, into.len(), Access::Read) {
            Some(stale) => {
                self.host.borrow().world.memory.read_at(stale, into);
                Ok(())
            }
            None => self.memory.read(space, at, into),
        }
    }

    fn write(&self, space: SpaceId, at: Iova, from: &[u8]) -> Result<(), MemoryError> {
        self.before(at, from.len(), Access::Write);
        self.memory.write(space, at, from)
    }

    fn copy(&self, space: SpaceId, from: Iova, to: Iova, len: usize) -> Result<(), MemoryError> {
        self.before(from, len, Access::Read);
        self.before(to, len, Access::Write);
        self.memory.copy(space, from, to, len)
    }

    fn atomic(
        &self,
        space: SpaceId,
        at: Iova,
        width: Width,
        operation: AtomicOperation,
    ) -> Result<u64, MemoryError> {
        for access in operation.accesses() {
            self.before(at, width.bytes() as usize, *access);
        }
        self.memory.atomic(space, at, width, operation)
    }
}

fn leaves_code(leaves: &Leaves) -> u64 {
    match leaves {
        Leaves::Finished(JobOutcome::Done) => 0,
        Leaves::Finished(JobOutcome::Failed(_)) => 1,
        Leaves::TakenOff => 2,
        Leaves::Evicted => 3,
        Leaves::Missing(_) | Leaves::Faulted { .. } => 4,
        Leaves::Invalidating => 5,
        Leaves::SliceOver => 6,
        Leaves::Waiting { .. } => 7,
    }
}
