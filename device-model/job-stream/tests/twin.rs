//! The naive interpreter does what the manual says of each packet.

use job_stream::twin::{Buffers, Memory, OutOfBounds, Outcome, interpret, resume};
use job_stream::{
    At, Atomic, AtomicOperation, Compare, Context, Crc32c, Limits, Priority, Program, Range, Space,
    SpinBehaviour, Stream, Wait, verify,
};

const POISON: u8 = 0xa5;

const fn place(resource: u32, address: u64) -> At {
    At::new(Space::resource(resource), address)
}

fn program(stream: Stream) -> Program {
    verify(&stream.finish(), &Limits::default()).unwrap()
}

/// Two buffers of poison.
fn poisoned() -> Buffers {
    Buffers::new().with(1, vec![POISON; 64]).with(2, vec![POISON; 64])
}

/// What `stream` leaves behind of buffers of poison.
fn after(stream: Stream) -> Buffers {
    let mut memory = poisoned();
    assert_eq!(interpret(&program(stream), &mut memory), Ok(Outcome::Done));
    memory
}

/// Buffer 1 as it is if only the bytes from `at` on were written.
fn only(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut expected = vec![POISON; 64];
    expected[at..at + bytes.len()].copy_from_slice(bytes);
    expected
}

#[test]
fn fill_writes_its_range_and_nothing_else() {
    let memory = after(Stream::new().fill(place(1, 4).range(8), 0x4433_2211));
    assert_eq!(memory.bytes(1), only(4, &[0x11, 0x22, 0x33, 0x44, 0x11, 0x22, 0x33, 0x44]));
}

#[test]
fn copy_writes_its_destination_and_nothing_else() {
    let memory = after(
        Stream::new().signal64(place(2, 8), 0x0807_0605_0403_0201).copy(place(2, 9).range(5), place(1, 3)),
    );
    assert_eq!(memory.bytes(1), only(3, &[2, 3, 4, 5, 6]));
}

#[test]
fn checksum_writes_the_crc_of_its_range() {
    let memory = after(Stream::new().checksum(place(2, 1).range(33), place(1, 0)));
    assert_eq!(memory.bytes(1), only(0, &Crc32c::of(&[POISON; 33]).to_le_bytes()));
}

#[test]
fn signal_writes_as_many_bits_as_it_has() {
    assert_eq!(after(Stream::new().signal(place(1, 4), 7)).bytes(1), only(4, &[7, 0, 0, 0]));
    assert_eq!(after(Stream::new().signal64(place(1, 8), 7)).bytes(1), only(8, &[7, 0, 0, 0, 0, 0, 0, 0]));
}

#[test]
fn an_addition_wraps_at_its_width_and_stores_the_old_value() {
    let stream = Stream::new().signal64(place(1, 0), u64::MAX).add(place(1, 0), 2, Some(place(1, 8)));
    let memory = after(stream);
    let bytes = [[1, 0, 0, 0], [0xff; 4], [0xff; 4]].concat();
    assert_eq!(memory.bytes(1), only(0, &bytes));
    let memory = after(Stream::new().signal64(place(1, 0), u64::MAX).add64(place(1, 0), 2, None));
    assert_eq!(memory.bytes(1), only(0, &1_u64.to_le_bytes()));
}

#[test]
fn a_swap_changes_memory_only_if_it_holds_what_is_expected() {
    let swap = |expected| {
        let stream = Stream::new().signal(place(1, 0), 5).signal(place(1, 4), 0);
        after(stream.cas(place(1, 0), expected, 6, Some(place(1, 4))))
    };
    assert_eq!(swap(5).bytes(1), only(0, &[6, 0, 0, 0, 5, 0, 0, 0]));
    assert_eq!(swap(4).bytes(1), only(0, &[5, 0, 0, 0, 5, 0, 0, 0]));
}

#[test]
fn wait_goes_on_only_when_it_holds() {
    let mut memory = poisoned();
    let waiting = program(Stream::new().wait(place(1, 0), Compare::Equal, 9, 0).signal(place(2, 0), 1));
    assert_eq!(interpret(&waiting, &mut memory), Ok(Outcome::Waits { packet: 0 }));
    assert_eq!(memory.bytes(2), [POISON; 64]);
    memory.write(place(1, 0), &9_u32.to_le_bytes()).unwrap();
    assert_eq!(resume(&waiting, 0, &mut memory), Ok(Outcome::Done));
    assert_eq!(memory.bytes(2)[..4], [1, 0, 0, 0]);
}

#[test]
fn wait_looks_only_at_the_bits_of_its_mask() {
    let wait =
        Wait { wide: false, at: place(1, 0), compare: Compare::Equal, value: 5, mask: 0xf, timeout: 0 };
    let masked = |mask| program(Stream::new().signal(place(1, 0), 0x75).push(Wait { mask, ..wait }));
    assert_eq!(interpret(&masked(0xf), &mut poisoned()), Ok(Outcome::Done));
    assert_eq!(interpret(&masked(0xff), &mut poisoned()), Ok(Outcome::Waits { packet: 1 }));
}

#[test]
fn the_result_of_a_narrow_addition_has_32_bits() {
    let operation = AtomicOperation::Add;
    let add = Atomic { wide: false, operation, at: place(1, 0), operand: 2, expected: 0, old: None };
    assert_eq!(add.result(0xffff_ffff), 1);
    assert_eq!(Atomic { wide: true, ..add }.result(0xffff_ffff), 0x1_0000_0001);
}

#[test]
fn timestamps_never_go_back() {
    let memory = after(Stream::new().timestamp(place(1, 0)).timestamp(place(1, 8)));
    let time = |at: usize| u64::from_le_bytes(memory.bytes(1)[at..at + 8].try_into().unwrap());
    assert!(time(0) < time(8));
}

#[test]
fn the_user_fence_is_written_when_all_is_done_and_not_before() {
    let fence =
        Context { mode: None, priority: Some(Priority::High), fence: Some(place(1, 8)), done: 3, failed: 4 };
    let memory = after(Stream::new().push(fence).nop(2).barrier().spin(SpinBehaviour::Stubborn, 1));
    assert_eq!(memory.bytes(1), only(8, &3_u64.to_le_bytes()));
    let mut memory = poisoned();
    let wedged = program(Stream::new().push(fence).spin(SpinBehaviour::Wedged, 0));
    assert_eq!(interpret(&wedged, &mut memory), Ok(Outcome::Wedged { packet: 1 }));
    assert_eq!(memory, poisoned());
}

#[test]
fn memory_that_does_not_exist_is_named() {
    let missing = Range::new(Space::resource(1), 60, 8);
    let copy = program(Stream::new().copy(missing, place(2, 0)));
    assert_eq!(interpret(&copy, &mut poisoned()), Err(OutOfBounds { range: missing }));
}
