//! Which rings run: start, stop, reset.

use super::*;

#[test]
fn the_device_runs_while_the_control_ring_is_started_and_enabled() {
    let mut rig = fresh();
    rig.core.set_features(VHOST_USER_PROTOCOL_FEATURES).unwrap();
    assert_eq!(rig.done(), ["features 0x40000000"]);
    rig.core.start_ring(ms(0), 1);
    rig.core.enable_ring(ms(0), 1, true);
    assert_eq!(rig.done(), ["ring 1 true false", "ring 1 true true", "serve 1"]);
    rig.core.start_ring(ms(0), CONTROL_QUEUE);
    assert_eq!((rig.done(), rig.core.is_running()), (vec!["ring 0 true false".to_owned()], false));
    rig.core.enable_ring(ms(0), CONTROL_QUEUE, true);
    assert_eq!(rig.done(), ["ring 0 true true", "Started", "serve 0", "serve 1", "serve 0"]);
    assert_eq!((rig.calls(), rig.core.is_running()), (vec!["resume"], true));
    rig.core.enable_ring(ms(0), CONTROL_QUEUE, false);
    assert_eq!(rig.done(), ["ring 0 true false", "Stopped"]);
    assert_eq!((rig.calls(), rig.core.is_running()), (vec!["pause"], false));
}

#[test]
fn without_the_message_that_enables_rings_a_started_ring_is_enabled() {
    let mut rig = fresh();
    rig.core.start_ring(ms(0), CONTROL_QUEUE);
    assert_eq!(rig.done()[..2], ["ring 0 true true", "Started"]);
}

#[test]
fn a_stop_keeps_jobs_and_a_reset_discards_them_and_stops_every_ring() {
    let mut rig = running();
    rig.core.start_ring(ms(0), 1);
    rig.core.enable_ring(ms(0), 1, true);
    rig.effects();
    rig.core.message(ms(1), Message::Unread(Unread::StopRing(Some(CONTROL_QUEUE))));
    assert_eq!(rig.done(), ["ring 0 false true", "Stopped", "MirrorEmptied", "HandOver"]);
    rig.core.base_given(CONTROL_QUEUE, 5);
    rig.core.handed_over(ms(1), None, true);
    assert_eq!(rig.done(), ["forget kick 0"]);
    assert_eq!(rig.calls(), ["pause", "forget suspects", "invalidation ended"]);

    rig.core.message(ms(2), Message::Unread(Unread::Reset));
    assert_eq!(rig.done(), ["ring 0 false true", "ring 1 false true", "MirrorEmptied", "HandOver"]);
    rig.core.reset_device(ms(2));
    let wanted = [
        "ring 0 false true",
        "ring 1 false true",
        "forget kick 0",
        "ring 0 false false",
        "forget kick 1",
        "ring 1 false false",
        &format!("reset {IOMMU:#x}"),
    ];
    assert_eq!(rig.done(), wanted);
    rig.core.handed_over(ms(2), None, true);
    assert_eq!(rig.calls(), ["forget suspects", "discard", "invalidation ended"]);
}

#[test]
fn a_reset_while_the_device_runs_stops_it_before_anything_is_drained() {
    let mut rig = running();
    rig.core.message(ms(2), Message::Unread(Unread::Reset));
    assert_eq!(
        rig.done(),
        ["ring 0 false true", "Stopped", "ring 1 false false", "MirrorEmptied", "HandOver"]
    );
    assert_eq!(rig.calls()[0], "pause");
}

#[test]
fn a_ring_that_goes_on_elsewhere_belongs_to_a_driver_that_has_reset_the_device() {
    let mut rig = running();
    rig.core.message(ms(1), Message::Unread(Unread::StopRing(Some(CONTROL_QUEUE))));
    rig.core.base_given(CONTROL_QUEUE, 5);
    rig.core.handed_over(ms(1), None, true);
    rig.effects();
    rig.calls();
    assert_eq!(rig.core.set_base(ms(2), 0, 5).unwrap(), 5);
    assert_eq!((rig.done(), rig.calls()), (vec![], vec![]));
    assert_eq!(rig.core.set_base(ms(2), 0, 0).unwrap(), 0);
    assert_eq!((rig.done(), rig.calls()), (vec![format!("reset {IOMMU:#x}")], vec!["discard"]));
    // It is recognised once.
    assert_eq!(rig.core.set_base(ms(2), 0, 9).unwrap(), 9);
    assert!(rig.calls().is_empty());
}

#[test]
fn a_ring_of_a_new_driver_that_runs_already_is_served_after_the_reset() {
    let mut rig = running();
    rig.core.message(ms(1), Message::Unread(Unread::StopRing(Some(1))));
    rig.core.base_given(1, 5);
    rig.core.handed_over(ms(1), None, true);
    rig.effects();
    rig.core.set_base(ms(2), 1, 0).unwrap();
    assert_eq!(rig.done(), [format!("reset {IOMMU:#x}"), "serve 0".to_owned()]);
}

#[test]
fn requests_that_make_no_sense_are_refused_and_change_nothing() {
    let mut rig = running();
    let refused = |result: Result<usize, Refusal>| result.unwrap_err().to_string();
    assert_eq!(refused(rig.core.ring(2)), "There is no ring 2: the device has 2");
    assert_eq!(refused(rig.core.ring(u32::MAX)), "There is no ring 4294967295: the device has 2");
    assert!(rig.core.stopped_ring(1).is_ok());
    assert!(matches!(rig.core.stopped_ring(0), Err(Refusal::RingStarted { index: 0 })));
    assert!(matches!(rig.core.set_base(ms(0), 0, 1), Err(Refusal::RingStarted { index: 0 })));
    assert!(matches!(rig.core.set_base(ms(0), 1, 1 << 16), Err(Refusal::RingIndex { index: 0x1_0000 })));
    assert!(matches!(rig.core.set_features(8), Err(Refusal::Features(8))));
    assert!(matches!(rig.core.set_features(IOMMU | 2), Err(Refusal::FeaturesInUse)));
    assert!(rig.core.set_features(IOMMU).is_ok());
    assert!(matches!(rig.core.set_protocol_features(1 << 20), Err(Refusal::ProtocolFeatures(0x10_0000))));
    assert!(rig.core.has_reply_ack() && rig.core.has_iommu());
    assert_eq!(rig.core.driver_features(), IOMMU);
}

#[test]
fn an_iommu_needs_acks_and_a_channel() {
    for (chosen, missing) in
        [(0, REPLY_ACK | BACKEND_REQ), (REPLY_ACK, BACKEND_REQ), (BACKEND_REQ, REPLY_ACK)]
    {
        let mut rig = fresh();
        rig.core.set_protocol_features(chosen).unwrap();
        match rig.core.set_features(IOMMU) {
            Err(Refusal::IotlbNeeds { missing: found }) => assert_eq!(found, missing),
            other => panic!("{other:?}"),
        }
        assert!(!rig.core.has_iommu() && rig.core.driver_features() == 0);
        assert_eq!(rig.core.has_reply_ack(), chosen == REPLY_ACK);
        // Bits that front-ends pass on unconditionally are not refused.
        assert!(rig.core.set_features(2).is_ok());
    }
}
