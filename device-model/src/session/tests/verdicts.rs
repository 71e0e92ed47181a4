//! What an INVALIDATE meant, as far as the session is involved.

use job_stream::Mode;

use super::*;
use crate::jobs::verdict::{Confidence, Verdict};

fn job_verdict(verdict: Verdict, confidence: Confidence, mode: Mode, is_first: bool) -> JobVerdict {
    JobVerdict {
        verdict,
        confidence,
        job: JobId::new(1),
        context: Some(2),
        packet: Some(3),
        mode,
        range: pages(4, 1),
        access: Access::Write,
        by: InvalidationInfo { number: 1, range: pages(4, 1), begun: ms(1), acked: None },
        is_first,
    }
}

#[test]
fn jobs_are_told_what_is_taken_away_while_the_mirror_still_has_it() {
    let mut rig = running();
    rig.map(4, 1);
    rig.core.jobs_mut().judged = true;
    rig.invalidate(ms(5), pages(4, 1));
    let [(by, mapped)] = &rig.core.jobs().suspected[..] else { panic!("{:?}", rig.core.jobs()) };
    assert_eq!((by.number, by.range, by.begun, by.acked), (1, pages(4, 1), ms(5), None));
    assert_eq!((mapped.len(), mapped[0].range, mapped[0].host), (1, pages(4, 1), FRAME + 0x4000));
}

#[test]
fn nothing_is_looked_up_where_no_job_is_judged() {
    let mut rig = running();
    rig.map(4, 1);
    rig.invalidate(ms(5), pages(4, 1));
    assert!(rig.core.jobs().suspected.is_empty());
}

#[test]
fn a_violation_is_reported_once_and_only_where_somebody_can_be_blamed() {
    use Confidence::{CannotTell, Certain, Likely};
    let cases = [
        (job_verdict(Verdict::Gone, Certain, Mode::Fence, true), true),
        (job_verdict(Verdict::Moved, Likely, Mode::Strict, true), true),
        (job_verdict(Verdict::Moved, Certain, Mode::Fence, false), false),
        (job_verdict(Verdict::Benign, Certain, Mode::Fence, true), false),
        (job_verdict(Verdict::Gone, CannotTell, Mode::Fence, true), false),
        (job_verdict(Verdict::Gone, Certain, Mode::Fault, true), false),
    ];
    for (job_verdict, is_reported) in cases {
        let mut rig = running();
        rig.ask(ms(0), Waiter::Job(wait(1)), missing(4, 1, Access::Write));
        rig.sent(ms(0));
        rig.core.jobs_mut().job_verdicts = vec![job_verdict];
        rig.answer(ms(1), false);
        let violations = rig.effects().iter().filter(|effect| matches!(effect, Effect::Violation(_))).count();
        assert_eq!(violations, usize::from(is_reported), "{job_verdict:?}");
    }
}

#[test]
fn a_violation_names_the_time_of_the_ack() {
    let mut rig = running();
    rig.invalidate(ms(1), pages(4, 1));
    rig.core.replied(ms(3));
    rig.ask(ms(4), Waiter::Job(wait(1)), missing(4, 1, Access::Write));
    rig.sent(ms(4));
    rig.core.jobs_mut().job_verdicts =
        vec![job_verdict(Verdict::Gone, Confidence::Certain, Mode::Fence, true)];
    rig.answer(ms(5), false);
    let violation = rig.effects().into_iter().find_map(|effect| match effect {
        Effect::Violation(violation) => Some(violation),
        _ => None,
    });
    let violation = violation.unwrap();
    assert_eq!((violation.at, violation.invalidation.acked), (ms(5), Some(ms(3))));
}

#[test]
fn work_in_flight_is_counted() {
    let mut rig = running();
    rig.core.jobs_mut().touched = true;
    rig.invalidate(ms(1), pages(4, 1));
    assert_eq!(rig.core.stats.snapshot().invalidations_with_work_in_flight, 1);
}
