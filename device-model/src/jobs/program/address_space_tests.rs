//! The executor over address spaces: against the naive twin, with table pages and data pages that go missing; what ends a
//! job; and what is looked up ahead.

use std::collections::BTreeMap;
use std::sync::Arc;

use job_stream::address_space::pte;
use job_stream::twin::{Memory, OutOfBounds, Outcome, interpret};
use job_stream::{Limits, Program, Space as StreamSpace, Stream, verify};
use proptest::prelude::*;

use super::tests::{BYTES, packet};
use super::*;
use crate::addr::{Access, Asid, ByteRange, Gva};
use crate::jobs::address_space::tlb::TlbConfig;
use crate::jobs::address_space::{AddressSpace, FaultKind, TlbPolicy, TranslationFault};
use crate::jobs::error::InvalidMemory;
use crate::testing::memory::SparseMemory;
use crate::testing::page_tables::PageTables;

/// All that a leaf can permit.
const ALL: u64 = pte::VALID | pte::READ | pte::WRITE | pte::ATOMIC;
/// The window of [`BYTES`] that is mapped: the last page of a leaf of 2 MiB, and two pages of 4 KiB.
const BASE: u64 = 0x1f_f000;
const WINDOW: [u64; 3] = [0x3f_f000, 0x9000, 0x5000];

/// Guest memory with two address spaces, of which the second has its window 16 MiB higher up.
struct Guest {
    memory: SparseMemory,
    tables: [PageTables; 2],
    spaces: [Arc<AddressSpace>; 2],
}

fn guest() -> Guest {
    let mut memory = SparseMemory::new();
    let tables = [0, 0x100_0000].map(|up| {
        for at in WINDOW {
            memory.fill(ByteRange::new(Iova::new(up + at), 0x1000).unwrap());
        }
        let mut tables = PageTables::new(&mut memory, 0x8000_0000 + up);
        tables.map(&mut memory, 0, 1, (0x20_0000 + up) | ALL | pte::LEAF);
        tables.map(&mut memory, 0x20_0000, 0, (0x9000 + up) | ALL);
        tables.map(&mut memory, 0x20_1000, 0, (0x5000 + up) | ALL);
        tables
    });
    Guest::new(memory, tables, TlbPolicy::Sticky)
}

impl Guest {
    fn new(memory: SparseMemory, tables: [PageTables; 2], policy: TlbPolicy) -> Self {
        let config = TlbConfig::new(policy, 1024);
        let space = |asid: usize| {
            let root = Iova::new(tables[asid - 1].root());
            Arc::new(AddressSpace::new(Asid::new(asid as u32), root, config.clone()))
        };
        let spaces = [space(1), space(2)];
        Self { memory, tables, spaces }
    }

    fn execution(&self, program: Program) -> Execution {
        let find = |asid: u32| Ok(Arc::clone(&self.spaces[asid as usize - 1]));
        let none = |id| -> Result<_, InvalidMemory> { panic!("Operand in resource {id}") };
        Execution::new(Operands::resolve(program, none, find).unwrap(), Duration::from_secs(60))
    }

    fn window(&self, asid: u32) -> Vec<u8> {
        let mut all = vec![0; BYTES as usize];
        for (at, part) in WINDOW.into_iter().zip(all.chunks_mut(0x1000)) {
            let at = Iova::new(at + u64::from(asid - 1) * 0x100_0000);
            self.memory.read(DomainId::DEVICE, at, part).unwrap();
        }
        all
    }

    fn pages(&self) -> Vec<Iova> {
        let data = WINDOW.into_iter().flat_map(|at| [at, at + 0x100_0000]).map(Iova::new);
        data.chain(self.tables.iter().flat_map(PageTables::pages)).collect()
    }

    /// Changes the leaf of the window's second page.
    fn set(&mut self, entry: u64) {
        self.tables[0].map(&mut self.memory, 0x20_0000, 0, entry);
    }
}

/// The windows, for the twin.
struct Windows(BTreeMap<u32, Vec<u8>>);

impl Windows {
    fn slice(&mut self, at: At, len: usize) -> Result<&mut [u8], OutOfBounds> {
        let range = at.range(len as u64);
        let bytes = self.0.get_mut(&at.space.asid().unwrap()).ok_or(OutOfBounds { range })?;
        let first = (at.address - BASE) as usize;
        bytes.get_mut(first..first + len).ok_or(OutOfBounds { range })
    }
}

impl Memory for Windows {
    fn read(&mut self, at: At, into: &mut [u8]) -> Result<(), OutOfBounds> {
        into.copy_from_slice(self.slice(at, into.len())?);
        Ok(())
    }

    fn write(&mut self, at: At, from: &[u8]) -> Result<(), OutOfBounds> {
        self.slice(at, from.len())?.copy_from_slice(from);
        Ok(())
    }

    fn now(&mut self) -> u64 {
        0
    }
}

fn place(asid: u32, offset: u64) -> At {
    At::new(StreamSpace::address_space(asid), BASE + offset)
}

/// The same packet in the windows.
fn translated(mut packet: Packet) -> Packet {
    let at = |at: At| place(at.space.raw(), at.address);
    let range = |range: Range| at(range.at()).range(range.length);
    match &mut packet {
        Packet::Fill(fill) => fill.to = range(fill.to),
        Packet::Copy(copy) => (copy.from, copy.to) = (range(copy.from), at(copy.to)),
        Packet::Checksum(sum) => (sum.from, sum.to) = (range(sum.from), at(sum.to)),
        Packet::Signal(signal) => signal.at = at(signal.at),
        Packet::Atomic(atomic) => (atomic.at, atomic.old) = (at(atomic.at), atomic.old.map(at)),
        other => panic!("{other:?}"),
    }
    packet
}

fn program(stream: Stream) -> Program {
    verify(&stream.finish(), &Limits::default()).unwrap()
}

fn stream() -> impl Strategy<Value = Program> {
    prop::collection::vec(packet(), 0..12)
        .prop_map(|packets| {
            let fence =
                Context { mode: None, priority: None, fence: Some(place(1, 8)), done: 77, failed: 78 };
            packets.into_iter().fold(Stream::new().push(fence), |stream, packet| {
                let longer = stream.clone().push(translated(packet));
                let taken = verify(&longer.clone().finish(), &Limits::default()).is_ok();
                if taken { longer } else { stream }
            })
        })
        .prop_map(program)
}

proptest! {
    #[test]
    fn random_programs_leave_what_the_twin_leaves_whatever_table_or_page_goes_missing(
        program in stream(),
        budgets in prop::collection::vec(1_usize..5000, 1..40),
        misses in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..40),
    ) {
        let mut guest = guest();
        let pages = guest.pages();
        let mut twin = Windows([1, 2].map(|asid| (asid, guest.window(asid))).into());
        prop_assert_eq!(interpret(&program, &mut twin), Ok(Outcome::Done));
        let mut execution = guest.execution(program);
        let (mut steps, mut stashed, mut calm) = (0, None, false);
        loop {
            let (page, gone) = misses[steps % misses.len()];
            if gone && !calm && stashed.is_none() {
                let page = *page.get(&pages);
                stashed = guest.memory.take_page(page).map(|bytes| (page, bytes));
            }
            let step = execution.step(&guest.memory, budgets[steps % budgets.len()].into());
            steps += 1;
            // The page stays for one step, since no driver takes pages away at once for ever.
            calm = matches!(step, Step::Missing(_));
            match step {
                Step::Done => break,
                Step::Yield => {}
                Step::Missing(missing) => {
                    let Some((page, bytes)) = stashed.take() else { panic!("{missing} was there") };
                    prop_assert_eq!(missing.range, page.page_range());
                    guest.memory.put_page(page, bytes);
                }
                other => panic!("{other:?}"),
            }
            prop_assert!(steps < 100_000);
        }
        if let Some((page, bytes)) = stashed {
            guest.memory.put_page(page, bytes);
        }
        prop_assert_eq!(guest.window(1), &twin.0[&1][..]);
        prop_assert_eq!(guest.window(2), &twin.0[&2][..]);
    }
}

/// Runs a job with a user fence at the start of window 2, which must fail, and returns its error.
fn failure(guest: &Guest, stream: impl FnOnce(Stream) -> Stream) -> JobError {
    let fence = Context { mode: None, priority: None, fence: Some(place(2, 0)), done: 1, failed: 2 };
    let mut job = guest.execution(program(stream(Stream::new().push(fence))));
    loop {
        match job.step(&guest.memory, (1 << 16).into()) {
            Step::Yield => {}
            Step::Error(error) => {
                assert_eq!(guest.window(2)[..8], 2_u64.to_le_bytes());
                return error;
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_the_tables_do_not_permit_ends_the_job_and_is_named_with_all_that_the_walk_found() {
    let at = place(1, 0x1008);
    type Build = fn(Stream, At) -> Stream;
    let fill: Build = |stream, at| stream.fill(at.range(8), 0);
    let read: Build = |stream, at| stream.copy(at.range(8), place(2, 8));
    let add: Build = |stream, at| stream.add64(at, 1, None);
    let wait: Build = |stream, at| stream.wait(at, job_stream::Compare::Equal, 1, 0);
    let cases = [
        (0x9000 | ALL & !pte::VALID, fill, GvaAccess::Write, FaultKind::NotPresent),
        (0x9000 | ALL & !pte::WRITE, fill, GvaAccess::Write, FaultKind::WriteDenied),
        (0x9000 | ALL & !pte::READ, read, GvaAccess::Read, FaultKind::ReadDenied),
        (0x9000 | ALL & !pte::READ, wait, GvaAccess::Read, FaultKind::ReadDenied),
        (0x9000 | ALL & !pte::ATOMIC, add, GvaAccess::Atomic, FaultKind::AtomicDenied),
        (0x9000 | ALL | 1 << 60, read, GvaAccess::Read, FaultKind::ReservedBits),
    ];
    for (pte, build, access, kind) in cases {
        let mut guest = guest();
        guest.set(pte);
        let gva = Gva::new(at.address);
        let fault = TranslationFault { asid: Asid::new(1), gva, access, kind, level: 0, pte, cached: None };
        assert_eq!(failure(&guest, |stream| build(stream, at)), JobError::Translation(fault));
    }
}

#[test]
fn what_came_before_the_fault_has_happened_and_nothing_behind_it() {
    let mut guest = guest();
    guest.set(0);
    let before = guest.window(1);
    let error =
        failure(&guest, |stream| stream.fill(place(1, 0).range(0x2000), 0).signal(place(1, 0x2000), 9));
    assert!(matches!(error, JobError::Translation(fault) if fault.gva.raw() == BASE + 0x1000));
    let after = guest.window(1);
    assert!(after[..0x1000].iter().all(|byte| *byte == 0) && after[0x1000..] == before[0x1000..]);
}

#[test]
fn where_there_is_no_memory_zeros_are_read_and_writes_vanish() {
    let mut guest = guest();
    guest.set(ALL | pte::NULL);
    let before = guest.window(1);
    let null = place(1, 0x1000);
    let stream = Stream::new()
        .fill(null.range(0x1000), 0x0101_0101)
        .copy(null.range(0x10), place(2, 0))
        .checksum(null.range(0x1000), place(2, 0x10))
        .add64(null, 5, Some(place(2, 0x18)))
        .copy(place(2, 0x100).range(0x20), null)
        .wait(null, job_stream::Compare::Equal, 0, 0)
        .signal(null, 7);
    let mut job = guest.execution(program(stream));
    while job.step(&guest.memory, (1 << 16).into()) == Step::Yield {}
    assert_eq!(job.step(&guest.memory, 1.into()), Step::Done);
    assert_eq!(guest.window(1), before);
    let after = guest.window(2);
    assert_eq!(after[..0x10], [0; 0x10]);
    assert_eq!(after[0x10..0x14], Crc32c::of(&[0; 0x1000]).to_le_bytes());
    assert_eq!(after[0x18..0x20], [0; 8]);
}

#[test]
fn a_miss_looks_for_63_more_pages_of_the_packet_and_names_each_once() {
    let mut memory = SparseMemory::new();
    let mut tables = PageTables::new(&mut memory, 0x8000_0000);
    for page in 0..200 {
        tables.map(&mut memory, page << 12, 0, (0x1000 + page) << 12 | ALL);
    }
    let guest = Guest::new(memory, [tables.clone(), tables], TlbPolicy::Sticky);
    let all = At::new(StreamSpace::address_space(1), 0x800).range(199 << 12);
    let mut job = guest.execution(program(Stream::new().fill(all, 0)));
    let Step::Missing(missing) = job.step(&guest.memory, (1 << 16).into()) else { panic!() };
    assert_eq!((missing.range.first(), missing.access), (Iova::new(0x100_0000), Access::Write));
    // The mirror has every fourth page.
    let probe = |at: Iova, access| {
        let range = at.page_range();
        (at.raw() >> 12 & 3 != 3).then_some(Missing { space: DomainId::DEVICE, range, access })
    };
    let ahead = job.look_ahead(&guest.memory, probe, missing);
    let pages: Vec<u64> = ahead.iter().map(|missing| missing.range.first().raw() >> 12).collect();
    let expected: Vec<u64> = (0x1001..0x1040).filter(|page| page & 3 != 3).collect();
    assert_eq!(pages, expected);
}

#[test]
fn a_table_that_is_missing_is_named_once_and_what_lies_behind_it_is_not_guessed() {
    let mut guest = guest();
    let tables: Vec<Iova> = guest.tables[0].pages().collect();
    // Of level 0: the window's last two pages.
    guest.memory.unmap(tables[1]);
    let all = place(1, 0).range(BYTES);
    let job = guest.execution(program(Stream::new().fill(all, 0)));
    let first =
        Missing { space: DomainId::DEVICE, range: Iova::new(WINDOW[0]).page_range(), access: Access::Write };
    let table = Missing { space: DomainId::DEVICE, range: tables[1].page_range(), access: Access::Read };
    assert_eq!(job.look_ahead(&guest.memory, |_, _| None, first), [table]);
    assert_eq!(job.look_ahead(&guest.memory, |_, _| None, table), []);
}

#[test]
fn a_refusal_is_blamed_on_the_address_that_needed_the_page() {
    let mut guest = guest();
    guest.memory.unmap(Iova::new(WINDOW[1]));
    let copy = Stream::new().copy(place(1, 0x1004).range(8), place(2, 0));
    let mut job = guest.execution(program(copy));
    let Step::Missing(missing) = job.step(&guest.memory, (1 << 16).into()) else { panic!() };
    let pte = 0x9000 | ALL;
    let (gva, kind) = (Gva::new(BASE + 0x1004), FaultKind::Refused);
    let fault = TranslationFault {
        asid: Asid::new(1),
        gva,
        access: GvaAccess::Read,
        kind,
        level: 0,
        pte,
        cached: None,
    };
    assert_eq!(job.refusal(missing), JobError::Translation(fault));
    guest.memory.unmap(Iova::new(guest.tables[0].root()));
    let Step::Missing(missing) = job.step(&guest.memory, (1 << 16).into()) else { panic!() };
    let fault = TranslationFault { level: 3, pte: 0, ..fault };
    assert_eq!(job.refusal(missing), JobError::Translation(fault));
}
