//! Tests of the control socket from a tool's side.

use std::io::{BufRead, BufReader};
use std::net::Shutdown;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use serde_json::{Value, json};

use super::*;

/// Time limit of every wait in these tests.
const PATIENCE: Duration = Duration::from_secs(20);

struct Fixture {
    directory: tempfile::TempDir,
    stats: Arc<Stats>,
    instruments: Arc<Instruments>,
    stopped: Receiver<()>,
    _server: ControlServer,
}

fn start() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let listener = PathListener::bind(&directory.path().join("control")).unwrap();
    let stats = Arc::new(Stats::default());
    let (sender, stopped) = mpsc::channel();
    let instruments = Instruments::start(1, None, stats.clone()).unwrap();
    let hooks = Hooks {
        stats: stats.clone(),
        instruments: instruments.clone(),
        injection: Arc::default(),
        stop: Box::new(move || sender.send(()).unwrap()),
    };
    Fixture {
        directory,
        stats,
        instruments,
        stopped,
        _server: ControlServer::start(listener, hooks).unwrap(),
    }
}

struct Tool(BufReader<UnixStream>);

impl Fixture {
    fn connect(&self) -> Tool {
        let stream = UnixStream::connect(self.directory.path().join("control")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        Tool(BufReader::new(stream))
    }

    fn greeted(&self) -> Tool {
        let mut tool = self.connect();
        let greeting = json!({"MirrorGPU": {"version": env!("CARGO_PKG_VERSION"), "capabilities": []}});
        assert_eq!(tool.hear(), greeting);
        tool
    }
}

impl Tool {
    fn say(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    fn hear(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    fn ask(&mut self, line: &str) -> Value {
        self.say(&format!("{line}\n"));
        self.hear()
    }

    fn hear_end(&mut self) {
        let mut rest = String::new();
        assert_eq!(self.0.read_line(&mut rest).unwrap(), 0, "{rest}");
    }
}

#[test]
fn stats_are_those_of_the_process() {
    let fixture = start();
    let mut tool = fixture.greeted();
    fixture.stats.misses.add(42);
    let reply = tool.ask(r#"{"execute": "stats"}"#);
    assert_eq!(reply, json!({"return": fixture.stats.snapshot()}));
    assert_eq!(reply["return"]["misses"], 42);
}

#[test]
fn an_id_comes_back_with_answers_and_errors() {
    let fixture = start();
    let mut tool = fixture.greeted();
    let reply = tool.ask(r#"{"execute": "query-commands", "id": {"any": [1]}}"#);
    let names = [
        "audit",
        "contexts",
        "faults",
        "findings",
        "inject",
        "iotlb",
        "jobs",
        "query-commands",
        "quit",
        "record",
        "stats",
        "violations",
    ];
    let names = names.map(|name| json!({"name": name}));
    assert_eq!(reply, json!({"return": names, "id": {"any": [1]}}));
    let reply = tool.ask(r#"{"execute": "fly", "id": null}"#);
    let desc = "There is no command fly; query-commands lists them";
    assert_eq!(reply, json!({"error": {"class": "CommandNotFound", "desc": desc}, "id": null}));
}

#[test]
fn quit_asks_the_process_to_end() {
    let fixture = start();
    let mut tool = fixture.greeted();
    assert_eq!(tool.ask(r#"{"execute": "quit", "arguments": {}}"#), json!({"return": {}}));
    assert_eq!(fixture.stopped.recv_timeout(PATIENCE), Ok(()));
}

#[test]
fn bad_input_gets_an_error_object_and_the_connection_lives_on() {
    let fixture = start();
    let mut tool = fixture.greeted();
    let deep = "[".repeat(60_000);
    for (line, expected) in [
        ("hello", "The line is not JSON"),
        (deep.as_str(), "The line is not JSON"),
        ("\u{0}\u{1}", "The line is not JSON"),
        ("[]", "The line is not a request"),
        ("{}", "The line is not a request"),
        (r#"{"execute": 5}"#, "The line is not a request"),
        (r#"{"execute": "stats", "surprise": 1}"#, "The line is not a request"),
        (r#"{"execute": "stats", "arguments": 1}"#, "The line is not a request"),
        (
            r#"{"execute": "stats", "arguments": {"a": 1}}"#,
            "The arguments of command stats are wrong: unknown field `a`",
        ),
        (r#"{"execute": "iotlb", "arguments": {"limit": -1}}"#, "The arguments of command iotlb are wrong"),
        (r#"{"execute": "record"}"#, "The arguments of command record are wrong: missing field `path`"),
        (
            r#"{"execute": "record", "arguments": {"path": "/none/t.json"}}"#,
            "The trace cannot be written to /none",
        ),
        (
            r#"{"execute": "inject", "arguments": {"on": "x"}}"#,
            "Injection x cannot be changed: there is no bug",
        ),
        (r#"{"execute": "contexts"}"#, "No front-end is connected"),
        (r#"{"execute": "jobs"}"#, "No front-end is connected"),
        (r#"{"execute": "iotlb"}"#, "No front-end is connected"),
        (r#"{"execute": "audit"}"#, "No front-end is connected"),
    ] {
        let reply = tool.ask(line);
        assert_eq!(reply["error"]["class"], "GenericError", "{reply}");
        let description = reply["error"]["desc"].as_str().unwrap();
        assert!(description.starts_with(expected), "{description}");
    }
    tool.say("\n  \r\n");
    assert!(tool.ask(r#"{"execute": "stats"}"#)["return"].is_object());
}

#[test]
fn a_line_without_end_is_refused_once_and_skipped() {
    let fixture = start();
    let mut tool = fixture.greeted();
    tool.say(&"x".repeat(200_000));
    let reply = tool.hear();
    let desc = "A line has more than 65536 bytes; it is ignored up to its end";
    assert_eq!(reply, json!({"error": {"class": "GenericError", "desc": desc}}));
    tool.say(&"x".repeat(200_000));
    tool.say("\n");
    assert!(tool.ask(r#"{"execute": "stats"}"#)["return"].is_object());
}

#[test]
fn lines_may_come_in_pieces_many_at_once_and_without_a_last_end() {
    let fixture = start();
    let mut tool = fixture.greeted();
    for piece in [r#"{"exe"#, r#"cute": "stats", "id": 1}"#, "\n{\"execute\": \"stats\", \"id\": 2}\n"] {
        tool.say(piece);
    }
    tool.say(r#"{"execute": "stats", "id": 3}"#);
    tool.0.get_ref().shutdown(Shutdown::Write).unwrap();
    for id in 1..=3 {
        assert_eq!(tool.hear()["id"], id);
    }
    tool.hear_end();
}

#[test]
fn one_client_too_many_is_told_so_and_the_next_finds_room() {
    let fixture = start();
    let mut tools: Vec<Tool> = (0..MAX_CLIENTS).map(|_| fixture.greeted()).collect();
    let mut extra = fixture.connect();
    let desc = "8 clients are connected already";
    assert_eq!(extra.hear(), json!({"error": {"class": "GenericError", "desc": desc}}));
    extra.hear_end();
    for tool in &mut tools {
        assert!(tool.ask(r#"{"execute": "stats"}"#)["return"].is_object());
    }
    let leaving = tools.pop().unwrap();
    leaving.0.get_ref().shutdown(Shutdown::Write).unwrap();
    let mut leaving = leaving;
    leaving.hear_end();
    fixture.greeted();
}

/// A client that does not read stays connected, and gets its answers when it reads again.
#[test]
fn a_client_that_does_not_read_delays_nobody() {
    let fixture = start();
    let mut lazy = fixture.greeted();
    lazy.0.get_ref().set_nonblocking(true).unwrap();
    let line = format!("{}\n", r#"{"execute": "stats"}"#);
    let mut asked = 0;
    while lazy.0.get_mut().write(line.as_bytes()).is_ok_and(|count| count == line.len()) {
        asked += 1;
    }
    let mut other = fixture.greeted();
    assert!(other.ask(r#"{"execute": "stats"}"#)["return"].is_object());
    lazy.0.get_ref().set_nonblocking(false).unwrap();
    for _ in 0..asked {
        assert!(lazy.hear()["return"].is_object());
    }
}

#[test]
fn injections_are_listed_turned_on_and_off() {
    let fixture = start();
    let mut tool = fixture.greeted();
    let on = |reply: &Value| {
        let rows = reply["return"]["injections"].as_array().unwrap();
        rows.iter().filter(|row| !row["on"].is_null()).map(|row| row["usage"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(on(&tool.ask(r#"{"execute": "inject"}"#)), [""; 0]);
    let set = r#"{"execute": "inject", "arguments": {"on": "step-delay", "argument": "1ms"}}"#;
    assert_eq!(on(&tool.ask(set)), ["step-delay=[..]DURATION"]);
    assert_eq!(on(&tool.ask(r#"{"execute": "inject", "arguments": {"off": "step-delay"}}"#)), [""; 0]);
}

/// As in QMP: events come between answers, and all clients get them.
#[test]
fn every_client_hears_of_events() {
    let fixture = start();
    let mut tools = [fixture.greeted(), fixture.greeted()];
    fixture.instruments.outbox.send("FAULT", json!({"job": 1}));
    for tool in &mut tools {
        let event = tool.hear();
        assert_eq!((&event["event"], &event["data"]), (&json!("FAULT"), &json!({"job": 1})));
        assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_000_000_000);
        assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
    }
}

#[test]
fn a_client_that_does_not_read_misses_events_which_is_counted_and_the_others_do_not() {
    let fixture = start();
    let _lazy = fixture.greeted();
    let mut other = fixture.greeted();
    let long = "x".repeat(20_000);
    let mut sent = 0;
    while fixture.stats.events_dropped.get() == 0 {
        fixture.instruments.outbox.send("FAULT", json!({"number": sent, "long": long}));
        assert_eq!(other.hear()["data"]["number"], sent);
        sent += 1;
        assert!(sent < 10_000);
    }
    assert!(other.ask(r#"{"execute": "stats"}"#)["return"]["events_dropped"].as_u64() > Some(0));
}

#[test]
fn a_trace_is_written_where_it_is_wanted() {
    let fixture = start();
    let mut tool = fixture.greeted();
    let sink = fixture.instruments.sink(crate::telemetry::instruments::Producer::Session);
    sink.record(device_model::telemetry::record::Event::Start {});
    let path = fixture.directory.path().join("trace.json");
    let reply = tool.ask(&json!({"execute": "record", "arguments": {"path": path}}).to_string());
    assert_eq!(reply["return"], json!({"path": path, "events": 1}));
    let trace: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    assert!(events.iter().any(|event| event["ph"] == "i" && event["name"] == "start"), "{trace}");
}

#[test]
fn the_end_closes_clients_and_removes_the_socket() {
    let fixture = start();
    let mut tool = fixture.greeted();
    let Fixture { directory, _server, .. } = fixture;
    drop(_server);
    tool.hear_end();
    assert!(!directory.path().join("control").exists());
}
