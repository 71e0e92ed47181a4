//! An audit against a front-end that is a function.

use super::*;
use crate::mmu::{HostRange, Permissions};

const HOST: u64 = 0x7000_0000_0000;
const LATER: Duration = Duration::from_secs(3600);

fn range(start: u64, len: u64) -> ByteRange<Iova> {
    ByteRange::new(Iova::new(start), len).unwrap()
}

fn held(start: u64, len: u64, permissions: Permissions) -> MappedRange {
    MappedRange { space: DomainId::DEVICE, range: range(start, len), host: HOST + start, permissions }
}

/// The answer of a front-end that has `len` bytes at `start`, `moved` bytes further up than in the mirror.
fn there(start: u64, len: u64, moved: u64) -> Outcome {
    // SAFETY: never dereferenced: an audit compares addresses.
    let host = unsafe { HostRange::new((HOST + start + moved) as *mut u8, len as usize) };
    Outcome::Mapped { range: range(start, len), host, permissions: Permissions::READ_WRITE }
}

/// Audits the whole mirror; `answer` is the front-end.
fn run(
    held: &[MappedRange],
    mut answer: impl FnMut(MissRequest) -> Outcome,
) -> (AuditReport, Vec<MissRequest>) {
    let mut now = Duration::ZERO;
    let mut audit = Audit::begin(now);
    let mut asked = Vec::new();
    loop {
        if audit.wants(now).is_some() {
            audit.listed(held.iter().copied(), None);
        }
        let questions = audit.questions(now);
        assert!(questions.len() <= BATCH);
        for (number, question) in questions {
            asked.push(question);
            audit.answered(now, number, &answer(question));
        }
        if let Some(report) = audit.finished(now) {
            return (report, asked);
        }
        now = audit.deadline().expect("it is not at its end").max(now);
        assert!(now < LATER);
    }
}

#[test]
fn every_page_and_every_permission_is_asked_for() {
    let held = [held(0x1000, 0x2000, Permissions::READ), held(0x8000, 0x1000, Permissions::READ_WRITE)];
    let (report, asked) = run(&held, |question| there(question.iova.raw(), 4096, 0));
    assert_eq!(report, AuditReport { checked: 4, ..AuditReport::default() });
    let mut asked: Vec<_> = asked.iter().map(|question| (question.iova.raw(), question.access)).collect();
    asked.sort();
    let expected =
        [(0x1000, Access::Read), (0x2000, Access::Read), (0x8000, Access::Read), (0x8000, Access::Write)];
    assert_eq!(asked, expected);
}

#[test]
fn a_large_answer_settles_all_that_it_covers() {
    let held = [held(0, 4 << 20, Permissions::READ)];
    let (report, asked) = run(&held, |question| there(question.iova.raw() & !0x1f_ffff, 2 << 20, 0));
    assert_eq!((report.checked, report.findings.len(), asked.len()), (2, 0, 2));
}

#[test]
fn what_is_refused_is_gone_and_what_lies_elsewhere_has_moved() {
    let held = [held(0x1000, 0x4000, Permissions::WRITE)];
    let (report, _) = run(&held, |question| match question.iova.raw() {
        0x2000 => Outcome::Refused,
        0x3000 => there(0x3000, 4096, 4096),
        0x4000 => Outcome::TimedOut,
        at => there(at, 4096, 0),
    });
    let finding = |start, stale| Finding { range: range(start, 4096), access: Access::Write, stale };
    assert_eq!(report.findings, [finding(0x2000, Stale::Gone), finding(0x3000, Stale::Moved)]);
    assert_eq!((report.checked, report.unanswered, report.interrupted), (4, 1, false));
}

/// Linux in lazy mode unmaps first, and sends the INVALIDATE later.
#[test]
fn what_is_invalidated_within_the_grace_is_no_finding() {
    let mut audit = Audit::begin(Duration::ZERO);
    audit.listed([held(0x1000, 0x3000, Permissions::READ)], None);
    let [(number, question)] = audit.questions(Duration::ZERO)[..] else { panic!() };
    assert_eq!(question.iova, Iova::new(0x1000));
    audit.answered(Duration::ZERO, number, &Outcome::Refused);
    let soon = Duration::from_millis(10);
    assert_eq!(audit.finished(soon), None);
    // Its second page is unmapped while it is requested: that answer does not count.
    let [(number, _)] = audit.questions(soon)[..] else { panic!() };
    audit.invalidated(range(0x1000, 0x2000));
    audit.answered(soon, number, &Outcome::Refused);
    let [(number, question)] = audit.questions(soon + PAUSE)[..] else { panic!() };
    assert_eq!(question.iova, Iova::new(0x3000));
    audit.answered(soon, number, &there(0x3000, 4096, 0));
    assert_eq!(audit.finished(LATER).unwrap().findings, []);
}

#[test]
fn a_stretch_loses_what_is_invalidated_and_keeps_both_sides() {
    let walk = Walk { rest: range(0x1000, 0x5000), host: HOST, access: Access::Read };
    let left = |hole| walk.without(hole).map(|walk| (walk.rest, walk.host)).collect::<Vec<_>>();
    assert_eq!(
        left(range(0x2000, 0x1000)),
        [(range(0x1000, 0x1000), HOST), (range(0x3000, 0x3000), HOST + 0x2000)]
    );
    assert_eq!(left(range(0, 0x2000)), [(range(0x2000, 0x4000), HOST + 0x1000)]);
    assert_eq!(left(range(0x5000, 0x9000)), [(range(0x1000, 0x4000), HOST)]);
    assert_eq!(left(ByteRange::everything()), []);
    assert_eq!(left(range(0, 0x1000)), [(range(0x1000, 0x5000), HOST)]);
    assert_eq!(left(range(0x6000, 0x1000)), [(range(0x1000, 0x5000), HOST)]);
}

#[test]
fn the_rate_is_bounded() {
    let mut audit = Audit::begin(Duration::ZERO);
    audit.listed([held(0, 1 << 20, Permissions::READ)].repeat(100), None);
    let first = audit.questions(Duration::ZERO);
    assert_eq!(first.len(), BATCH);
    assert_eq!(audit.questions(LATER).len(), 0);
    for (number, question) in first {
        audit.answered(Duration::ZERO, number, &there(question.iova.raw(), 4096, 0));
    }
    assert_eq!(audit.questions(Duration::from_micros(999)).len(), 0);
    assert_eq!(audit.deadline(), Some(PAUSE));
    assert_eq!(audit.questions(PAUSE).len(), BATCH);
}
