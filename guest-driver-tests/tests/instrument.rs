//! The instrument from outside: what the control socket says of a live device behind the vIOMMU, with jobs in flight,
//! and what it records.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use guest_driver_tests::soft_guest::control::Control;
use guest_driver_tests::soft_guest::driver::Ticket;
use guest_driver_tests::soft_guest::*;
use job_stream::{At, Compare, Mode, Range, Space, SpinBehaviour, Stream};
use serde_json::{Value, json};

const PAGES: usize = 16;
const BYTES: u64 = PAGES as u64 * 4096;
const SECOND: Duration = Duration::from_secs(1);
/// Nanoseconds that a job spins for that is to be taken off: about the most that a stream may ask for.
const LONG: u64 = 9_000_000_000;

fn place(id: u32, address: u64) -> At {
    At::new(Space::resource(id), address)
}

fn whole(id: u32) -> Range {
    place(id, 0).range(BYTES)
}

/// A guest with context 1 and the buffers 1 and 2; the control socket is open.
struct Client {
    guest: SoftGuest,
    buffers: Vec<dma::DmaBuffer>,
    control: Control,
    fence: u64,
}

impl Client {
    fn new(backend: &Backend, mode: Mode) -> Self {
        let mut guest = SoftGuest::boot(backend, GuestConfig::headless()).unwrap();
        guest.driver.ok(&Command::ctx_create(1)).unwrap();
        let mut buffers = Vec::new();
        for id in 1..=2 {
            let buffer = guest.dma.space().allocate(PAGES, Permission::ReadWrite).unwrap();
            guest.driver.ok(&Command::create_buffer(id, BYTES as u32)).unwrap();
            guest.driver.ok(&Command::attach_backing(id, &buffer.segments(0, BYTES))).unwrap();
            guest.driver.ok(&Command::ctx_attach(1, id)).unwrap();
            buffers.push(buffer);
        }
        let mut client = Self { guest, buffers, control: backend.control().unwrap(), fence: 0 };
        client.run(Stream::new().mode(mode));
        client
    }

    fn submit(&mut self, stream: Stream) -> Ticket {
        self.fence += 1;
        self.guest.driver.submit(&Command::submit_3d(1, &stream.finish()).fenced(self.fence)).unwrap()
    }

    fn run(&mut self, stream: Stream) {
        let ticket = self.submit(stream);
        self.guest.driver.wait_ok(ticket).unwrap();
    }

    fn page(&self, id: usize, page: u64) -> Iova {
        self.buffers[id - 1].address(page * PAGE)
    }

    fn ask(&mut self, command: &str) -> Value {
        self.control.execute(command).unwrap()
    }

    /// Asks until the answer is as wanted.
    fn ask_until(&mut self, command: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        loop {
            let answer = self.ask(command);
            if wanted(&answer) {
                return answer;
            }
            assert!(begin.elapsed() < 10 * SECOND, "{command} still says {answer}");
            wire::wait_readable(&[], Some(Duration::from_millis(1))).unwrap();
        }
    }

    /// The one job that there is, once it is in this state.
    fn job_in(&mut self, state: &str) -> Value {
        let is = |answer: &Value| answer["jobs"][0]["state"] == state;
        self.ask_until("jobs", is)["jobs"][0].clone()
    }

    fn swap(&mut self, buffer: usize, page: usize) {
        let frame = self.guest.dma.space().frames().take(1).unwrap()[0];
        self.guest.dma.swap_page(&mut self.buffers[buffer - 1], page, frame).unwrap();
    }
}

fn page_range(page: Iova) -> String {
    format!("{:#x}+0x1000", page.0)
}

fn spin(time: Duration) -> Stream {
    Stream::new().spin(SpinBehaviour::Preemptible, time.as_nanos() as u64)
}

#[test]
fn a_job_in_flight_is_seen_with_its_context_and_what_waits_behind_it() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Preempt);
    assert_eq!(client.ask("jobs"), json!({"jobs": [], "queued": []}));
    let first =
        client.submit(Stream::new().nop(1).fill(whole(1), 1).nop(2).spin(SpinBehaviour::Preemptible, LONG));
    let _second = client.submit(spin(SECOND));
    // The second is taken off the ring by another thread than the one that spins.
    let both = |answer: &Value| answer["jobs"][0]["packet"] == 3 && answer["queued"] != json!([]);
    let answer = client.ask_until("jobs", both);
    let job = &answer["jobs"][0];
    let expected = json!({
        "job": job["job"], "context": 1, "mode": "preempt", "priority": "normal", "state": "running", "engine": 0,
        "packet": 3, "bytes": BYTES, "misses": [],
    });
    assert_eq!(job, &expected);
    assert_eq!(answer["queued"], json!([{"context": 1, "ring": 0, "waiting": 1}]));
    let contexts = client.ask("contexts");
    let expected = json!([{
        "context": 1, "mode": "preempt", "priority": "normal", "lost": false, "attached": [1, 2],
        "rings": [{"ring": 0, "running": job["job"], "waiting": 1}],
    }]);
    assert_eq!(contexts["contexts"], expected);
    let destroyed = client.guest.driver.submit(&Command::ctx_destroy(1)).unwrap();
    assert_eq!(client.guest.driver.wait(first).unwrap().kind(), kind::ERR_UNSPEC);
    client.guest.driver.wait_ok(destroyed).unwrap();
    client.ask_until("contexts", |answer| answer["contexts"] == json!([]));
}

#[test]
fn a_job_that_waits_says_for_what() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fence);
    client.guest.front_end.hold_misses(true);
    let ticket = client.submit(Stream::new().fill(place(1, 0).range(2 * PAGE), 1));
    let asked =
        |answer: &Value| answer["jobs"][0]["misses"].as_array().is_some_and(|misses| misses.len() == 2);
    let job = client.ask_until("jobs", asked)["jobs"][0].clone();
    assert_eq!(job["state"], "missing");
    let miss = |page| json!({"page": format!("{:#x}", client.page(1, page).0), "access": "write"});
    let (mut found, mut expected) = (job["misses"].as_array().unwrap().clone(), vec![miss(0), miss(1)]);
    found.sort_by_key(Value::to_string);
    expected.sort_by_key(Value::to_string);
    assert_eq!(found, expected);
    client.guest.front_end.hold_misses(false);
    client.guest.driver.wait_ok(ticket).unwrap();
    let ticket = client.submit(Stream::new().wait(place(2, 0), Compare::Equal, 7, 0));
    assert_eq!(client.job_in("waiting")["context"], 1);
    client.buffers[1].write(0, &7_u32.to_le_bytes()).unwrap();
    client.guest.driver.wait_ok(ticket).unwrap();
}

/// The pages of a list of ranges: first address of each, with its permissions.
fn pages_of(iotlb: &Value) -> BTreeSet<(u64, bool)> {
    let mut pages = BTreeSet::new();
    for entry in iotlb["ranges"].as_array().unwrap() {
        let (start, len) = entry["range"].as_str().unwrap().split_once('+').unwrap();
        let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        for page in (number(start)..number(start) + number(len)).step_by(PAGE as usize) {
            pages.extend((entry["read"] == true).then_some((page, false)));
            pages.extend((entry["write"] == true).then_some((page, true)));
        }
    }
    pages
}

#[test]
fn the_iotlb_has_exactly_what_the_iommu_granted() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fault);
    client.run(Stream::new().copy(whole(1), place(2, 0)));
    let iotlb = client.ask("iotlb");
    let granted: BTreeSet<_> =
        client.guest.front_end.recent_misses().iter().map(|miss| (miss.iova.page().0, miss.write)).collect();
    assert_eq!((pages_of(&iotlb), &iotlb["truncated"]), (granted, &json!(false)));
    let (read, written) = (client.page(1, 3).0, client.page(2, 3).0);
    let pages = pages_of(&iotlb);
    assert!(pages.contains(&(read, false)) && !pages.contains(&(read, true)));
    assert!(pages.contains(&(written, true)) && !pages.contains(&(written, false)));
    let one = client.control.execute_with("iotlb", json!({"limit": 1})).unwrap();
    assert_eq!((one["ranges"].as_array().unwrap().len(), &one["truncated"]), (1, &json!(true)));
    client.swap(1, 3);
    assert!(!pages_of(&client.ask("iotlb")).contains(&(read, false)));
}

#[test]
fn a_refused_miss_of_a_job_is_a_fault_record_and_an_event() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fault);
    let hole = client.page(1, 5);
    client.guest.dma.space().iommu().unmap(hole, 1);
    let ticket = client.submit(Stream::new().nop(1).fill(whole(1), 1));
    assert_eq!(client.guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
    let fault = client.control.event("FAULT").unwrap();
    for (field, expected) in [
        ("context", json!(1)),
        ("packet", json!(1)),
        ("access", json!("write")),
        ("mode", json!("fault")),
        ("range", json!(page_range(hole))),
    ] {
        assert_eq!(fault[field], expected, "{fault}");
    }
    let names = fault["names"].as_array().unwrap();
    assert!(names[0].as_str().unwrap().starts_with("resource 1 (backing entry "), "{fault}");
    let job = format!("job {} of context 1, packet 1 FILL (written)", fault["job"]);
    assert!(names.iter().any(|name| name.as_str().unwrap().starts_with(&job)), "{fault}");
    let faults = client.ask("faults");
    assert_eq!((faults["faults"].as_array().unwrap().len(), &faults["dropped"]), (1, &json!(0)));
    assert_eq!(faults["faults"][0]["range"], json!(page_range(hole)));
    assert_eq!(client.ask("violations"), json!({"violations": [], "dropped": 0}));
}

#[test]
fn an_audit_finds_what_was_unmapped_without_an_invalidate_and_nothing_else() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fault);
    client.run(Stream::new().copy(whole(1), place(2, 0)));
    let faults = client.guest.dma.space().iommu().faults().len();
    assert_eq!(client.ask("audit")["state"], "running");
    let clean = client.control.event("AUDIT_DONE").unwrap();
    assert_eq!((&clean["stale"], &clean["interrupted"]), (&json!([]), &json!(false)));
    assert!(clean["checked"].as_u64().unwrap() >= 2 * PAGES as u64, "{clean}");
    assert_eq!(client.guest.dma.space().iommu().faults().len(), faults);

    // A driver, or a front-end, that forgets to say so: one page is gone, one is another.
    let (gone, moved) = (client.page(1, 2), client.page(2, 9));
    client.guest.dma.space().iommu().unmap(gone, 1);
    let frame = client.guest.dma.space().frames().take(1).unwrap()[0];
    client.guest.dma.space().iommu().map(moved, frame, Permission::ReadWrite);
    // The last result, until a new audit is wanted.
    assert_eq!((&client.ask("audit")["state"], &client.ask("audit")["stale"]), (&json!("done"), &json!([])));
    client.control.execute_with("audit", json!({"restart": true})).unwrap();
    let found = client.control.event("AUDIT_DONE").unwrap();
    let mut stale = found["stale"].as_array().unwrap().clone();
    stale.sort_by_key(|finding| finding["found"].as_str().unwrap().to_owned());
    let expected = [
        json!({"range": page_range(gone), "access": "read", "found": "gone"}),
        json!({"range": page_range(moved), "access": "write", "found": "moved"}),
    ];
    assert_eq!(stale, expected);
    assert_eq!(client.ask("audit")["stale"].as_array().unwrap().len(), 2);
}

/// Linux in lazy mode: unmapped now, said later.
#[test]
fn an_audit_gives_the_guest_time_to_say_what_it_has_unmapped() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fault);
    client.run(Stream::new().copy(whole(1), place(2, 0)));
    let late = client.page(1, 2);
    client.guest.dma.space().iommu().unmap(late, 1);
    client.ask("audit");
    assert!(client.guest.front_end.wait_for_misses(5 * SECOND, |counts| counts.refused == 1));
    client.guest.front_end.invalidate(late, PAGE).unwrap();
    assert_eq!(client.control.event("AUDIT_DONE").unwrap()["stale"], json!([]));
}

#[test]
fn an_audit_ends_with_the_device_and_says_so() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fault);
    client.run(Stream::new().copy(whole(1), place(2, 0)));
    client.guest.front_end.hold_misses(true);
    assert_eq!(client.ask("audit")["state"], "running");
    drop(client.guest);
    assert_eq!(client.control.event("AUDIT_DONE").unwrap()["interrupted"], true);
    assert!(client.control.execute("iotlb").is_err());
}

fn time(event: &Value, key: &str) -> f64 {
    event[key].as_f64().unwrap_or_else(|| panic!("{key} of {event}"))
}

#[test]
fn the_trace_shows_an_ack_that_waits_for_the_last_step_of_a_job() {
    let backend = Backend::start_recording(&["--drain-timeout", "10s"]).unwrap();
    let mut client = Client::new(&backend, Mode::Fence);
    let ticket = client.submit(
        Stream::new().fill(whole(1), 1).spin(SpinBehaviour::Preemptible, 50_000_000).fill(whole(1), 2),
    );
    let job = client.ask_until("jobs", |answer| answer["jobs"][0]["packet"] == 1)["jobs"][0]["job"].clone();
    client.swap(1, 3);
    client.guest.driver.wait_ok(ticket).unwrap();
    let path = backend.directory().join("trace.json");
    let answer = client.control.execute_with("record", json!({"path": path})).unwrap();
    assert!(answer["events"].as_u64().unwrap() > 50, "{answer}");
    let trace: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let thread = |name: &str| {
        let named = |event: &&Value| event["name"] == "thread_name" && event["args"]["name"] == name;
        events.iter().find(named).unwrap()["tid"].clone()
    };
    let spans = |tid: Value| events.iter().filter(move |event| event["ph"] == "X" && event["tid"] == tid);
    let end = |span: &Value| time(span, "ts") + time(span, "dur");
    let drain = spans(thread("session")).find(|span| span["name"] == "invalidation 1").unwrap();
    let last = spans(thread("engine 0")).rfind(|step| step["args"]["job"] == job).unwrap();
    assert_eq!(last["args"]["end"], "done");
    assert!(end(drain) >= end(last), "{drain} {last}");
    assert!(time(drain, "ts") < time(last, "ts") && time(drain, "dur") > 10_000.0, "{drain} {last}");
    let arrow = events.iter().find(|event| event["ph"] == "f").unwrap();
    assert_eq!(arrow["tid"], thread("engine 0"));
    assert!((time(last, "ts")..=end(last)).contains(&time(arrow, "ts")), "{arrow} {last}");
}

#[test]
fn injections_are_turned_on_and_off_while_the_device_runs() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fault);
    let set = json!({"on": "step-delay", "argument": "50ms"});
    client.control.execute_with("inject", set).unwrap();
    let begin = Instant::now();
    client.run(Stream::new().nop(1));
    assert!(begin.elapsed() >= Duration::from_millis(50));
    let rows = client.control.execute_with("inject", json!({"off": "step-delay"})).unwrap();
    let row = rows["injections"].as_array().unwrap().iter().find(|row| row["name"] == "step-delay").unwrap();
    assert!(row["on"].is_null() && row["hits"].as_u64().unwrap() > 0, "{row}");
}

/// A step that takes longer than the ladder bears is a hang, here made by a step that sleeps.
#[test]
fn a_hang_leaves_a_trace_that_shows_it() {
    let folder = tempfile::tempdir().unwrap();
    let folder_name = folder.path().to_str().unwrap();
    let backend = Backend::start(&["--drain-timeout", "1ms", "--record-dir", folder_name]).unwrap();
    let mut client = Client::new(&backend, Mode::Strict);
    client.control.execute_with("inject", json!({"on": "step-delay", "argument": "1s"})).unwrap();
    let _ticket = client.submit(Stream::new().fill(whole(1), 1));
    let sections = |stats: &Stats| stats.get("job_steps").is_ok_and(|steps| steps > 1);
    assert!(backend.wait_for_stats(5 * SECOND, sections).unwrap());
    let page = client.page(1, 1);
    client.guest.front_end.invalidate(page, PAGE).unwrap();
    let trace = trace_in(&folder, &backend);
    for name in ["parked", "ladder", "revoked"] {
        assert!(named(&trace, name).next().is_some(), "{name} is missing");
    }
}

/// A job that stays on its engine until the ladder takes it off is a hang, too: of the driver's making.
#[test]
fn an_ack_that_waits_until_the_drain_timeout_leaves_a_trace_with_the_ack_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let folder_name = folder.path().to_str().unwrap();
    let backend = Backend::start(&["--drain-timeout", "30ms", "--record-dir", folder_name]).unwrap();
    let mut client = Client::new(&backend, Mode::Fence);
    let stays = Stream::new().fill(whole(1), 1).spin(SpinBehaviour::Preemptible, 200_000_000);
    let ticket = client.submit(stays.fill(whole(1), 2));
    client.ask_until("jobs", |answer| answer["jobs"][0]["packet"] == 1);
    client.swap(1, 3);
    let trace = trace_in(&folder, &backend);
    assert!(named(&trace, "ladder").next().is_some());
    let drain = named(&trace, "invalidation 1").next().expect("the ack is in the trace");
    assert!(time(drain, "dur") >= 30_000.0, "{drain}");
    client.guest.driver.wait(ticket).unwrap();
    let said = "A job held the front-end up until the drain timeout. Trace: /";
    let begin = Instant::now();
    while !backend.stderr().contains(said) {
        assert!(begin.elapsed() < 10 * SECOND, "{}", backend.stderr());
        wire::wait_readable(&[], Some(Duration::from_millis(1))).unwrap();
    }
}

/// The first trace that was written into a folder, as soon as it is there.
fn trace_in(folder: &tempfile::TempDir, backend: &Backend) -> Value {
    let begin = Instant::now();
    loop {
        let file = std::fs::read_dir(folder).unwrap().next().map(|entry| entry.unwrap().path());
        let text = file.as_ref().and_then(|path| std::fs::read(path).ok()).unwrap_or_default();
        if let Ok(trace) = serde_json::from_slice::<Value>(&text) {
            return trace;
        }
        assert!(begin.elapsed() < 10 * SECOND, "there is no trace\n{}", backend.stderr());
        wire::wait_readable(&[], Some(Duration::from_millis(1))).unwrap();
    }
}

fn named<'t>(trace: &'t Value, name: &'t str) -> impl Iterator<Item = &'t Value> {
    trace["traceEvents"].as_array().unwrap().iter().filter(move |event| event["name"] == name)
}

/// Whoever asks and does not listen is nobody's trouble but its own.
#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let backend = Backend::start::<&str>(&[]).unwrap();
    let mut client = Client::new(&backend, Mode::Fault);
    let mut deaf = backend.control().unwrap();
    client.run(Stream::new().copy(whole(1), place(2, 0)));
    // Its answers fill the socket: from then on it is not read from either.
    deaf.ask_without_listening(r#"{"execute":"iotlb"}"#, 20_000).unwrap();
    let before = backend.stats().unwrap();
    for page in 0..PAGES {
        client.swap(1, page);
        client.run(Stream::new().copy(whole(1), place(2, 0)));
    }
    let acks = backend.stats().unwrap().since(&before, "ack_latency_ns.count").unwrap();
    assert_eq!(acks, PAGES as u64);
    assert_eq!(client.ask("faults")["faults"], json!([]));
}

/// A buffer is unmapped while a job spins that will use it again.
#[test]
fn a_violation_is_told_with_names_and_leaves_a_trace() {
    let folder = tempfile::tempdir().unwrap();
    let folder_name = folder.path().to_str().unwrap();
    let backend = Backend::start(&["--drain-timeout", "5ms", "--record-dir", folder_name]).unwrap();
    let mut client = Client::new(&backend, Mode::Fence);
    let twice = Stream::new().fill(whole(1), 1).spin(SpinBehaviour::Preemptible, 100_000_000);
    let ticket = client.submit(twice.fill(whole(1), 2));
    client.ask_until("jobs", |answer| answer["jobs"][0]["packet"] == 1);
    let buffer = client.buffers.remove(0);
    let first = buffer.address(0);
    client.guest.dma.unmap(buffer).unwrap();
    assert_eq!(client.guest.driver.wait(ticket).unwrap().kind(), kind::ERR_UNSPEC);
    let violation = client.control.event("VIOLATION").unwrap();
    for (field, expected) in [
        ("id", json!(1)),
        ("verdict", json!("gone")),
        ("confidence", json!("certain")),
        ("mode", json!("fence")),
        ("context", json!(1)),
        ("range", json!(page_range(first))),
        ("access", json!("write")),
        ("invalidation", json!(1)),
    ] {
        assert_eq!(violation[field], expected, "{violation}");
    }
    let report = violation["report"].as_str().unwrap();
    let job = format!(
        "which is job {} of context 1, packet 0 FILL (written), packet 2 FILL (written)",
        violation["job"]
    );
    assert!(report.contains("which is resource 1 (backing entry 0, offset 0x0)"), "{report}");
    assert!(report.contains(&job), "{report}");
    // Printed, kept and told alike.
    assert!(report.lines().all(|line| backend.has_said(line.trim())), "{}", backend.stderr());
    assert_eq!(client.ask("violations")["violations"], json!([violation]));
    let file = report.lines().last().unwrap().trim_start().strip_prefix("trace").unwrap().trim();
    let trace: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let judged = trace["traceEvents"].as_array().unwrap().iter().find(|event| event["name"] == "judged");
    assert_eq!(judged.unwrap()["args"]["job"], violation["job"]);
}

/// The flight recorder takes no memory for events that there have not been.
#[test]
fn an_idle_process_is_small() {
    let backend = Backend::start(&["--engines", "4"]).unwrap();
    let resident = backend.resident_kib().unwrap();
    // 8 MiB are promised; with the whole recorder in memory it would be about as much.
    assert!(resident <= 7 << 10, "{resident} KiB");
}

#[test]
fn the_log_says_whether_an_iommu_is_mirrored() {
    for (config, said) in [
        (GuestConfig::headless(), "has accepted VIRTIO_F_ACCESS_PLATFORM"),
        (GuestConfig::without_iommu(), "has not accepted VIRTIO_F_ACCESS_PLATFORM"),
    ] {
        let backend = Backend::start::<&str>(&[]).unwrap();
        let mut guest = SoftGuest::boot(&backend, config).unwrap();
        guest.reboot().unwrap();
        assert!(backend.has_said(said), "{}", backend.stderr());
        assert_eq!(backend.stderr().matches(said).count(), 1, "{}", backend.stderr());
    }
}
