use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::jobs::backing::RawEntry;
use crate::mmu::Missing;
use crate::testing::memory::{SparseMemory, pattern};

fn backing(entries: &[(u64, u32)]) -> Backing {
    let raw = |&(at, len): &(u64, u32)| RawEntry { at: Iova::new(at), len };
    Backing::new(entries.iter().map(raw)).unwrap()
}

fn memory(entries: &[(u64, u32)]) -> SparseMemory {
    let mut memory = SparseMemory::new();
    for &(at, len) in entries {
        memory.fill(ByteRange::new(Iova::new(at), len.into()).unwrap());
    }
    memory
}

fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
    Rect { x, y, width, height }
}

fn transfer(image: &Arc<Image>, entries: &[(u64, u32)], rect: Rect, offset: u64) -> Transfer {
    Transfer::new(image.clone(), backing(entries), rect, offset).unwrap()
}

/// Steps to the end; returns the number of steps.
fn run(transfer: &mut Transfer, memory: &SparseMemory, budget: usize) -> usize {
    for steps in 1.. {
        match transfer.step(memory, budget) {
            Step::Done => return steps,
            Step::Yield => {}
            other => panic!("{other:?}"),
        }
    }
    unreachable!()
}

/// The naive twin: for every byte that the transfer reads, its address and its place in the image.
fn twin(image: &Image, entries: &[(u64, u32)], rect: Rect, offset: u64) -> Vec<(Iova, usize)> {
    let bytes: Vec<u64> =
        entries.iter().flat_map(|&(at, len)| (0..u64::from(len)).map(move |n| at + n)).collect();
    let mut copied = Vec::new();
    for row in 0..rect.height as usize {
        for column in 0..rect.width as usize * 4 {
            let from = usize::try_from(offset).unwrap() + row * image.stride() + column;
            let to = (rect.y as usize + row) * image.stride() + rect.x as usize * 4 + column;
            if let Some(at) = bytes.get(from) {
                copied.push((Iova::new(*at), to));
            }
        }
    }
    copied
}

fn pages(ranges: &[PinRange]) -> BTreeSet<Iova> {
    ranges.iter().flat_map(|pin| pin.range.pages()).collect()
}

/// A backing whose entries do not share a page, the sides of an image, a rect in it, an offset, a budget.
type Case = (Vec<(u64, u32)>, (u32, u32), Rect, u64, usize);

fn case() -> impl Strategy<Value = Case> {
    let entries = prop::collection::vec((0_u64..64, 0_u64..4096, 1_u32..9000), 1..12).prop_map(|list| {
        let place =
            |(slot, (at, offset, len)): (u64, (u64, u64, u32))| ((at << 24) + (slot << 16) + offset, len);
        (0..).zip(list).map(place).collect::<Vec<_>>()
    });
    let side = prop_oneof![1_u32..8, 1_u32..60, 1020_u32..1030, 2000_u32..2100];
    (entries, side, 1_u32..40, any::<[u32; 4]>(), 0_u64..9000, prop_oneof![1_usize..64, 1_usize..70_000])
        .prop_map(|(entries, width, height, [x, y, w, h], offset, budget)| {
            let (x, y) = (x % width, y % height);
            let rect = rect(x, y, 1 + w % (width - x), 1 + h % (height - y));
            (entries, (width, height), rect, offset, budget)
        })
}

proptest! {
    #[test]
    fn a_transfer_copies_what_its_naive_twin_copies_and_touches_no_other_page(
        (entries, (width, height), rect, offset, budget) in case()
    ) {
        let image = Arc::new(Image::new(width, height).unwrap());
        let expected = twin(&image, &entries, rect, offset);
        let mut pixels = vec![0; image.stride() * height as usize];
        for (at, to) in &expected {
            pixels[*to] = pattern(*at);
        }
        let mut transfer = transfer(&image, &entries, rect, offset);
        let mut memory = memory(&entries);

        let needed: BTreeSet<Iova> = expected.iter().map(|(at, _)| at.page()).collect();
        prop_assert_eq!(pages(&transfer.working_set()), needed.clone());
        let touches = transfer.touches();
        let memory_of = |access| touches.parts().iter().flat_map(move |part| part.memory(access));
        let touched: BTreeSet<Iova> = memory_of(Access::Read).flat_map(|range| range.pages()).collect();
        prop_assert_eq!(touched, needed.clone());
        prop_assert_eq!(memory_of(Access::Write).count(), 0);
        memory.pin(transfer.working_set());

        let mut before = 0;
        loop {
            let step = transfer.step(&memory, budget);
            let moved = transfer.bytes_moved() - before;
            prop_assert!(moved <= budget as u64);
            let left = expected.get(usize::try_from(transfer.bytes_moved()).unwrap()..).unwrap();
            let left: BTreeSet<Iova> = left.iter().map(|(at, _)| at.page()).collect();
            prop_assert_eq!(pages(&transfer.working_set()), left);
            match step {
                Step::Done => break,
                Step::Yield => prop_assert!(moved > 0),
                other => prop_assert!(false, "{:?}", other),
            }
            before = transfer.bytes_moved();
        }
        prop_assert_eq!(transfer.bytes_moved(), expected.len() as u64);
        prop_assert_eq!(memory.take_touched(), needed);
        prop_assert!(&**image.lock() == pixels.as_slice());
    }
}

#[test]
fn the_working_set_ranges_are_in_order_and_no_two_touch() {
    let image = Arc::new(Image::new(1024, 64).unwrap());
    let entries = [(0x9000_0000, 4096), (0x1000_0000, 4096), (0x1000_1000, 4096), (0x5000_0800, 64 << 10)];
    let set = transfer(&image, &entries, rect(0, 0, 8, 8), 0).working_set();
    let range = |at, len| ByteRange::new(Iova::new(at), len).unwrap();
    let ranges: Vec<_> = set.iter().map(|pin| pin.range).collect();
    // Row 0, rows 1 and 2, whose pages are adjacent, and the five rows after them, a page apart from each other.
    assert_eq!(ranges[..2], [range(0x1000_0000, 0x1020), range(0x5000_0800, 0x4020)]);
    assert_eq!(ranges[2..], [range(0x9000_0000, 0x20)]);
    assert!(set.iter().all(|pin| pin.access == Access::Read && pin.space == DomainId::DEVICE));
}

#[test]
fn rows_far_apart_leave_the_pages_between_them_out_of_the_working_set() {
    let image = Arc::new(Image::new(4096, 8).unwrap());
    let set = transfer(&image, &[(0x10_0000, 8 * 4 * 4096)], rect(0, 0, 1, 3), 0).working_set();
    let firsts: Vec<_> = set.iter().map(|pin| (pin.range.first().raw(), pin.range.len())).collect();
    assert_eq!(firsts, [(0x10_0000, 4), (0x10_4000, 4), (0x10_8000, 4)]);
}

#[test]
fn the_working_set_of_a_million_rows_is_one_range() {
    let image = Arc::new(Image::new(4, 1 << 20).unwrap());
    let set = transfer(&image, &[(0x10_0000, 16 << 20)], rect(1, 0, 1, 1 << 20), 0).working_set();
    assert_eq!(set.len(), 1);
    assert_eq!(set[0].range.len(), (16 << 20) - 12);
}

#[test]
fn a_missing_page_stops_the_job_there_and_what_was_copied_is_not_read_again() {
    let image = Arc::new(Image::new(1024, 4).unwrap());
    let entries = [(0x4000, 4096), (0x8000, 4096), (0x20_0000, 8192)];
    let mut transfer = transfer(&image, &entries, rect(0, 0, 1024, 4), 0);
    let mut memory = memory(&entries);
    memory.unmap(Iova::new(0x8000));

    let range = ByteRange::new(Iova::new(0x8000), 4096).unwrap();
    let missing = Missing { space: DomainId::DEVICE, range, access: Access::Read };
    for _ in 0..2 {
        assert_eq!(transfer.step(&memory, 64 << 10), Step::Missing(missing));
        assert_eq!(transfer.bytes_moved(), 4096);
    }
    assert_eq!(memory.take_accesses(), [(Iova::new(0x4000), 4096, Access::Read)]);
    memory.fill(range);
    assert_eq!(transfer.step(&memory, 64 << 10), Step::Done);
    assert_eq!(memory.take_accesses().len(), 3);
}

#[test]
fn a_step_looks_up_a_bounded_number_of_runs_however_short_they_are() {
    let image = Arc::new(Image::new(4, 1 << 16).unwrap());
    let entries = [(0x100_0000, 1 << 20)];
    let mut transfer = transfer(&image, &entries, rect(0, 0, 1, 1 << 16), 0);
    let memory = memory(&entries);
    assert_eq!(transfer.step(&memory, 64 << 10), Step::Yield);
    assert_eq!(memory.take_accesses().len(), (64 << 10) / RUN_COST);
}

#[test]
fn a_step_takes_no_more_than_its_budget_and_at_least_a_byte() {
    let image = Arc::new(Image::new(1024, 64).unwrap());
    let entries = [(0x100_0000, 256 << 10)];
    let memory = memory(&entries);
    let mut quarter = transfer(&image, &entries, rect(0, 0, 1024, 64), 0);
    assert_eq!(run(&mut quarter, &memory, 64 << 10), 4);
    let mut tiny = transfer(&image, &entries, rect(0, 0, 1, 1), 0);
    assert_eq!(run(&mut tiny, &memory, 0), 4);
}

#[test]
fn a_job_waits_for_nobody_who_has_the_image() {
    let image = Arc::new(Image::new(16, 16).unwrap());
    let entries = [(0x1000, 1024)];
    let mut transfer = transfer(&image, &entries, rect(0, 0, 16, 16), 0);
    let memory = memory(&entries);
    let pixels = image.lock();
    assert_eq!(transfer.step(&memory, 64 << 10), Step::Yield);
    assert!(memory.take_touched().is_empty());
    drop(pixels);
    assert_eq!(transfer.step(&memory, 64 << 10), Step::Done);
}

#[test]
fn rows_behind_the_end_of_the_backing_are_left_as_they_are() {
    let image = Arc::new(Image::new(16, 16).unwrap());
    image.lock().fill(7);
    let entries = [(0x1000, 100)];
    let mut transfer = transfer(&image, &entries, rect(0, 0, 16, 16), 0);
    assert_eq!(transfer.step(&memory(&entries), 64 << 10), Step::Done);
    assert_eq!(transfer.bytes_moved(), 100);
    assert_eq!(image.lock()[99], pattern(Iova::new(0x1000 + 99)));
    assert!(image.lock()[100..].iter().all(|byte| *byte == 7));

    let mut beyond = self::transfer(&image, &entries, rect(0, 0, 1, 1), 1 << 40);
    assert_eq!(beyond.working_set(), []);
    assert_eq!(beyond.step(&memory(&entries), 64 << 10), Step::Done);
}

#[test]
fn an_offset_that_wraps_is_refused() {
    let image = Arc::new(Image::new(16, 16).unwrap());
    let new = |offset| Transfer::new(image.clone(), backing(&[(0x1000, 4)]), rect(0, 15, 1, 1), offset);
    assert!(new(u64::MAX - 64).is_ok());
    assert_eq!(new(u64::MAX - 63).err(), Some(InvalidMemory::OffsetWraps { offset: u64::MAX - 63 }));
}

#[test]
fn a_pin_that_covers_too_little_is_a_bug_that_ends_the_job() {
    let image = Arc::new(Image::new(16, 16).unwrap());
    let entries = [(0x1000, 1024)];
    let mut memory = memory(&entries);
    memory.pin(Vec::new());
    let range = ByteRange::new(Iova::new(0x1000), 4096).unwrap();
    let missing = Missing { space: DomainId::DEVICE, range, access: Access::Read };
    let step = transfer(&image, &entries, rect(0, 0, 16, 16), 0).step(&memory, 64 << 10);
    assert_eq!(step, Step::Error(JobError::Memory(MemoryError::NotPinned(missing))));
}
