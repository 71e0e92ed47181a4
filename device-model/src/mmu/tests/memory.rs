//! Bytes through sections, pins and ring memory, over real memory of this process.

use vm_memory::guest_memory::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryMmap, Permissions as VmPermissions,
};

use super::*;
use crate::addr::RangeError;

/// Real memory: `frames` pages, of which the first byte of each is its number.
struct Frames(GuestMemoryMmap<()>);

impl Frames {
    fn new(frames: u64) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), (frames * PAGE) as usize)]).unwrap();
        for number in 0..frames {
            memory.write_obj(number as u8, GuestAddress(number * PAGE)).unwrap();
        }
        Self(memory)
    }

    fn host(&self, frame: u64, len: u64) -> HostRange {
        let at = GuestAddress(frame * PAGE);
        let slice =
            self.0.get_slices(at, len as usize, VmPermissions::Read).unwrap().next().unwrap().unwrap();
        HostRange::invented(slice.ptr_guard_mut().as_ptr().expose_provenance() as u64, len)
    }

    fn byte(&self, frame: u64, offset: u64) -> u8 {
        self.0.read_obj(GuestAddress(frame * PAGE + offset)).unwrap()
    }
}

/// IOVA pages 0 to 3 map to frames 3, 0, 2, 1; all but the last are readable, all but the first writable.
fn scattered() -> (Frames, Rig) {
    let frames = Frames::new(4);
    let mut rig = rig();
    for (page, frame) in [3, 0, 2, 1].into_iter().enumerate() {
        let permissions = Permissions { read: page != 3, write: page != 0 };
        let at = range(page as u64 * PAGE, PAGE);
        rig.writer.map(SPACE, at, frames.host(frame, PAGE), permissions).unwrap();
    }
    (frames, rig)
}

fn missing(start: u64, len: u64, access: Access) -> Missing {
    Missing { space: SPACE, range: range(start, len), access }
}

/// Neither end is aligned, and the page boundaries of the two sides differ.
#[test]
fn a_copy_within_the_guest_crosses_pages_of_both_sides_and_asks_for_what_each_lacks() {
    let frames = Frames::new(4);
    let mut rig = rig();
    for page in 0..4 {
        rig.writer
            .map(SPACE, range(page * PAGE, PAGE), frames.host(3 - page, PAGE), Permissions::READ_WRITE)
            .unwrap();
    }
    let bytes: Vec<u8> = (0..PAGE as usize + 100).map(|at| (at % 251) as u8).collect();
    let (from, to) = (Iova::new(0xf01), Iova::new(0x2f80));
    let pinned = [
        wanted(from.raw(), bytes.len() as u64, Access::Read),
        wanted(to.raw(), bytes.len() as u64, Access::Write),
    ];
    let pin = rig.reader.pin(&pinned).unwrap();
    let section = rig.reader.enter();
    let put = |at, bytes: &[u8]| section.write(SPACE, at, bytes).unwrap();
    let arrived = || {
        let mut copied = vec![0; bytes.len()];
        section.read(SPACE, to, &mut copied).unwrap();
        copied == bytes
    };
    put(from, &bytes);
    section.copy(SPACE, from, to, bytes.len()).unwrap();
    assert!(arrived());
    put(to, &vec![0; bytes.len()]);
    pin.copy(SPACE, from, to, bytes.len()).unwrap();
    assert!(arrived());
    let lacks = |result: Result<(), MemoryError>, start, access| {
        assert_eq!(result, Err(MemoryError::Missing(missing(start, PAGE, access))));
    };
    lacks(section.copy(SPACE, Iova::new(0x3ff0), Iova::new(0), 0x20), 0x4000, Access::Read);
    lacks(section.copy(SPACE, Iova::new(0), Iova::new(0x3ff0), 0x20), 0x4000, Access::Write);
}

#[test]
fn reads_and_writes_cross_pages_that_are_not_neighbours() {
    let (frames, rig) = scattered();
    let section = rig.reader.enter();
    let mut bytes = [0xee; 2 * PAGE as usize + 1];
    section.read(SPACE, Iova::new(0), &mut bytes).unwrap();
    assert_eq!([bytes[0], bytes[0x1000], bytes[0x2000]], [3, 0, 2]);
    section.write(SPACE, Iova::new(0x1fff), &[0xaa, 0xbb]).unwrap();
    assert_eq!((frames.byte(0, 0xfff), frames.byte(2, 0)), (0xaa, 0xbb));
}

#[test]
fn a_miss_names_all_pages_in_a_row_that_the_access_lacks() {
    let (_frames, rig) = scattered();
    let section = rig.reader.enter();
    let mut bytes = [0; 0x4000];
    let error = section.read(SPACE, Iova::new(0x2000), &mut bytes);
    assert_eq!(error, Err(MemoryError::Missing(missing(0x3000, 3 * PAGE, Access::Read))));
    assert_eq!(
        section.write(SPACE, Iova::new(8), &[1]),
        Err(MemoryError::Missing(missing(0, PAGE, Access::Write)))
    );
}

#[test]
fn an_access_past_the_end_of_the_space_is_an_error_and_one_of_no_bytes_is_none() {
    let (_frames, rig) = scattered();
    let section = rig.reader.enter();
    let wraps = RangeError::Wraps { start: u64::MAX, len: 2 };
    assert_eq!(section.write(SPACE, Iova::new(u64::MAX), &[0; 2]), Err(MemoryError::Wraps(wraps)));
    assert_eq!(section.read(SPACE, Iova::new(u64::MAX), &mut []), Ok(()));
}

#[test]
fn a_pin_holds_what_it_was_given_after_the_mirror_forgot() {
    let (frames, mut rig) = scattered();
    let pin =
        rig.reader.pin(&[wanted(0x10, 0x1ff0, Access::Read), wanted(0x1000, 0x2000, Access::Write)]).unwrap();
    let parked = rig.writer.begin(SPACE, ByteRange::everything()).poll().unwrap_err();
    let mut bytes = [0xee; 0x2000];
    pin.read(SPACE, Iova::new(0), &mut bytes).unwrap();
    assert_eq!([bytes[0], bytes[0x1000]], [3, 0]);
    pin.write(SPACE, Iova::new(0x1fff), &[0xaa, 0xbb]).unwrap();
    assert_eq!((frames.byte(0, 0xfff), frames.byte(2, 0)), (0xaa, 0xbb));
    drop(pin);
    assert!(parked.poll().is_ok());
}

#[test]
fn a_preempt_pin_is_evicted_when_the_invalidation_begins_and_still_waited_for() {
    let (_frames, mut rig) = scattered();
    let wanted = [wanted(0x1000, PAGE, Access::Read)];
    let (pin, fence) =
        (rig.reader.pin_as(PinMode::Preempt, &wanted).unwrap(), rig.reader.pin(&wanted).unwrap());
    rig.invalidate(range(0, PAGE));
    assert!(!pin.evicted(), "its neighbour was meant");
    let parked = rig.writer.begin(SPACE, range(0x1000, PAGE)).poll().unwrap_err();
    assert!(pin.evicted() && !fence.evicted());
    drop(fence);
    let parked = parked.poll().unwrap_err();
    drop(pin);
    assert!(parked.poll().is_ok());
}

#[test]
fn a_registration_cache_is_waited_for_only_when_its_memory_goes_away_for_good() {
    let (frames, mut rig) = scattered();
    let wanted = [wanted(0x1000, PAGE, Access::Read)];
    let pin = rig.reader.pin_as(PinMode::RegistrationCache, &wanted).unwrap();
    let invalidation = rig.writer.begin(SPACE, range(0x1000, PAGE));
    assert_eq!((invalidation.in_flight().pins, invalidation.incoherent()), (0, 1));
    assert_eq!(invalidation.evict(), 0);
    let drained = invalidation.poll().unwrap();
    drop(rig.writer.end(drained));
    let mut bytes = [0xee; 1];
    pin.read(SPACE, Iova::new(0x1000), &mut bytes).unwrap();
    assert_eq!((bytes[0], frames.byte(0, 0)), (0, 0));
    let parked = rig.writer.begin_for_good(SPACE, ByteRange::everything()).poll().unwrap_err();
    assert_eq!((parked.in_flight().pins, parked.incoherent(), parked.evict()), (1, 0, 1));
    assert!(pin.evicted());
    drop(pin);
    assert!(parked.poll().is_ok());
}

#[test]
fn atomics_change_aligned_values_in_one_piece_and_need_their_permissions() {
    let (frames, rig) = scattered();
    let section = rig.reader.enter();
    let at = Iova::new(0x1ff8);
    let change = |width, operation| section.atomic(SPACE, at, width, operation);
    assert_eq!(change(Width::Wide, AtomicOperation::Store(u64::MAX)), Ok(0));
    assert_eq!(change(Width::Word, AtomicOperation::Add(3)), Ok(u32::MAX.into()));
    assert_eq!(change(Width::Wide, AtomicOperation::Load), Ok(0xffff_ffff_0000_0002));
    let swap = |expected| AtomicOperation::CompareExchange { expected, new: 9 };
    assert_eq!(change(Width::Word, swap(1)), Ok(2));
    assert_eq!(change(Width::Word, swap(2)), Ok(2));
    assert_eq!(frames.byte(0, 0xff8), 9);
    let unaligned = section.atomic(SPACE, Iova::new(0x1ffc), Width::Wide, AtomicOperation::Load);
    assert_eq!(unaligned, Err(MemoryError::Unaligned(Iova::new(0x1ffc))));
    let read_only = section.atomic(SPACE, Iova::new(0), Width::Word, AtomicOperation::Add(1));
    assert_eq!(read_only, Err(MemoryError::Missing(missing(0, PAGE, Access::Write))));
    let write_only = section.atomic(SPACE, Iova::new(0x3000), Width::Word, AtomicOperation::Add(1));
    assert_eq!(write_only, Err(MemoryError::Missing(missing(0x3000, PAGE, Access::Read))));
}

#[test]
fn a_pin_allows_what_was_wanted_and_nothing_else() {
    let (_frames, rig) = scattered();
    let pin =
        rig.reader.pin(&[wanted(0x1000, PAGE, Access::Read), wanted(0x2000, PAGE, Access::Write)]).unwrap();
    let not_pinned = |start, access| Err(MemoryError::NotPinned(missing(start, PAGE, access)));
    assert_eq!(pin.write(SPACE, Iova::new(0x1000), &[1]), not_pinned(0x1000, Access::Write));
    assert_eq!(pin.read(SPACE, Iova::new(0x2000), &mut [0]), not_pinned(0x2000, Access::Read));
    assert_eq!(pin.read(SPACE, Iova::new(0x1fff), &mut [0; 2]), not_pinned(0x2000, Access::Read));
    assert_eq!(pin.read(SPACE, Iova::new(0xfff), &mut [0; 2]), not_pinned(0, Access::Read));
}

#[test]
fn a_pin_names_all_that_is_missing_and_holds_nothing() {
    let (_frames, mut rig) = scattered();
    let error = rig.reader.pin(&[
        wanted(0x6000, 1, Access::Write),
        wanted(0, 0x6000, Access::Read),
        wanted(0, 0x2000, Access::Write),
    ]);
    let all = vec![
        missing(0x3000, 3 * PAGE, Access::Read),
        missing(0, PAGE, Access::Write),
        missing(0x6000, PAGE, Access::Write),
    ];
    assert_eq!(error.err(), Some(PinError::Missing(all)));
    rig.invalidate(ByteRange::everything());
}

#[test]
fn what_a_pin_asks_for_at_once_is_capped() {
    let rig = rig();
    let error = rig.reader.pin(&[wanted(0, 16 * MIB, Access::Read), wanted(0, PAGE, Access::Write)]);
    assert_eq!(error.err(), Some(PinError::Missing(vec![missing(0, MISSING_PAGES * PAGE, Access::Read)])));
}

#[test]
fn a_pin_that_could_never_be_in_the_tables_is_refused() {
    let rig = rig_with(1 << 16);
    let error = rig.reader.pin(&[wanted(0, GIB, Access::Read)]);
    assert!(matches!(error, Err(PinError::TooLarge { limit: 0x1_0000, .. })), "{error:?}");
    // 8 MiB need 4 tables and a path for each end.
    let missing = rig.reader.pin(&[wanted(0, 8 * MIB, Access::Read)]);
    assert!(matches!(missing, Err(PinError::Missing(_))), "{missing:?}");
}

#[test]
fn ring_memory_reads_writes_and_crosses_pages() {
    let (frames, rig) = scattered();
    let ring = RingMemory::new(rig.reader);
    let memory = ring.memory();
    memory.store(0x1234_u16, GuestAddress(0x1002), std::sync::atomic::Ordering::Release).unwrap();
    assert_eq!(
        memory.load::<u16>(GuestAddress(0x1002), std::sync::atomic::Ordering::Acquire).unwrap(),
        0x1234
    );
    memory.write_slice(&[7; 4], GuestAddress(0x1ffe)).unwrap();
    assert_eq!((frames.byte(0, 0xffe), frames.byte(2, 1)), (7, 7));
    assert!(memory.check_range(GuestAddress(0x1000), 0x2000, VmPermissions::ReadWrite));
    assert_eq!(ring.take_missing(), []);
}

#[test]
fn ring_memory_remembers_each_miss_once_until_it_is_taken() {
    let (_frames, rig) = scattered();
    let ring = RingMemory::new(rig.reader);
    let memory = ring.memory();
    for _ in 0..2 {
        let error = memory.write_slice(&[0; 4], GuestAddress(0xffe)).unwrap_err();
        assert!(matches!(error, Error::InvalidGuestAddress(GuestAddress(0xffe))), "{error}");
        assert!(memory.read_slice(&mut [0; 4], GuestAddress(0x2ffe)).is_err(), "a short read is an error");
    }
    assert_eq!(ring.take_missing(), [missing(0, PAGE, Access::Write), missing(0x3000, PAGE, Access::Read)]);
    assert_eq!(ring.take_missing(), []);
    assert!(!memory.check_range(GuestAddress(0x10_0000), 1, VmPermissions::ReadWrite));
    assert_eq!(ring.take_missing().len(), 2);
    for page in 0..2 * STICKY_MISSES as u64 {
        assert!(memory.read_obj::<u8>(GuestAddress(GIB + page * PAGE)).is_err());
    }
    assert_eq!(ring.take_missing().len(), STICKY_MISSES);
}

#[test]
fn ring_memory_past_the_end_of_the_space_is_an_error() {
    let ring = RingMemory::new(rig().reader);
    let error = ring.memory().read_slice(&mut [0; 2], GuestAddress(u64::MAX)).unwrap_err();
    assert!(matches!(error, Error::GuestAddressOverflow), "{error}");
    assert!(ring.memory().read_slice(&mut [], GuestAddress(u64::MAX)).is_ok());
}

#[test]
fn every_guard_of_the_rings_holds_an_invalidation_up() {
    let (_frames, mut rig) = scattered();
    let ring = RingMemory::new(rig.reader);
    let first = ring.memory();
    let parked = rig.writer.begin(SPACE, range(0, PAGE)).poll().unwrap_err();
    let second = first.clone();
    drop(first);
    let parked = parked.poll().unwrap_err();
    drop(second);
    assert_eq!(rig.wakes.0.load(Ordering::SeqCst), 1);
    let _later = ring.enter();
    assert!(parked.poll().is_ok());
}

#[test]
fn only_a_host_range_of_no_bytes_is_empty() {
    let of = |len| HostRange::invented(FRAME, len);
    assert_eq!((of(0).is_empty(), of(1).is_empty(), of(1).len()), (true, false, 1));
}

#[test]
fn an_atomic_of_a_word_has_32_bits() {
    let value = 0x1_2345_6789;
    assert_eq!((Width::Word.cut(value), Width::Wide.cut(value)), (0x2345_6789, value));
}

#[test]
fn pages_in_a_row_are_requested_as_one_range_only_for_the_same_access() {
    let (_, rig) = scattered();
    let both =
        rig.reader.pin(&[wanted(0x10_0000, PAGE, Access::Read), wanted(0x10_1000, PAGE, Access::Write)]);
    let Err(PinError::Missing(found)) = both else { panic!("{both:?}") };
    let one = |start, access| missing(start, PAGE, access);
    assert_eq!(found, [one(0x10_0000, Access::Read), one(0x10_1000, Access::Write)]);
}

/// A new memory table puts the guest's memory elsewhere in this process.
#[test]
fn the_memory_behind_a_page_is_compared_only_while_memory_stays_where_it_is() {
    let (frames, mut rig) = scattered();
    let page = |rig: &Rig, at| rig.reader.enter().host_page(SPACE, Iova::new(at), Access::Read);
    let before = page(&rig, 0x1234).unwrap();
    assert_eq!(page(&rig, 0x1fff), Some(before));
    assert_eq!(page(&rig, 0x3000), None, "it cannot be read");
    rig.invalidate(range(0x1000, PAGE));
    assert_eq!(page(&rig, 0x1234), None);
    rig.writer.map(SPACE, range(0x1000, PAGE), frames.host(3, PAGE), Permissions::READ_WRITE).unwrap();
    assert!(page(&rig, 0x1234).unwrap().differs(before));
    let drained = rig.writer.begin_for_good(SPACE, ByteRange::everything()).poll().unwrap();
    drop(rig.writer.end(drained));
    rig.writer.map(SPACE, range(0x1000, PAGE), frames.host(1, PAGE), Permissions::READ_WRITE).unwrap();
    assert!(!page(&rig, 0x1234).unwrap().differs(before), "nothing is known of what was there before");
}
