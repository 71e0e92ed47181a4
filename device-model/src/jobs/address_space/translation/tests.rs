//! What a job finds through the TLB, and what convicts a driver of a missing or misplaced flush.

use job_stream::address_space::pte;

use super::*;
use crate::addr::{Asid, ByteRange};
use crate::jobs::address_space::tlb::{Flush, Flushed, TlbConfig};
use crate::testing::memory::SparseMemory;
use crate::testing::page_tables::PageTables;

const ALL: u64 = pte::VALID | pte::READ | pte::WRITE | pte::ATOMIC;
/// The address that the tests use, and what it is mapped to.
const GVA: Gva = Gva::new(0x40_3000);
const PAGE: u64 = 0x7000;
const OTHER: u64 = 0x9000;

/// A driver with one address space, and a job that uses it.
struct Driver {
    memory: SparseMemory,
    tables: PageTables,
    space: Arc<AddressSpace>,
    job: SpaceUse,
    now: Duration,
}

fn driver(policy: TlbPolicy) -> Driver {
    let mut memory = SparseMemory::new();
    memory.fill(ByteRange::new(Iova::new(PAGE), 0x3000).unwrap());
    let mut tables = PageTables::new(&mut memory, 0x8000_0000);
    tables.map(&mut memory, GVA.raw(), 0, PAGE | ALL);
    let config = TlbConfig::new(policy, 64);
    let space = Arc::new(AddressSpace::new(Asid::new(5), Iova::new(tables.root()), config));
    let job = SpaceUse::new(Arc::clone(&space));
    Driver { memory, tables, space, job, now: Duration::from_secs(5) }
}

impl Driver {
    fn set(&mut self, entry: u64) {
        self.tables.map(&mut self.memory, GVA.raw(), 0, entry);
    }

    /// One step that accesses the address.
    fn step(&self, access: GvaAccess) -> Result<Translation, Untranslated> {
        let found = self.job.translate(&self.memory, GVA, access, self.now);
        self.job.end_step();
        found
    }

    /// The page that a step finds.
    fn finds(&self) -> Place {
        self.step(GvaAccess::Read).unwrap().0
    }

    fn fault(&self) -> TranslationFault {
        match self.step(GvaAccess::Read) {
            Err(Untranslated::Fault(fault)) => fault,
            other => panic!("{other:?}"),
        }
    }

    fn flush(&self, what: Flushed) -> Flush {
        self.space.flush(GVA.page_range(), what)
    }

    /// Other memory behind the same IOVA.
    fn remap(&mut self, at: u64) {
        let old = self.memory.take_page(Iova::new(at)).unwrap();
        // The old page is still there, so the new one is elsewhere.
        self.memory.put_page(Iova::new(at), old.clone());
        self.memory.put_page(Iova::new(0xf_0000), old);
    }

    fn after(&mut self, time: Duration) {
        self.now += time;
    }
}

fn at(page: u64) -> Place {
    Place::Iova(Iova::new(page))
}

#[test]
fn an_entry_is_used_until_it_is_flushed_and_in_a_step_until_that_ends() {
    let mut driver = driver(TlbPolicy::Sticky);
    assert_eq!(driver.finds(), at(PAGE));
    driver.set(OTHER | ALL);
    assert_eq!(driver.finds(), at(PAGE), "no flush came");
    let now = driver.now;
    let translate =
        |driver: &Driver| driver.job.translate(&driver.memory, GVA, GvaAccess::Read, now).unwrap().0;
    assert_eq!(translate(&driver), at(PAGE));
    let flush = driver.flush(Flushed::Leaves);
    assert_eq!(translate(&driver), at(PAGE), "the step goes on with what it has looked up");
    assert!(!flush.is_over());
    assert!(driver.job.end_step());
    assert!(flush.is_over());
    assert_eq!(driver.finds(), at(OTHER));
    let TlbCounts { hits, misses } = driver.job.take_counts();
    assert_eq!((hits, misses), (2, 2));
}

#[test]
fn a_driver_that_clears_flushes_and_then_remaps_is_never_blamed() {
    for policy in [TlbPolicy::Sticky, TlbPolicy::Prefetch { pages: 3 }, TlbPolicy::Random { seed: 1 }] {
        let mut driver = driver(policy);
        for round in 0..20 {
            assert_eq!(driver.finds(), at(PAGE));
            driver.set(0);
            // Late, and a whole-domain flush of the IOMMU comes first: the page is there again when it is asked for.
            driver.after(Duration::from_millis(round * 40));
            let page = driver.memory.take_page(Iova::new(PAGE)).unwrap();
            let missed = driver.step(GvaAccess::Read);
            assert!(missed.is_ok() || policy != TlbPolicy::Sticky, "{missed:?}");
            driver.memory.put_page(Iova::new(PAGE), page);
            let used = driver.step(GvaAccess::Read);
            assert!(used.is_ok() || policy != TlbPolicy::Sticky, "{used:?}");
            assert!(driver.flush(Flushed::Leaves).is_over());
            driver.remap(PAGE);
            driver.set(PAGE | ALL);
        }
        assert_eq!(driver.job.take_overdue(), None);
    }
}

#[test]
fn other_memory_at_the_iova_of_an_entry_convicts_the_driver_and_says_of_which_order() {
    type Mistake = fn(&mut Driver);
    let unmap_before_flush: Mistake = |driver| {
        driver.finds();
        driver.set(0);
    };
    let flush_before_clearing: Mistake = |driver| {
        drop(driver.flush(Flushed::Leaves));
        driver.finds();
        driver.set(0);
    };
    for (mistake, after_flush, advice) in [
        (unmap_before_flush, false, "the device was not told, or the page was unmapped before it was"),
        (flush_before_clearing, true, "read the old entry again after an AS_INVALIDATE"),
    ] {
        let mut driver = driver(TlbPolicy::Sticky);
        mistake(&mut driver);
        driver.after(Duration::from_micros(70));
        driver.remap(PAGE);
        let fault = driver.fault();
        let (age_ns, tables) = (Some(70_000), Some(0));
        let cached = Some(CachedTranslation { age_ns, tables, contradicts: true, after_flush });
        let (asid, access, kind) = (Asid::new(5), GvaAccess::Read, FaultKind::Moved);
        let expected = TranslationFault { asid, gva: GVA, access, kind, level: 0, pte: PAGE | ALL, cached };
        assert_eq!(fault, expected);
        assert!(fault.advice().contains(advice), "{}", fault.advice());
        // Told once: the entry is gone.
        assert_eq!(driver.fault().kind, FaultKind::NotPresent);
    }
}

/// The driver puts another page behind the IOVA, and the entry stays as it is: the TLB has nothing that is old.
#[test]
fn other_memory_behind_an_entry_that_the_tables_still_have_is_used() {
    let mut driver = driver(TlbPolicy::Sticky);
    for _ in 0..3 {
        assert_eq!(driver.finds(), at(PAGE));
        driver.remap(PAGE);
    }
    driver.set(0);
    assert_eq!(driver.fault().kind, FaultKind::Moved, "the last one came without a flush");
}

#[test]
fn an_entry_whose_page_is_refused_is_what_is_blamed() {
    let mut driver = driver(TlbPolicy::Sticky);
    driver.finds();
    driver.set(0);
    driver.memory.unmap(Iova::new(PAGE));
    let (place, _, walked) = driver.step(GvaAccess::Write).unwrap();
    let fault = walked.unwrap().fault;
    assert_eq!((place, fault.kind), (at(PAGE), FaultKind::Refused));
    assert!(fault.cached.is_some_and(|cached| cached.contradicts), "{fault}");
    assert_eq!(fault.cached.unwrap().tables, Some(0));
    driver.job.forget(&fault);
    assert_eq!(driver.fault().kind, FaultKind::NotPresent);
}

#[test]
fn a_flush_is_missed_only_when_the_tables_have_said_less_for_a_second() {
    let second = FLUSH_IS_MISSING;
    for (entry, is_told) in [
        (0, true),
        (OTHER | ALL, true),
        (PAGE | pte::VALID | pte::READ, true),
        // It is what it was, but for a bit of the driver's own.
        (PAGE | ALL | 1 << 52, false),
    ] {
        let mut driver = driver(TlbPolicy::Sticky);
        driver.finds();
        driver.set(entry);
        driver.after(CHECK_INTERVAL);
        driver.finds();
        driver.after(second - Duration::from_nanos(1));
        driver.finds();
        assert_eq!(driver.job.take_overdue(), None, "{entry:#x}: not yet");
        driver.after(Duration::from_millis(2));
        assert_eq!(driver.finds(), at(PAGE), "the entry is obeyed");
        let told = driver.job.take_overdue();
        assert_eq!(told.map(|fault| fault.kind), is_told.then_some(FaultKind::NotFlushed), "{entry:#x}");
        driver.after(Duration::from_millis(2));
        driver.finds();
        assert_eq!(driver.job.take_overdue(), None, "{entry:#x}: not at each step");
    }
}

#[test]
fn an_entry_that_permits_more_by_now_needs_no_flush() {
    let mut driver = driver(TlbPolicy::Sticky);
    driver.set(PAGE | pte::VALID | pte::READ);
    driver.finds();
    driver.set(PAGE | ALL);
    assert!(driver.step(GvaAccess::Write).is_ok());
    driver.after(2 * FLUSH_IS_MISSING);
    driver.finds();
    assert_eq!(driver.job.take_overdue(), None);
}

#[test]
fn a_table_that_was_unmapped_while_it_is_remembered_is_blamed_on_that() {
    let mut driver = driver(TlbPolicy::Sticky);
    driver.finds();
    let low = driver.tables.entry(&mut driver.memory, GVA.raw(), 0).page();
    let above = driver.tables.entry(&mut driver.memory, GVA.raw(), 1);
    // The driver clears the entry above, flushes leaves alone, and frees the table.
    drop(driver.flush(Flushed::Leaves));
    driver.memory.write(DomainId::DEVICE, above, &[0; 8]).unwrap();
    driver.memory.unmap(low);
    let Err(Untranslated::Memory(MemoryError::Missing(missing), walked)) = driver.step(GvaAccess::Read)
    else {
        panic!("the table is walked")
    };
    assert!(missing.range.contains(low));
    let cached = CachedTranslation { age_ns: None, tables: Some(0), contradicts: true, after_flush: false };
    assert_eq!((walked.fault.level, walked.fault.cached), (0, Some(cached)));
    assert!(walked.fault.advice().contains("without LEAVES"));
    // Correct: the table is flushed too.
    drop(driver.flush(Flushed::All));
    assert_eq!(driver.fault().kind, FaultKind::NotPresent);
}

#[test]
fn a_remembered_table_that_ends_a_walk_is_not_believed() {
    let mut driver = driver(TlbPolicy::Sticky);
    driver.finds();
    drop(driver.flush(Flushed::Leaves));
    // The table is used for something else, and the tables lead elsewhere.
    let low = driver.tables.entry(&mut driver.memory, GVA.raw(), 0).page();
    driver.memory.write(DomainId::DEVICE, low, &[0; PAGE_SIZE as usize]).unwrap();
    let (above, new) = (driver.tables.entry(&mut driver.memory, GVA.raw(), 1), 0xa000_0000_u64);
    driver.memory.fill(Iova::new(new).page_range());
    driver.memory.write(DomainId::DEVICE, above, &(new | pte::VALID).to_le_bytes()).unwrap();
    let slot = Iova::new(new | low.page_offset() | (GVA.raw() >> 12 & 511) << 3);
    driver.memory.write(DomainId::DEVICE, slot, &(OTHER | ALL).to_le_bytes()).unwrap();
    assert_eq!(driver.finds(), at(OTHER));
}

#[test]
fn what_lies_behind_is_looked_up_too_if_the_policy_says_so() {
    for (policy, known) in [(TlbPolicy::Sticky, false), (TlbPolicy::Prefetch { pages: 1 }, true)] {
        let mut driver = driver(policy);
        let next = Gva::new(GVA.raw() + PAGE_SIZE);
        driver.tables.map(&mut driver.memory, next.raw(), 0, OTHER | ALL);
        driver.finds();
        assert_eq!(matches!(driver.space.tlb.lookup(next), Lookup::Hit(_)), known, "{policy:?}");
    }
}

#[test]
fn where_there_is_no_memory_none_is_compared() {
    let mut driver = driver(TlbPolicy::Sticky);
    driver.set(ALL | pte::NULL);
    assert_eq!((driver.finds(), driver.finds()), (Place::Null, Place::Null));
    let TlbCounts { hits, misses } = driver.job.take_counts();
    assert_eq!((hits, misses), (1, 1));
}
