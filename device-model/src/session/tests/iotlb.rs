//! UPDATEs, MISSes and their waiters.

use super::*;
use crate::session::miss_port::RingWait;

const JOB: Waiter = Waiter::Job(JobWait::for_tests(JobId::new(1), 1));

#[test]
fn a_translation_is_cached_with_the_permission_that_its_miss_asked_for() {
    let mut rig = running();
    rig.ask(ms(0), JOB, missing(4, 1, Access::Read));
    assert_eq!(rig.sent(ms(0)), [miss(4, Access::Read)]);
    rig.update(ms(1), pages(4, 1), Permissions::READ_WRITE);
    assert_eq!((rig.done(), rig.can(4, Access::Read)), (vec!["reply 3 true".to_owned()], false));
    rig.answer(ms(1), true);
    let permissions = Permissions { read: true, write: false };
    assert_eq!(rig.done(), [format!("mapped 0x4000 {permissions:?}"), format!("{JOB:?} 0x4000 Mapped")]);
    assert!(rig.can(4, Access::Read) && !rig.can(4, Access::Write));
}

#[test]
fn an_update_that_is_invalidated_before_its_miss_is_granted_is_asked_for_again() {
    let mut rig = running();
    rig.ask(ms(0), JOB, missing(4, 1, Access::Read));
    rig.sent(ms(0));
    rig.update(ms(1), pages(4, 1), Permissions::READ_WRITE);
    rig.invalidate(ms(2), pages(4, 1));
    rig.core.replied(ms(2));
    rig.effects();
    rig.answer(ms(3), true);
    assert!(rig.done().is_empty() && !rig.can(4, Access::Read));
    assert_eq!(rig.sent(ms(3)), [miss(4, Access::Read)]);
    assert_eq!(rig.core.stats.snapshot().miss_retries, 1);
}

#[test]
fn an_update_for_which_no_miss_was_sent_is_acked_and_not_cached() {
    let mut rig = running();
    rig.update(ms(0), pages(4, 1), Permissions::READ_WRITE);
    assert_eq!((rig.done(), rig.can(4, Access::Read)), (vec!["reply 3 true".to_owned()], false));
    assert_eq!(rig.core.stats.snapshot().updates_unsolicited, 1);
}

#[test]
fn an_update_that_makes_no_sense_is_refused() {
    let mut rig = running();
    let (range, target) = (pages(4, 1), ByteRange::new(FrontendVa::new(0x4000), 0x1000).unwrap());
    let update = Update { range, target, host: None, claimed: Permissions::READ_WRITE };
    rig.core.message(ms(0), Message::Update { update, reply: Some(3) });
    assert_eq!(rig.done(), ["reply 3 false"]);
    let mut rig = fresh();
    rig.update(ms(0), pages(4, 1), Permissions::READ_WRITE);
    assert_eq!(rig.done(), ["reply 3 false"]);
}

#[test]
fn a_refused_miss_is_told_to_each_waiter_and_is_a_fault_of_a_job() {
    let mut rig = running();
    let ring = Waiter::RingInput(RingWait { queue: 0, start: 1 });
    let ahead = Waiter::Ahead(wait(2));
    for waiter in [JOB, ring, ahead] {
        rig.ask(ms(0), waiter, missing(4, 1, Access::Write));
    }
    assert_eq!(rig.sent(ms(0)).len(), 1);
    rig.core.jobs_mut().parked = Some(AtRest {
        context: Some(9),
        mode: job_stream::Mode::Fault,
        priority: job_stream::Priority::Normal,
        packet: Some(3),
        bytes: 0,
    });
    rig.answer(ms(1), false);
    let wanted = [
        format!("fault 1 {}", pages(4, 1)),
        format!("{JOB:?} 0x4000 Refused"),
        format!("{ring:?} 0x4000 Refused"),
    ];
    assert_eq!(rig.done(), wanted);
    assert_eq!(rig.core.jobs().asked, [JobId::new(1), JobId::new(2)]);
    assert_eq!(rig.core.stats.snapshot().miss_refused, 1);
}

#[test]
fn a_miss_that_is_not_answered_in_time_is_given_up_unless_the_front_end_stands_still() {
    let mut rig = running();
    rig.ask(ms(0), JOB, missing(4, 1, Access::Write));
    rig.sent(ms(0));
    assert_eq!(rig.core.next_deadline(), Some(MISS_TIMEOUT));
    assert!(rig.core.expire(ms(999), || unreachable!("Nothing is overdue")).is_empty());
    assert!(rig.core.expire(MISS_TIMEOUT, || true).is_empty());
    assert_eq!(rig.core.next_deadline(), Some(2 * MISS_TIMEOUT));
    // The front-end reads again, and has the whole timeout from then on.
    assert!(rig.core.expire(2 * MISS_TIMEOUT, || false).is_empty());
    let mut settled = rig.core.expire(3 * MISS_TIMEOUT, || false);
    assert_eq!(settled[0].resolution().outcome, Outcome::TimedOut);
    rig.core.apply(3 * MISS_TIMEOUT, settled.remove(0));
    assert_eq!(rig.done(), [format!("{JOB:?} 0x4000 TimedOut")]);
    assert_eq!(rig.core.stats.snapshot().miss_timeouts, 1);
}

#[test]
fn what_was_asked_for_before_a_stop_is_not_sent_after_it() {
    let mut rig = running();
    // One was sent, one waits in the session, and one in the port.
    rig.ask(ms(0), JOB, missing(4, 1, Access::Write));
    rig.sent(ms(0));
    rig.ask(ms(0), JOB, missing(5, 1, Access::Write));
    rig.port.request(JOB, vec![missing(6, 1, Access::Write)]);
    rig.core.message(ms(1), Message::Unread(Unread::StopRing(Some(CONTROL_QUEUE))));
    rig.core.handed_over(ms(1), None, true);
    rig.run();
    rig.take_requests(ms(3));
    assert!(rig.sent(ms(3)).is_empty());
    // The late answer to the sent one is ignored.
    rig.answer(ms(3), true);
    assert!(rig.done().is_empty() && rig.core.is_idle());
}

#[test]
fn what_is_asked_for_during_a_stop_is_not_sent_after_it() {
    let mut rig = running();
    rig.core.message(ms(1), Message::Unread(Unread::StopRing(Some(CONTROL_QUEUE))));
    rig.core.handed_over(ms(1), None, true);
    // A thread that has not seen the stop yet asks.
    rig.ask(ms(2), JOB, missing(7, 1, Access::Write));
    assert!(rig.sent(ms(2)).is_empty());
    rig.run();
    rig.take_requests(ms(3));
    assert!(rig.sent(ms(3)).is_empty() && rig.core.is_idle());
}

#[test]
fn without_a_channel_nothing_can_be_asked_for_and_that_is_no_refusal() {
    let mut rig = fresh();
    rig.core.set_protocol_features(REPLY_ACK | BACKEND_REQ).unwrap();
    rig.core.set_features(IOMMU).unwrap();
    rig.run();
    rig.ask(ms(0), JOB, missing(4, 2, Access::Write));
    assert_eq!(rig.done(), [format!("{JOB:?} 0x4000 NoChannel"), format!("{JOB:?} 0x5000 NoChannel")]);
    // A lost channel drops what was requested on it.
    rig.core.message(ms(1), Message::Channel { reply: Some(4) });
    assert_eq!(rig.done(), ["reply 4 true"]);
    rig.ask(ms(2), JOB, missing(4, 1, Access::Write));
    assert_eq!(rig.sent(ms(2)).len(), 1);
    for settled in rig.core.channel_lost() {
        rig.core.apply(ms(3), settled);
    }
    assert_eq!(rig.done(), [format!("{JOB:?} 0x4000 NoChannel")]);
    rig.ask(ms(4), JOB, missing(4, 1, Access::Write));
    assert_eq!(rig.done(), [format!("{JOB:?} 0x4000 NoChannel")]);
    let stats = rig.core.stats.snapshot();
    assert_eq!((stats.miss_refused, stats.miss_timeouts), (0, 0));
}

#[test]
fn a_replaced_channel_is_asked_again() {
    let mut rig = running();
    rig.ask(ms(0), JOB, missing(4, 1, Access::Write));
    rig.sent(ms(0));
    rig.core.message(ms(1), Message::Channel { reply: None });
    assert_eq!(rig.sent(ms(1)), [miss(4, Access::Write)]);
}

#[test]
fn an_answer_to_nothing_is_the_front_ends_error() {
    let mut rig = running();
    assert!(matches!(rig.core.channel_answered(ms(0), true), Err(Unasked)));
}

#[test]
fn without_an_iommu_the_memory_table_answers() {
    let mut rig = fresh();
    let range = pages(0, 0x10);
    rig.core
        .memory_is_here(vec![PhysicalRegion { range, host: HostRange::invented(FRAME, range.len() as u64) }]);
    assert!(!rig.can(4, Access::Write));
    rig.run();
    assert!(rig.can(4, Access::Write));
    rig.ask(ms(0), JOB, missing(0xf, 2, Access::Write));
    assert_eq!(rig.done(), [format!("{JOB:?} 0xf000 Mapped"), format!("{JOB:?} 0x10000 Refused")]);
    assert!(rig.sent(ms(0)).is_empty());
}

#[test]
fn without_an_iommu_memory_that_cannot_be_mapped_is_refused() {
    let mut rig = fresh();
    let host = HostRange::invented(FRAME + 1, 0x1000);
    rig.core.memory_is_here(vec![PhysicalRegion { range: pages(4, 1), host }]);
    rig.run();
    rig.ask(ms(0), JOB, missing(4, 1, Access::Write));
    assert_eq!(rig.done(), [format!("{JOB:?} 0x4000 Refused")]);
}

#[test]
fn a_session_is_idle_only_when_nothing_is_requested_due_or_left_to_carry_out() {
    let mut rig = running();
    assert!(rig.core.is_idle());
    rig.port.request(JOB, vec![missing(4, 1, Access::Write)]);
    assert!(!rig.core.is_idle(), "a request is in the port");
    rig.take_requests(ms(0));
    assert!(!rig.core.is_idle(), "it is in the session");
    rig.sent(ms(0));
    rig.effects();
    assert!(!rig.core.is_idle(), "its answer is due");
    rig.answer(ms(1), false);
    assert!(!rig.core.is_idle(), "there are effects");
    rig.effects();
    assert!(rig.core.is_idle());
    rig.core.message(ms(2), Message::Unread(Unread::Other));
    rig.effects();
    assert!(!rig.core.is_idle(), "a reply is due");
}

#[test]
fn without_an_iommu_requests_wait_for_the_end_of_a_drain_and_the_new_table_answers_them() {
    let mut rig = fresh();
    rig.run();
    let host = HostRange::invented(FRAME, 0x1000);
    rig.core.memory_is_here(vec![PhysicalRegion { range: pages(4, 1), host }]);
    rig.core.message(ms(1), Message::Unread(Unread::Remap));
    rig.effects();
    rig.port.request(JOB, vec![missing(5, 1, Access::Write)]);
    rig.take_requests(ms(1));
    assert!(rig.done().is_empty());
    // Nothing of the old table may be mapped, whatever the message does.
    rig.core.memory_is_here(vec![PhysicalRegion { range: pages(5, 1), host }]);
    rig.core.handed_over(ms(2), None, true);
    rig.take_requests(ms(2));
    assert_eq!(rig.done(), [format!("{JOB:?} 0x5000 Mapped")]);
    assert!(rig.can(5, Access::Write) && !rig.can(4, Access::Write));
}

#[test]
fn memory_that_is_added_while_the_device_runs_is_there_at_once_without_an_iommu() {
    let mut rig = fresh();
    rig.run();
    rig.core.message(ms(1), Message::Unread(Unread::Other));
    let host = HostRange::invented(FRAME, 0x1000);
    rig.core.memory_is_here(vec![PhysicalRegion { range: pages(4, 1), host }]);
    rig.core.handed_over(ms(1), None, true);
    assert!(rig.can(4, Access::Write));
}

#[test]
fn an_injected_refusal_looks_like_the_front_ends() {
    let mut rig = running();
    rig.core.refuse(ms(0), PortRequest { missing: missing(4, 2, Access::Write), waiter: JOB });
    assert_eq!(rig.done(), [format!("{JOB:?} 0x4000 Refused"), format!("{JOB:?} 0x5000 Refused")]);
    assert_eq!(MissAnswer::Mapped.for_job(miss(4, Access::Read)), Ok(()));
}

#[test]
fn after_a_drain_of_everything_memory_is_where_the_handler_says_or_nowhere() {
    let host = HostRange::invented(FRAME, 0x1000);
    let regions = vec![PhysicalRegion { range: pages(4, 1), host }];
    for is_told in [true, false] {
        let mut rig = fresh();
        rig.core.memory_is_here(regions.clone());
        rig.run();
        rig.core.message(ms(1), Message::Unread(Unread::Remap));
        rig.effects();
        if is_told {
            rig.core.memory_is_here(regions.clone());
        }
        rig.core.handed_over(ms(1), None, true);
        rig.ask(ms(1), JOB, missing(4, 1, Access::Write));
        let answer = if is_told { "Mapped" } else { "Refused" };
        assert_eq!(
            (rig.done(), rig.can(4, Access::Write)),
            (vec![format!("{JOB:?} 0x4000 {answer}")], is_told)
        );
    }
}

#[test]
fn what_a_job_has_given_up_is_not_asked_for() {
    let mut rig = running();
    rig.core.jobs_mut().stale = vec![wait(1)];
    rig.ask(ms(0), JOB, missing(4, 1, Access::Write));
    rig.ask(ms(0), Waiter::Ahead(wait(1)), missing(5, 1, Access::Write));
    rig.ask(ms(0), Waiter::Job(wait(2)), missing(6, 1, Access::Write));
    assert_eq!(rig.sent(ms(0)), [miss(6, Access::Write)]);
}

#[test]
fn each_waiter_is_told_of_its_own_page_when_one_large_update_answers_for_several() {
    let mut rig = running();
    // So many are pending that the last one is not sent.
    rig.ask(ms(0), JOB, missing(4, crate::mmu::miss::MISS_WINDOW as u64, Access::Read));
    rig.ask(ms(0), Waiter::Job(wait(2)), missing(0x400, 1, Access::Read));
    rig.sent(ms(0));
    rig.grant(ms(1), pages(4, 0x3fd), Permissions::READ_WRITE);
    let told = rig.done();
    assert!(told.contains(&format!("{JOB:?} 0x4000 Mapped")), "{told:?}");
    assert!(told.contains(&format!("{:?} 0x400000 Mapped", Waiter::Job(wait(2)))), "{told:?}");
}
