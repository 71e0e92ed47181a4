//! `include/mirrorgpu_job.h`, made from the table. Knows C.

use std::fmt::Write;

use job_stream::address_space::{
    COMMANDS, CREATE_FAULTS, FAULT_FAIL, FAULT_REPLAY, GVA_BITS, INVALIDATE_LEAVES, PTE_BITS, RESPONSES,
};
use job_stream::{AsCommandInfo, CAPSET_ID, CAPSET_VERSION, Capset, ChoiceInfo, Kind, PACKETS, PacketInfo};

use crate::check::assert_generated;
use crate::manual::CHOICES;

pub(crate) const HEADER: &str = "include/mirrorgpu_job.h";

const TOP: &str = "\
/* SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause */
/*
 * The job stream of MirrorGPU, for guests: see MANUAL.md.
 *
 * Generated from the table of packets. Do not edit:
 * UPDATE_GENERATED=1 cargo test -p job-stream --test generated
 *
 * A stream is built by one mirrorgpu_job_put_*() after the other. Each takes
 * where the next word goes, and gives back where the one after the packet goes.
 * There has to be room: MIRRORGPU_JOB_*_WORDS says how much.
 */
#ifndef MIRRORGPU_JOB_H
#define MIRRORGPU_JOB_H

#include <stdint.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error \"The words of a job stream are little-endian\"
#endif
";

const BASE: &str = "\
/*
 * A place in memory: the space is a resource, and the address an offset in it;
 * or it is an address space, and the address one of its own.
 */
struct mirrorgpu_job_at {
\tuint32_t space;
\tuint64_t address;
};

struct mirrorgpu_job_range {
\tuint32_t space;
\tuint64_t address;
\tuint64_t length;
};

/* The space that the address space with this asid is. */
#define MIRRORGPU_JOB_ADDRESS_SPACE(asid) (0x80000000u | (uint32_t)(asid))

/* The first word of a packet; the length is in words and counts this one. */
#define MIRRORGPU_JOB_HEADER(opcode, flags, length) \\
\t((uint32_t)(opcode) | (uint32_t)(flags) << 8 | (uint32_t)(length) << 16)

static inline uint32_t *mirrorgpu_job_put_u64(uint32_t *words, uint64_t value)
{
\twords[0] = (uint32_t)value;
\twords[1] = (uint32_t)(value >> 32);
\treturn words + 2;
}

static inline uint32_t *mirrorgpu_job_put_at(uint32_t *words, struct mirrorgpu_job_at at)
{
\t*words++ = at.space;
\treturn mirrorgpu_job_put_u64(words, at.address);
}

static inline uint32_t *mirrorgpu_job_put_range(uint32_t *words, struct mirrorgpu_job_range range)
{
\t*words++ = range.space;
\twords = mirrorgpu_job_put_u64(words, range.address);
\treturn mirrorgpu_job_put_u64(words, range.length);
}
";

/// A name of the table in the manner of C constants: `SpinBehaviour` and `registration-cache` as well.
pub(crate) fn constant(name: &str) -> String {
    let mut text = String::new();
    for (index, letter) in name.chars().enumerate() {
        if letter.is_uppercase() && index > 0 && !text.ends_with('_') {
            text.push('_');
        }
        text.push(if letter == '-' { '_' } else { letter.to_ascii_uppercase() });
    }
    text
}

pub(crate) fn choice_constant(choice: &ChoiceInfo, value: &str) -> String {
    format!("MIRRORGPU_JOB_{}_{}", constant(choice.name), constant(value))
}

fn opcodes() -> String {
    let rows = PACKETS.iter().map(|p| format!("\tMIRRORGPU_JOB_{} = {:#04x},\n", p.name, p.opcode.raw()));
    format!("enum mirrorgpu_job_opcode {{\n{}}};\n", rows.collect::<String>())
}

fn choice(choice: &ChoiceInfo) -> String {
    let mut text = format!("/* {} */\n", choice.text.trim());
    let _ = writeln!(text, "enum mirrorgpu_job_{} {{", constant(choice.name).to_lowercase());
    for (number, name, _) in choice.values {
        let _ = writeln!(text, "\t{} = {number},", choice_constant(choice, name));
    }
    text + "};\n"
}

fn c_type(kind: Kind) -> &'static str {
    match kind {
        Kind::U32 | Kind::Choice(_) | Kind::OptionalChoice(_) | Kind::Payload => "uint32_t ",
        Kind::U64 => "uint64_t ",
        Kind::At | Kind::OptionalAt => "struct mirrorgpu_job_at ",
        Kind::Range => "struct mirrorgpu_job_range ",
        Kind::Bits256 => panic!("No packet has a set of 256 bits"),
    }
}

fn put(name: &str, kind: Kind) -> String {
    match kind {
        Kind::U32 | Kind::Choice(_) | Kind::OptionalChoice(_) => format!("\t*words++ = packet->{name};\n"),
        Kind::U64 => format!("\twords = mirrorgpu_job_put_u64(words, packet->{name});\n"),
        Kind::At | Kind::OptionalAt => format!("\twords = mirrorgpu_job_put_at(words, packet->{name});\n"),
        Kind::Range => format!("\twords = mirrorgpu_job_put_range(words, packet->{name});\n"),
        Kind::Payload => format!("\tfor (uint32_t i = 0; i < packet->{name}; i++)\n\t\t*words++ = 0;\n"),
        Kind::Bits256 => panic!("No packet has a set of 256 bits"),
    }
}

fn structure(packet: &PacketInfo) -> String {
    let (name, lower) = (packet.name, packet.name.to_lowercase());
    let mut text = format!("/* {name}: {} */\n", packet.text[0].trim());
    let _ = writeln!(text, "#define MIRRORGPU_JOB_{name}_WORDS {}", packet.length().0);
    for flag in packet.flags {
        let (flag_name, bit) = (constant(flag.name), flag.bit);
        let _ = writeln!(text, "#define MIRRORGPU_JOB_{name}_{flag_name} (1u << {bit}) /* {} */", flag.text);
    }
    let _ = writeln!(text, "\nstruct mirrorgpu_job_{lower} {{\n\tuint32_t flags;");
    for field in packet.fields {
        let _ = writeln!(text, "\t/* {} */\n\t{}{};", field.text, c_type(field.kind), field.name);
    }
    text + "};\n"
}

fn function(packet: &PacketInfo) -> String {
    let (name, lower) = (packet.name, packet.name.to_lowercase());
    let mut text = format!("static inline uint32_t *mirrorgpu_job_put_{lower}(uint32_t *words,\n");
    let _ = writeln!(text, "\t\tconst struct mirrorgpu_job_{lower} *packet)\n{{");
    let payload = packet.fields.iter().filter(|field| matches!(field.kind, Kind::Payload));
    let more: String = payload.map(|field| format!(" + packet->{}", field.name)).collect();
    let _ = writeln!(text, "\t*words++ = MIRRORGPU_JOB_HEADER(MIRRORGPU_JOB_{name}, packet->flags,");
    let _ = writeln!(text, "\t\tMIRRORGPU_JOB_{name}_WORDS{more});");
    for field in packet.fields {
        text.push_str(&put(field.name, field.kind));
    }
    text + "\treturn words;\n}\n"
}

fn capset() -> String {
    let mut text = format!(
        "/* The capability set. */\n#define MIRRORGPU_JOB_CAPSET_ID {CAPSET_ID}\n\
         #define MIRRORGPU_JOB_CAPSET_VERSION {CAPSET_VERSION}\n#define MIRRORGPU_JOB_CAPSET_BYTES {}\n\n\
         struct mirrorgpu_job_capset {{\n",
        Capset::BYTES
    );
    for field in Capset::FIELDS {
        let (kind, array) = match field.kind {
            Kind::Bits256 => ("uint32_t ", "[8]"),
            other => (c_type(other), ""),
        };
        let _ = writeln!(text, "\t/* {} */\n\t{kind}{}{array};", field.text, field.name);
    }
    text + "};\n"
}

/// A command about address spaces, or the response to one: what follows its header.
fn message(message: &AsCommandInfo, kind: &str) -> String {
    let AsCommandInfo { number, name, text, fields } = *message;
    let mut code =
        format!("/* {name}: {} */\n#define MIRRORGPU_{kind}_{name} {number:#x}u\n\n", text[0].trim());
    let _ = writeln!(code, "struct mirrorgpu_{} {{", name.to_lowercase());
    for field in fields {
        let _ = writeln!(code, "\t/* {} */\n\t{}{};", field.text, c_type(field.kind), field.name);
    }
    code + "};\n"
}

fn page_table_entry() -> String {
    let mut text = format!(
        "/* Addresses of an address space have {GVA_BITS} bits; the bits of its page-table entries. */\n\
         #define MIRRORGPU_GVA_BITS {GVA_BITS}\n\
         /* flags of AS_CREATE and AS_INVALIDATE, actions of AS_ANSWER_FAULT */\n\
         #define MIRRORGPU_AS_CREATE_FAULTS {CREATE_FAULTS}u\n\
         #define MIRRORGPU_AS_INVALIDATE_LEAVES {INVALIDATE_LEAVES}u\n\
         #define MIRRORGPU_AS_FAULT_REPLAY {FAULT_REPLAY}u\n\
         #define MIRRORGPU_AS_FAULT_FAIL {FAULT_FAIL}u\n"
    );
    for bits in PTE_BITS {
        let mask = u64::MAX >> (63 - (bits.high - bits.low)) << bits.low;
        let _ = writeln!(text, "#define MIRRORGPU_PTE_{} {mask:#x}ull", bits.name);
    }
    text
}

fn header() -> String {
    let choices = CHOICES.iter().map(choice);
    let packets = PACKETS.iter().flat_map(|packet| [structure(packet), function(packet)]);
    let parts: Vec<_> =
        [TOP.to_owned(), opcodes()].into_iter().chain(choices).chain([BASE.to_owned()]).collect();
    let address_spaces = COMMANDS.iter().map(|command| message(command, "CMD"));
    let responses = RESPONSES.iter().map(|response| message(response, "RESP"));
    let address_spaces = address_spaces.chain(responses).chain([page_table_entry()]);
    let parts = parts
        .into_iter()
        .chain(packets)
        .chain(address_spaces)
        .chain([capset()])
        .collect::<Vec<_>>()
        .join("\n");
    format!("{parts}\n#endif /* MIRRORGPU_JOB_H */\n")
}

#[test]
fn the_c_header_has_the_rows_of_the_table() {
    assert_generated(HEADER, &header());
}

#[test]
fn names_become_constants() {
    assert_eq!(constant("SpinBehaviour"), "SPIN_BEHAVIOUR");
    assert_eq!(constant("registration-cache"), "REGISTRATION_CACHE");
}
