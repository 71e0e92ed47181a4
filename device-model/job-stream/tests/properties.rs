//! What holds for all streams: what is encoded is decoded again, no words make the verifier panic, each word belongs
//! to one packet, and a word that is wrong is blamed on its own packet. Packets are made from their rows, so a new
//! row is tested too.

use job_stream::{Kind, Limits, PACKETS, Packet, PacketInfo, Stream, StreamError, verify};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::strategy::Union;
use proptest::test_runner::{Config, TestRunner};

fn numbers(values: impl Strategy<Value = u64> + 'static) -> BoxedStrategy<Vec<u32>> {
    values.prop_map(|value| vec![value as u32, (value >> 32) as u32]).boxed()
}

/// Words of a field that have a chance to be accepted.
fn field(kind: Kind) -> BoxedStrategy<Vec<u32>> {
    let joined = |parts: Vec<BoxedStrategy<Vec<u32>>>| parts.prop_map(|words| words.concat()).boxed();
    let space = || (1_u32..0x8000_0000).prop_map(|space| vec![space]).boxed();
    let address = || numbers((0..u64::MAX / 16).prop_map(|address| 8 * address));
    match kind {
        Kind::U32 => any::<u32>().prop_map(|word| vec![word]).boxed(),
        Kind::U64 => numbers(prop_oneof![Just(0), 0..10_u64, any::<u32>().prop_map(u64::from), any::<u64>()]),
        Kind::At => joined(vec![space(), address()]),
        Kind::OptionalAt => prop_oneof![Just(vec![0; 3]), field(Kind::At)].boxed(),
        Kind::Range => joined(vec![field(Kind::At), numbers((1..1_u64 << 20).prop_map(|length| 4 * length))]),
        Kind::Choice(info) => (0..info.values.len()).prop_map(|at| vec![info.values[at].0]).boxed(),
        Kind::OptionalChoice(info) => prop_oneof![Just(vec![0]), field(Kind::Choice(info))].boxed(),
        Kind::Payload => prop::collection::vec(any::<u32>(), 0..5).boxed(),
        Kind::Bits256 => prop::collection::vec(any::<u32>(), 8).boxed(),
    }
}

/// Words with the shape of a packet, and flags that it knows.
fn shaped(info: &'static PacketInfo) -> impl Strategy<Value = Vec<u32>> {
    let body: Vec<_> = info.fields.iter().map(|row| field(row.kind)).collect();
    (body, any::<u8>()).prop_map(move |(body, flags)| {
        let body = body.concat();
        let length = body.len() as u32 + 1;
        let flags = u32::from(flags & info.known_flags());
        [vec![u32::from(info.opcode.raw()) | flags << 8 | length << 16], body].concat()
    })
}

/// Packets of a row that the verifier accepts.
fn accepted(info: &'static PacketInfo) -> impl Strategy<Value = Packet> {
    shaped(info).prop_filter_map("refused", |words| {
        let program = verify(&words, &Limits::default()).ok()?;
        program.packets().first().copied()
    })
}

/// Streams of packets that may stand anywhere, after one that may have to come first.
fn packets() -> impl Strategy<Value = Vec<Packet>> {
    let anywhere = |packet: &Packet| {
        let words = Stream::new().nop(0).push(*packet).finish();
        verify(&words, &Limits::default()).is_ok()
    };
    let rows = || Union::new(PACKETS.iter().map(|info| accepted(info).boxed()));
    let more = prop::collection::vec(rows().prop_filter("only first", anywhere), 0..8);
    (rows(), more).prop_map(|(first, more)| [vec![first], more].concat())
}

fn stream(packets: &[Packet]) -> Vec<u32> {
    packets.iter().fold(Stream::new(), |stream, packet| stream.push(*packet)).finish()
}

/// Words that look like packets more often than noise does.
fn half_plausible() -> impl Strategy<Value = Vec<u32>> {
    let row = select(PACKETS).prop_flat_map(|info| {
        let garbled = (
            shaped(PACKETS.iter().find(|row| row.opcode == info.opcode).unwrap()),
            any::<Index>(),
            any::<u32>(),
        );
        garbled.prop_map(|(mut words, at, value)| {
            let at = at.index(words.len());
            words[at] ^= value & value.rotate_left(7) & value.rotate_left(13);
            words
        })
    });
    prop::collection::vec(row, 0..6).prop_map(|packets| packets.concat())
}

#[test]
fn every_row_is_decoded_as_it_was_encoded() {
    for info in PACKETS {
        let mut runner = TestRunner::new(Config::with_cases(200));
        let result = runner.run(&accepted(info), |packet| {
            let words = Stream::new().push(packet).finish();
            let program = verify(&words, &Limits::default()).unwrap();
            prop_assert_eq!(program.packets(), &[packet][..]);
            prop_assert_eq!(packet.opcode(), info.opcode);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{}: {error}", info.name));
    }
}

proptest! {
    #[test]
    fn a_stream_is_decoded_as_it_was_built(packets in packets()) {
        let program = verify(&stream(&packets), &Limits::default()).unwrap();
        prop_assert_eq!(program.packets(), packets);
    }

    #[test]
    fn no_words_make_the_verifier_panic(words: Vec<u32>) {
        let _ = verify(&words, &Limits::default());
    }

    #[test]
    fn each_word_belongs_to_exactly_one_packet(words in half_plausible()) {
        match verify(&words, &Limits::default()) {
            // NOPs forget what their payload was, but not how long.
            Ok(program) => prop_assert_eq!(stream(program.packets()).len(), words.len()),
            Err(StreamError::Packet { packet, word, .. }) => prop_assert!(word < words.len() && packet <= word),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }

    #[test]
    fn a_wrong_word_is_blamed_on_its_own_packet(packets in packets(), at: Index, value: u32) {
        let mut words = stream(&packets);
        let at = at.index(words.len());
        words[at] ^= value;
        let starts = packets.iter().scan(0, |next, packet| {
            let start = *next;
            *next += stream(&[*packet]).len();
            Some(start)
        });
        let (owner, start) = starts.enumerate().take_while(|(_, start)| *start <= at).last().unwrap();
        match verify(&words, &Limits::default()) {
            Ok(program) => prop_assert_eq!(&program.packets()[..owner], &packets[..owner]),
            // A length that is wrong and still plausible may show only behind the packet.
            Err(StreamError::Packet { packet, .. }) if at == start => prop_assert!(packet >= owner),
            Err(StreamError::Packet { packet, opcode, .. }) => {
                prop_assert_eq!((packet, opcode), (owner, packets[owner].opcode().raw()));
            }
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
