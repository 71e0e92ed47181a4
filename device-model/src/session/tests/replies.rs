//! The order of replies, and the drains that they wait for.

use super::*;
use crate::mmu::MemoryRevoked;
use crate::session::drain::STEP_END;
use crate::telemetry::record::Event;

#[test]
fn an_invalidate_of_an_idle_range_is_acked_at_once_and_nothing_is_read_before_the_ack_is_sent() {
    let mut rig = running();
    rig.map(4, 1);
    rig.invalidate(ms(5), pages(4, 1));
    assert_eq!(rig.done(), [format!("ack Some(7) {}", pages(4, 1))]);
    assert_eq!(rig.calls(), ["invalidation ended"]);
    assert!(!rig.core.may_read() && !rig.can(4, Access::Write));
    rig.core.replied(ms(6));
    assert!(rig.core.may_read() && rig.done().is_empty(), "no job was late");
    let stats = rig.core.stats.snapshot();
    assert_eq!((stats.invalidations, stats.frozen_ns), (1, 1_000_000));
}

#[test]
fn an_invalidate_that_nobody_waits_for_is_drained_all_the_same() {
    let mut rig = running();
    rig.core.message(ms(5), Message::Invalidate { range: pages(4, 1), reply: None });
    assert_eq!(rig.done(), [format!("ack None {}", pages(4, 1))]);
    rig.core.replied(ms(5));
    assert!(rig.core.may_read());
}

#[test]
fn an_ack_waits_for_a_section_that_was_open_and_whoever_leaves_wakes_the_session() {
    let Rig { mut core, reader, wakes, .. } = running();
    let section = reader.enter();
    core.message(ms(5), Message::Invalidate { range: pages(4, 1), reply: Some(7) });
    let acks = |core: &mut Session<u32, Noted>| {
        std::iter::from_fn(|| core.next_effect())
            .filter(|effect| matches!(effect, Effect::Ack { .. }))
            .count()
    };
    assert_eq!((acks(&mut core), core.may_read(), core.in_flight().unwrap().sections), (0, false, 1));
    core.poll(ms(6), || false);
    assert_eq!(acks(&mut core), 0);
    let before = wakes.0.load(Ordering::SeqCst);
    drop(section);
    assert_eq!(wakes.0.load(Ordering::SeqCst), before + 1);
    core.poll(ms(7), || false);
    assert_eq!((acks(&mut core), core.in_flight()), (1, None));
}

#[test]
fn the_latency_of_an_ack_is_counted_from_the_message_and_a_drain_that_was_late_leaves_a_trace_after_its_ack()
{
    let mut rig = running();
    rig.map(4, 1);
    let pin = rig.pin(PinMode::Fence, 4, 1);
    rig.invalidate(ms(5), pages(4, 1));
    assert_eq!(rig.core.next_deadline(), Some(ms(105)));
    assert_eq!(rig.done(), ["Parked", "EnginesToldToLeave"]);
    rig.poll(ms(104));
    assert!(!pin.evicted() && rig.done().is_empty());
    rig.poll(ms(105));
    assert!(pin.evicted());
    assert_eq!(rig.done(), ["EnginesToldToLeave"]);
    drop(pin);
    rig.poll(ms(110));
    assert_eq!(rig.done(), [format!("ack Some(7) {}", pages(4, 1))]);
    rig.core.replied(ms(111));
    assert_eq!(rig.done(), ["incident: A job held the front-end up until the drain timeout"]);
    assert_eq!(rig.core.stats.snapshot().frozen_ns, 106_000_000);
}

#[test]
fn jobs_that_are_preempted_at_once_by_a_stop_are_no_incident() {
    let mut rig = running();
    rig.map(4, 1);
    let pin = rig.pin(PinMode::Fence, 4, 1);
    rig.core.message(ms(5), Message::Unread(Unread::StopRing(Some(CONTROL_QUEUE))));
    assert!(pin.evicted());
    drop(pin);
    rig.poll(ms(6));
    assert_eq!(rig.done().last().unwrap(), "HandOver");
    rig.core.handed_over(ms(6), None, true);
    assert!(rig.done().is_empty());
}

#[test]
fn an_engine_that_is_not_scheduled_is_waited_for_and_one_that_hangs_has_its_memory_revoked() {
    let Rig { mut core, reader, .. } = running();
    let section = reader.enter();
    core.message(ms(0), Message::Invalidate { range: pages(4, 1), reply: Some(7) });
    let mut now = DRAIN_TIMEOUT;
    let starved = Cell::new(0);
    let revokes = |core: &mut Session<u32, Noted>| {
        std::iter::from_fn(|| core.next_effect()).any(|effect| matches!(effect, Effect::Revoke))
    };
    core.poll(now, || unreachable!("Nobody is stuck yet"));
    while starved.get() < 3 {
        now = core.next_deadline().unwrap();
        core.poll(now, || {
            starved.set(starved.get() + 1);
            true
        });
        assert!(!revokes(&mut core));
    }
    // Three grace periods passed; the next one is the last.
    assert!(now >= DRAIN_TIMEOUT + 3 * STEP_END);
    let last = now + STEP_END;
    while now < last {
        assert!(!revokes(&mut core));
        now = core.next_deadline().unwrap();
        core.poll(now, || false);
    }
    assert!(revokes(&mut core) && now <= last + ms(1));
    core.revoked(now, MemoryRevoked::all_regions_replaced());
    let told: Vec<_> = std::iter::from_fn(|| core.next_effect()).map(|effect| word(&effect)).collect();
    assert_eq!(told, [format!("ack Some(7) {}", pages(4, 1)), "end: revoked".to_owned()]);
    drop(section);
}

#[test]
fn a_long_time_without_a_poll_counts_as_one_poll_of_the_grace_period() {
    let Rig { mut core, reader, .. } = running();
    let section = reader.enter();
    core.message(ms(0), Message::Invalidate { range: pages(4, 1), reply: Some(7) });
    core.poll(ms(100), || false);
    // The process was stopped for an hour.
    core.poll(Duration::from_secs(3600), || unreachable!("The engines had no time to leave"));
    assert!(core.in_flight().is_some());
    drop(section);
}

#[test]
fn a_message_that_needs_a_drain_is_handed_over_only_after_it() {
    for (unread, is_patient) in
        [(Unread::Reset, false), (Unread::StopRing(None), false), (Unread::Remap, true)]
    {
        let mut rig = running();
        rig.map(4, 1);
        let pin = rig.pin(PinMode::RegistrationCache, 4, 1);
        rig.core.message(ms(5), Message::Unread(unread));
        // Jobs of all modes leave memory that goes away; they may end first only where they go on afterwards.
        assert_eq!((pin.evicted(), rig.core.may_read()), (!is_patient, false), "{unread:?}");
        rig.poll(ms(6));
        assert!(!rig.done().contains(&"HandOver".to_owned()), "{unread:?}");
        drop(pin);
        rig.poll(ms(7));
        assert_eq!(rig.done(), ["HandOver"], "{unread:?}");
        assert!(!rig.core.may_read());
        rig.core.handed_over(ms(8), None, true);
        assert!(rig.core.may_read() && rig.calls().contains(&"invalidation ended"), "{unread:?}");
        assert!(rig.effects().iter().any(|effect| {
            matches!(effect, Effect::Record { event: Event::Acked { number: 0, .. }, .. })
        }));
    }
}

#[test]
fn a_message_that_needs_no_drain_is_handed_over_at_once() {
    let Rig { mut core, reader, .. } = running();
    let section_is_open = reader.enter();
    core.message(ms(5), Message::Unread(Unread::Other));
    assert!(matches!(core.next_effect(), Some(Effect::HandOver)) && !core.may_read());
    core.handed_over(ms(5), None, false);
    assert!(core.may_read() && core.next_effect().is_none());
    drop(section_is_open);
}

#[test]
fn a_refusal_that_cannot_be_told_ends_the_session() {
    for (told, wanted) in [(true, vec![]), (false, vec!["end: Features 0x8 were not offered".to_owned()])] {
        let mut rig = running();
        rig.core.message(ms(5), Message::Unread(Unread::Other));
        rig.effects();
        rig.core.handed_over(ms(5), Some(Refusal::Features(8)), told);
        assert_eq!(rig.done(), wanted);
    }
    let bad = |reply| Message::BadIotlb { error: "nonsense".into(), reply };
    let mut rig = running();
    rig.core.message(ms(5), bad(Some(9)));
    assert_eq!(rig.done(), ["reply 9 false"]);
    rig.core.message(ms(5), bad(None));
    assert_eq!(rig.done(), ["end: nonsense"]);
    assert_eq!(rig.core.stats.snapshot().updates_rejected, 2);
}

#[test]
fn the_miss_clock_stands_still_while_a_reply_is_due() {
    let messages: [fn() -> Message<u32>; 2] =
        [|| Message::Invalidate { range: pages(0x40, 1), reply: Some(7) }, || Message::Unread(Unread::Remap)];
    for message in messages {
        let mut rig = running();
        rig.map(0x40, 1);
        let pin = rig.pin(PinMode::Fence, 0x40, 1);
        rig.ask(ms(0), Waiter::Job(wait(1)), missing(4, 1, Access::Read));
        rig.sent(ms(0));
        rig.core.message(ms(10), message());
        // A minute passes with the drain under way: the front-end serves no MISS before the reply.
        assert!(rig.core.expire(Duration::from_secs(60), || false).is_empty());
        drop(pin);
        rig.poll(Duration::from_secs(60));
        // Nor before the reply is sent.
        assert!(rig.core.expire(Duration::from_secs(61), || false).is_empty());
        rig.core.replied(Duration::from_secs(61));
        rig.core.handed_over(Duration::from_secs(61), None, true);
        let left = MISS_TIMEOUT - ms(10);
        assert!(rig.core.expire(Duration::from_secs(61) + left - ms(1), || false).is_empty());
        assert_eq!(rig.core.expire(Duration::from_secs(61) + left, || false).len(), 1);
    }
}
