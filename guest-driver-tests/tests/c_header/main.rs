//! Streams that a C program has built with the header that guests are given, `mirrorgpu_job.h`, do on a live device what
//! the manual says. The device decodes with the crate that most other tests encode with: a mistake that both halves of it
//! share would not be noticed there. So nothing here is built, decoded or foretold by that crate: the words come out of
//! [`streams.c`](streams.c), and what they must leave is computed in this file.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};

use guest_driver_tests::soft_guest::driver::Ticket;
use guest_driver_tests::soft_guest::jobs::{BYTES, contents};
use guest_driver_tests::soft_guest::*;
use job_stream::Mode;
use serde_json::{Value, json};

const DONE: u64 = 0x0123_4567_89ab_cdef;
const FAILED: u64 = 0xfedc_ba98_7654_3210;
/// Contexts whose mode the streams settle themselves.
const CTX: u32 = 2;
const OTHER_CTX: u32 = 3;

/// The C program, compiled.
struct Streams {
    _directory: tempfile::TempDir,
    program: PathBuf,
}

impl Streams {
    fn compile() -> Self {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("streams");
        let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
        let mut compile = Process::new(&compiler);
        compile.args(["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-I"]);
        compile.arg(here.join("../device-model/job-stream/include"));
        compile.arg(here.join("tests/c_header/streams.c")).arg("-o").arg(&program);
        let output = compile.output();
        let output = output.unwrap_or_else(|error| panic!("{compiler:?}: {error}; install gcc, or set CC"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { _directory: directory, program }
    }

    /// What the program prints for this name when it is given `input`.
    fn output(&self, name: &str, input: &[u8]) -> Vec<u8> {
        let mut process = Process::new(&self.program);
        process.arg(name).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = process.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{name}: {}", output.status);
        output.stdout
    }

    /// The words of a stream.
    fn words(&self, name: &str) -> Vec<u32> {
        let bytes = self.output(name, &[]);
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }
}

/// A guest with the buffers 1 to 3, and the C program.
struct Trial {
    streams: Streams,
    backend: Backend,
    client: JobGuest,
    fence: u64,
}

impl Trial {
    fn start(args: &[&str]) -> Self {
        let backend = Backend::start(args).unwrap();
        let mut client = JobGuest::boot(&backend, Mode::Fence, 71).unwrap();
        for ctx in [CTX, OTHER_CTX] {
            client.make_context(ctx).unwrap();
        }
        Self { streams: Streams::compile(), backend, client, fence: 1000 }
    }

    fn submit(&mut self, ctx: u32, name: &str) -> Ticket {
        self.fence += 1;
        let command = Command::submit_3d(ctx, &self.streams.words(name)).fenced(self.fence);
        self.client.guest.driver.submit(&command).unwrap()
    }

    fn run(&mut self, ctx: u32, name: &str) {
        let ticket = self.submit(ctx, name);
        self.client.guest.driver.wait_ok(ticket).unwrap();
    }

    /// How a job ends that does not end well.
    fn failure(&mut self, ticket: Ticket) -> u32 {
        self.client.guest.driver.wait(ticket).unwrap().kind()
    }

    fn number<const N: usize>(&self, address: usize) -> [u8; N] {
        self.client.bytes(3).unwrap()[address..address + N].try_into().unwrap()
    }

    fn word(&self, address: usize) -> u32 {
        u32::from_le_bytes(self.number(address))
    }

    fn long(&self, address: usize) -> u64 {
        u64::from_le_bytes(self.number(address))
    }

    /// What the device says of a context.
    fn context(&self, ctx: u32) -> Value {
        let answer = self.backend.control().unwrap().execute("contexts").unwrap();
        let contexts = answer["contexts"].as_array().unwrap();
        contexts.iter().find(|context| context["context"] == ctx).unwrap().clone()
    }
}

/// CRC-32C, bit by bit, as section 7 of the manual defines it.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

/// What stream `memory` leaves of the three buffers, but for the two times.
fn expected() -> [Vec<u8>; 3] {
    let [mut one, mut two, mut three] = [1, 2, 3].map(contents);
    one[0x0ff4..0x0ff4 + 0x2010].chunks_exact_mut(4).for_each(|word| word.copy_from_slice(&[1, 2, 3, 4]));
    two[0x0803..0x0803 + 0x2_1235].copy_from_slice(&one[0x0f01..0x0f01 + 0x2_1235]);
    let mut put = |at: usize, bytes: &[u8]| three[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x40, &crc32c(&two[3..3 + 0x3_effd]).to_le_bytes());
    // 0x01020304 + 0xfffffffe is 0x01020302, modulo 2^32; then it is exchanged.
    put(0x48, &0xaabb_ccdd_u32.to_le_bytes());
    put(0x4c, &0x0102_0304_u32.to_le_bytes());
    // 0x1112131415161718 + 0x0f00000000000001; then it is not what it would have to be.
    put(0x50, &0x2012_1314_1516_1719_u64.to_le_bytes());
    put(0x58, &0x1112_1314_1516_1718_u64.to_le_bytes());
    put(0x60, &0x0102_0302_u32.to_le_bytes());
    put(0x68, &0x2012_1314_1516_1719_u64.to_le_bytes());
    put(0x1000, &DONE.to_le_bytes());
    [one, two, three]
}

#[test]
fn each_packet_leaves_in_memory_what_the_manual_says() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    let mut trial = Trial::start(&[]);
    trial.run(CTX, "memory");
    let (first, second) = (trial.long(0x70), trial.long(0x78));
    assert!(second - first >= 3_000_000, "the SPIN of 3 ms between two times took {} ns", second - first);
    let mut due = expected();
    due[2][0x70..0x78].copy_from_slice(&first.to_le_bytes());
    due[2][0x78..0x80].copy_from_slice(&second.to_le_bytes());
    for (id, due) in (1..=3).zip(due) {
        let found = trial.client.bytes(id).unwrap();
        let differs = found.iter().zip(&due).position(|(found, due)| found != due);
        assert_eq!((found.len() as u64, differs), (BYTES, None), "buffer {id}");
    }
    assert_eq!(trial.client.guest.dma.space().iommu().faults(), []);
}

#[test]
fn a_wait_compares_what_its_mask_leaves_and_ends_when_it_is_told() {
    let mut trial = Trial::start(&[]);
    trial.run(CTX, "comparisons");
    assert_eq!(trial.word(0x88), 9, "the last of nine comparisons that hold was come to");
    let wait = |trial: &mut Trial, word: u32| {
        trial.client.buffers[2].write(0x90, &word.to_le_bytes()).unwrap();
    };
    wait(&mut trial, 0x0005_0405);
    let mark = trial.word(0x98);
    let ticket = trial.submit(CTX, "waits");
    let mut control = trial.backend.control().unwrap();
    let mut is_waiting = || {
        let jobs = control.execute("jobs").unwrap()["jobs"].clone();
        jobs.as_array().unwrap().iter().any(|job| job["context"] == CTX && job["state"] == "waiting")
    };
    while !is_waiting() {
        std::thread::yield_now();
    }
    assert_eq!(trial.word(0x98), mark, "a value that does not compare ends no WAIT");
    wait(&mut trial, 0xffff_05ff);
    trial.client.guest.driver.wait_ok(ticket).unwrap();
    assert_eq!(trial.word(0x98), 7);
}

#[test]
fn a_wait_that_is_not_told_fails_after_its_time_and_the_user_fence_says_so() {
    let mut trial = Trial::start(&[]);
    let ticket = trial.submit(CTX, "times-out");
    assert_eq!(trial.failure(ticket), kind::ERR_UNSPEC);
    assert_eq!((trial.word(0xa0), trial.long(0x1000)), (1, FAILED));
    assert_eq!(trial.context(CTX)["lost"], true);
}

#[test]
fn a_context_gets_the_mode_and_the_priority_that_its_first_job_names() {
    let mut trial = Trial::start(&["--allow-incoherent"]);
    for (name, priority) in [
        ("strict", "low"),
        ("fence", "normal"),
        ("preempt", "high"),
        ("fault", "normal"),
        ("registration-cache", "normal"),
    ] {
        trial.run(CTX, name);
        let context = trial.context(CTX);
        assert_eq!((&context["mode"], &context["priority"]), (&json!(name), &json!(priority)));
        trial.client.guest.driver.ok(&Command::ctx_destroy(CTX)).unwrap();
        trial.client.make_context(CTX).unwrap();
    }
}

#[test]
fn a_spin_holds_its_only_engine_as_its_behaviour_says() {
    let mut trial = Trial::start(&["--engines", "1"]);
    // Its engine is another's until it is over. (One that may be left would have been left after a time slice.)
    let stubborn = trial.submit(CTX, "spins-stubborn");
    trial.client.wait_for_word(3, 0xb0, 1).unwrap();
    trial.run(OTHER_CTX, "time");
    trial.client.guest.driver.wait_ok(stubborn).unwrap();
    assert_eq!(trial.word(0xb0), 2);
    let (begin, other) = (trial.long(0xc0), trial.long(0xd0));
    assert!(other - begin >= 200_000_000, "another job ran {} ns after the SPIN began", other - begin);
    // Its engine is left for another, and comes back for the rest: which the context's end makes a failure.
    let preemptible = trial.submit(CTX, "spins-preemptible");
    trial.client.wait_for_word(3, 0xb0, 1).unwrap();
    let time = Command::submit_3d(OTHER_CTX, &trial.streams.words("time"));
    trial.client.guest.driver.ok(&time).unwrap();
    while trial.long(0xd0) == other {
        std::thread::yield_now();
    }
    assert_eq!(trial.word(0xb0), 1, "a SPIN of 9 s was over before another job of no length");
    trial.client.guest.driver.ok(&Command::ctx_destroy(CTX)).unwrap();
    assert_eq!(trial.failure(preemptible), kind::ERR_UNSPEC);
    // It is taken off by force, and fails.
    trial.client.make_context(CTX).unwrap();
    let wedged = trial.submit(CTX, "spins-wedged");
    trial.client.wait_for_word(3, 0xb0, 1).unwrap();
    trial.client.guest.driver.ok(&Command::ctx_destroy(CTX)).unwrap();
    assert_eq!((trial.failure(wedged), trial.word(0xb0)), (kind::ERR_UNSPEC, 1));
}

#[test]
fn the_capability_set_is_laid_out_as_the_header_has_it() {
    let mut trial = Trial::start(&["--default-mode", "fault", "--engines", "2"]);
    let command = Command::job_capset();
    let response = trial.client.guest.driver.ok(&command).unwrap();
    let printed = String::from_utf8(trial.streams.output("capset", response.body())).unwrap();
    let fields: BTreeMap<_, _> = printed.lines().filter_map(|line| line.split_once(' ')).collect();
    // Opcodes 1 to 3, 0x10 to 0x12, 0x20 to 0x23 and 0x30; modes 1 to 4, for nobody has allowed the incoherent one.
    for (field, value) in [
        ("version", "2"),
        ("size", "104"),
        ("engines", "2"),
        ("modes", "0x1e"),
        ("default_mode", "4"),
        ("packets[0]", "0x7000e"),
        ("packets[1]", "0x1000f"),
        ("packets[2]", "0"),
        ("packets[7]", "0"),
        ("max_address_spaces", "64"),
        ("gva_bits", "48"),
    ] {
        assert_eq!(fields.get(field), Some(&value), "{field}: {printed}");
    }
    for field in ["max_words", "max_packets", "max_jobs", "max_operand", "max_spin", "max_wait", "max_wedge"]
    {
        let value: u64 = fields[field].parse().unwrap();
        assert!(value > 0, "{field}: {printed}");
    }
}
