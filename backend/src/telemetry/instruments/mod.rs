//! What watches the device: the flight recorder, the names of addresses, the records of what went wrong, and the way
//! of news to the control socket. One for the whole process; every thread that has something to tell shares it.
//! Nothing here ever makes a thread of the device wait: rendering, writing and printing is the reporter's
//! ([`reporter`]), and the control socket asks through mailboxes ([`query_channel`]).
//!
//! LOCKING: the names, the connection and the findings' track have a leaf mutex each.

mod outbox;
pub mod query_channel;
mod reporter;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use device_model::jobs::job::{Job, JobId};
use device_model::locking::lock;
use device_model::telemetry::names::Names;
use device_model::telemetry::record::{Event, Recorder, Snapshot, TrackWriter};
use device_model::telemetry::stats::Stats;
use device_model::telemetry::violation::{Fault, Violation};

pub use self::outbox::Outbox;
pub(crate) use self::reporter::HOW_TO_TRACE;
use self::reporter::{Note, Reporter};
use crate::front_end_check::{Finding, Findings};
use crate::telemetry::reports::Reports;

/// The clock of the device: one for all connections, so that records can be compared.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// A clock that begins now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// How long it has been running.
    pub fn now(self) -> Duration {
        self.0.elapsed()
    }

    /// The same clock for those who know no clock of ours.
    pub fn shared(self) -> device_model::jobs::scheduler::Clock {
        Arc::new(move || self.now())
    }
}

/// Whose track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Producer {
    /// The session: the front-end's messages, misses, invalidations.
    Session,
    /// One of the rings, by its queue.
    Ring(usize),
    /// One of the engines.
    Engine(usize),
}

/// How long the end of the process waits for reports to be written.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The track on which verdicts and faults are recorded, by whoever finds them.
const FINDINGS: usize = 0;
const SESSION: usize = 1;
const RINGS: usize = 2;
const RING_NAMES: [&str; crate::queues::QUEUES] = ["control ring", "cursor ring"];

impl Producer {
    fn track(self) -> usize {
        match self {
            Self::Session => SESSION,
            Self::Ring(queue) => RINGS + queue,
            Self::Engine(index) => RINGS + RING_NAMES.len() + index,
        }
    }
}

/// How far the job on an engine is, for whoever asks.
#[derive(Debug, Default)]
struct Progress {
    /// The number of the job, and 1; 0: none.
    job: AtomicU64,
    /// The packet, and 1; 0: it has none.
    packet: AtomicU64,
    bytes: AtomicU64,
}

/// What [`Instruments::running`] says of an engine's job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnEngine {
    /// Which engine.
    pub engine: usize,
    /// Which job.
    pub job: JobId,
    /// The packet that it has come to.
    pub packet: Option<u64>,
    /// Bytes that it has moved.
    pub bytes: u64,
}

/// All instruments.
#[derive(Debug)]
pub struct Instruments {
    clock: Clock,
    recorder: Recorder,
    findings: Mutex<Option<TrackWriter>>,
    names: Mutex<Names>,
    progress: Box<[Progress]>,
    /// What went wrong.
    pub reports: Reports,
    /// What the front-end did.
    pub front_end: Findings,
    /// News for the clients of the control socket.
    pub outbox: Outbox,
    /// The front-end that is served.
    pub query_channel: query_channel::QueryChannel,
    reporter: Reporter,
}

impl Instruments {
    /// Instruments for a device with so many engines. Traces are written to `record_dir` by themselves, if there is one.
    pub fn start(engines: usize, record_dir: Option<PathBuf>, stats: Arc<Stats>) -> io::Result<Arc<Self>> {
        let rings = RING_NAMES.iter().map(|name| (*name).to_owned());
        let engine_names = (0..engines).map(|index| format!("engine {index}"));
        let fixed = ["findings".to_owned(), "session".to_owned()];
        let recorder = Recorder::new(fixed.into_iter().chain(rings).chain(engine_names));
        let findings = Mutex::new(recorder.writer(FINDINGS));
        let (reporter, notes) = Reporter::new(record_dir);
        let this = Arc::new(Self {
            clock: Clock::start(),
            recorder,
            findings,
            names: Mutex::default(),
            progress: (0..engines).map(|_| Progress::default()).collect(),
            reports: Reports::default(),
            front_end: Findings::default(),
            outbox: Outbox::new(stats)?,
            query_channel: query_channel::QueryChannel::default(),
            reporter,
        });
        reporter::spawn(notes, Arc::downgrade(&this))?;
        Ok(this)
    }

    /// The device's clock.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// The recorder's sink for this producer. There is one: a second one records nothing.
    pub fn sink(self: &Arc<Self>, producer: Producer) -> EventSink {
        let progress = match producer {
            Producer::Engine(index) => Some(index),
            Producer::Session | Producer::Ring(_) => None,
        };
        let writer = self.recorder.writer(producer.track());
        EventSink { instruments: Arc::clone(self), writer, progress }
    }

    /// What was recorded.
    pub fn snapshot(&self) -> Vec<Snapshot> {
        self.recorder.snapshot()
    }

    /// The names of addresses.
    pub fn names(&self) -> MutexGuard<'_, Names> {
        lock(&self.names)
    }

    /// The name of a ring.
    pub fn ring_name(queue: usize) -> &'static str {
        RING_NAMES.get(queue).copied().unwrap_or("ring")
    }

    /// What the engines are at.
    pub fn running(&self) -> Vec<OnEngine> {
        let of = |(engine, progress): (usize, &Progress)| {
            // ORDERING: Relaxed: the three may be of different steps, which is good enough to be looked at.
            let job = progress.job.load(Ordering::Relaxed).checked_sub(1).map(JobId::new)?;
            let packet = progress.packet.load(Ordering::Relaxed).checked_sub(1);
            Some(OnEngine { engine, job, packet, bytes: progress.bytes.load(Ordering::Relaxed) })
        };
        self.progress.iter().enumerate().filter_map(of).collect()
    }

    /// Keeps a violation, and has it reported: on the log, to the clients of the control socket, as a trace. Returns
    /// its number. Does not wait.
    pub fn violation(&self, violation: Violation) -> u64 {
        let (range, verdict, job) = (violation.range, violation.verdict, violation.job);
        let (id, print) = self.reports.violation(violation);
        let number = u32::try_from(id).unwrap_or(u32::MAX);
        self.find(Event::Judged { job, verdict, range, violation: number });
        self.reporter.tell(Note::Violation(id, print));
        id
    }

    /// Keeps a fault, and has it told to the clients of the control socket. Does not wait.
    pub fn fault(&self, fault: Fault) {
        self.find(Event::Fault { job: fault.job, range: fault.range, access: fault.access });
        self.reports.fault(fault.clone());
        self.reporter.tell(Note::Fault(fault));
    }

    /// Keeps what a front-end did, and has it reported: on the log, to the clients of the control socket, as a trace. Does
    /// not wait.
    pub fn finding(&self, finding: Finding) {
        let (id, print) = self.front_end.add(finding);
        self.reporter.tell(Note::Finding(id, print));
    }

    /// The device has hung, or nearly: a trace is written if there is a place for it. Does not wait.
    pub fn incident(&self, what: &'static str) {
        self.reporter.tell(Note::Incident(what));
    }

    /// Waits until everything so far is reported: for the end of the process, not for threads of the device.
    pub fn flush(&self) {
        self.reporter.flush(LAST_WORDS);
    }

    fn find(&self, event: Event) {
        let findings = lock(&self.findings);
        if let Some(writer) = findings.as_ref() {
            writer.record(self.clock.now(), event);
        }
    }
}

/// What a producer records with. Costs a few stores an event, and never waits.
#[derive(Debug)]
pub struct EventSink {
    instruments: Arc<Instruments>,
    writer: Option<TrackWriter>,
    progress: Option<usize>,
}

impl EventSink {
    /// Records what has just happened.
    #[inline]
    pub fn record(&self, event: Event) {
        self.record_at(self.instruments.clock.now(), event);
    }

    /// Records what happened at this time.
    #[inline]
    pub fn record_at(&self, at: Duration, event: Event) {
        if let Some(writer) = &self.writer {
            writer.record(at, event);
        }
    }

    /// All instruments.
    pub fn instruments(&self) -> &Arc<Instruments> {
        &self.instruments
    }

    /// Says how far the engine's job is; `None`: it has none.
    #[inline]
    pub fn at_work(&self, job: Option<&Job>) {
        let Some(progress) = self.progress.and_then(|index| self.instruments.progress.get(index)) else {
            return;
        };
        // ORDERING: Relaxed, see `Instruments::running`.
        progress.job.store(job.map_or(0, |job| job.id().raw().wrapping_add(1)), Ordering::Relaxed);
        let packet = job.and_then(Job::packet).map_or(0, |packet| packet as u64 + 1);
        progress.packet.store(packet, Ordering::Relaxed);
        progress.bytes.store(job.map_or(0, Job::bytes_moved), Ordering::Relaxed);
    }
}
