//! Faults that the driver answers: each reaches it once, its job goes on or fails as it says, and none is left behind.

use std::time::Duration;

use job_stream::address_space::{CREATE_FAULTS, FAULT_FAIL, FAULT_REPLAY, pte};
use job_stream::{AsFault, At, Context, Space, Stream};

use super::*;
use crate::addr::DomainId;
use crate::jobs::engine::{Leaves, Left};
use crate::jobs::schedule::{Disposed, Schedule, Turn};
use crate::mmu::JobMemory;
use crate::testing::page_tables::PageTables;

const ASID: u32 = 7;
const ALL: u64 = pte::VALID | pte::READ | pte::WRITE | pte::ATOMIC;
/// Two pages of the address space, and the memory that they are for.
const GVA: [u64; 2] = [0x10_0000, 0x10_1000];
const MEMORY: [u64; 2] = [0x5000, 0x9000];

/// A device, its schedule, and a driver that answers faults of address space [`ASID`] in context 1.
struct Rig {
    gpu: Harness,
    schedule: Schedule,
    tables: PageTables,
}

fn rig() -> Rig {
    let mut gpu = Harness::new();
    for at in MEMORY {
        gpu.memory.fill(Iova::new(at).page_range());
    }
    let tables = PageTables::new(&mut gpu.memory, 0x8000_0000);
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    assert_eq!(gpu.status(&ctx_create(1)), OK_NODATA);
    assert_eq!(gpu.status(&as_create_with(1, ASID, CREATE_FAULTS, tables.root())), OK_NODATA);
    Rig { gpu, schedule, tables }
}

fn at(page: usize, offset: u64) -> At {
    At::new(Space::address_space(ASID), GVA[page] + offset)
}

impl Rig {
    fn map(&mut self, page: usize) {
        self.tables.map(&mut self.gpu.memory, GVA[page], 0, MEMORY[page] | ALL);
    }

    fn word(&self, page: usize) -> u64 {
        let mut word = [0; 8];
        self.gpu.memory.read(DomainId::DEVICE, Iova::new(MEMORY[page]), &mut word).unwrap();
        u64::from_le_bytes(word)
    }

    fn submit(&mut self, stream: Stream) -> u64 {
        self.gpu.send(&submit_3d(1, &stream.finish_bytes()))
    }

    fn fetch(&mut self) -> u64 {
        self.gpu.send(&as_fetch_fault(1, ASID))
    }

    fn answer(&mut self, action: u32, id: u64) -> u32 {
        self.gpu.status(&as_answer_fault(1, ASID, action, id))
    }

    fn fault(&self, fetch: u64) -> Option<AsFault> {
        let response = self.gpu.response(fetch)?;
        assert_eq!(response.kind(), AsFault::NUMBER);
        AsFault::parse(&response.as_bytes()[24..])
    }

    /// Runs everything that can run.
    fn run(&mut self) {
        loop {
            self.gpu.jobs.drain(..).for_each(|job| self.schedule.submit(job));
            let answers = std::mem::take(&mut self.gpu.resumed);
            answers.into_iter().for_each(|(wait, answer)| self.schedule.fault_answered(wait, answer));
            let Turn::Run(mut work) = self.schedule.turn() else { return };
            let failed = work.failed.take().and_then(|error| work.job.fail(error).err());
            let leaves = match failed.map_or_else(|| work.job.step(&self.gpu.memory, 1 << 16), Step::Error) {
                Step::Done => Leaves::Finished(JobOutcome::Done),
                Step::Error(error) => Leaves::Finished(JobOutcome::Failed(error)),
                Step::Fault(fault) => Leaves::RaisedFault(fault),
                Step::Yield => Leaves::SliceOver,
                other => panic!("{other:?}"),
            };
            let mut effects = Vec::new();
            match self.schedule.dispose(Left { work, leaves }) {
                Disposed::Finished(finished) => {
                    self.gpu.device.job_finished(finished.job, finished.outcome, &mut effects);
                }
                Disposed::Faulted(faulted) => self.gpu.device.job_faulted(faulted, &mut effects),
                Disposed::Waits => {}
                other => panic!("{other:?}"),
            }
            self.gpu.absorb(effects);
        }
    }

    fn parked(&self) -> usize {
        self.schedule.parked()
    }
}

#[test]
fn a_fault_waits_for_a_fetch_or_a_fetch_for_a_fault_and_says_what_is_wrong() {
    for fetch_first in [true, false] {
        let mut rig = rig();
        let early = fetch_first.then(|| rig.fetch());
        rig.submit(Stream::new().nop(0).signal(at(0, 8), 5));
        rig.run();
        let fetch = early.unwrap_or_else(|| rig.fetch());
        let fault = rig.fault(fetch).unwrap();
        let expected = AsFault {
            id: 0,
            asid: ASID,
            access: 2,
            gva: GVA[0] + 8,
            pte: 0,
            level: 3,
            denied: 0,
            packet: 1,
            repeats: 0,
        };
        assert_eq!((fault, rig.parked()), (expected, 1));
        let next = rig.fetch();
        assert_eq!(rig.gpu.response(next), None, "there is no second fault");
    }
}

#[test]
fn a_job_whose_fault_is_replayed_goes_on_where_it_stopped_and_does_nothing_twice() {
    let mut rig = rig();
    rig.map(0);
    let before = rig.word(0);
    // The value is changed, and then there is no page for what it was.
    rig.submit(Stream::new().add64(at(0, 0), 5, Some(at(1, 0))).signal(at(1, 8), 3));
    rig.run();
    let fetch = rig.fetch();
    let fault = rig.fault(fetch).unwrap();
    assert_eq!((fault.gva, fault.repeats, rig.word(0)), (GVA[1], 0, before.wrapping_add(5)));
    // Too early: nothing is mapped there yet.
    assert_eq!(rig.answer(FAULT_REPLAY, fault.id), OK_NODATA);
    rig.run();
    let fetch = rig.fetch();
    let again = rig.fault(fetch).unwrap();
    assert_eq!((again.gva, again.repeats), (GVA[1], 1));
    assert!(again.id != fault.id);
    rig.map(1);
    assert_eq!(rig.answer(FAULT_REPLAY, again.id), OK_NODATA);
    rig.run();
    assert_eq!((rig.word(0), rig.word(1), rig.parked()), (before.wrapping_add(5), before, 0));
}

#[test]
fn a_permission_that_is_missing_can_be_granted() {
    let mut rig = rig();
    rig.tables.map(&mut rig.gpu.memory, GVA[0], 0, MEMORY[0] | pte::VALID | pte::READ);
    rig.submit(Stream::new().signal(at(0, 0), 9));
    rig.run();
    let fetch = rig.fetch();
    let fault = rig.fault(fetch).unwrap();
    assert_eq!((fault.denied, fault.level, fault.pte), (1, 0, MEMORY[0] | pte::VALID | pte::READ));
    rig.map(0);
    rig.answer(FAULT_REPLAY, fault.id);
    rig.run();
    assert_eq!(rig.word(0) as u32, 9);
}

#[test]
fn a_job_whose_fault_is_failed_fails_and_writes_its_fence() {
    let mut rig = rig();
    rig.map(1);
    let fence = Context { mode: None, priority: None, fence: Some(at(1, 0)), done: 1, failed: 2 };
    rig.submit(Stream::new().push(fence).signal(at(0, 0), 9));
    rig.run();
    let fetch = rig.fetch();
    let id = rig.fault(fetch).unwrap().id;
    assert_eq!(rig.answer(FAULT_FAIL, id), OK_NODATA);
    rig.run();
    assert_eq!((rig.word(1), rig.parked()), (2, 0));
    assert_eq!(rig.gpu.status(&submit_3d(1, &Stream::new().nop(0).finish_bytes())), ERR_INVALID_CONTEXT_ID);
}

#[test]
fn what_cannot_be_answered_is_refused() {
    let mut rig = rig();
    rig.submit(Stream::new().signal(at(0, 0), 9));
    rig.run();
    assert_eq!(rig.answer(FAULT_REPLAY, 0), ERR_INVALID_PARAMETER, "it was not fetched");
    rig.fetch();
    assert_eq!(rig.answer(2, 0), ERR_INVALID_PARAMETER);
    assert_eq!(rig.answer(FAULT_REPLAY, 1), ERR_INVALID_PARAMETER);
    assert_eq!(rig.answer(FAULT_REPLAY, 0), OK_NODATA);
    assert_eq!(rig.answer(FAULT_REPLAY, 0), ERR_INVALID_PARAMETER, "it was answered");
    let root = rig.tables.root();
    assert_eq!(rig.gpu.status(&as_create(1, 8, root)), OK_NODATA);
    assert_eq!(rig.gpu.status(&as_fetch_fault(1, 8)), ERR_INVALID_PARAMETER, "it has no FAULTS");
    assert_eq!(rig.gpu.status(&as_fetch_fault(1, 9)), ERR_INVALID_RESOURCE_ID);
}

#[test]
fn the_end_of_an_address_space_fails_its_faults_and_ends_what_waits_for_more() {
    for is_fetched in [true, false] {
        let mut rig = rig();
        rig.submit(Stream::new().signal(at(0, 0), 9));
        rig.run();
        if is_fetched {
            rig.fetch();
        }
        let waits = rig.fetch();
        let waits = is_fetched.then_some(waits);
        let destroy = rig.gpu.send(&as_destroy(1, ASID));
        let status = waits.map(|waits| rig.gpu.response(waits).unwrap().kind());
        assert_eq!(status, waits.map(|_| ERR_INVALID_RESOURCE_ID));
        rig.run();
        assert_eq!(rig.gpu.response(destroy).unwrap().kind(), OK_NODATA);
        assert_eq!(rig.parked(), 0);
    }
}

#[test]
fn a_job_of_an_address_space_that_has_ended_raises_no_fault_in_the_next_one_of_this_number() {
    let mut rig = rig();
    let job = rig.submit(Stream::new().nop(0).signal(at(0, 0), 9));
    let destroy = rig.gpu.send(&as_destroy(1, ASID));
    let root = rig.tables.root();
    assert_eq!(rig.gpu.status(&as_create_with(1, ASID, CREATE_FAULTS, root)), OK_NODATA);
    let fetch = rig.fetch();
    rig.run();
    assert_eq!(rig.gpu.response(fetch), None);
    assert_eq!(rig.gpu.response(destroy).unwrap().kind(), OK_NODATA);
    assert_eq!((rig.gpu.response(job).unwrap().kind(), rig.parked()), (OK_NODATA, 0));
}

#[test]
fn jobs_that_are_killed_while_their_faults_wait_end() {
    let mut rig = rig();
    let fence = Context { mode: None, priority: None, fence: Some(at(1, 0)), done: 1, failed: 2 };
    // Its fence cannot be written either.
    rig.submit(Stream::new().push(fence).signal(at(0, 0), 9));
    rig.run();
    let destroy = rig.gpu.send(&ctx_destroy(1));
    rig.run();
    assert_eq!((rig.gpu.response(destroy).unwrap().kind(), rig.parked()), (OK_NODATA, 0));
}

#[test]
fn a_stop_leaves_faults_to_be_answered_and_a_reset_leaves_none() {
    let mut rig = rig();
    let fetch = rig.fetch();
    let waits = rig.fetch();
    rig.submit(Stream::new().signal(at(0, 0), 9));
    rig.run();
    let id = rig.fault(fetch).unwrap().id;
    rig.schedule.pause(Duration::ZERO);
    rig.schedule.resume(Duration::ZERO);
    rig.run();
    assert_eq!(rig.gpu.response(waits), None, "the fault is not raised again");
    rig.map(0);
    rig.answer(FAULT_REPLAY, id);
    rig.run();
    assert_eq!(rig.word(0) as u32, 9);
    assert_eq!(rig.gpu.device.reset(), [waits]);
}
