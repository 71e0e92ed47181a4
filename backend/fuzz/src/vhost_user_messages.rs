//! Messages of a front-end. Half of the inputs are bytes of the main socket ([`crate::raw_messages`]); the other half
//! become a script of messages, answers, misses, stops and changes of the memory table, which is played on the table of
//! misses and the mirror beside a naive twin ([`crate::iotlb_session`]).

use arbitrary::Unstructured;

use crate::iotlb_session::{self, Step};
use crate::raw_messages;

/// Most steps of a script.
const STEPS: usize = 300;

/// Plays `bytes`.
pub fn run(bytes: &[u8]) {
    match bytes.split_first() {
        Some((how, rest)) if how & 1 == 0 => raw_messages::run(usize::from(how >> 1) + 1, rest),
        Some((_, rest)) => iotlb_session::play(script(rest)),
        None => {}
    }
}

fn script(bytes: &[u8]) -> Vec<Step> {
    let mut u = Unstructured::new(bytes);
    let mut script = Vec::new();
    while !u.is_empty() && script.len() < STEPS {
        let Ok(next) = Step::decode(&mut u) else { break };
        script.push(next);
    }
    script
}

/// Messages and scripts to begin with.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let message = |code: u32, flags: u32, payload: &[u8]| {
        let words = [code, flags, payload.len() as u32];
        [words.map(u32::to_ne_bytes).concat(), payload.to_vec()].concat()
    };
    let iotlb = |kind: u8, iova: u64, size: u64, uaddr: u64, permission: u8| {
        let mut payload = [iova, size, uaddr].map(u64::to_ne_bytes).concat();
        payload.extend([permission, kind, 0, 0, 0, 0, 0, 0]);
        message(22, 0x9, &payload)
    };
    let stream = [
        message(2, 0x9, &(1_u64 << 33).to_ne_bytes()),
        message(1, 0x1, &[]),
        iotlb(2, 0x1000, 0x1000, 0x7f00_0000_1000, 3),
        iotlb(3, 0x1000, 0, 0, 0),
        iotlb(3, 0xfef0_0000, 0xffff_ffff_0110_0000, 0, 0),
        message(34, 0x1, &[0; 100]),
    ]
    .concat();
    let mut seeds = vec![
        ("messages".to_owned(), [&[0xfe][..], &stream].concat()),
        ("messages-in-pieces".to_owned(), [&[0x08][..], &stream].concat()),
        ("a-reply".to_owned(), [&[0xfe][..], &message(22, 0x5, &[])].concat()),
        ("too-long".to_owned(), [&[0xfe][..], &message(22, 0x1, &[0; 0x1001])].concat()),
    ];
    let scripts = device_model::testing::noise::noise(6, 1000).into_iter();
    seeds.extend(scripts.map(|(name, bytes)| (format!("script-{name}"), [&[1][..], &bytes].concat())));
    seeds
}
