//! What the verifier refuses, and exactly how it says so: packet, word, field and reason.

use job_stream::{
    At, AtomicOperation, Compare, Context, Limits, Mode, ModeSet, Opcode, PacketSet, Problem, Range, Space,
    SpinBehaviour, Stream, StreamError, Wait, verify, verify_bytes,
};

const fn place(resource: u32, address: u64) -> At {
    At::new(Space::resource(resource), address)
}

const fn range(resource: u32, address: u64, length: u64) -> Range {
    Range::new(Space::resource(resource), address, length)
}

/// Verifies a stream by the default limits, and gives what is wrong with it.
fn refusal(stream: Stream) -> StreamError {
    verify(&stream.finish(), &Limits::default()).unwrap_err()
}

/// A refusal of a packet that begins with the word `header`.
fn of(packet: usize, opcode: Opcode, word: usize, field: &'static str, problem: Problem) -> StreamError {
    StreamError::Packet { packet, opcode: opcode.raw(), word, field, problem }
}

fn of_words(words: &[u32]) -> StreamError {
    verify(words, &Limits::default()).unwrap_err()
}

#[test]
fn a_stream_of_nothing_is_a_job_that_does_nothing() {
    assert_eq!(verify(&[], &Limits::default()).unwrap().packets(), []);
}

#[test]
fn bytes_that_are_no_words_are_refused() {
    assert_eq!(verify_bytes(&[1, 0, 1, 0, 9], &Limits::default()), Err(StreamError::NotWords { bytes: 5 }));
    assert!(verify_bytes(&[1, 0, 1, 0], &Limits::default()).is_ok());
}

#[test]
fn a_stream_is_bounded_in_words_and_in_packets() {
    let limits = Limits { words: 4, packets: 3, ..Limits::default() };
    let nops = |count| (0..count).fold(Stream::new(), |stream, _| stream.nop(0)).finish();
    assert_eq!(verify(&nops(5), &limits), Err(StreamError::TooManyWords { words: 5, limit: 4 }));
    let too_many = of(3, Opcode::Nop, 3, "header", Problem::TooManyPackets { limit: 3 });
    assert_eq!(verify(&nops(4), &limits), Err(too_many));
    assert_eq!(verify(&nops(3), &limits).unwrap().packets().len(), 3);
}

#[test]
fn memory_of_zeros_and_unknown_or_reserved_opcodes_are_refused() {
    let header =
        |opcode, problem| StreamError::Packet { packet: 1, opcode, word: 1, field: "header", problem };
    assert_eq!(of_words(&[0x0001_0001, 0]), header(0, Problem::UnknownOpcode));
    assert_eq!(of_words(&[0x0001_0001, 0x0001_0031]), header(0x31, Problem::UnknownOpcode));
    for opcode in [0x80, 0xbf] {
        let words = [0x0001_0001, 0x0001_0000 | u32::from(opcode)];
        assert_eq!(of_words(&words), header(opcode, Problem::ReservedOpcode));
    }
}

#[test]
fn a_packet_that_the_device_does_not_offer_is_refused() {
    let limits = Limits { offered: PacketSet::NONE.with(Opcode::Nop), ..Limits::default() };
    let words = Stream::new().nop(3).barrier().finish();
    assert_eq!(verify(&words, &limits), Err(of(1, Opcode::Barrier, 4, "header", Problem::NotOffered)));
}

#[test]
fn a_length_other_than_the_packets_own_is_refused() {
    let header = |opcode, problem| of(0, opcode, 0, "header", problem);
    let length = |found, expected| Problem::Length { found, expected };
    assert_eq!(of_words(&[0x0000_0001]), header(Opcode::Nop, length(0, 1)));
    assert_eq!(of_words(&[0x0002_0002, 0]), header(Opcode::Barrier, length(2, 1)));
    assert_eq!(of_words(&[0x0003_0023, 0, 0]), header(Opcode::Timestamp, length(3, 4)));
}

#[test]
fn a_packet_that_ends_past_the_stream_is_refused() {
    let truncated = |missing| Problem::Truncated { missing };
    assert_eq!(of_words(&[0x0004_0023, 3]), of(0, Opcode::Timestamp, 0, "header", truncated(2)));
    assert_eq!(of_words(&[0xffff_0001]), of(0, Opcode::Nop, 0, "header", truncated(65_534)));
}

#[test]
fn flags_that_mean_nothing_are_refused() {
    let unknown = |flags| Problem::UnknownFlags { flags };
    assert_eq!(of_words(&[0x0001_8102]), of(0, Opcode::Barrier, 0, "header", unknown(0x81)));
    let mut words = Stream::new().signal64(place(3, 0), 1).finish();
    words[0] |= 0x0200;
    assert_eq!(of_words(&words), of(0, Opcode::Signal, 0, "header", unknown(0x02)));
}

#[test]
fn an_operand_needs_a_space() {
    let to = |space, word| (Stream::new().nop(0).copy(range(1, 0, 1), At::new(space, 0)), word);
    let (stream, word) = to(Space::NONE, 7);
    assert_eq!(refusal(stream), of(1, Opcode::Copy, word, "to", Problem::NoSpace));
    let stream = Stream::new().add(place(3, 0), 1, Some(At::new(Space::NONE, 8)));
    assert_eq!(refusal(stream), of(0, Opcode::Atomic, 9, "old", Problem::AddressWithoutSpace { address: 8 }));
}

#[test]
fn an_operand_lies_in_an_address_space_only_if_there_are_any_and_within_its_48_bits() {
    let last = (1 << 48) - 1;
    let fill = |address| Stream::new().fill(Range::new(Space::address_space(9), address, 8), 0).finish();
    assert!(verify(&fill(last - 7), &Limits::default()).is_ok());
    let range = Range::new(Space::address_space(9), last - 3, 8);
    let beyond = of(0, Opcode::Fill, 1, "to", Problem::BeyondGva { range });
    assert_eq!(verify(&fill(last - 3), &Limits::default()), Err(beyond));
    let none = of(0, Opcode::Fill, 1, "to", Problem::NoAddressSpaces { space: range.space });
    assert_eq!(verify(&fill(0), &Limits { address_spaces: 0, ..Limits::default() }), Err(none));
}

#[test]
fn an_operand_has_bytes_and_not_too_many_and_does_not_wrap() {
    let limit = Limits::default().operand_bytes;
    let fill = |address, length| refusal(Stream::new().fill(range(1, address, length), 0));
    let to = |problem| of(0, Opcode::Fill, 1, "to", problem);
    assert_eq!(fill(0, 0), to(Problem::Empty));
    assert_eq!(fill(0, limit + 4), to(Problem::TooLong { length: limit + 4, limit }));
    assert_eq!(fill(u64::MAX - 3, 8), to(Problem::Wraps { range: range(1, u64::MAX - 3, 8) }));
    assert!(verify(&Stream::new().fill(range(1, u64::MAX - 3, 4), 0).finish(), &Limits::default()).is_ok());
    assert!(verify(&Stream::new().fill(range(1, 0, limit), 0).finish(), &Limits::default()).is_ok());
}

#[test]
fn words_and_values_are_aligned_to_their_size_and_bytes_to_nothing() {
    let unaligned = |range, unit| Problem::Unaligned { range, unit };
    let refused = |stream, opcode, word, field, range, unit| {
        assert_eq!(refusal(stream), of(0, opcode, word, field, unaligned(range, unit)));
    };
    refused(Stream::new().fill(range(1, 2, 4), 0), Opcode::Fill, 1, "to", range(1, 2, 4), 4);
    refused(Stream::new().fill(range(1, 4, 6), 0), Opcode::Fill, 1, "to", range(1, 4, 6), 4);
    refused(Stream::new().signal(place(1, 2), 0), Opcode::Signal, 1, "at", range(1, 2, 4), 4);
    refused(Stream::new().signal64(place(1, 4), 0), Opcode::Signal, 1, "at", range(1, 4, 8), 8);
    refused(Stream::new().timestamp(place(1, 4)), Opcode::Timestamp, 1, "at", range(1, 4, 8), 8);
    refused(
        Stream::new().checksum(range(2, 1, 3), place(1, 1)),
        Opcode::Checksum,
        6,
        "to",
        range(1, 1, 4),
        4,
    );
    refused(
        Stream::new().add64(place(1, 0), 1, Some(place(1, 12))),
        Opcode::Atomic,
        9,
        "old",
        range(1, 12, 8),
        8,
    );
    let unbound = Stream::new().copy(range(1, 1, 3), place(2, 7)).signal(place(1, 4), 0);
    assert!(verify(&unbound.finish(), &Limits::default()).is_ok());
}

#[test]
fn what_a_packet_writes_does_not_overlap_its_other_operand() {
    let overlaps = |range, other| Problem::Overlaps { range, other };
    let copy = |from: u64, to: u64| {
        verify(&Stream::new().copy(range(1, from, 16), place(1, to)).finish(), &Limits::default())
    };
    for (from, to) in [(0, 0), (0, 15), (15, 0)] {
        assert_eq!(copy(from, to), Err(of(0, Opcode::Copy, 6, "to", overlaps(range(1, to, 16), "from"))));
    }
    assert!(copy(0, 16).is_ok() && copy(16, 0).is_ok());
    let stream = Stream::new().checksum(range(1, 0, 4), place(1, 0));
    assert_eq!(refusal(stream), of(0, Opcode::Checksum, 6, "to", overlaps(range(1, 0, 4), "from")));
    let stream = Stream::new().add64(place(1, 8), 1, Some(place(1, 8)));
    assert_eq!(refusal(stream), of(0, Opcode::Atomic, 9, "old", overlaps(range(1, 8, 8), "at")));
    assert!(verify(&Stream::new().copy(range(1, 0, 16), place(2, 0)).finish(), &Limits::default()).is_ok());
}

#[test]
fn the_context_packet_comes_first_and_asks_for_what_there_is() {
    let rule = |value, rule| Problem::Rule { value, rule };
    let late = Stream::new().nop(0).mode(Mode::Fault);
    let first = rule(0x000a_0003, "must stand in the first packet of the stream");
    assert_eq!(refusal(late), of(1, Opcode::Context, 1, "header", first));
    let offered = rule(5, "must be one that the device offers");
    assert_eq!(
        refusal(Stream::new().mode(Mode::RegistrationCache)),
        of(0, Opcode::Context, 1, "mode", offered)
    );
    let modes = ModeSet::COHERENT.with(Mode::RegistrationCache);
    let words = Stream::new().mode(Mode::RegistrationCache).finish();
    assert!(verify(&words, &Limits { modes, ..Limits::default() }).is_ok());
    let unfenced = Context { mode: None, priority: None, fence: None, done: 0, failed: 7 };
    let without = rule(7, "must be 0 if there is no fence");
    assert_eq!(refusal(Stream::new().push(unfenced)), of(0, Opcode::Context, 8, "failed", without));
}

#[test]
fn a_word_that_is_none_of_the_named_values_is_refused() {
    let mut words = Stream::new().wait(place(1, 0), Compare::Equal, 1, 0).finish();
    words[4] = 7;
    let problem = Problem::Choice { choice: "Compare", value: 7 };
    assert_eq!(of_words(&words), of(0, Opcode::Wait, 4, "compare", problem));
    let mut words = Stream::new().mode(Mode::Strict).finish();
    words[1] = 6;
    assert_eq!(
        of_words(&words),
        of(0, Opcode::Context, 1, "mode", Problem::Choice { choice: "Mode", value: 6 })
    );
}

#[test]
fn values_fit_where_they_go_and_times_within_the_limits() {
    let rule = |value, rule| Problem::Rule { value, rule };
    let narrow = "must fit in 32 bits without the flag `wide`";
    let wait = Wait { wide: false, at: place(1, 0), compare: Compare::Equal, value: 0, mask: 1, timeout: 0 };
    let refused = |wait: Wait| refusal(Stream::new().push(wait));
    assert_eq!(
        refused(Wait { value: 1 << 32, ..wait }),
        of(0, Opcode::Wait, 5, "value", rule(1 << 32, narrow))
    );
    assert_eq!(
        refused(Wait { mask: 1 << 32, ..wait }),
        of(0, Opcode::Wait, 7, "mask", rule(1 << 32, narrow))
    );
    assert_eq!(refused(Wait { mask: 0, ..wait }), of(0, Opcode::Wait, 7, "mask", rule(0, "must not be 0")));
    let (wait_ns, spin_ns) = (Limits::default().wait_ns, Limits::default().spin_ns);
    let long = "must not be longer than the device allows";
    let timeout = rule(wait_ns + 1, long);
    assert_eq!(refused(Wait { timeout: wait_ns + 1, ..wait }), of(0, Opcode::Wait, 9, "timeout", timeout));
    let spin = |behaviour, duration| refusal(Stream::new().spin(behaviour, duration));
    let duration = |value, text| of(0, Opcode::Spin, 2, "duration", rule(value, text));
    assert_eq!(spin(SpinBehaviour::Preemptible, spin_ns + 1), duration(spin_ns + 1, long));
    assert_eq!(spin(SpinBehaviour::Wedged, 1), duration(1, "must be 0 for `wedged`, which has no end"));
}

#[test]
fn an_addition_expects_nothing() {
    let mut words = Stream::new().cas(place(1, 0), 5, 6, None).finish();
    words[1] = AtomicOperation::Add as u32;
    let problem = Problem::Rule { value: 5, rule: "must be 0 unless the operation is `cas`" };
    assert_eq!(of_words(&words), of(0, Opcode::Atomic, 7, "expected", problem));
}

#[test]
fn a_refusal_reads_like_a_sentence() {
    let text = |stream| refusal(stream).to_string();
    let nops = || Stream::new().nop(4).barrier();
    assert_eq!(
        text(nops().copy(range(1, 0, 16), place(1, 8))),
        "Packet 2 (COPY), to at word 12: 0x8+0x10 of resource 1 overlaps `from`"
    );
    assert_eq!(
        text(nops().wait(place(1, 0), Compare::Equal, 0, u64::MAX)),
        "Packet 2 (WAIT), timeout at word 15: 0xffffffffffffffff breaks the rule that it must not be longer than \
         the device allows"
    );
    assert_eq!(
        of_words(&[0x0001_0001, 0x00ff_0000]).to_string(),
        "Packet 1 (opcode 0x00), header at word 1: no packet has this opcode"
    );
}
