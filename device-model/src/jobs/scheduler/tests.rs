//! How many engines are woken, and what engines read without the lock.

use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Time;

use job_stream::{Mode, Stream};

use super::*;
use crate::addr::{Access, PAGE_SIZE};
use crate::jobs::engine::Leaves;
use crate::jobs::schedule::Found;
use crate::jobs::testing::{AT, execution, job, place};
use crate::jobs::verdict::Verdict;
use crate::mmu::Permissions;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn submit(schedule: &mut Schedule, id: u64) {
    schedule.submit(job(id, Mode::Fault, execution(Stream::new().nop(0))));
}

fn scheduler() -> Scheduler {
    Scheduler::new(Arc::new(|| Duration::ZERO))
}

/// This many engines sleep while a schedule runs.
fn shared(sleeping: usize) -> Shared {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    Shared { schedule, sleeping, alarm: None }
}

#[test]
fn as_many_engines_are_woken_as_jobs_are_ready() {
    let mut shared = shared(3);
    for (jobs, wanted) in [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)] {
        assert_eq!(shared.wanted(), wanted, "{jobs} jobs");
        submit(&mut shared.schedule, jobs);
    }
    shared.schedule.pause(Duration::ZERO);
    assert_eq!(shared.wanted(), 0, "it is paused");
    shared.schedule.close();
    assert_eq!(shared.wanted(), 3, "it closes");
}

/// An engine that keeps a job for long must not be the only one that wakes for a WAIT's next poll.
#[test]
fn one_engine_watches_for_the_time_of_the_next_wait() {
    let mut shared = shared(2);
    submit(&mut shared.schedule, 0);
    let Turn::Run(work) = shared.schedule.turn() else { panic!("It is ready") };
    let _ = shared.schedule.dispose(Left { work, leaves: Leaves::Waiting { until: ms(1000) } });
    let poll = Duration::from_micros(50);
    assert_eq!((shared.alarm_needed(), shared.wanted()), (Some(poll), 1));
    shared.alarm = Some(poll + ms(1));
    assert_eq!((shared.alarm_needed(), shared.wanted()), (Some(poll), 1), "too late");
    shared.alarm = Some(poll);
    assert_eq!((shared.alarm_needed(), shared.wanted()), (None, 0));
    submit(&mut shared.schedule, 1);
    shared.alarm = None;
    assert_eq!(shared.wanted(), 2, "one for each");
}

#[test]
fn the_time_that_the_device_has_run_for_stands_still_while_it_is_stopped() {
    let time = Arc::new(Time::new(10));
    let theirs = Arc::clone(&time);
    let scheduler = Scheduler::new(Arc::new(move || ms(theirs.load(Ordering::Relaxed))));
    let shows = |now, running| {
        time.store(now, Ordering::Relaxed);
        assert_eq!(scheduler.running(scheduler.now()), ms(running), "at {now}");
    };
    shows(30, 0);
    scheduler.resume();
    shows(37, 7);
    scheduler.pause();
    shows(500, 7);
    scheduler.resume();
    shows(501, 8);
}

#[test]
fn an_engine_gives_its_job_back_while_the_device_is_stopped_and_whenever_that_was_reset() {
    let scheduler = scheduler();
    scheduler.resume();
    scheduler.change(|schedule| submit(schedule, 0));
    let old = scheduler.next().unwrap();
    assert!(!scheduler.must_leave(&old));
    scheduler.pause();
    assert!(scheduler.must_leave(&old));
    scheduler.resume();
    assert!(!scheduler.must_leave(&old), "a stop is no reset");
    scheduler.pause();
    scheduler.discard();
    scheduler.resume();
    scheduler.change(|schedule| submit(schedule, 1));
    let new = scheduler.next().unwrap();
    assert!(scheduler.must_leave(&old) && !scheduler.must_leave(&new), "that one is of the driver before");
    assert!(matches!(scheduler.dispose(Left { work: old, leaves: Leaves::Preempted }), Disposed::Stale));
    scheduler.close();
    assert!(scheduler.must_leave(&new) && scheduler.next().is_none());
}

#[test]
fn a_running_engine_is_told_when_another_job_wants_it() {
    let scheduler = scheduler();
    scheduler.change(|schedule| submit(schedule, 0));
    assert!(!scheduler.is_wanted(), "it is paused");
    scheduler.resume();
    assert!(scheduler.is_wanted());
    let work = scheduler.next().unwrap();
    assert!(!scheduler.is_wanted(), "the only job is on the engine");
    scheduler.change(|schedule| submit(schedule, 1));
    assert!(scheduler.is_wanted());
    drop(work);
}

#[test]
fn what_an_invalidation_takes_from_a_job_on_an_engine_is_judged_unless_it_is_forgotten() {
    for (forgets, wanted) in [(false, vec![Verdict::Gone]), (true, vec![])] {
        let scheduler = scheduler();
        scheduler.resume();
        scheduler.submit(job(0, Mode::Fence, execution(Stream::new().signal(place(), 1))));
        let page = |number| ByteRange::new(Iova::new(number * PAGE_SIZE), PAGE_SIZE).unwrap();
        let range = page(AT / PAGE_SIZE);
        assert!(!scheduler.touches(DomainId::DEVICE, range), "it has not begun");
        let work = scheduler.next().unwrap();
        assert!(scheduler.touches(DomainId::DEVICE, range) && !scheduler.touches(DomainId::DEVICE, page(9)));
        assert_eq!(scheduler.first_in(DomainId::DEVICE, range), Some(work.job.id()));
        assert_eq!(scheduler.judged(DomainId::DEVICE, ByteRange::everything()), [range]);
        let by = InvalidationInfo { number: 1, range, begun: ms(1), acked: None };
        let space = DomainId::DEVICE;
        let mapped = MappedRange { space, range, host: 0x7000_0000, permissions: Permissions::READ_WRITE };
        scheduler.suspect(by, &[mapped]);
        if forgets {
            scheduler.forget_suspects();
        }
        let revealed = Revealed { space, pages: range, access: Access::Write, found: Found::Nothing };
        let found = scheduler.reveal(&revealed, &[work.job.id()]);
        assert_eq!(found.iter().map(|judgement| judgement.verdict).collect::<Vec<_>>(), wanted);
        drop(work);
    }
}
