//! Scheduling order: priorities, time slices, and WAITs that poll again.

use std::ops::ControlFlow;

use job_stream::{At, Compare, Limits, Mode, Priority, Space, Stream, verify};

use super::ready::PATIENCE;
use super::*;
use crate::jobs::backing::Backing;
use crate::jobs::job::Treatment;
use crate::jobs::operands::{self, Operands};
use crate::jobs::program::Execution;

fn job(id: u64, priority: Priority) -> Job {
    let wait = Stream::new().wait(At::new(Space::resource(1), 0), Compare::Equal, 1, 0);
    job_on(&backing(), id, priority, wait)
}

fn backing() -> Backing {
    let entry = crate::jobs::backing::RawEntry { at: crate::addr::Iova::new(0), len: 4096 };
    Backing::new(std::iter::once(entry)).unwrap()
}

fn job_on(backing: &Backing, id: u64, priority: Priority, stream: Stream) -> Job {
    let program = verify(&stream.finish(), &Limits::default()).unwrap();
    let space = |_| Ok(operands::ResourceMemory { bytes: 4096, backing: backing.clone() });
    let execution = Execution::new(Operands::new(program, space).unwrap(), Duration::from_secs(1));
    Job::program(JobId(id), Treatment { context: Some(1), mode: Mode::Fault, priority }, execution)
}

fn turn(schedule: &mut Schedule) -> ControlFlow<ScheduledJob, ()> {
    match schedule.turn() {
        Turn::Run(work) => ControlFlow::Break(work),
        Turn::Wait | Turn::Close => ControlFlow::Continue(()),
    }
}

fn next(schedule: &mut Schedule) -> Option<ScheduledJob> {
    turn(schedule).break_value()
}

#[test]
fn the_highest_priority_comes_first_and_the_lowest_comes_too() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    schedule.submit(job(0, Priority::Low));
    (1..40).for_each(|id| schedule.submit(job(id, Priority::High)));
    let order: Vec<u64> =
        std::iter::from_fn(|| next(&mut schedule)).map(|work| work.job.id().raw()).collect();
    assert_eq!(order[..3], [1, 2, 3]);
    assert_eq!(order.iter().position(|id| *id == 0), Some(PATIENCE as usize));
    assert_eq!(order.len(), 40);
}

#[test]
fn a_job_whose_slice_is_over_comes_after_the_others() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    (0..2).for_each(|id| schedule.submit(job(id, Priority::Normal)));
    let work = next(&mut schedule).unwrap();
    assert!(matches!(schedule.dispose(Left { work, leaves: Leaves::SliceOver }), Disposed::Waits));
    assert_eq!([next(&mut schedule), next(&mut schedule)].map(|work| work.unwrap().job.id().raw()), [1, 0]);
}

#[test]
fn a_wait_polls_at_growing_intervals_and_at_once_when_a_job_that_writes_there_ends() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    let (shared, at) = (backing(), At::new(Space::resource(1), 0));
    let streams = [Stream::new().wait(at, Compare::Equal, 1, 0), Stream::new().signal(at, 1)];
    for (id, stream) in (0..).zip(streams) {
        schedule.submit(job_on(&shared, id, Priority::Normal, stream));
    }
    let (mut waiting, other) = (next(&mut schedule).unwrap(), next(&mut schedule).unwrap());
    let mut now = Duration::ZERO;
    for pause in [50, 100, 200, 400, 800, 1000, 1000] {
        let leaves = Leaves::Waiting { until: Duration::from_secs(1) };
        let _ = schedule.dispose(Left { work: waiting, leaves });
        assert_eq!(schedule.next_poll(), Some(now + Duration::from_micros(pause)));
        schedule.set_time(now + Duration::from_micros(pause - 1));
        assert!(next(&mut schedule).is_none());
        now += Duration::from_micros(pause);
        schedule.set_time(now);
        waiting = next(&mut schedule).unwrap();
    }
    let leaves = Leaves::Waiting { until: now + Duration::from_micros(7) };
    let _ = schedule.dispose(Left { work: waiting, leaves });
    assert_eq!(schedule.next_poll(), Some(now + Duration::from_micros(7)), "no later than it gives up");
    schedule.submit(job(2, Priority::Normal));
    let stranger = next(&mut schedule).unwrap();
    let _ = schedule.dispose(Left { work: stranger, leaves: Leaves::Finished(JobOutcome::Done) });
    assert!(next(&mut schedule).is_none(), "that one writes nothing that is waited for");
    let _ = schedule.dispose(Left { work: other, leaves: Leaves::Finished(JobOutcome::Done) });
    assert_eq!((next(&mut schedule).unwrap().job.id().raw(), schedule.next_poll()), (0, None));
}

/// A job may wait for one value after the other.
#[test]
fn the_next_wait_of_a_job_polls_as_soon_as_the_first() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    schedule.submit(job(0, Priority::Normal));
    let mut waiting = next(&mut schedule).unwrap();
    let mut now = Duration::ZERO;
    for (pause, wait) in [(50, 0), (100, 0), (200, 0), (50, 1), (100, 1)] {
        let until = Duration::from_secs(1) + Duration::from_millis(wait);
        let _ = schedule.dispose(Left { work: waiting, leaves: Leaves::Waiting { until } });
        assert_eq!(schedule.next_poll(), Some(now + Duration::from_micros(pause)), "WAIT {wait}");
        now += Duration::from_micros(pause);
        schedule.set_time(now);
        waiting = next(&mut schedule).unwrap();
    }
    drop(waiting);
}

/// The guest is stopped meanwhile, and with it the writer of the value that the job waits for.
#[test]
fn a_stop_costs_a_wait_none_of_its_time() {
    let ms = Duration::from_millis;
    let mut schedule = Schedule::new();
    schedule.set_time(ms(50));
    assert_eq!(schedule.running(), ms(0), "it has not started");
    schedule.resume(ms(100));
    schedule.submit(job(0, Priority::Normal));
    schedule.set_time(ms(140));
    let waiting = next(&mut schedule).unwrap();
    let leaves = Leaves::Waiting { until: schedule.running() + Duration::from_micros(30) };
    let _ = schedule.dispose(Left { work: waiting, leaves: leaves.clone() });
    let due = ms(140) + Duration::from_micros(30);
    assert_eq!((schedule.running(), schedule.next_poll()), (ms(40), Some(due)));
    schedule.pause(ms(140));
    schedule.set_time(ms(900));
    assert_eq!((schedule.running(), schedule.next_poll()), (ms(40), None));
    schedule.resume(ms(1140));
    let waiting = next(&mut schedule).unwrap();
    let _ = schedule.dispose(Left { work: waiting, leaves });
    let due = ms(1140) + Duration::from_micros(30);
    assert_eq!((schedule.running(), schedule.next_poll()), (ms(40), Some(due)));
}

/// A poll takes almost no time, but there may be a thousand of them.
#[test]
fn a_job_with_work_to_do_comes_after_one_poll_and_not_after_all() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    (0..64).for_each(|id| schedule.submit(job(id, Priority::Normal)));
    for _ in 0..64 {
        let work = next(&mut schedule).unwrap();
        let _ = schedule.dispose(Left { work, leaves: Leaves::Waiting { until: Duration::from_secs(1) } });
    }
    schedule.set_time(Duration::from_millis(1));
    (64..67).for_each(|id| schedule.submit(job(id, Priority::Normal)));
    let order: Vec<u64> =
        std::iter::from_fn(|| next(&mut schedule)).map(|work| work.job.id().raw()).collect();
    let places = (64..67).map(|id| order.iter().position(|other| *other == id).unwrap());
    assert!(places.eq([0, 2, 4]) || order[..6] == [0, 64, 1, 65, 2, 66], "{order:?}");
    assert_eq!(order.len(), 67);
}

#[test]
fn polls_that_are_due_soon_come_with_one_that_is_due() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    (0..2).for_each(|id| schedule.submit(job(id, Priority::Normal)));
    let (first, second) = (next(&mut schedule).unwrap(), next(&mut schedule).unwrap());
    let leaves = || Leaves::Waiting { until: Duration::from_secs(1) };
    let _ = schedule.dispose(Left { work: first, leaves: leaves() });
    schedule.set_time(Duration::from_micros(40));
    let _ = schedule.dispose(Left { work: second, leaves: leaves() });
    schedule.set_time(Duration::from_micros(49));
    assert!(next(&mut schedule).is_none());
    schedule.set_time(Duration::from_micros(50));
    assert_eq!([next(&mut schedule), next(&mut schedule)].map(|work| work.unwrap().job.id().raw()), [0, 1]);
    assert_eq!(schedule.next_poll(), None);
}
