//! Tests of the schedule with transfers; turns and priorities are in [`super::turns`].

use super::*;
use crate::addr::Access;
use crate::gpu::device::{Device, DeviceConfig, Effect};
use crate::gpu::scanout::Rect;
use crate::testing::requests::{attach_backing, create_2d, transfer_to_host_2d};

pub(super) const BACKING: u64 = 0x10_0000;

/// A transfer of so many pages at [`BACKING`].
pub(super) fn job(pages: u32) -> Job {
    numbered(0, pages)
}

/// The same with a number.
pub(super) fn numbered(id: u64, pages: u32) -> Job {
    let mut device = Device::new(DeviceConfig::default());
    device.number_jobs_from(JobId(id));
    let mut effects = Vec::new();
    let all = Rect { x: 0, y: 0, width: 32, height: 32 * pages };
    for request in [
        create_2d(1, 1, 32, 32 * pages),
        attach_backing(1, &[(BACKING, 4096 * pages)]),
        transfer_to_host_2d(1, all, 0),
    ] {
        device.control(&request, (), &mut effects);
    }
    let run = effects.into_iter().find_map(|effect| match effect {
        Effect::Run(job) => Some(job),
        _ => None,
    });
    run.unwrap()
}

pub(super) fn schedule() -> Schedule {
    let mut schedule = Schedule::new();
    schedule.resume();
    schedule.submit(job(1));
    schedule
}

pub(super) fn take(schedule: &mut Schedule) -> ScheduledJob {
    match schedule.turn() {
        Turn::Run(work) => work,
        other => panic!("{other:?}"),
    }
}

pub(super) fn page(start: u64) -> ByteRange<Iova> {
    ByteRange::new(Iova::new(start), 4096).unwrap()
}

pub(super) fn missing(starts: &[u64]) -> Leaves {
    let one = |start: &u64| Missing { space: SpaceId::DEVICE, range: page(*start), access: Access::Read };
    Leaves::Missing(starts.iter().map(one).collect())
}

#[test]
fn a_job_is_in_flight_from_its_first_turn_to_its_end_wherever_it_waits() {
    let mut schedule = schedule();
    assert!(!schedule.touches(SpaceId::DEVICE, page(BACKING)));
    let work = take(&mut schedule);
    let id = work.job.id();
    assert!(matches!(schedule.dispose(Left { work, leaves: missing(&[BACKING]) }), Disposed::Missing { .. }));
    assert!(schedule.touches(SpaceId::DEVICE, page(BACKING)));
    assert!(!schedule.touches(SpaceId::DEVICE, page(BACKING + 4096)));
    schedule.miss_answered(id, Ok(()));
    let work = take(&mut schedule);
    let left = Left { work, leaves: Leaves::Finished(JobOutcome::Done) };
    assert!(matches!(schedule.dispose(left), Disposed::Finished(_)));
    assert!(!schedule.touches(SpaceId::DEVICE, page(BACKING)));
}

#[test]
fn a_job_goes_on_when_every_page_is_answered_and_a_page_named_twice_is_one() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    let id = work.job.id();
    let leaves = missing(&[BACKING, BACKING + 4096, BACKING]);
    assert!(matches!(schedule.dispose(Left { work, leaves }), Disposed::Missing { .. }));
    schedule.miss_answered(id, Ok(()));
    assert!(matches!(schedule.turn(), Turn::Wait));
    schedule.miss_answered(id, Err(JobError::Killed));
    assert_eq!(take(&mut schedule).failed, Some(JobError::Killed));
}

#[test]
fn a_job_does_not_wait_for_what_is_asked_for_ahead() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    let id = work.job.id();
    let one = |start| Missing { space: SpaceId::DEVICE, range: page(start), access: Access::Read };
    let leaves = Leaves::Faulted { missing: one(BACKING), ahead: vec![one(BACKING + 4096)] };
    match schedule.dispose(Left { work, leaves }) {
        Disposed::Missing { job, missing, ahead } => {
            assert_eq!((job, missing, ahead), (id, vec![one(BACKING)], vec![one(BACKING + 4096)]));
        }
        other => panic!("{other:?}"),
    }
    schedule.miss_answered(id, Ok(()));
    drop(take(&mut schedule));
}

#[test]
fn an_invalidation_that_ended_before_the_job_was_parked_does_not_park_it() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    schedule.invalidation_ended();
    let left = Left { work, leaves: Leaves::Invalidating };
    assert!(matches!(schedule.dispose(left), Disposed::Waits));
    let work = take(&mut schedule);
    let left = Left { work, leaves: Leaves::Invalidating };
    assert!(matches!(schedule.dispose(left), Disposed::Waits));
    assert!(matches!(schedule.turn(), Turn::Wait));
    schedule.invalidation_ended();
    drop(take(&mut schedule));
}

/// A reset comes while an engine has the job, and the engine puts it back only then.
#[test]
fn a_job_from_before_a_discard_never_runs_again() {
    let ways = [Leaves::Preempted, Leaves::Evicted, Leaves::Invalidating, missing(&[BACKING])];
    for leaves in ways.into_iter().chain([Leaves::Finished(JobOutcome::Done)]) {
        let mut schedule = schedule();
        let work = take(&mut schedule);
        schedule.pause();
        schedule.discard();
        assert!(matches!(schedule.dispose(Left { work, leaves }), Disposed::Stale));
        schedule.resume();
        assert!(matches!(schedule.turn(), Turn::Wait));
        assert!(!schedule.touches(SpaceId::DEVICE, page(BACKING)));
    }
}

#[test]
fn a_pause_keeps_every_job_and_forgets_what_it_waits_for() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    assert!(matches!(schedule.dispose(Left { work, leaves: missing(&[BACKING]) }), Disposed::Missing { .. }));
    schedule.pause();
    assert!(matches!(schedule.turn(), Turn::Wait) && schedule.is_stopped());
    schedule.resume();
    drop(take(&mut schedule));
}

#[test]
fn each_job_is_listed_once_in_order_wherever_it_is() {
    let mut schedule = Schedule::new();
    schedule.resume();
    let number = |id: u64| id << 32;
    (0..6).for_each(|id| schedule.submit(numbered(number(5 - id), 1)));
    let taken: Vec<_> = (0..4).map(|_| take(&mut schedule)).collect();
    for (work, leaves) in
        taken.into_iter().zip([Leaves::SliceOver, missing(&[BACKING]), Leaves::Invalidating])
    {
        let _ = schedule.dispose(Left { work, leaves });
    }
    let listed = schedule.jobs();
    let states: Vec<_> = listed.iter().map(|job| (job.id.raw() >> 32, job.state)).collect();
    let ready = JobState::Ready;
    let others = [(2, JobState::Running), (3, JobState::Invalidation), (4, JobState::Misses(1))];
    let wanted = [&[(0, ready), (1, ready)], others.as_slice(), &[(5, ready)]].concat();
    assert_eq!(states, wanted);
    assert!(listed.iter().all(|job| job.at_rest.is_some() == (job.state != JobState::Running)));
}
