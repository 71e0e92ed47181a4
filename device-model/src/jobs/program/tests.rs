//! The executor against its naive twin, and the promises that the twin does not make.

use job_stream::twin::{Buffers, Outcome, interpret};
use job_stream::{Compare, Limits, Program, Space as StreamSpace, Stream, verify};
use proptest::prelude::*;

use super::*;
use crate::addr::ByteRange;
use crate::jobs::backing::Backing;
use crate::jobs::backing::RawEntry;
use crate::jobs::error::InvalidMemory;
use crate::jobs::operands::ResourceMemory;
use crate::testing::memory::{SparseMemory, pattern};

/// Bytes of the two resources of the tests.
pub(super) const BYTES: u64 = 3 * PAGE_SIZE;

/// Resource 1 lies on pages in reverse order; resource 2 in entries that split pages.
fn entries(id: u32) -> Vec<(u64, u32)> {
    match id {
        1 => vec![(0x1_3000, 0x1000), (0x1_2000, 0x1000), (0x1_1000, 0x1000)],
        _ => vec![(0x2_0800, 0x808), (0x3_0ff8, 0x1010), (0x4_0010, 0x17e8)],
    }
}

fn space(id: u32) -> Result<ResourceMemory, InvalidMemory> {
    let list = entries(id).into_iter().map(|(at, len)| RawEntry { at: Iova::new(at), len });
    Ok(ResourceMemory { bytes: BYTES, backing: Backing::new(list)? })
}

fn memory() -> SparseMemory {
    let mut memory = SparseMemory::new();
    for (at, len) in entries(1).into_iter().chain(entries(2)) {
        memory.fill(ByteRange::new(Iova::new(at), len.into()).unwrap());
    }
    memory
}

/// The bytes of a resource, read from guest memory.
fn bytes(memory: &SparseMemory, id: u32) -> Vec<u8> {
    let mut all = Vec::new();
    for (at, len) in entries(id) {
        let mut part = vec![0; len as usize];
        memory.read(DomainId::DEVICE, Iova::new(at), &mut part).unwrap();
        all.extend(part);
    }
    all
}

fn place(id: u32, address: u64) -> At {
    At::new(StreamSpace::resource(id), address)
}

fn program(stream: Stream) -> Program {
    verify(&stream.finish(), &Limits::default()).unwrap()
}

fn execution(stream: Stream) -> Execution {
    Execution::new(Operands::new(program(stream), space).unwrap(), Duration::from_secs(60))
}

fn at(ms: u64) -> StepContext {
    let now = Duration::from_millis(ms);
    StepContext { now, running: now, budget: 1 << 16 }
}

/// One packet with valid operands.
pub(super) fn packet() -> impl Strategy<Value = Packet> {
    let len = 1_u64..2 * PAGE_SIZE;
    let id = 1_u32..3;
    let word = (1_u32..3, 0..BYTES / 4).prop_map(|(id, word)| place(id, word * 4));
    let wide = (1_u32..3, 0..BYTES / 8).prop_map(|(id, word)| place(id, word * 8));
    let spot = (id.clone(), 0..BYTES, id, 0..BYTES, len);
    let pair = spot.prop_map(|(from, at, to, there, len)| {
        let len = len.min(BYTES - at).min(BYTES - there);
        (place(from, at).range(len), place(to, there))
    });
    prop_oneof![
        (word.clone(), 1_u64..BYTES / 4, any::<u32>()).prop_map(|(at, words, pattern)| {
            let to = at.range((words * 4).min(BYTES - at.address));
            Packet::Fill(job_stream::Fill { to, pattern })
        }),
        pair.clone().prop_map(|(from, to)| Packet::Copy(job_stream::Copy { from, to })),
        (pair, word.clone())
            .prop_map(|((from, _), to)| { Packet::Checksum(job_stream::Checksum { from, to }) }),
        (wide.clone(), any::<u64>()).prop_map(|(at, value)| Packet::Signal(job_stream::Signal {
            wide: true,
            at,
            value
        })),
        (word, any::<u32>()).prop_map(|(at, value)| {
            Packet::Signal(job_stream::Signal { wide: false, at, value: value.into() })
        }),
        (wide.clone(), wide, any::<u64>()).prop_map(|(at, old, operand)| {
            let operation = job_stream::AtomicOperation::Add;
            Packet::Atomic(Atomic { wide: true, operation, at, operand, expected: 0, old: Some(old) })
        }),
    ]
}

/// A program of those packets that the verifier accepts, with a user fence.
fn stream() -> impl Strategy<Value = (Stream, Program)> {
    prop::collection::vec(packet(), 0..12).prop_map(|packets| {
        let fence = Context { mode: None, priority: None, fence: Some(place(1, 8)), done: 77, failed: 78 };
        let mut stream = Stream::new().push(fence);
        for packet in packets {
            let longer = stream.clone().push(packet);
            let taken = verify(&longer.clone().finish(), &Limits::default())
                .is_ok_and(|program| Operands::new(program, space).is_ok());
            stream = if taken { longer } else { stream };
        }
        let program = program(stream.clone());
        (stream, program)
    })
}

proptest! {
    #[test]
    fn random_programs_leave_what_the_twin_leaves_whatever_interrupts_them(
        (stream, program) in stream(),
        budgets in prop::collection::vec(1_usize..5000, 1..40),
        misses in prop::collection::vec((0_usize..7, any::<bool>()), 1..40),
    ) {
        let mut real = memory();
        let mut twin = Buffers::new().with(1, bytes(&real, 1)).with(2, bytes(&real, 2));
        prop_assert_eq!(interpret(&program, &mut twin), Ok(Outcome::Done));

        let pages: Vec<Iova> = [0x1_1000, 0x1_2000, 0x1_3000, 0x2_0000, 0x3_0000, 0x4_0000, 0x4_1000]
            .map(Iova::new).into();
        let mut execution = execution(stream);
        let (mut steps, mut stashed, mut calm) = (0, None, false);
        loop {
            let (page, gone) = misses[steps % misses.len()];
            if gone && !calm && stashed.is_none() {
                stashed = real.take_page(pages[page]).map(|bytes| (pages[page], bytes));
            }
            let step = execution.step(&real, budgets[steps % budgets.len()].into());
            steps += 1;
            // The requested page stays for one step, since no driver unmaps pages at once for ever.
            calm = matches!(step, Step::Missing(_));
            match step {
                Step::Done => break,
                Step::Yield => {}
                Step::Missing(missing) => {
                    let Some((page, bytes)) = stashed.take() else { panic!("{missing} was there") };
                    prop_assert!(missing.range.contains(page));
                    real.put_page(page, bytes);
                }
                other => panic!("{other:?}"),
            }
            prop_assert!(steps < 100_000);
        }
        if let Some((page, bytes)) = stashed {
            real.put_page(page, bytes);
        }
        prop_assert_eq!(bytes(&real, 1), twin.bytes(1));
        prop_assert_eq!(bytes(&real, 2), twin.bytes(2));
    }

    #[test]
    fn a_pin_of_the_working_set_covers_every_step_to_come(
        (stream, _) in stream(), steps_before in 0_usize..20, budget in 1_usize..5000,
    ) {
        let mut real = memory();
        let mut execution = execution(stream);
        for _ in 0..steps_before {
            if execution.step(&real, budget.into()) != Step::Yield {
                return Ok(());
            }
        }
        let whole = |pin: PinRange| PinRange { range: pin.range.page_aligned(), ..pin };
        real.pin(execution.working_set().into_iter().map(whole).collect());
        loop {
            match execution.step(&real, budget.into()) {
                Step::Done => break,
                Step::Yield => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[test]
fn an_operand_that_is_not_in_its_resource_or_not_in_one_piece_is_refused() {
    let refusal = |stream| Operands::new(program(stream), space).unwrap_err();
    let range = place(1, BYTES - 4).range(8);
    let outside = InvalidMemory::OperandOutside { packet: 1, field: "to", range, bytes: BYTES };
    assert_eq!(refusal(Stream::new().nop(0).fill(range, 0)), outside);
    // Byte 0x1818 of resource 2 is at 0x4_0010; the value before it ends there, this one crosses the page's end.
    let range = place(2, 0x804).range(8);
    assert!(Operands::new(program(Stream::new().signal(range.at(), 1)), space).is_ok());
    let split = place(2, 0x1814);
    assert!(Operands::new(program(Stream::new().signal(split, 1)), space).is_ok());
    let crooked = |id| {
        let list = [(0x1002, 6), (0x2000, 0x100)].into_iter();
        let list = list.map(|(at, len)| RawEntry { at: Iova::new(at), len });
        assert_eq!(id, 1);
        Ok(ResourceMemory { bytes: 0x100, backing: Backing::new(list)? })
    };
    for address in [0, 4] {
        let range = place(1, address).range(4);
        let error = Operands::new(program(Stream::new().signal(range.at(), 1)), crooked).unwrap_err();
        assert_eq!(error, InvalidMemory::OperandSplit { packet: 0, field: "at", range });
    }
}

#[test]
fn wait_leaves_the_engine_until_the_value_is_there_and_then_goes_on() {
    let memory = memory();
    let mut job =
        execution(Stream::new().wait(place(1, 0), Compare::Equal, 9, 5_000_000).signal(place(2, 0), 1));
    let until = Duration::from_millis(15);
    assert_eq!(job.step(&memory, at(10)), Step::Waiting { until });
    assert_eq!(job.step(&memory, at(14)), Step::Waiting { until });
    memory.write(DomainId::DEVICE, Iova::new(0x1_3000), &9_u32.to_le_bytes()).unwrap();
    assert!(job.is_waiting());
    assert_eq!(job.step(&memory, at(20)), Step::Yield, "what is behind it may need memory that is not held");
    assert!(!job.is_waiting());
    assert_eq!(job.step(&memory, at(20)), Step::Done);
    assert_eq!(bytes(&memory, 2)[..4], [1, 0, 0, 0]);
}

#[test]
fn a_wait_that_is_over_its_time_fails_and_the_fence_says_so() {
    let memory = memory();
    let fence = Context { mode: None, priority: None, fence: Some(place(1, 8)), done: 1, failed: 2 };
    let stream = Stream::new().push(fence).wait(place(1, 0), Compare::Equal, 9, 5_000_000);
    let mut job = execution(stream.signal(place(2, 0), 1));
    assert_eq!(job.step(&memory, at(10)), Step::Waiting { until: Duration::from_millis(15) });
    assert_eq!(job.step(&memory, at(15)), Step::Yield);
    assert_eq!(job.step(&memory, at(15)), Step::Error(JobError::WaitTimedOut { packet: 1 }));
    assert_eq!(bytes(&memory, 1)[8..16], 2_u64.to_le_bytes());
    assert_eq!(bytes(&memory, 2)[0], pattern(Iova::new(0x2_0800)), "what is behind it is not executed");
}

#[test]
fn spin_counts_the_time_on_its_engine_only() {
    let memory = memory();
    let mut job = execution(Stream::new().spin(SpinBehaviour::Preemptible, 10_000_000));
    let spinning = Step::Spinning { stubborn: false };
    assert_eq!([job.step(&memory, at(0)), job.step(&memory, at(6))], [spinning, spinning]);
    job.left_engine();
    assert_eq!([job.step(&memory, at(100)), job.step(&memory, at(103))], [spinning, spinning]);
    assert_eq!([job.step(&memory, at(104)), job.step(&memory, at(104))], [Step::Yield, Step::Done]);
}

/// Whether a spinning job has to leave is not checked, whatever happens to its device; what follows the SPIN checks it.
#[test]
fn what_is_behind_a_spin_waits_for_the_next_step() {
    let memory = memory();
    let mut job = execution(Stream::new().spin(SpinBehaviour::Stubborn, 1_000_000).signal(place(2, 0), 1));
    assert_eq!(job.step(&memory, at(0)), Step::Spinning { stubborn: true });
    assert_eq!(job.step(&memory, at(1)), Step::Yield);
    assert_eq!(bytes(&memory, 2)[0], pattern(Iova::new(0x2_0800)), "nothing has happened yet");
    assert_eq!(job.step(&memory, at(1)), Step::Done);
}

#[test]
fn a_wedged_spin_is_taken_off_by_force() {
    let memory = memory();
    let mut job = execution(Stream::new().nop(0).spin(SpinBehaviour::Wedged, 0));
    assert_eq!(job.step(&memory, at(0)), Step::Spinning { stubborn: true });
    assert_eq!(job.step(&memory, at(99)), Step::Spinning { stubborn: true });
    assert_eq!(job.step(&memory, at(100)), Step::Error(JobError::Wedged { packet: 1 }));
}

#[test]
fn a_job_that_is_cancelled_ends_at_its_next_step() {
    let memory = memory();
    let mut job = execution(Stream::new().fill(place(1, 0).range(4), 0));
    job.cancellation().store(true, Ordering::Relaxed);
    assert_eq!(job.step(&memory, at(0)), Step::Error(JobError::Killed));
    assert_eq!(bytes(&memory, 1)[0], pattern(Iova::new(0x1_3000)));
}

#[test]
fn the_user_fence_is_written_after_everything_before_it() {
    let memory = memory();
    let fence = Context { mode: None, priority: None, fence: Some(place(1, 8)), done: 77, failed: 78 };
    let mut job = execution(Stream::new().push(fence).fill(place(2, 0).range(BYTES), 0x0101_0101));
    let before = bytes(&memory, 1);
    while job.step(&memory, 500.into()) == Step::Yield {
        assert!(bytes(&memory, 1) == before, "{} bytes were written before", job.bytes_moved());
    }
    assert_eq!(
        (bytes(&memory, 1)[8..16].to_vec(), job.bytes_moved()),
        (77_u64.to_le_bytes().to_vec(), BYTES)
    );
    assert!(bytes(&memory, 2).iter().all(|byte| *byte == 1));
}

#[test]
fn timestamps_are_the_time_of_their_step_in_nanoseconds() {
    let memory = memory();
    assert_eq!(execution(Stream::new().timestamp(place(1, 0))).step(&memory, at(7)), Step::Done);
    assert_eq!(bytes(&memory, 1)[..8], 7_000_000_u64.to_le_bytes());
}

#[test]
fn what_waits_and_spins_is_measured_in_the_time_that_the_device_has_run_for() {
    let memory = memory();
    let ms = Duration::from_millis;
    let at = |running| StepContext { now: ms(1000 * running), running: ms(running), budget: 1 << 16 };
    let mut wait = execution(Stream::new().wait(place(1, 0), Compare::Equal, 9, 5_000_000));
    assert_eq!(wait.step(&memory, at(10)), Step::Waiting { until: ms(15) });
    assert_eq!(wait.step(&memory, at(14)), Step::Waiting { until: ms(15) });
    assert_eq!(wait.step(&memory, at(15)), Step::Error(JobError::WaitTimedOut { packet: 0 }));
    let mut spin = execution(Stream::new().spin(SpinBehaviour::Stubborn, 5_000_000));
    assert_eq!(spin.step(&memory, at(10)), Step::Spinning { stubborn: true });
    assert_eq!(spin.step(&memory, at(14)), Step::Spinning { stubborn: true });
    assert_eq!(spin.step(&memory, at(15)), Step::Yield);
    let mut stamp = execution(Stream::new().timestamp(place(1, 0)));
    assert_eq!(stamp.step(&memory, at(7)), Step::Done);
    assert_eq!(bytes(&memory, 1)[..8], 7_000_000_000_u64.to_le_bytes(), "the time goes on in a stop");
}
