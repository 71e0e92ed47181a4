//! The generated parts of `MANUAL.md`: between `<!-- BEGIN name -->` and `<!-- END name -->`. Knows Markdown.

use std::fmt::Write;

use job_stream::address_space::{COMMANDS, PTE_BITS, RESPONSES};
use job_stream::{
    AsCommandInfo, AtomicOperation, CAPSET_ID, CAPSET_VERSION, Capset, Choice, ChoiceInfo, Compare, Kind,
    Limits, Mode, PACKETS, Packet, PacketInfo, Priority, SpinBehaviour, Stream, verify,
};

use crate::check::{assert_generated, read};

const MANUAL: &str = "MANUAL.md";

pub(crate) const CHOICES: [ChoiceInfo; 5] =
    [Mode::INFO, Priority::INFO, Compare::INFO, AtomicOperation::INFO, SpinBehaviour::INFO];

/// The words of one packet.
pub(crate) fn words(packet: Packet) -> Vec<u32> {
    Stream::new().push(packet).finish()
}

fn opcodes() -> String {
    let mut text = String::from("| opcode | packet | words | |\n|---|---|---|---|\n");
    for packet in PACKETS {
        let (length, more) = packet.length();
        let more = if more { " or more" } else { "" };
        let (opcode, name, summary) = (packet.opcode.raw(), packet.name, packet.text[0].trim());
        let _ = writeln!(
            text,
            "| {opcode:#04x} | [{name}](#{}) | {length}{more} | {summary} |",
            name.to_lowercase()
        );
    }
    text.push_str("| 0x80 to 0xbf | | | Kept for packets about address spaces. Refused. |\n");
    text.push_str("| all others | | | Refused. 0x00 stays so: memory of zeros is no stream. |\n");
    text
}

fn kind(kind: Kind) -> String {
    match kind {
        Kind::U32 => "u32".into(),
        Kind::U64 => "u64".into(),
        Kind::Bits256 => "256 bits".into(),
        Kind::At => "place".into(),
        Kind::OptionalAt => "place or 0".into(),
        Kind::Range => "range".into(),
        Kind::Choice(info) => format!("[{}](#{})", info.name, info.name.to_lowercase()),
        Kind::OptionalChoice(info) => format!("[{}](#{}) or 0", info.name, info.name.to_lowercase()),
        Kind::Payload => "words".into(),
    }
}

fn unit(unit: &str) -> &'static str {
    match unit {
        "Bytes" => "bytes, no alignment",
        "Words" => "32-bit words, aligned to 4",
        "Value32" => "a value of 32 bits",
        "Value64" => "a value of 64 bits",
        "Value" => "a value of 32 bits; with `wide` of 64 bits",
        other => panic!("The manual does not know the unit {other}"),
    }
}

fn position(first: u16, words: u16) -> String {
    match words {
        0 => format!("{first} …"),
        1 => format!("{first}"),
        more => format!("{first}–{}", first + more - 1),
    }
}

fn body(packet: &PacketInfo) -> String {
    let mut text = String::from("| words | field | type | |\n|---|---|---|---|\n");
    let (length, more) = packet.length();
    let length = if more { format!("{length} or more") } else { length.to_string() };
    let opcode = packet.opcode.raw();
    let _ = writeln!(text, "| 0 | header | opcode {opcode:#04x} | Length {length}. |");
    for flag in packet.flags {
        let _ = writeln!(
            text,
            "| 0 | `{}` | flag {} (bit {}) | {} |",
            flag.name,
            flag.bit,
            flag.bit + 8,
            flag.text
        );
    }
    for field in packet.fields {
        let place = position(packet.offset(field.name), field.kind.words());
        let _ = writeln!(text, "| {place} | `{}` | {} | {} |", field.name, kind(field.kind), field.text);
    }
    text
}

fn demands(packet: &PacketInfo) -> String {
    let mut text = String::new();
    for operand in packet.operands {
        let _ =
            writeln!(text, "- Memory: `{}` is {}: {}.", operand.field, operand.access, unit(operand.unit));
    }
    for rule in packet.rules {
        let _ = writeln!(text, "- `{}` {}.", rule.field, rule.text);
    }
    if text.is_empty() { text } else { format!("\n{text}") }
}

/// What each word of a packet is.
fn meanings(packet: &PacketInfo) -> impl Iterator<Item = String> {
    let parts =
        |name: &'static str, kind: Kind| kind.parts().iter().map(move |part| format!("`{name}`{part}"));
    let fields = packet.fields.iter().flat_map(move |field| parts(field.name, field.kind));
    [format!("{}: opcode, flags, length", packet.name)].into_iter().chain(fields)
}

fn example(packet: &PacketInfo) -> String {
    let mut text = String::from("\nExample:\n\n| word | value | |\n|---|---|---|\n");
    let meanings = meanings(packet).map(Some).chain(std::iter::repeat(None));
    for (number, (word, meaning)) in words((packet.example)()).into_iter().zip(meanings).enumerate() {
        let _ = writeln!(text, "| {number} | `{word:#010x}` | {} |", meaning.as_deref().unwrap_or("ignored"));
    }
    text
}

fn packets() -> String {
    let section = |packet: &PacketInfo| {
        let text: Vec<_> = packet.text.iter().map(|line| line.trim()).collect();
        let more = text[1..].join("\n");
        let more = if more.is_empty() { more } else { format!("\n{more}\n") };
        let parts = [body(packet), demands(packet), example(packet)].concat();
        format!("### {}\n\n{}\n{more}\n{parts}\n", packet.name, text[0])
    };
    PACKETS.iter().map(section).collect::<String>().trim_end().to_owned() + "\n"
}

fn choices() -> String {
    let mut text = String::new();
    for choice in CHOICES {
        let _ = writeln!(
            text,
            "### {}\n\n{}\n\n| value | name | |\n|---|---|---|",
            choice.name,
            choice.text.trim()
        );
        for (number, name, meaning) in choice.values {
            let _ = writeln!(text, "| {number} | `{name}` | {} |", meaning.trim());
        }
        text.push('\n');
    }
    text.trim_end().to_owned() + "\n"
}

fn capset() -> String {
    let mut text = format!("Id {CAPSET_ID}, version {CAPSET_VERSION}, {} bytes.\n\n", Capset::BYTES);
    text.push_str("| byte | field | type | |\n|---|---|---|---|\n");
    let mut word = 0;
    for field in Capset::FIELDS {
        let _ = writeln!(text, "| {} | `{}` | {} | {} |", 4 * word, field.name, kind(field.kind), field.text);
        word += field.kind.words();
    }
    text
}

fn commands() -> String {
    let section = |(message, of): (&AsCommandInfo, &str)| {
        let AsCommandInfo { number, name, text, fields } = *message;
        let lines: Vec<_> = text.iter().map(|line| line.trim()).collect();
        let mut section = format!("### {name}\n\n{}\n\n{}\n\n", lines[0], lines[1..].join("\n"));
        section.push_str("| byte | field | type | |\n|---|---|---|---|\n");
        let _ = writeln!(section, "| 0 | header | `virtio_gpu_ctrl_hdr` | Type {number:#x}{of}. |");
        let mut byte = 24;
        for field in fields {
            let _ =
                writeln!(section, "| {byte} | `{}` | {} | {} |", field.name, kind(field.kind), field.text);
            byte += 4 * field.kind.words();
        }
        section + "\n"
    };
    let commands = COMMANDS.iter().map(|command| (command, ", `ctx_id` the context"));
    let responses = RESPONSES.iter().map(|response| (response, ", a response"));
    commands.chain(responses).map(section).collect::<String>().trim_end().to_owned() + "\n"
}

fn page_table_entry() -> String {
    let mut text = String::from("| bits | name | |\n|---|---|---|\n");
    for bits in PTE_BITS {
        let place = if bits.low == bits.high {
            bits.low.to_string()
        } else {
            format!("{}–{}", bits.low, bits.high)
        };
        let _ = writeln!(text, "| {place} | {} | {} |", bits.name, bits.text);
    }
    text.push_str("| all others | | 0. |\n");
    text
}

fn between<'a>(text: &'a str, name: &str) -> (&'a str, &'a str) {
    let (begin, end) = (format!("<!-- BEGIN {name} -->\n"), format!("<!-- END {name} -->"));
    let (before, rest) = text.split_once(&begin).unwrap_or_else(|| panic!("{MANUAL} lacks {begin}"));
    let (_, after) = rest.split_once(&end).unwrap_or_else(|| panic!("{MANUAL} lacks {end}"));
    (before, after)
}

#[test]
fn the_manual_has_the_rows_of_the_table() {
    let parts = [
        ("opcodes", opcodes()),
        ("commands", commands()),
        ("pte", page_table_entry()),
        ("packets", packets()),
        ("choices", choices()),
        ("capset", capset()),
    ];
    let manual = parts.into_iter().fold(read(MANUAL), |text, (name, part)| {
        let (before, after) = between(&text, name);
        format!("{before}<!-- BEGIN {name} -->\n{part}<!-- END {name} -->{after}")
    });
    assert_generated(MANUAL, &manual);
}

/// The words that a table of the manual gives as an example, after the heading of a packet.
fn printed_example(section: &str) -> Vec<u32> {
    let example = section.split_once("Example:").map_or("", |(_, example)| example);
    let values = example.lines().filter_map(|line| line.split('`').nth(1)?.strip_prefix("0x"));
    values.map_while(|value| u32::from_str_radix(value, 16).ok()).collect()
}

#[test]
fn an_example_of_the_manual_decodes_to_the_packet_that_it_is_of() {
    let manual = read(MANUAL);
    let limits = Limits { operand_bytes: u64::MAX, ..Limits::default() };
    for packet in PACKETS {
        let (_, section) = manual.split_once(&format!("\n### {}\n", packet.name)).unwrap();
        let section = section.split_once("\n### ").map_or(section, |(section, _)| section);
        let program = verify(&printed_example(section), &limits).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(program.packets(), [(packet.example)()]);
    }
}

#[test]
fn the_streams_of_the_manual_are_accepted_and_have_the_packets_that_they_say() {
    let manual = read(MANUAL);
    let streams: Vec<_> = manual.split("```job-stream\n").skip(1).collect();
    assert!(!streams.is_empty());
    for stream in streams {
        let lines = stream.lines().take_while(|line| *line != "```").map(|line| line.split_whitespace());
        let (mut words, mut names) = (Vec::new(), Vec::new());
        for mut line in lines {
            words.push(u32::from_str_radix(line.next().unwrap(), 16).unwrap());
            let name = line.next().and_then(|name| name.strip_suffix(','));
            names.extend(name.filter(|name| PACKETS.iter().any(|packet| packet.name == *name)));
        }
        let program = verify(&words, &Limits::default()).unwrap_or_else(|error| panic!("{error}"));
        assert!(program.packets().iter().map(|packet| packet.opcode().name()).eq(names));
    }
}
