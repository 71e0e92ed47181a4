//! Tests of the schedule with transfers; turns and priorities are in [`super::turn_tests`].

use job_stream::{At, Space, Stream};

use super::*;
use crate::gpu::device::{Device, DeviceConfig, Effect};
use crate::image::Rect;
use crate::jobs::testing;
use crate::testing::requests::{attach_backing, create_2d, transfer_to_host_2d};

pub(super) const BACKING: u64 = 0x10_0000;

/// A transfer of this many pages at [`BACKING`].
pub(super) fn job(pages: u32) -> Job {
    numbered(0, pages)
}

/// The same with a given number.
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
    schedule.resume(Duration::ZERO);
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

/// A request for a page.
pub(super) fn request(start: u64) -> MissRequest {
    MissRequest { space: DomainId::DEVICE, access: Access::Read, iova: Iova::new(start) }
}

/// The wait of a job that has left its engine because of missing translations.
pub(super) fn wait_of(disposed: Disposed) -> JobWait {
    match disposed {
        Disposed::Missing { wait, .. } => wait,
        other => panic!("{other:?}"),
    }
}

pub(super) fn missing(starts: &[u64]) -> Leaves {
    let one = |start: &u64| Missing { space: DomainId::DEVICE, range: page(*start), access: Access::Read };
    Leaves::Missing(starts.iter().map(one).collect())
}

#[test]
fn a_job_is_in_flight_from_its_first_turn_to_its_end_wherever_it_waits() {
    let mut schedule = schedule();
    assert!(!schedule.touches(DomainId::DEVICE, page(BACKING)));
    let work = take(&mut schedule);
    let wait = wait_of(schedule.dispose(Left { work, leaves: missing(&[BACKING]) }));
    assert!(schedule.touches(DomainId::DEVICE, page(BACKING)));
    assert_eq!(schedule.first_in(DomainId::DEVICE, page(BACKING)), Some(wait.job));
    assert!(!schedule.touches(DomainId::DEVICE, page(BACKING + 4096)));
    assert_eq!(schedule.first_in(DomainId::DEVICE, page(BACKING + 4096)), None);
    schedule.miss_answered(wait, request(BACKING), Ok(()));
    let work = take(&mut schedule);
    let left = Left { work, leaves: Leaves::Finished(JobOutcome::Done) };
    assert!(matches!(schedule.dispose(left), Disposed::Finished(_)));
    assert!(!schedule.touches(DomainId::DEVICE, page(BACKING)));
}

#[test]
fn a_job_goes_on_when_every_page_is_answered_and_a_page_named_twice_is_one() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    let leaves = missing(&[BACKING, BACKING + 4096, BACKING]);
    let Leaves::Missing(named) = &leaves else { unreachable!("That is what it leaves for") };
    assert_eq!(pages_of(named), 2);
    let wait = wait_of(schedule.dispose(Left { work, leaves }));
    // Even if it is answered repeatedly.
    for page in [BACKING, BACKING, BACKING + 8192] {
        schedule.miss_answered(wait, request(page), Ok(()));
        assert!(matches!(schedule.turn(), Turn::Wait), "{page:#x}");
    }
    schedule.miss_answered(wait, request(BACKING + 4096), Err(JobError::Killed));
    assert_eq!(take(&mut schedule).failed, Some(JobError::Killed));
}

#[test]
fn a_job_does_not_wait_for_what_is_asked_for_ahead() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    let id = work.job.id();
    let one = |start| Missing { space: DomainId::DEVICE, range: page(start), access: Access::Read };
    let leaves = Leaves::Faulted { missing: one(BACKING), ahead: vec![one(BACKING + 4096)] };
    match schedule.dispose(Left { work, leaves }) {
        Disposed::Missing { wait, missing, ahead } => {
            assert_eq!((wait.job, missing, ahead), (id, vec![one(BACKING)], vec![one(BACKING + 4096)]));
            schedule.miss_answered(wait, request(BACKING), Ok(()));
        }
        other => panic!("{other:?}"),
    }
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

/// A reset comes while the job is on an engine, which puts it back only afterwards.
#[test]
fn a_job_from_before_a_discard_never_runs_again() {
    let ways = [Leaves::Preempted, Leaves::Evicted, Leaves::Invalidating, missing(&[BACKING])];
    for leaves in ways.into_iter().chain([Leaves::Finished(JobOutcome::Done)]) {
        let mut schedule = schedule();
        let work = take(&mut schedule);
        schedule.pause(Duration::ZERO);
        schedule.discard();
        assert!(matches!(schedule.dispose(Left { work, leaves }), Disposed::Stale));
        schedule.resume(Duration::ZERO);
        assert!(matches!(schedule.turn(), Turn::Wait));
        assert!(!schedule.touches(DomainId::DEVICE, page(BACKING)));
    }
}

#[test]
fn a_pause_keeps_every_job_and_forgets_what_it_waits_for() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    assert!(matches!(schedule.dispose(Left { work, leaves: missing(&[BACKING]) }), Disposed::Missing { .. }));
    schedule.pause(Duration::ZERO);
    assert!(matches!(schedule.turn(), Turn::Wait) && schedule.is_stopped());
    schedule.resume(Duration::ZERO);
    drop(take(&mut schedule));
}

/// An engine parks a job, and is delayed before it requests the job's pages. Meanwhile the device stops and goes on,
/// and another engine has parked the job for another page.
#[test]
fn answers_to_an_earlier_wait_of_a_job_are_not_taken_for_those_of_a_later_one() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    let first = wait_of(schedule.dispose(Left { work, leaves: missing(&[BACKING]) }));
    assert!(schedule.is_current(first));
    schedule.pause(Duration::ZERO);
    schedule.resume(Duration::ZERO);
    let work = take(&mut schedule);
    let second = wait_of(schedule.dispose(Left { work, leaves: missing(&[BACKING, BACKING + 4096]) }));
    assert!(!schedule.is_current(first) && schedule.is_current(second));
    assert_eq!(schedule.waiting_job(first, request(BACKING)), None);
    for page in [BACKING, BACKING + 4096] {
        schedule.miss_answered(first, request(page), Err(JobError::Killed));
    }
    schedule.miss_answered(second, request(BACKING), Ok(()));
    assert_eq!(schedule.waiting_job(second, request(BACKING)), None, "it is answered");
    assert!(schedule.waiting_job(second, request(BACKING + 4096)).is_some());
    assert!(matches!(schedule.turn(), Turn::Wait));
    schedule.miss_answered(second, request(BACKING + 4096), Ok(()));
    assert_eq!(take(&mut schedule).failed, None);
}

#[test]
fn nothing_that_was_asked_for_before_a_reset_is_wanted_after_it() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    let old = wait_of(schedule.dispose(Left { work, leaves: missing(&[BACKING]) }));
    schedule.discard();
    assert!(!schedule.is_current(old));
}

#[test]
fn each_job_is_listed_once_in_order_wherever_it_is() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
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

#[test]
fn a_refusal_ends_a_job_at_once_unless_it_uses_an_address_space_and_walks_again() {
    let wait_of_refused = |execution| {
        let mut schedule = Schedule::new();
        schedule.resume(Duration::ZERO);
        schedule.submit(testing::job(0, Mode::Fault, execution));
        let work = take(&mut schedule);
        let wait = wait_of(schedule.dispose(Left { work, leaves: missing(&[BACKING]) }));
        let refused = JobError::Refused(request(BACKING).missing());
        schedule.miss_answered(wait, request(BACKING), Err(refused));
        let work = take(&mut schedule);
        (work.failed == Some(refused), work.refused)
    };
    let signal = |space| Stream::new().signal(At::new(space, 0), 1);
    let of_resource = testing::execution(signal(Space::resource(1)));
    assert_eq!(wait_of_refused(of_resource), (true, None));
    let of_address_space = testing::translated(signal(Space::address_space(1)));
    let refused = RefusedPage { page: Iova::new(BACKING), access: Access::Read, times: 1 };
    assert_eq!(wait_of_refused(of_address_space), (false, Some(refused)));
}

#[test]
fn refusals_of_one_page_in_turn_are_counted_and_another_page_starts_the_count_again() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    let signal = Stream::new().signal(At::new(Space::address_space(1), 0), 1);
    schedule.submit(testing::job(0, Mode::Fault, testing::translated(signal)));
    let mut times = Vec::new();
    for page in [BACKING, BACKING, BACKING + 4096, BACKING] {
        let work = take(&mut schedule);
        let wait = wait_of(schedule.dispose(Left { work, leaves: missing(&[page]) }));
        schedule.miss_answered(wait, request(page), Err(JobError::Refused(request(page).missing())));
        let work = take(&mut schedule);
        times.push(work.refused.unwrap().times);
        let _ = schedule.dispose(Left { work, leaves: Leaves::SliceOver });
    }
    assert_eq!(times, [1, 2, 1, 1]);
}
