//! Each rule of DESIGN 4.5, one by one.

use super::*;

const SPACE: DomainId = DomainId::DEVICE;
const SECOND: Duration = Duration::from_secs(1);

fn at(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn table() -> MissTable<u32> {
    MissTable::new(SECOND)
}

fn range(start: u64, len: u64) -> ByteRange<Iova> {
    ByteRange::new(Iova::new(start), len).unwrap()
}

fn host(len: u64) -> HostRange {
    HostRange::invented(0x7000_0000, len)
}

fn miss(iova: u64, access: Access) -> MissRequest {
    MissRequest { space: SPACE, access, iova: Iova::new(iova) }
}

/// A table with one miss, for reading 0x1000: it was sent, and 7 waits for it.
fn one_sent() -> MissTable<u32> {
    let mut table = table();
    assert_eq!(table.request(at(0), SPACE, Iova::new(0x1234), Access::Read, 7), Requested::Queued);
    assert_eq!(table.next_to_send(at(0)), Some(miss(0x1000, Access::Read)));
    table
}

fn resolved(request: MissRequest, waiters: &[u32], outcome: Outcome) -> Answer<u32> {
    let waiters = waiters.iter().map(|waiter| (request, *waiter)).collect();
    Answer::Resolved(Resolution { request, waiters, outcome })
}

#[test]
fn a_page_is_asked_for_once_for_all_its_waiters_and_once_for_each_access() {
    let mut table = one_sent();
    assert_eq!(table.request(at(1), SPACE, Iova::new(0x1fff), Access::Read, 8), Requested::Joined);
    assert_eq!(table.request(at(1), SPACE, Iova::new(0x1000), Access::Read, 7), Requested::Joined);
    assert_eq!(table.request(at(1), SPACE, Iova::new(0x1000), Access::Write, 7), Requested::Queued);
    assert_eq!(table.next_to_send(at(0)), Some(miss(0x1000, Access::Write)));
    assert_eq!(table.next_to_send(at(0)), None);
    assert_eq!(table.on_reply(at(2), false), resolved(miss(0x1000, Access::Read), &[7, 8], Outcome::Refused));
    assert_eq!(table.on_reply(at(2), false), resolved(miss(0x1000, Access::Write), &[7], Outcome::Refused));
    assert!(table.is_idle());
}

#[test]
fn an_update_is_cached_only_after_its_reply_and_with_the_permission_that_was_asked_for() {
    let mut table = one_sent();
    let verdict = table.on_update(range(0x1000, 0x1000), host(0x1000), Permissions::READ_WRITE);
    assert_eq!(verdict, UpdateVerdict::Staged);
    let mapped =
        Outcome::Mapped { range: range(0x1000, 0x1000), host: host(0x1000), permissions: Permissions::READ };
    assert_eq!(table.on_reply(at(1), true), resolved(miss(0x1000, Access::Read), &[7], mapped));
}

#[test]
fn a_refused_miss_is_refused_whatever_was_staged() {
    let mut table = one_sent();
    let _ = table.on_update(range(0x1000, 0x1000), host(0x1000), Permissions::READ_WRITE);
    assert_eq!(table.on_reply(at(1), false), resolved(miss(0x1000, Access::Read), &[7], Outcome::Refused));
}

#[test]
fn an_update_that_does_not_cover_the_page_gets_one_more_try_and_then_a_fault() {
    let mut table = one_sent();
    for last_try in [false, true] {
        // Half of the page: it overlaps, but has no whole page.
        let verdict = table.on_update(range(0x800, 0x1000), host(0x1000), Permissions::READ);
        assert_eq!(verdict, UpdateVerdict::Staged);
        let answer = table.on_reply(at(1), true);
        if last_try {
            assert_eq!(answer, resolved(miss(0x1000, Access::Read), &[7], Outcome::NotCovered));
        } else {
            assert_eq!(answer, Answer::AskedAgain);
            assert_eq!(table.next_to_send(at(0)), Some(miss(0x1000, Access::Read)));
        }
    }
    assert!(table.is_idle());
}

#[test]
fn success_without_an_update_or_with_one_that_claims_less_covers_nothing() {
    let mut table = one_sent();
    assert_eq!(table.on_reply(at(1), true), Answer::AskedAgain);
    assert_eq!(table.next_to_send(at(0)), Some(miss(0x1000, Access::Read)));
    let _ = table.on_update(range(0x1000, 0x1000), host(0x1000), Permissions::WRITE);
    assert_eq!(table.on_reply(at(2), true), resolved(miss(0x1000, Access::Read), &[7], Outcome::NotCovered));
}

#[test]
fn an_update_elsewhere_or_with_nothing_asked_is_unsolicited() {
    let mut table = table();
    let update = |table: &mut MissTable<u32>, start| {
        table.on_update(range(start, 0x1000), host(0x1000), Permissions::READ_WRITE)
    };
    assert_eq!(update(&mut table, 0x1000), UpdateVerdict::Unsolicited);
    let mut table = one_sent();
    assert_eq!(update(&mut table, 0x2000), UpdateVerdict::Unsolicited);
    assert_eq!(table.on_reply(at(1), true), Answer::AskedAgain);
}

#[test]
fn an_update_belongs_to_the_oldest_miss() {
    let mut table = one_sent();
    let _ = table.request(at(0), SPACE, Iova::new(0x2000), Access::Read, 8);
    assert_eq!(table.next_to_send(at(0)), Some(miss(0x2000, Access::Read)));
    let second = range(0x2000, 0x1000);
    assert_eq!(table.on_update(second, host(0x1000), Permissions::READ), UpdateVerdict::Unsolicited);
    assert_eq!(table.on_reply(at(1), false), resolved(miss(0x1000, Access::Read), &[7], Outcome::Refused));
    assert_eq!(table.on_update(second, host(0x1000), Permissions::READ), UpdateVerdict::Staged);
}

#[test]
fn an_invalidation_discards_what_is_staged_and_the_miss_is_asked_again() {
    let mut table = one_sent();
    for _ in 0..3 {
        let _ = table.on_update(range(0x1000, 0x1000), host(0x1000), Permissions::READ);
        table.invalidate(SPACE, ByteRange::everything());
        assert_eq!(table.on_reply(at(1), true), Answer::AskedAgain);
        assert_eq!(table.next_to_send(at(0)), Some(miss(0x1000, Access::Read)));
    }
    let _ = table.on_update(range(0x1000, 0x1000), host(0x1000), Permissions::READ);
    table.invalidate(SPACE, range(0x2000, 0x1000));
    assert!(
        matches!(table.on_reply(at(1), true), Answer::Resolved(_)),
        "an invalidation elsewhere discards nothing"
    );
}

#[test]
fn a_large_update_settles_the_misses_in_it_that_are_not_sent() {
    let mut table = one_sent();
    for (iova, access, waiter) in
        [(0x2000, Access::Read, 8), (0x3000, Access::Write, 9), (0x9000, Access::Read, 10)]
    {
        let _ = table.request(at(0), SPACE, Iova::new(iova), access, waiter);
    }
    let _ = table.on_update(range(0, 0x4000), host(0x4000), Permissions::READ_WRITE);
    let mapped =
        Outcome::Mapped { range: range(0, 0x4000), host: host(0x4000), permissions: Permissions::READ };
    let request = miss(0x1000, Access::Read);
    let waiters = vec![(request, 7), (miss(0x2000, Access::Read), 8)];
    let resolution = Resolution { request, waiters, outcome: mapped };
    assert_eq!(table.on_reply(at(1), true), Answer::Resolved(resolution));
    assert_eq!(table.next_to_send(at(0)), Some(miss(0x3000, Access::Write)));
    assert_eq!(table.next_to_send(at(0)), Some(miss(0x9000, Access::Read)));
    assert_eq!(table.next_to_send(at(0)), None);
}

#[test]
fn an_unanswered_miss_times_out_and_its_late_answer_is_still_good() {
    let mut table = one_sent();
    assert_eq!(table.next_deadline(), Some(SECOND));
    assert_eq!(table.expire(at(999)), []);
    let request = miss(0x1000, Access::Read);
    let timed_out = Resolution { request, waiters: vec![(request, 7)], outcome: Outcome::TimedOut };
    assert_eq!(table.expire(at(1000)), [timed_out]);
    assert_eq!((table.next_deadline(), table.outstanding()), (None, 1));
    let _ = table.on_update(range(0x1000, 0x1000), host(0x1000), Permissions::READ);
    assert!(matches!(
        table.on_reply(at(1500), true),
        Answer::Resolved(Resolution { waiters, outcome: Outcome::Mapped { .. }, .. }) if waiters.is_empty()
    ));
}

#[test]
fn a_miss_that_was_given_up_can_be_waited_for_again_but_is_not_sent_twice() {
    let mut table = one_sent();
    assert_eq!(table.expire(at(1000)).len(), 1);
    assert_eq!(table.request(at(1100), SPACE, Iova::new(0x1000), Access::Read, 9), Requested::Joined);
    assert_eq!((table.next_to_send(at(0)), table.next_deadline()), (None, Some(at(2100))));
    assert_eq!(table.on_reply(at(1200), false), resolved(miss(0x1000, Access::Read), &[9], Outcome::Refused));
}

#[test]
fn a_miss_that_was_never_sent_times_out_and_is_not_sent_any_more() {
    let mut table = table();
    let _ = table.request(at(0), SPACE, Iova::new(0x1000), Access::Read, 7);
    assert_eq!(table.expire(at(1000)).len(), 1);
    assert_eq!(table.next_to_send(at(0)), None);
    assert!(table.is_idle());
}

#[test]
fn a_miss_behind_others_is_not_late_while_these_are_answered() {
    let mut table = one_sent();
    let _ = table.request(at(0), SPACE, Iova::new(0x2000), Access::Read, 8);
    let _ = table.next_to_send(at(0));
    let _ = table.on_reply(at(900), false);
    assert_eq!(table.next_deadline(), Some(at(1900)));
    assert_eq!(table.expire(at(1899)), []);
    assert_eq!(table.expire(at(1900)).len(), 1);
}

#[test]
fn a_front_end_that_stands_still_is_not_late_but_not_for_ever() {
    let mut table = one_sent();
    assert!(!table.is_due(at(999)) && table.is_due(at(1000)));
    for seconds in 1..=60 {
        assert!(table.put_off(at(1000 * seconds)), "{seconds} s");
        assert_eq!(table.next_deadline(), Some(at(1000 * (seconds + 1))));
        assert_eq!(table.expire(at(1000 * seconds + 999)), []);
    }
    assert!(!table.put_off(at(61_000)));
    assert_eq!(table.expire(at(61_000)).len(), 1);
}

#[test]
fn a_front_end_that_reads_again_has_the_whole_timeout_once() {
    let mut table = one_sent();
    assert!(!table.reads_again(at(1000)), "it never stood still");
    assert!(table.put_off(at(1000)));
    assert!(table.reads_again(at(2000)));
    assert_eq!(table.next_deadline(), Some(at(3000)));
    assert!(!table.reads_again(at(3000)));
    assert_eq!(table.expire(at(3000)).len(), 1);
}

#[test]
fn a_front_end_that_has_answered_may_stand_still_as_long_again() {
    let mut table = one_sent();
    assert!(table.put_off(at(1000)));
    let _ = table.on_reply(at(50_000), false);
    let _ = table.request(at(100_000), SPACE, Iova::new(0x2000), Access::Read, 8);
    let _ = table.next_to_send(at(0));
    assert!(table.put_off(at(101_000)));
    assert_eq!(table.next_deadline(), Some(at(102_000)));
}

#[test]
fn the_timeout_stands_still_while_we_owe_a_reply() {
    let mut table = one_sent();
    table.pause(at(400));
    table.pause(at(500));
    assert_eq!(table.next_deadline(), None);
    assert_eq!(table.expire(at(5000)), []);
    table.resume(at(10_400));
    assert_eq!(table.next_deadline(), Some(at(11_000)));
    assert_eq!(table.expire(at(10_999)), []);
    assert_eq!(table.expire(at(11_000)).len(), 1);
}

#[test]
fn what_was_due_before_a_clear_is_swallowed_in_order() {
    let mut table = one_sent();
    table.clear();
    assert_eq!(table.request(at(1), SPACE, Iova::new(0x1000), Access::Read, 8), Requested::Queued);
    assert_eq!(table.next_to_send(at(0)), Some(miss(0x1000, Access::Read)));
    let page = range(0x1000, 0x1000);
    assert_eq!(table.on_update(page, host(0x1000), Permissions::READ), UpdateVerdict::Stale);
    assert_eq!(table.on_reply(at(2), true), Answer::Stale);
    assert_eq!(table.on_reply(at(3), false), resolved(miss(0x1000, Access::Read), &[8], Outcome::Refused));
    assert_eq!(table.on_reply(at(4), true), Answer::Unexpected);
}

#[test]
fn a_replaced_channel_asks_again_in_order() {
    let mut table = one_sent();
    let _ = table.request(at(0), SPACE, Iova::new(0x2000), Access::Read, 8);
    let _ = table.request(at(0), SPACE, Iova::new(0x3000), Access::Read, 9);
    assert_eq!(table.next_to_send(at(0)), Some(miss(0x2000, Access::Read)));
    table.channel_replaced();
    for iova in [0x1000, 0x2000, 0x3000] {
        assert_eq!(table.next_to_send(at(0)), Some(miss(iova, Access::Read)));
    }
    assert_eq!(table.outstanding(), 3);
}

#[test]
fn the_window_and_the_table_are_bounded_and_what_does_not_fit_waits_in_order() {
    let mut table = table();
    let pages = MISS_LIMIT as u64 + 2;
    let missing = |first: u64, count: u64| Missing {
        space: SPACE,
        range: range(first << 12, count << 12),
        access: Access::Read,
    };
    table.ask(at(0), missing(0, pages), 1);
    table.ask(at(0), missing(pages, 1), 2);
    assert_eq!(table.pending().count(), MISS_LIMIT);
    let mut sent = Vec::new();
    for _ in 0..=pages {
        sent.extend(std::iter::from_fn(|| table.next_to_send(at(0))));
        assert!(table.outstanding() <= MISS_WINDOW && table.pending().count() <= MISS_LIMIT);
        let _ = table.on_reply(at(1), false);
    }
    let wanted: Vec<_> = (0..=pages).map(|page| miss(page << 12, Access::Read)).collect();
    assert_eq!(sent, wanted);
    assert!(table.is_idle());
}

#[test]
fn without_a_channel_everything_that_is_asked_for_ends_and_nothing_is_due() {
    let mut table = one_sent();
    let many = Missing {
        space: SPACE,
        range: range(0x10_0000, (MISS_LIMIT as u64 + 1) << 12),
        access: Access::Read,
    };
    table.ask(at(0), many, 8);
    let lost = table.channel_lost();
    assert_eq!(lost.len(), MISS_LIMIT + 2);
    assert!(lost.iter().all(|lost| lost.outcome == Outcome::NoChannel));
    assert_eq!(lost.iter().filter(|lost| lost.waiters == [(lost.request, 8)]).count(), MISS_LIMIT + 1);
    assert_eq!((table.is_idle(), table.next_deadline()), (true, None));
}

#[test]
fn deadlines_of_settled_misses_do_not_pile_up() {
    let mut table = table();
    for _ in 0..100 {
        let _ = table.request(at(0), SPACE, Iova::new(0x1000), Access::Read, 1);
        let _ = table.next_to_send(at(0));
        let _ = table.on_reply(at(0), false);
    }
    assert_eq!(table.deadlines.len(), 0);
}
