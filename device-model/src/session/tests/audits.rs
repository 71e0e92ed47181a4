//! Audits, as the session drives them.

use super::*;

#[test]
fn an_audit_asks_again_for_what_the_mirror_holds_and_ends() {
    let mut rig = running();
    rig.map(4, 1);
    rig.core.begin_audit(ms(10));
    assert_eq!(rig.done(), ["audit"]);
    rig.core.continue_audit(ms(10));
    assert_eq!(rig.sent(ms(10)), [miss(4, Access::Write)]);
    rig.grant(ms(11), pages(4, 1), Permissions::READ_WRITE);
    rig.effects();
    rig.core.continue_audit(ms(20));
    assert_eq!(rig.done(), ["audit ended, interrupted: false"]);
    // No audit is under way any more.
    rig.core.continue_audit(ms(30));
    assert!(rig.done().is_empty());
}

#[test]
fn an_audit_is_interrupted_by_a_stop_and_there_is_one_at_a_time() {
    let mut rig = running();
    rig.map(4, 1);
    rig.core.begin_audit(ms(10));
    rig.core.begin_audit(ms(10));
    assert_eq!(rig.done(), ["audit"]);
    rig.core.enable_ring(ms(11), CONTROL_QUEUE, false);
    assert!(rig.done().contains(&"audit ended, interrupted: true".to_owned()));
}

#[test]
fn what_the_guest_takes_away_is_no_finding_of_an_audit() {
    let mut rig = running();
    rig.map(4, 1);
    rig.core.begin_audit(ms(10));
    rig.core.continue_audit(ms(10));
    assert_eq!(rig.sent(ms(10)).len(), 1);
    rig.invalidate(ms(11), pages(4, 1));
    rig.core.replied(ms(11));
    rig.answer(ms(12), false);
    rig.effects();
    rig.core.continue_audit(ms(500));
    rig.core.continue_audit(ms(1000));
    let report = rig.effects().into_iter().find_map(|effect| match effect {
        Effect::AuditEnded(report) => Some(report),
        _ => None,
    });
    assert!(report.unwrap().findings.is_empty());
}
