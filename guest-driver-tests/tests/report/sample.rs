//! Results to tell: three cases from a live back-end, with its traces and reports, and made-up ones around them that say
//! whatever a guest may say.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use guest_driver_tests::soft_guest::control::Control;
use guest_driver_tests::soft_guest::jobs::{place, whole};
use guest_driver_tests::soft_guest::*;
use guest_driver_tests::suite::report::timeline::Timeline;
use guest_driver_tests::suite::report::trace::{Mark, Sign, Trace};
use guest_driver_tests::suite::results::{Case, Evidence, Level, Outcome, Results, Score};
use job_stream::{Mode, SpinBehaviour, Stream};
use serde_json::{Value, json};

/// What a hostile guest says: it must come through as text, or not at all.
pub(crate) const NASTY: &str = "<script>alert(1)</script> ]]> </pre></script><!-- & \" ' \x1b[31mred\x1b[0m \0\x07\u{fffe} # SKIP\r\nok 1 forged\u{2028}ok 2 µ→∞";

const TOPOLOGIES: [&str; 5] =
    ["no-iommu", "intel-iommu-strict", "intel-iommu-lazy", "intel-iommu-ats", "virtio-iommu"];
/// Number, name, group, promise.
type Scenario = (u32, &'static str, &'static str, &'static str);
const SCENARIOS: [Scenario; 14] = [
    (1, "idle-page", "Range arithmetic", "An INVALIDATE of a page that nobody uses is acked at once."),
    (2, "exact-range", "Range arithmetic", "An INVALIDATE of exactly the range of a job waits for that job."),
    (
        5,
        "adjacent-range",
        "Range arithmetic",
        "An INVALIDATE beside the range of a job waits no longer than a step.",
    ),
    (
        7,
        "whole-space",
        "Range arithmetic",
        "Ranges up to 2^64, and those that wrap, are taken as they are meant.",
    ),
    (13, "parked-on-a-miss", "Timing", "A job that is parked on a MISS holds no INVALIDATE up."),
    (
        14,
        "overlapping",
        "Timing",
        "Of two overlapping invalidations each is acked when its own drain is over.",
    ),
    (
        15,
        "unmap-then-remap",
        "Timing",
        "An address that is mapped anew under a job leads to the old page until the ack, and to the new one after it.",
    ),
    (
        19,
        "write-to-read-only",
        "Permissions and faults",
        "A write to a read-only mapping faults, and changes nothing.",
    ),
    (22, "unmapped", "Permissions and faults", "A job on unmapped memory fails, and its fence says so."),
    (25, "correct-driver", "Modes", "A correct driver is accused of nothing, in any mode, strict or lazy."),
    (32, "order-in-a-ring", "Fences", "Fences of one ring signal in order."),
    (49, "stop-and-cont", "Life cycle", "What is in flight at a stop goes on after the next start."),
    (
        59,
        "address-reused",
        "What an invalidation meant",
        "An address that another buffer gets at once is not taken for the old one.",
    ),
    (60, "swiotlb", "DMA API", "Nothing depends on which page a bounce buffer is in."),
];

/// The sample; the back-ends run once.
pub(crate) fn results() -> &'static Results {
    static RESULTS: OnceLock<Results> = OnceLock::new();
    RESULTS.get_or_init(|| {
        let mut cases = live();
        for scenario in SCENARIOS {
            cases.extend((0..=TOPOLOGIES.len()).filter_map(|at| made_up(scenario, at)));
        }
        cases.extend(nasty());
        cases.sort_by_key(|case| (case.number, case.level, topology_index(case)));
        Results {
            started: SystemTime::UNIX_EPOCH + Duration::from_secs(1_796_000_000),
            took: Duration::from_millis(312_400),
            environment: environment(),
            cases,
            score: score(),
        }
    })
}

fn topology_index(case: &Case) -> Option<usize> {
    TOPOLOGIES.iter().position(|name| Some(*name) == case.topology.as_deref())
}

fn environment() -> Vec<(String, String)> {
    let pairs = [
        ("MirrorGPU", "0.1.0"),
        ("QEMU", "10.0.2"),
        ("Kernel", "6.12.9-amd64"),
        ("Accelerator", "tcg"),
        ("Seed", "15"),
    ];
    let nasty = [("Command <line>", NASTY)];
    pairs.into_iter().chain(nasty).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

pub(crate) fn case(
    (number, name, group, promise): Scenario,
    topology: Option<&str>,
    outcome: Outcome,
) -> Case {
    Case {
        number,
        name: name.into(),
        group,
        promise,
        level: if topology.is_some() { Level::Real } else { Level::Soft },
        topology: topology.map(str::to_owned),
        outcome,
        took: Duration::from_millis(u64::from(number) * 37 + 120),
        evidence: Evidence::default(),
    }
}

/// A case without much to say; `None` where a live one stands.
fn made_up(scenario: Scenario, at: usize) -> Option<Case> {
    let topology = at.checked_sub(1).map(|index| TOPOLOGIES[index]);
    let outcome = match (scenario.0, at) {
        (15 | 2 | 25, 0) => return None,
        (5, 1..) => Outcome::Skipped("A real VT-d rounds ranges: only the soft guest can show it.".into()),
        (13..=15 | 59, 1) => Outcome::Skipped("Without an IOMMU nothing is invalidated.".into()),
        (60, 0) => Outcome::Skipped("There is no kernel in the soft guest.".into()),
        (49, 5) => Outcome::Broken(
            "QEMU ended with signal 11 before the guest was up.\nLook at the console; run again with --keep.".into(),
        ),
        (32, 2) => Outcome::Flaky(
            "The fence of job 9 came before that of job 8.\nThe order in which they came: 7, 9, 8.".into(),
        ),
        (22, 4) => Outcome::Failed(
            "The fence of job 7 signalled success although its second page is not mapped.\nExpected an error, and a fault of 0xfffe1000 in the guest's IOMMU log; there was none."
                .into(),
        ),
        _ => Outcome::Passed,
    };
    let mut case = case(scenario, topology, outcome);
    if at > 0 && !matches!(case.outcome, Outcome::Skipped(_)) {
        case.evidence.console =
            "[    0.000000] Linux version 6.12.9-amd64\n[    0.913370] [drm] Initialized virtio_gpu\n"
                .repeat(20);
        case.evidence.numbers = vec![("misses".into(), "73".into()), ("acks".into(), "41".into())];
    }
    Some(case)
}

/// What the world may do to a report.
fn nasty() -> Vec<Case> {
    let scenario = (97, "nasty", "What others say", "Text of others stays text: <b>&amp;</b>.");
    let mut failed = case(scenario, None, Outcome::Failed(format!("{NASTY}\nsecond line {NASTY}")));
    failed.evidence = Evidence {
        numbers: vec![(NASTY.into(), NASTY.into())],
        notes: vec![NASTY.into(), "A note.".into()],
        reports: vec![format!("Violation 1: {NASTY}\n  job 1")],
        console: format!("{NASTY}\n").repeat(100_000 / NASTY.len()) + "the last line of the console",
        backend_log: format!("log {NASTY}\n").repeat(2_000),
        trace: Some(json!({"traceEvents": [
            {"ph": "M", "tid": 1, "name": "thread_name", "args": {"name": NASTY}},
            {"ph": "X", "tid": 1, "ts": 1.0, "dur": 5.0, "name": NASTY, "args": {"job": 1, "number": 4, "took": 5000}},
            {"ph": "i", "tid": 1, "ts": 2.0, "name": "parked", "args": {"number": 4, "job": 1}},
            {"ph": "i", "tid": 1, "ts": 1.0, "name": "invalidation", "args": {"number": 4, "range": NASTY}},
            {"ph": "X", "tid": 1, "ts": 1e300, "dur": -4, "name": "invalidation 9", "args": {"number": 9}},
            NASTY, 7, null,
        ]})),
        screenshot: Some(png()),
    };
    let mut broken = case(scenario, Some("<nasty> #1.cfg"), Outcome::Broken(NASTY.into()));
    broken.evidence.trace = Some(json!({"traceEvents": "none"}));
    let skipped = case(scenario, Some("virtio-iommu"), Outcome::Skipped(NASTY.into()));
    vec![failed, broken, skipped]
}

/// A small picture.
pub(crate) fn png() -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, 160, 100);
    encoder.set_color(png::ColorType::Rgb);
    let pixels: Vec<u8> =
        (0..160 * 100).flat_map(|at| [(at % 160) as u8, (at / 160 * 2) as u8, 140]).collect();
    encoder.write_header().unwrap().write_image_data(&pixels).unwrap();
    bytes
}

fn score() -> Vec<Score> {
    let row = |bug: &str, whose, place: &str, caught: &[&str], cannot_show: Option<&str>| Score {
        bug: bug.into(),
        whose,
        place: place.into(),
        caught_by: caught.iter().map(|id| (*id).to_owned()).collect(),
        held: Vec::new(),
        cannot_show: cannot_show.map(str::to_owned),
    };
    vec![
        row("ack-before-drain", "device", "soft", &["15-unmap-then-remap", "02-exact-range"], None),
        row("ack-before-drain", "device", "intel-iommu-strict", &["15-unmap-then-remap"], None),
        row("skip-section", "device", "soft", &["05-adjacent-range"], None),
        row(
            "skip-section",
            "device",
            "intel-iommu-strict",
            &[],
            Some("A late touch is over within microseconds."),
        ),
        row("reorder-fence", "device", "soft", &["32-order-in-a-ring"], None),
        row("reorder-fence", "device", "intel-iommu-strict", &[], None),
        row("unmap-before-fence", "driver", "soft", &["25-correct-driver"], None),
        row("<double & unmap>", "driver", "intel-iommu-strict", &["22-unmapped", "98-of-another-run"], None),
    ]
}

fn scenario(number: u32) -> Scenario {
    SCENARIOS.into_iter().find(|scenario| scenario.0 == number).unwrap()
}

/// Drains of a live back-end: one that waits for a job to its end, one that takes it off and finds the driver out, and
/// one under a crowd of jobs.
fn live() -> Vec<Case> {
    let mut accused = case(scenario(25), None, Outcome::Passed);
    let is_found_out = |evidence: &Evidence| {
        let is_verdict = |mark: &Mark| matches!(mark.sign, Sign::Verdict(..));
        !evidence.reports.is_empty() && timeline(evidence).marks.iter().any(is_verdict)
    };
    accused.evidence = drain("8ms", 1, 40_000_000, is_found_out);
    accused.outcome = Outcome::Failed(
        "Violation 1: memory was moved under a job in flight.\nThe driver gave a page of buffer 1 another frame before the fence of job 1 had signalled: wait for the fence first."
            .into(),
    );
    let mut waited = case(scenario(15), None, Outcome::Passed);
    let is_long = |evidence: &Evidence| longest_wait(evidence) > 4_000.0;
    waited.evidence = drain("10s", 2, 12_000_000, is_long);
    let mut crowd = case(scenario(2), None, Outcome::Passed);
    crowd.evidence = storm();
    vec![accused, waited, crowd]
}

/// A job that fills its buffer, spins and fills it again; meanwhile one of its pages is given another frame. If the host
/// has let the job end before that was done, another one spins for longer.
fn drain(timeout: &str, engines: u32, spin: u64, is_enough: impl Fn(&Evidence) -> bool) -> Evidence {
    for spin in [spin, 8 * spin, 64 * spin] {
        let backend =
            Backend::start_recording(&["--drain-timeout", timeout, "--engines", &engines.to_string()])
                .unwrap();
        let mut client = JobGuest::boot(&backend, Mode::Fence, 35).unwrap();
        let started = Stream::new().signal(place(3, 0), 0xabcd).fill(whole(1), 1);
        let ticket = client.submit(started.spin(SpinBehaviour::Preemptible, spin).fill(whole(1), 2)).unwrap();
        client.wait_for_word(3, 0, 0xabcd).unwrap();
        let ack = client.swap(1, 40).unwrap();
        client.guest.driver.wait(ticket).unwrap();
        let numbers = vec![("ack".into(), format!("{:.1} ms", ack.latency.as_secs_f64() * 1e3))];
        let evidence = evidence(&backend, numbers);
        if is_enough(&evidence) {
            return evidence;
        }
    }
    panic!("no INVALIDATE came while the job was in flight");
}

fn timeline(evidence: &Evidence) -> Timeline {
    Timeline::of(&evidence.trace.as_ref().and_then(Trace::of).unwrap())
}

/// For how many microseconds an ack waited for a job, at the longest.
fn longest_wait(evidence: &Evidence) -> f64 {
    let drains = timeline(evidence).drains;
    drains.iter().filter(|drain| drain.parked.is_some()).map(|drain| drain.at.length()).fold(0.0, f64::max)
}

/// Many jobs, and pages that are taken away from under them.
fn storm() -> Evidence {
    let backend = Backend::start_recording(&["--drain-timeout", "1s", "--engines", "2"]).unwrap();
    let mut client = JobGuest::boot(&backend, Mode::Fence, 36).unwrap();
    let clean = client.storm(200, 36).unwrap();
    evidence(&backend, vec![("frames looked at".into(), clean.to_string())])
}

fn evidence(backend: &Backend, mut numbers: Vec<(String, String)>) -> Evidence {
    let mut control = backend.control().unwrap();
    let stats = backend.stats().unwrap();
    for name in ["misses", "acks_parked", "jobs_done", "jobs_failed"] {
        numbers.push((name.into(), stats.get(name).unwrap().to_string()));
    }
    let violations = control.execute("violations").unwrap();
    let reports = violations["violations"].as_array().unwrap().iter();
    Evidence {
        numbers,
        reports: reports.take(4).map(|violation| violation["report"].as_str().unwrap().to_owned()).collect(),
        backend_log: backend.stderr(),
        trace: Some(trace(backend, &mut control)),
        ..Evidence::default()
    }
}

fn trace(backend: &Backend, control: &mut Control) -> Value {
    let path = backend.directory().join("trace.json");
    control.execute_with("record", json!({"path": path})).unwrap();
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}
