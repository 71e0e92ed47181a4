//! A tool on the control socket: whatever it says, in whatever pieces, each line gets one answer, which is a JSON
//! object of bounded size with the `id` of the line, and the device keeps no more for it than it may.
//!
//! The input: a byte that says how large the pieces are and how slowly the tool reads, then what it says. The byte
//! 0xff, which stands in no JSON text, repeats the byte before it: 300 times the byte behind it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use device_model::telemetry::stats::Stats;
use mirrorgpu::control::Hooks;
use mirrorgpu::control::conversation::Conversation;
use mirrorgpu::fault_injection::Injection;
use mirrorgpu::telemetry::instruments::Instruments;
use serde_json::{Map, Value};

/// What repeats the byte before it.
const REPEAT: u8 = 0xff;
/// Most pieces of what is said: each is a turn of the control thread.
const MOST_PIECES: usize = 4096;
/// Longest line that is answered (`backend/CONTROL.md`), and what one read may add to it before that is noticed.
const LONGEST_LINE: usize = 64 << 10;
const READ: usize = 4 << 10;
/// Most bytes of an answer apart from what it gives back of the line, which JSON may write six times as long.
const LONGEST_ANSWER: usize = 64 << 10;

/// Plays `bytes`.
pub fn run(bytes: &[u8]) {
    let Some((how, rest)) = bytes.split_first() else { return };
    let said = harmless(&expanded(rest));
    let piece = (1 << (how & 0xf)).max(said.len() / MOST_PIECES);
    let room = 1 << (how >> 4);
    let injection = Arc::new(Injection::default());
    let stops = Arc::new(AtomicU64::new(0));
    let mut conversation = Conversation::new(hooks(&injection, &stops));
    for bytes in said.chunks(piece) {
        conversation.say(bytes, room);
        assert!(conversation.kept() <= said.len() + 7 * LONGEST_LINE + LONGEST_ANSWER, "Too much is kept");
    }
    conversation.hang_up();
    assert!(conversation.is_over(), "The connection outlives what the tool says");
    check(&said, conversation.heard(), stops.load(Ordering::Relaxed));
    check_injection(&injection);
}

fn hooks(injection: &Arc<Injection>, stops: &Arc<AtomicU64>) -> Hooks {
    static SHARED: OnceLock<(Arc<Stats>, Arc<Instruments>)> = OnceLock::new();
    let (stats, instruments) = SHARED.get_or_init(|| {
        let stats = Arc::new(Stats::default());
        let instruments = Instruments::start(1, None, Arc::clone(&stats)).expect("A thread can be started");
        (stats, instruments)
    });
    let stops = Arc::clone(stops);
    Hooks {
        stats: Arc::clone(stats),
        instruments: Arc::clone(instruments),
        injection: Arc::clone(injection),
        stop: Box::new(move || {
            stops.fetch_add(1, Ordering::Relaxed);
        }),
    }
}

fn expanded(bytes: &[u8]) -> Vec<u8> {
    let mut expanded = Vec::new();
    let mut rest = bytes.iter();
    while let Some(byte) = rest.next() {
        match (byte, expanded.last()) {
            (&REPEAT, Some(&before)) => {
                let times = rest.next().map_or(0, |times| usize::from(*times) * 300);
                // A few lines of the longest kind.
                let room = (4 * LONGEST_LINE).saturating_sub(expanded.len());
                expanded.extend(std::iter::repeat_n(before, times.min(room)));
            }
            _ => expanded.push(*byte),
        }
    }
    expanded
}

/// Leaves out the lines that would write a file wherever the fuzzer likes.
fn harmless(said: &[u8]) -> Vec<u8> {
    let writes =
        |line: &[u8]| object(line).is_some_and(|object| object.get("execute") == Some(&"record".into()));
    let kept: Vec<&[u8]> = said.split(|byte| *byte == b'\n').filter(|line| !writes(line)).collect();
    kept.join(&b'\n')
}

fn object(line: &[u8]) -> Option<Map<String, Value>> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(object)) => Some(object),
        _ => None,
    }
}

/// Compares what was heard with what was said, line by line.
fn check(said: &[u8], heard: &[u8], stops: u64) {
    let mut answers = heard.split(|byte| *byte == b'\n');
    assert_eq!(answers.next_back().map(<[u8]>::len), Some(0), "An answer without its end");
    let mut quits = 0;
    for line in said.split(|byte| *byte == b'\n') {
        let is_long = line.len() > LONGEST_LINE;
        if line.trim_ascii().is_empty() && !is_long {
            continue;
        }
        // A line of spaces that is a little too long may be skipped or refused.
        let Some(answer) = answers.next() else {
            assert!(line.trim_ascii().is_empty(), "A line has no answer: {}", line.escape_ascii());
            continue;
        };
        assert!(answer.len() <= 6 * line.len() + LONGEST_ANSWER, "An answer of {} bytes", answer.len());
        let answer = object(answer).expect("An answer is a JSON object");
        let is_refused =
            is_long && answer["error"]["desc"].as_str().is_some_and(|desc| desc.starts_with("A line has"));
        assert!(is_refused || line.len() <= LONGEST_LINE + READ, "A line that is too long was answered");
        if !is_refused {
            quits += check_answer(line, &answer);
        }
    }
    assert_eq!(answers.next(), None, "There are more answers than lines");
    assert_eq!(stops, quits, "The process was stopped by something else than quit");
}

/// Compares an answer with its line; how often that asked the process to end.
fn check_answer(line: &[u8], answer: &Map<String, Value>) -> u64 {
    assert!(answer.contains_key("return") != answer.contains_key("error"), "{answer:?}");
    let request = object(line);
    let id = request.as_ref().and_then(|request| request.get("id"));
    assert_eq!(answer.get("id"), id, "The id does not come back");
    assert_eq!(answer.len(), 1 + usize::from(id.is_some()));
    let is_quit = request.is_some_and(|request| request.get("execute") == Some(&"quit".into()));
    u64::from(is_quit && answer.contains_key("return"))
}

/// What is on can be turned on by what it says of itself.
fn check_injection(injection: &Injection) {
    for row in injection.list() {
        let Some(on) = row.on else { continue };
        let other = Injection::default();
        let argument = Some(on.as_str()).filter(|on| !on.is_empty());
        other.set(row.name, argument).expect("What is on can be turned on");
        let again = other.list().into_iter().find(|other| other.name == row.name).and_then(|other| other.on);
        assert_eq!(again, Some(on), "{} is turned on as something else", row.name);
    }
}

/// What tools say.
pub fn seeds() -> Vec<(String, Vec<u8>)> {
    let with = |how: u8, said: &[u8]| [&[how], said].concat();
    let seed = |name: &str, bytes: Vec<u8>| (name.to_owned(), bytes);
    let all = [
        "audit",
        "contexts",
        "faults",
        "findings",
        "iotlb",
        "jobs",
        "query-commands",
        "quit",
        "stats",
        "violations",
    ];
    let all: String = all.iter().map(|name| format!("{{\"execute\": \"{name}\", \"id\": 1}}\n")).collect();
    vec![
        seed("all-commands", with(0xff, all.as_bytes())),
        seed("byte-by-byte", with(0x30, b"{\"execute\": \"stats\", \"id\": {\"any\": [1]}}\n\n  \nx\n")),
        seed(
            "inject",
            with(
                0xfc,
                b"{\"execute\": \"inject\", \"arguments\": {\"on\": \"delay-fence\", \"argument\": \"20ms\"}}\n\
                  {\"execute\": \"inject\", \"arguments\": {\"on\": \"skip-pin\", \"off\": \"delay-fence\"}}\n",
            ),
        ),
        seed("arguments", with(0x5a, b"{\"execute\": \"iotlb\", \"arguments\": {\"limit\": 5}, \"id\": null}")),
        seed("a-line-too-long", with(0x9f, b"{\"id\": \"x\xff\xffy\n{\"execute\": \"quit\"}\n[\xff\x10\n")),
    ]
}
