//! The reporter: a thread that adds names to the device threads' records, prints them, sends them to the control
//! socket's clients and writes traces, so that the device threads need not wait. It ends with the instruments.

use std::io;
use std::path::Path;
use std::sync::Weak;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::time::Duration;

use device_model::telemetry::violation::{Fault, FaultCause, Report};
use job_stream::Choice;
use log::{debug, info, warn};

use super::Instruments;
use crate::front_end_check;
use crate::record_dir::{self, RecordDir};
use crate::records::{Print, Rate};
use crate::sandbox;
use crate::telemetry::trace;
use crate::thread_kind::ThreadKind;
use crate::threads::pool::spawn_confined;

/// Maximum number of pending notes; more are dropped (the records themselves are kept elsewhere).
const WAITING: usize = 256;
/// Maximum number of traces that one process writes unasked.
const TRACES: u32 = 32;

/// A note to the reporter.
#[derive(Debug)]
pub(super) enum Note {
    /// The violation with this number was found.
    Violation(u64, Print),
    /// The finding with this number was made.
    Finding(u64, Print),
    /// A job needs a page that the front-end refused.
    Fault(Fault),
    /// An event that a trace helps to understand.
    Incident(&'static str),
    /// The sender waits until all earlier notes are written.
    Flush(Sender<()>),
}

/// The handle of the reporter.
#[derive(Debug)]
pub(super) struct Reporter {
    notes: SyncSender<Note>,
    record_dir: Option<RecordDir>,
}

impl Reporter {
    pub(super) fn new(record_dir: Option<RecordDir>) -> (Self, Receiver<Note>) {
        let (notes, receiver) = sync_channel(WAITING);
        (Self { notes, record_dir }, receiver)
    }

    /// Sends a note. Does not block.
    pub(super) fn tell(&self, note: Note) {
        if self.notes.try_send(note).is_err() {
            debug!("More happens than can be told: a note was dropped");
        }
    }
}

impl Reporter {
    /// Waits until all earlier notes are written, but no longer than this.
    pub(super) fn flush(&self, patience: Duration) {
        let (done, written) = channel();
        self.tell(Note::Flush(done));
        // After the timeout the process ends without them.
        let _ = written.recv_timeout(patience);
    }
}

/// Starts the thread. It holds the instruments only while it works, and ends when they are gone.
pub(super) fn spawn(notes: Receiver<Note>, instruments: Weak<Instruments>) -> io::Result<()> {
    let (mut traces, mut incidents) = (0, Rate::default());
    let work = move || {
        for note in notes {
            let Some(instruments) = instruments.upgrade() else { return };
            instruments.write_down(note, &mut traces, &mut incidents);
        }
    };
    spawn_confined(ThreadKind::Reporter, ThreadKind::Reporter.name(), work).map(drop)
}

impl Instruments {
    fn write_down(&self, note: Note, traces: &mut u32, incidents: &mut Rate) {
        match note {
            Note::Violation(id, print) => self.tell_violation(id, print, traces),
            Note::Finding(id, print) => self.tell_finding(id, print, traces),
            Note::Fault(fault) => self.tell_fault(&fault),
            // The sender may have stopped waiting.
            Note::Flush(done) => drop(done.send(())),
            Note::Incident(what) => {
                let trace = self.trace_of(what, traces);
                // Rate-limited, because a guest can cause incidents as often as it likes.
                if incidents.take(self.clock.now()) {
                    warn!("{what}. Trace: {trace}");
                }
            }
        }
    }

    fn tell_violation(&self, id: u64, print: Print, traces: &mut u32) {
        let Some(reported) = self.reports.get(id) else { return };
        let violation = reported.violation;
        let names = self.names().of(violation.at, violation.range);
        let trace = match print {
            Print::Report { .. } => self.trace_of(&format!("violation-{id}"), traces),
            Print::Nothing => HOW_TO_TRACE.to_owned(),
        };
        let text = Report { violation: &violation, names: &names, trace: &trace }.to_string();
        self.reports.named(id, names, trace);
        if let Print::Report { unprinted } = print {
            if unprinted > 0 {
                warn!(
                    "{unprinted} violations were not printed: ask the control socket for them (violations)"
                );
            }
            warn!("{text}");
        }
        let mut data = crate::telemetry::reports::violation_json(&violation);
        if let Some(data) = data.as_object_mut() {
            data.insert("report".to_owned(), text.into());
        }
        self.outbox.send("VIOLATION", data);
    }

    fn tell_finding(&self, id: u64, print: Print, traces: &mut u32) {
        let Some(kept) = self.front_end.get(id) else { return };
        let finding = kept.finding;
        let names = finding.range.map(|range| self.names().of(finding.at, range)).unwrap_or_default();
        let row = finding.rule.row();
        let trace = match print {
            Print::Report { .. } if row.severity.accuses() => self.trace_of(&format!("finding-{id}"), traces),
            _ => HOW_TO_TRACE.to_owned(),
        };
        let text = front_end_check::Report { finding: &finding, names: &names, trace: &trace }.to_string();
        self.front_end.named(id, names, trace);
        if let Print::Report { unprinted } = print {
            if unprinted > 0 {
                warn!("{unprinted} findings were not printed: ask the control socket for them (findings)");
            }
            if row.severity.accuses() {
                warn!("{text}");
            } else {
                info!("Finding {id}: {} (note). {} Seen: {}", row.name, row.deed, finding.seen);
            }
        }
        let mut data = finding.json();
        if let Some(data) = data.as_object_mut() {
            data.insert("report".to_owned(), text.into());
        }
        self.outbox.send("FINDING", data);
    }

    fn tell_fault(&self, fault: &Fault) {
        let names = self.names_of(fault);
        let (job, mode) = (fault.job.raw(), fault.mode.name());
        match fault.cause {
            FaultCause::Refused { range, access } => debug!(
                "Job {job} (mode {mode}) needs {range} for {access}, which the front-end refused: {}. Likely {}",
                names.join("; "),
                fault.advice()
            ),
            FaultCause::Translation(cause) => {
                debug!("Job {job} (mode {mode}) has failed. {cause}. Likely {}", fault.advice());
            }
        }
        self.outbox.send("FAULT", crate::telemetry::reports::fault_json(fault, &names));
    }

    /// The names of the address of a fault. What the page tables of an address space map has none.
    pub fn names_of(&self, fault: &Fault) -> Vec<String> {
        match fault.cause {
            FaultCause::Refused { range, .. } => self.names().of(fault.at, range),
            FaultCause::Translation(_) => Vec::new(),
        }
    }

    /// Writes a trace if `record_dir` is set; returns its path, or how to get one.
    fn trace_of(&self, what: &str, traces: &mut u32) -> String {
        let Some(folder) = &self.reporter.record_dir else { return HOW_TO_TRACE.to_owned() };
        if *traces >= TRACES {
            return format!("none, for {TRACES} were written; ask the control socket (record)");
        }
        *traces += 1;
        let what: String = what.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let path = folder.join(&format!("mirrorgpu-{}-{traces}-{what}.json", std::process::id()));
        match self.write_trace(&path) {
            Ok(_) => path.display().to_string(),
            Err(error) => format!("cannot be written to {}: {error}", path.display()),
        }
    }

    /// Writes the recorded events as a trace; returns their number.
    pub fn write_trace(&self, path: &Path) -> io::Result<usize> {
        let file = record_dir::create(self.reporter.record_dir.as_ref(), path, sandbox::is_on())?;
        let snapshot = self.snapshot();
        trace::write(file, &snapshot)?;
        Ok(snapshot.iter().map(|track| track.events.len()).sum())
    }
}

/// Shown where the path of a trace would be.
pub(crate) const HOW_TO_TRACE: &str =
    "none; --record-dir DIR has one written for each, and the control command record writes one now";
