//! How many engines are woken, and what engines read without the lock.

use std::sync::Arc;
use std::sync::atomic::AtomicU64 as Time;

use job_stream::{Mode, Stream};

use super::*;
use crate::jobs::engine::Leaves;
use crate::jobs::testing::{execution, job};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn submit(schedule: &mut Schedule, id: u64) {
    schedule.submit(job(id, Mode::Fault, execution(Stream::new().nop(0))));
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
