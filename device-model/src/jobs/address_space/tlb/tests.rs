use job_stream::address_space::pte;
use proptest::prelude::*;

use super::*;

fn tlb(policy: TlbPolicy, limit: u64) -> (TlbConfig, Arc<Tlb>) {
    let config = TlbConfig::new(policy, limit);
    (config.clone(), Arc::new(Tlb::new(config)))
}

fn page(number: u64) -> Gva {
    Gva::new(number << PAGE_SHIFT)
}

fn pages(first: u64, last: u64) -> ByteRange<Gva> {
    ByteRange::inclusive(page(first), page(last)).unwrap().page_aligned()
}

/// An entry that differs from others by its number.
fn entry(number: u64) -> TlbEntry {
    let leaf = Leaf { level: 0, pte: number << PAGE_SHIFT | pte::VALID | pte::READ };
    let (filled, checked) = (Duration::ZERO, Duration::ZERO);
    TlbEntry { leaf, host: None, filled, flushes: 0, checked, outdated: None }
}

fn start(tlb: &Tlb, gva: Gva) -> WalkStart {
    match tlb.lookup(gva) {
        Lookup::Miss(start) => start,
        Lookup::Hit(entry) => panic!("{gva} has {entry:?}"),
    }
}

fn fill(tlb: &Tlb, number: u64) {
    tlb.fill(start(tlb, page(number)), page(number), entry(number), std::iter::empty());
}

fn hits(tlb: &Tlb, number: u64) -> bool {
    matches!(tlb.lookup(page(number)), Lookup::Hit(_))
}

/// Tables of levels 2 to 0 on the way to a page.
const ON_THE_WAY: [(u32, Iova); 3] = [(2, Iova::new(0x2000)), (1, Iova::new(0x1000)), (0, Iova::new(0x3000))];

#[test]
fn a_flush_waits_for_the_steps_from_before_and_for_no_other() {
    let (_, tlb) = tlb(TlbPolicy::Sticky, 8);
    let before = [tlb.begin_step(), tlb.begin_step()];
    let flush = Tlb::flush(&tlb, pages(0, 0), Flushed::All);
    let after = tlb.begin_step();
    for step in before {
        assert!(!flush.is_over());
        assert!(tlb.end_step(step), "a step from before the flush tells that it may be over");
    }
    assert!(flush.is_over());
    assert!(!tlb.end_step(after));
}

#[test]
fn what_a_walk_from_before_a_flush_has_found_is_not_kept() {
    let (config, tlb) = tlb(TlbPolicy::Sticky, 8);
    let old = start(&tlb, page(1));
    let _ = Tlb::flush(&tlb, pages(7, 7), Flushed::Leaves);
    tlb.fill(old, page(1), entry(1), ON_THE_WAY.into_iter());
    assert!(!hits(&tlb, 1) && start(&tlb, page(1)).table.is_none());
    assert_eq!(config.used(), 0);
    fill(&tlb, 1);
    assert!(hits(&tlb, 1));
}

#[test]
fn tables_are_kept_over_a_flush_of_leaves_and_forgotten_by_one_of_all_that_covers_them() {
    let (_, tlb) = tlb(TlbPolicy::Sticky, 8);
    // The pages of one table of level 0, and one beside it.
    let (inside, beside) = (page(5), page(512));
    tlb.fill(start(&tlb, inside), inside, entry(5), ON_THE_WAY.into_iter());
    assert_eq!(start(&tlb, page(6)).table, Some((0, Iova::new(0x3000))));
    assert_eq!(start(&tlb, beside).table, Some((1, Iova::new(0x1000))));
    let _ = Tlb::flush(&tlb, pages(5, 5), Flushed::Leaves);
    assert_eq!(start(&tlb, inside).table, Some((0, Iova::new(0x3000))));
    // That changes tables of level 1 and 2, which lead to all that is beside it, too.
    let _ = Tlb::flush(&tlb, pages(512, 512), Flushed::All);
    assert_eq!(start(&tlb, beside).table, None);
    assert_eq!(start(&tlb, inside).table, Some((0, Iova::new(0x3000))));
    let _ = Tlb::flush(&tlb, pages(511, 511), Flushed::All);
    assert_eq!(start(&tlb, inside).table, None);
}

#[test]
fn only_the_entry_that_was_looked_up_is_changed() {
    let (_, tlb) = tlb(TlbPolicy::Sticky, 8);
    fill(&tlb, 1);
    let Lookup::Hit(old) = tlb.lookup(page(1)) else { panic!("a hit") };
    let _ = Tlb::flush(&tlb, pages(0, 9), Flushed::Leaves);
    fill(&tlb, 1);
    tlb.change(page(1), &old, |entry| entry.outdated = Some(Duration::ZERO));
    let Lookup::Hit(new) = tlb.lookup(page(1)) else { panic!("a hit") };
    assert_eq!(new.outdated, None, "it is another entry by now");
    tlb.change(page(1), &new, |entry| entry.outdated = Some(Duration::ZERO));
    assert!(matches!(tlb.lookup(page(1)), Lookup::Hit(entry) if entry.outdated.is_some()));
}

#[test]
fn an_entry_knows_whether_it_was_read_again_after_a_flush() {
    let (_, tlb) = tlb(TlbPolicy::Sticky, 8);
    fill(&tlb, 1);
    let found = |number| match tlb.lookup(page(number)) {
        Lookup::Hit(entry) => entry,
        Lookup::Miss(_) => panic!("a hit"),
    };
    assert!(!tlb.was_flushed_before(page(1), &found(1)));
    let _ = Tlb::flush(&tlb, pages(1, 1), Flushed::Leaves);
    fill(&tlb, 1);
    fill(&tlb, 2);
    assert!(tlb.was_flushed_before(page(1), &found(1)));
    assert!(!tlb.was_flushed_before(page(2), &found(2)), "that flush was of another page");
}

#[test]
fn all_tlbs_together_keep_the_limit_and_give_back_what_they_had() {
    let config = TlbConfig::new(TlbPolicy::Sticky, 4);
    let tlbs = [(); 2].map(|()| Arc::new(Tlb::new(config.clone())));
    for number in 0..10 {
        fill(&tlbs[0], number);
        assert!(hits(&tlbs[0], number), "the newest entry is there");
    }
    assert_eq!((tlbs[0].len(), config.used()), (4, 4));
    fill(&tlbs[1], 1);
    assert!(!hits(&tlbs[1], 1), "one TLB takes nothing from another");
    let [first, second] = tlbs;
    drop(first);
    assert_eq!(config.used(), 0);
    fill(&second, 1);
    assert_eq!((hits(&second, 1), config.used()), (true, 1));
}

#[test]
fn a_policy_decides_what_is_kept() {
    let (_, thrash) = tlb(TlbPolicy::Thrash, 64);
    fill(&thrash, 1);
    assert!(!hits(&thrash, 1));
    let kept = |seed| {
        let (_, random) = tlb(TlbPolicy::Random { seed }, 64);
        (0..32).for_each(|number| fill(&random, number));
        (0..32).filter(|number| hits(&random, *number)).collect::<Vec<_>>()
    };
    assert!((8..32).contains(&kept(1).len()), "{:?}", kept(1));
    assert_eq!(kept(1), kept(1), "the same seed drops the same entries");
    assert_ne!(kept(1), kept(2));
}

/// What happens to a TLB.
#[derive(Clone, Copy, Debug)]
enum Op {
    Fill(u64),
    Forget(u64),
    Flush(u64, u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (0_u64..40).prop_map(Op::Fill),
        1 => (0_u64..40).prop_map(Op::Forget),
        1 => (0_u64..40, 0_u64..40).prop_map(|(a, b)| Op::Flush(a.min(b), a.max(b))),
    ]
}

proptest! {
    #[test]
    fn a_tlb_with_room_has_what_a_list_of_pages_has(ops in prop::collection::vec(op(), 0..200)) {
        let (config, tlb) = tlb(TlbPolicy::Sticky, 64);
        let mut twin = Vec::new();
        for op in ops {
            match op {
                Op::Fill(number) if !twin.contains(&number) => {
                    fill(&tlb, number);
                    twin.push(number);
                }
                Op::Fill(_) => {}
                Op::Forget(number) => {
                    tlb.forget(page(number));
                    twin.retain(|kept| *kept != number);
                }
                Op::Flush(first, last) => {
                    prop_assert!(Tlb::flush(&tlb, pages(first, last), Flushed::Leaves).is_over());
                    twin.retain(|kept| !(first..=last).contains(kept));
                }
            }
            for number in 0..40 {
                let found = match tlb.lookup(page(number)) {
                    Lookup::Hit(found) => Some(found.leaf),
                    Lookup::Miss(_) => None,
                };
                prop_assert_eq!(found, twin.contains(&number).then(|| entry(number).leaf));
            }
            prop_assert_eq!(config.used(), twin.len() as u64);
        }
    }
}
