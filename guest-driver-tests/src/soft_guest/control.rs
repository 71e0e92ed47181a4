//! The control socket, from the client's side: JSON lines in the style of QMP. Knows the framing and the counters'
//! names, not their meaning.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::error::{Error, Result};

const TIMEOUT: Duration = Duration::from_secs(10);

/// A connection to the control socket.
#[derive(Debug)]
pub struct Control {
    lines: BufReader<UnixStream>,
    greeting: Value,
    /// Events that came between answers.
    events: VecDeque<Value>,
}

impl Control {
    /// Connects and takes the greeting.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(path).map_err(Error::io(format!("connect to {}", path.display())))?;
        stream.set_read_timeout(Some(TIMEOUT)).map_err(Error::io("set a timeout"))?;
        let mut this = Self { lines: BufReader::new(stream), greeting: Value::Null, events: VecDeque::new() };
        this.greeting = this.receive("(greeting)")?;
        Ok(this)
    }

    /// What the back-end said first.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Runs a command without arguments.
    pub fn execute(&mut self, command: &str) -> Result<Value> {
        self.execute_with(command, json!({}))
    }

    /// Runs a command with these arguments.
    pub fn execute_with(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.send(&json!({ "execute": command, "arguments": arguments }).to_string())?;
        let mut reply = self.receive(command)?;
        match reply.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(Error::Control { command: command.into(), got: reply.to_string() }),
        }
    }

    /// Sends a line up to this many times, until the socket is full, and does not read what comes.
    pub fn ask_without_listening(&mut self, line: &str, times: usize) -> Result<()> {
        let stream = self.lines.get_mut();
        stream.set_nonblocking(true).map_err(Error::io("make a socket nonblocking"))?;
        let whole = format!("{line}\n");
        let sent = (0..times).take_while(|_| stream.write(whole.as_bytes()).is_ok_and(|n| n == whole.len()));
        let _ = sent.count();
        stream.set_nonblocking(false).map_err(Error::io("make a socket blocking"))
    }

    /// Sends a line unchanged and returns the line that answers it.
    pub fn line(&mut self, line: &str) -> Result<Value> {
        self.send(line)?;
        self.receive(line)
    }

    fn send(&mut self, line: &str) -> Result<()> {
        writeln!(self.lines.get_mut(), "{line}").map_err(Error::io("write to the control socket"))
    }

    /// Waits for the next event of this name, and returns its data. Other events are skipped.
    pub fn event(&mut self, name: &str) -> Result<Value> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive_any(name)?,
            };
            if event["event"] == name {
                return Ok(event["data"].clone());
            }
        }
    }

    /// The next line that is no event.
    fn receive(&mut self, command: &str) -> Result<Value> {
        loop {
            let line = self.receive_any(command)?;
            if line.get("event").is_none() {
                return Ok(line);
            }
            self.events.push_back(line);
        }
    }

    fn receive_any(&mut self, command: &str) -> Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line).map_err(Error::io("read from the control socket"))?;
        serde_json::from_str(&line).map_err(|_| Error::Control { command: command.into(), got: line.clone() })
    }

    /// The statistics now.
    pub fn stats(&mut self) -> Result<Stats> {
        self.execute("stats").map(Stats)
    }
}

/// A snapshot of the back-end's counters.
#[derive(Clone, Debug, PartialEq)]
pub struct Stats(pub Value);

impl Stats {
    /// A counter by name; dots lead into objects (`ack_latency_ns.p50`).
    pub fn get(&self, name: &str) -> Result<u64> {
        let value = name.split('.').try_fold(&self.0, |value, part| value.get(part));
        value.and_then(Value::as_u64).ok_or_else(|| Error::NoCounter(name.into()))
    }

    /// By how much a counter has grown since an earlier snapshot.
    pub fn since(&self, earlier: &Self, name: &str) -> Result<u64> {
        Ok(self.get(name)?.wrapping_sub(earlier.get(name)?))
    }
}
