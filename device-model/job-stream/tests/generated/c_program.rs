//! C programs against the header: it compiles without a warning, and builds the words that the Rust builder builds.
//! A C compiler has to be there; Rust's linker is one.

use std::process::{Command, Output};
use std::{env, fs};

use job_stream::{Capset, Kind, PACKETS, Packet, PacketInfo, Stream};

use crate::header::{choice_constant, generated_header};
use crate::manual::words;

/// A C compiler that was told to be strict.
fn compiler() -> Command {
    let name = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let found = Command::new(&name).arg("--version").output();
    assert!(found.is_ok(), "There is no C compiler {name:?}: install gcc, or set CC");
    let mut command = Command::new(name);
    command.args(["-Wall", "-Wextra", "-Wconversion", "-Wpedantic", "-Werror", "-std=c11"]);
    command.arg("-I").arg(generated_header().parent().unwrap());
    command
}

fn assert_success(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The designated initialiser of a field whose words begin `words`.
fn initialiser(name: &str, kind: Kind, words: &[u32]) -> String {
    let long = |at: usize| format!("{:#x}ull", u64::from(words[at]) | u64::from(words[at + 1]) << 32);
    let value = match kind {
        Kind::U32 => format!("{:#x}u", words[0]),
        Kind::U64 => long(0),
        Kind::At | Kind::OptionalAt => format!("{{ {}u, {} }}", words[0], long(1)),
        Kind::Range => format!("{{ {}u, {}, {} }}", words[0], long(1), long(3)),
        Kind::Choice(info) | Kind::OptionalChoice(info) => {
            let known = info.values.iter().find(|(number, ..)| *number == words[0]);
            known.map_or("0".into(), |(_, name, _)| choice_constant(info, name))
        }
        Kind::Payload => format!("{}u", words.len()),
        Kind::Bits256 => panic!("No packet has a set of 256 bits"),
    };
    format!(".{name} = {value}, ")
}

/// The statement of C that appends the example of a packet.
fn statement(info: &PacketInfo) -> String {
    let (words, lower) = (words((info.example)()), info.name.to_lowercase());
    let fields = info.fields.iter();
    let fields = fields.map(|f| initialiser(f.name, f.kind, &words[usize::from(info.offset(f.name))..]));
    let set = info.flags.iter().filter(|flag| words[0] >> (8 + flag.bit) & 1 == 1);
    let flags: String =
        set.map(|f| format!(" | MIRRORGPU_JOB_{}_{}", info.name, f.name.to_uppercase())).collect();
    let fields: String = fields.collect();
    format!(
        "\tnext = mirrorgpu_job_put_{lower}(next, &(struct mirrorgpu_job_{lower}){{ .flags = 0{flags}, {fields}}});\n"
    )
}

/// A program that prints the words of all examples, and then the offset of every field of the capability set.
fn program() -> String {
    let statements: String = PACKETS.iter().map(statement).collect();
    let offset = |name| format!("\tprintf(\"%zu\\n\", offsetof(struct mirrorgpu_job_capset, {name}));\n");
    let offsets: String = Capset::FIELDS.iter().map(|field| offset(field.name)).collect();
    format!(
        "#include <mirrorgpu_job.h>\n#include <stddef.h>\n#include <stdio.h>\n\n\
         _Static_assert(sizeof(struct mirrorgpu_job_capset) == MIRRORGPU_JOB_CAPSET_BYTES, \"padding\");\n\n\
         int main(void)\n{{\n\tuint32_t words[1024], *next = words;\n\n{statements}\
         \tfor (uint32_t *word = words; word < next; word++)\n\t\tprintf(\"%08x\\n\", *word);\n{offsets}\treturn 0;\n}}\n"
    )
}

#[test]
fn the_c_header_compiles_on_its_own_without_a_warning() {
    let mut compiler = compiler();
    assert_success(compiler.args(["-fsyntax-only", "-x", "c"]).arg(generated_header()).output().unwrap());
}

#[test]
fn a_c_program_builds_the_words_that_the_rust_builder_builds() {
    let mut compiler = compiler();
    let directory = tempfile::tempdir().unwrap();
    let (source, binary) = (directory.path().join("words.c"), directory.path().join("words"));
    fs::write(&source, program()).unwrap();
    assert_success(compiler.arg(&source).arg("-o").arg(&binary).output().unwrap());
    let printed = assert_success(Command::new(&binary).output().unwrap());

    let examples = PACKETS.iter().map(|packet| (packet.example)());
    let stream = examples.fold(Stream::new(), |stream, packet: Packet| stream.push(packet));
    let words = stream.finish().into_iter().map(|word| format!("{word:08x}"));
    let mut offset = 0;
    let offsets = Capset::FIELDS.iter().map(|field| {
        let here = offset;
        offset += 4 * field.kind.words();
        here.to_string()
    });
    assert_eq!(printed.lines().collect::<Vec<_>>(), words.chain(offsets).collect::<Vec<_>>());
}
