//! Tests of the verdicts on memory that an INVALIDATE takes from a job.

use super::tests::{BACKING, job, missing, numbered, page, request, schedule, take, wait_of};
use super::*;
use crate::addr::Access;
use crate::jobs::verdict::Confidence;
use crate::mmu::{MappedRange, Permissions};

const FRAME: u64 = 0x7000_0000;

fn by(number: u64) -> InvalidationInfo {
    InvalidationInfo {
        number,
        range: ByteRange::everything(),
        begun: Duration::from_millis(number),
        acked: None,
    }
}

fn mapped(start: u64, host: u64, permissions: Permissions) -> MappedRange {
    MappedRange { space: DomainId::DEVICE, range: page(start), host, permissions }
}

fn shows(found: Found) -> Revealed {
    Revealed { space: DomainId::DEVICE, pages: page(BACKING), access: Access::Read, found }
}

/// A job on an engine from which an INVALIDATE takes its page.
fn overlapped() -> (Schedule, ScheduledJob) {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    assert_eq!(schedule.judged(DomainId::DEVICE, ByteRange::everything()), [page(BACKING)]);
    schedule.suspect(by(3), &[mapped(BACKING, FRAME, Permissions::READ)]);
    (schedule, work)
}

fn verdicts(job_verdicts: &[JobVerdict]) -> Vec<(Verdict, Confidence, u64, bool)> {
    let short = |j: &JobVerdict| (j.verdict, j.confidence, j.by.number, j.is_first);
    job_verdicts.iter().map(short).collect()
}

#[test]
fn the_next_answer_says_what_an_invalidation_meant_and_says_it_once() {
    for (found, verdict) in [
        (Found::Memory(FRAME), Verdict::Benign),
        (Found::Memory(FRAME + 4096), Verdict::Moved),
        (Found::Nothing, Verdict::Gone),
    ] {
        let (mut schedule, work) = overlapped();
        let id = work.job.id();
        let job_verdicts = schedule.reveal(&shows(found), &[id]);
        let is_first = verdict != Verdict::Benign;
        assert_eq!(verdicts(&job_verdicts), [(verdict, Confidence::Certain, 3, is_first)]);
        assert_eq!(
            (job_verdicts[0].job, job_verdicts[0].range, job_verdicts[0].access),
            (id, page(BACKING), Access::Read)
        );
        assert_eq!(schedule.reveal(&shows(found), &[id]), []);
        drop(work);
    }
}

#[test]
fn no_verdict_is_given_without_an_answer_about_the_page() {
    let (mut schedule, work) = overlapped();
    let ids = [work.job.id()];
    let elsewhere = Revealed { pages: page(BACKING + 4096), ..shows(Found::Nothing) };
    let for_writing = Revealed { access: Access::Write, ..shows(Found::Nothing) };
    for revealed in [elsewhere, for_writing] {
        assert_eq!(schedule.reveal(&revealed, &ids), []);
    }
    assert_eq!(schedule.reveal(&shows(Found::Unknown), &ids), []);
    // What an unanswered request was about is not known any more.
    assert_eq!(schedule.reveal(&shows(Found::Nothing), &ids), []);
}

#[test]
fn what_was_not_mapped_or_not_for_this_access_was_not_taken_away() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    schedule.suspect(by(1), &[mapped(BACKING, FRAME, Permissions::WRITE)]);
    schedule.suspect(by(2), &[mapped(BACKING + 4096, FRAME, Permissions::READ)]);
    assert_eq!(schedule.reveal(&shows(Found::Nothing), &[work.job.id()]), []);
}

#[test]
fn an_answer_that_another_job_asked_for_makes_a_verdict_likely() {
    let (mut schedule, work) = overlapped();
    let job_verdicts = schedule.reveal(&shows(Found::Nothing), &[]);
    assert_eq!(verdicts(&job_verdicts), [(Verdict::Gone, Confidence::Likely, 3, true)]);
    drop(work);
}

#[test]
fn a_change_of_the_memory_table_ends_all_suspicions() {
    let (mut schedule, work) = overlapped();
    schedule.forget_suspects();
    assert_eq!(schedule.reveal(&shows(Found::Memory(FRAME + 4096)), &[work.job.id()]), []);
}

/// A driver that unmaps after the fence must not be mistaken for one that unmaps before it.
#[test]
fn the_fence_of_a_job_in_fence_mode_waits_until_its_memory_was_found_again() {
    let (mut schedule, work) = overlapped();
    let id = work.job.id();
    let done = Leaves::Finished(JobOutcome::Done);
    let Disposed::Missing { wait, missing, ahead } = schedule.dispose(Left { work, leaves: done }) else {
        panic!("Nobody asks for the page");
    };
    let page_missing = Missing { space: DomainId::DEVICE, range: page(BACKING), access: Access::Read };
    assert_eq!((wait.job, missing, ahead), (id, vec![page_missing], vec![]));
    assert!(schedule.touches(DomainId::DEVICE, page(BACKING)));
    let job_verdicts = schedule.reveal(&shows(Found::Nothing), &[id]);
    assert_eq!(verdicts(&job_verdicts), [(Verdict::Gone, Confidence::Certain, 3, true)]);
    schedule.miss_answered(wait, request(BACKING), Err(JobError::Refused(page_missing)));
    let work = take(&mut schedule);
    // Its memory was still mapped when it worked on it.
    assert!(work.checked);
    let left = Left { work, leaves: Leaves::Finished(JobOutcome::Done) };
    assert!(matches!(schedule.dispose(left), Disposed::Finished(_)));
}

#[test]
fn a_job_that_no_invalidation_overlapped_ends_at_once() {
    let mut schedule = schedule();
    let work = take(&mut schedule);
    schedule.suspect(by(1), &[]);
    let left = Left { work, leaves: Leaves::Finished(JobOutcome::Done) };
    assert!(matches!(schedule.dispose(left), Disposed::Finished(_)));
}

#[test]
fn a_job_in_fence_mode_that_has_worked_on_memory_that_was_moved_ends_with_that() {
    for stepped in [true, false] {
        let (mut schedule, work) = overlapped();
        let id = work.job.id();
        let work = ScheduledJob { stepped, ..work };
        let wait = wait_of(schedule.dispose(Left { work, leaves: missing(&[BACKING]) }));
        let job_verdicts = schedule.reveal(&shows(Found::Memory(FRAME + 4096)), &[id]);
        assert_eq!(verdicts(&job_verdicts), [(Verdict::Moved, Confidence::Certain, 3, true)]);
        schedule.miss_answered(wait, request(BACKING), Ok(()));
        let moved = Missing { space: DomainId::DEVICE, range: page(BACKING), access: Access::Read };
        assert_eq!(take(&mut schedule).failed, stepped.then_some(JobError::Moved(moved)));
    }
}

#[test]
fn a_verdict_about_a_part_leaves_the_rest_to_be_judged() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    schedule.submit(job(4));
    let work = take(&mut schedule);
    let all = ByteRange::new(Iova::new(BACKING), 4 * 4096).unwrap();
    let four = MappedRange { range: all, ..mapped(BACKING, FRAME, Permissions::READ) };
    schedule.suspect(by(1), &[four]);
    // The second page is where it was, the third is elsewhere; the others are unknown.
    let second = Revealed { pages: page(BACKING + 4096), ..shows(Found::Memory(FRAME + 4096)) };
    let third = Revealed { pages: page(BACKING + 2 * 4096), ..shows(Found::Memory(FRAME)) };
    let ids = [work.job.id()];
    assert_eq!(verdicts(&schedule.reveal(&second, &ids)), [(Verdict::Benign, Confidence::Certain, 1, false)]);
    assert_eq!(verdicts(&schedule.reveal(&third, &ids)), [(Verdict::Moved, Confidence::Certain, 1, true)]);
    let rest = Revealed { pages: all, ..shows(Found::Memory(FRAME)) };
    let job_verdicts = schedule.reveal(&rest, &ids);
    let ranges: Vec<_> =
        job_verdicts.iter().map(|job_verdict| (job_verdict.range, job_verdict.verdict)).collect();
    assert_eq!(ranges, [(page(BACKING), Verdict::Benign), (page(BACKING + 3 * 4096), Verdict::Benign)]);
    drop(work);
}

/// Two jobs use the same pages, one of them more: the mirror is looked up once for both, since what is found for the
/// smaller part would otherwise stand for the whole.
#[test]
fn what_two_jobs_use_is_judged_whole_for_both() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    let mut pages = Vec::new();
    for (id, count) in [(0, 1), (1 << 32, 3)] {
        schedule.submit(numbered(id, count));
        pages.push(take(&mut schedule));
    }
    let all = ByteRange::new(Iova::new(BACKING), 3 * 4096).unwrap();
    let three = MappedRange { range: all, ..mapped(BACKING, FRAME, Permissions::READ) };
    for part in schedule.judged(DomainId::DEVICE, ByteRange::everything()) {
        schedule.suspect(by(1), &[MappedRange { range: part, ..three }]);
    }
    let gone = Revealed { pages: page(BACKING + 4096), ..shows(Found::Nothing) };
    let job_verdicts = schedule.reveal(&gone, &[]);
    let jobs: Vec<_> =
        job_verdicts.iter().map(|job_verdict| (job_verdict.job.raw(), job_verdict.verdict)).collect();
    assert_eq!(jobs, [(1 << 32, Verdict::Gone)]);
    drop(pages);
}

/// The first page already waits for its verdict when an INVALIDATE takes it and the pages behind it.
#[test]
fn what_is_longer_than_an_older_suspicion_is_noted_behind_it() {
    let mut schedule = Schedule::new();
    schedule.resume(Duration::ZERO);
    schedule.submit(job(4));
    let work = take(&mut schedule);
    let all = ByteRange::new(Iova::new(BACKING), 4 * 4096).unwrap();
    schedule.suspect(by(1), &[mapped(BACKING, FRAME, Permissions::READ)]);
    schedule.suspect(by(2), &[MappedRange { range: all, ..mapped(BACKING, FRAME, Permissions::READ) }]);
    let rest = Revealed { pages: all, ..shows(Found::Memory(FRAME + 4096)) };
    let told = schedule.reveal(&rest, &[work.job.id()]);
    let told: Vec<_> = told.iter().map(|told| (told.range, told.verdict, told.by.number)).collect();
    let tail = ByteRange::new(Iova::new(BACKING + 4096), 3 * 4096).unwrap();
    assert_eq!(told, [(page(BACKING), Verdict::Moved, 1), (tail, Verdict::Moved, 2)]);
}
