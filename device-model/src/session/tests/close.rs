//! The end of a session.

use super::*;
use crate::mmu::MemoryRevoked;

#[test]
fn a_session_ends_when_nothing_uses_guest_memory_any_more() {
    let mut rig = running();
    rig.map(4, 1);
    let pin = rig.pin(PinMode::RegistrationCache, 4, 1);
    rig.core.close(ms(10));
    assert!(pin.evicted());
    assert_eq!(rig.calls(), ["pause", "pause", "discard", "forget suspects"]);
    assert!(!rig.done().contains(&"Closed".to_owned()));
    drop(pin);
    rig.poll(ms(11));
    assert_eq!(rig.done(), ["Closed"]);
}

#[test]
fn a_session_whose_drain_is_under_way_ends_too() {
    let mut rig = running();
    rig.map(4, 1);
    let pin = rig.pin(PinMode::Fence, 4, 1);
    rig.invalidate(ms(5), pages(4, 1));
    rig.core.close(ms(6));
    drop(pin);
    rig.poll(ms(7));
    assert_eq!(rig.done().last().unwrap(), "Closed");
}

#[test]
fn an_engine_that_does_not_leave_memory_that_goes_away_ends_the_process() {
    let Rig { mut core, reader, .. } = running();
    let section = reader.enter();
    core.close(ms(0));
    let mut now = ms(0);
    let mut until = |core: &mut Session<u32, Noted>, wanted: &str| {
        for _ in 0..100 {
            if std::iter::from_fn(|| core.next_effect()).any(|effect| format!("{effect:?}") == wanted) {
                return now;
            }
            now = core.next_deadline().unwrap();
            core.poll(now, || false);
        }
        panic!("{wanted} did not come");
    };
    let revoked = until(&mut core, "Revoke");
    core.revoked(revoked, MemoryRevoked::all_regions_replaced());
    let aborted = until(&mut core, "Abort");
    assert!(aborted >= revoked + Duration::from_secs(1), "{revoked:?} {aborted:?}");
    drop(section);
}
