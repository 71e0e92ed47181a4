//! The device's instruments: the flight recorder, the names of addresses, the records of violations, faults and
//! findings, and the events for the control socket. They exist once per process, and all threads share them. No call
//! here makes a thread of the device wait: the reporter ([`reporter`]) renders, writes and prints, and the control
//! thread sends its queries through mailboxes ([`query_channel`]).
//!
//! LOCKING: the names, the connection and the findings' track have a leaf mutex each.

mod outbox;
pub mod query_channel;
mod reporter;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use device_model::jobs::address_space::TranslationFault;
use device_model::jobs::job::{Job, JobId};
use device_model::locking::lock;
use device_model::telemetry::names::Names;
use device_model::telemetry::record::{Event, Recorder, Snapshot, TrackWriter};
use device_model::telemetry::stats::Stats;
use device_model::telemetry::violation::{Fault, FaultCause, Violation};

pub use self::outbox::Outbox;
pub(crate) use self::reporter::HOW_TO_TRACE;
use self::reporter::{Note, Reporter};
use crate::front_end_check::{Finding, Findings};
use crate::record_dir::RecordDir;
use crate::telemetry::reports::Reports;

/// The device's clock: the same for all connections, so that their records can be compared.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// A clock that starts at zero now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// Time since its start.
    pub fn now(self) -> Duration {
        self.0.elapsed()
    }

    /// The same clock as the type that `device_model` uses.
    pub fn shared(self) -> device_model::jobs::scheduler::Clock {
        Arc::new(move || self.now())
    }
}

/// The producer of a track.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Producer {
    /// The session: messages of the front-end, misses, invalidations.
    Session,
    /// One of the rings, by queue number.
    Ring(usize),
    /// One of the engines, by index.
    Engine(usize),
}

/// How long the process waits for the last reports when it ends.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The track on which verdicts and faults are recorded; several threads write it.
const FINDINGS: usize = 0;
const SESSION: usize = 1;
const RINGS: usize = 2;
const RING_NAMES: [&str; device_model::session::QUEUES] = ["control ring", "cursor ring"];

impl Producer {
    fn track(self) -> usize {
        match self {
            Self::Session => SESSION,
            Self::Ring(queue) => RINGS + queue,
            Self::Engine(index) => RINGS + RING_NAMES.len() + index,
        }
    }
}

/// Progress of an engine's job, for the control thread.
#[derive(Debug, Default)]
struct Progress {
    /// The job's number plus 1; 0: no job.
    job: AtomicU64,
    /// The packet's index plus 1; 0: no packet.
    packet: AtomicU64,
    bytes: AtomicU64,
}

/// State of an engine's job, as [`Instruments::running`] returns it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnEngine {
    /// The engine's index.
    pub engine: usize,
    /// The job's number.
    pub job: JobId,
    /// The packet that it is executing.
    pub packet: Option<u64>,
    /// Bytes that it has transferred.
    pub bytes: u64,
}

/// All instruments of the process.
#[derive(Debug)]
pub struct Instruments {
    clock: Clock,
    recorder: Recorder,
    findings: Mutex<Option<TrackWriter>>,
    names: Mutex<Names>,
    progress: Box<[Progress]>,
    /// The violations and faults.
    pub reports: Reports,
    /// The findings about the front-end.
    pub front_end: Findings,
    /// Events for the clients of the control socket.
    pub outbox: Outbox,
    /// Queries to the threads of the current connection.
    pub query_channel: query_channel::QueryChannel,
    reporter: Reporter,
}

impl Instruments {
    /// Instruments for a device with this many engines. The reporter writes traces to `record_dir`, if there is one.
    pub fn start(engines: usize, record_dir: Option<RecordDir>, stats: Arc<Stats>) -> io::Result<Arc<Self>> {
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

    /// The recorder's sink of this producer. There is one sink each: a second one records nothing.
    pub fn sink(self: &Arc<Self>, producer: Producer) -> EventSink {
        let progress = match producer {
            Producer::Engine(index) => Some(index),
            Producer::Session | Producer::Ring(_) => None,
        };
        let writer = self.recorder.writer(producer.track());
        EventSink { instruments: Arc::clone(self), writer, progress }
    }

    /// Copies of all recorded events.
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

    /// What the engines are executing.
    pub fn running(&self) -> Vec<OnEngine> {
        let of = |(engine, progress): (usize, &Progress)| {
            // ORDERING: Relaxed: the three values may be of different steps, which is good enough for display.
            let job = progress.job.load(Ordering::Relaxed).checked_sub(1).map(JobId::new)?;
            let packet = progress.packet.load(Ordering::Relaxed).checked_sub(1);
            Some(OnEngine { engine, job, packet, bytes: progress.bytes.load(Ordering::Relaxed) })
        };
        self.progress.iter().enumerate().filter_map(of).collect()
    }

    /// Keeps a violation and has it reported: in the log, to the clients of the control socket, as a trace. Returns its
    /// number. Does not block.
    pub fn violation(&self, violation: Violation) -> u64 {
        let (range, verdict, job) = (violation.range, violation.verdict, violation.job);
        let (id, print) = self.reports.violation(violation);
        let number = u32::try_from(id).unwrap_or(u32::MAX);
        self.find(Event::Judged { job, verdict, range, violation: number });
        self.reporter.tell(Note::Violation(id, print));
        id
    }

    /// Keeps a fault and has it reported to the clients of the control socket. Does not block.
    pub fn fault(&self, fault: Fault) {
        let job = fault.job;
        self.find(match fault.cause {
            FaultCause::Refused { range, access } => Event::Fault { job, range, access },
            FaultCause::Translation(TranslationFault { asid, gva, kind, level, .. }) => {
                Event::TranslationFault { job, asid, gva, kind, level }
            }
        });
        self.reports.fault(fault.clone());
        self.reporter.tell(Note::Fault(fault));
    }

    /// Keeps a finding and has it reported: in the log, to the clients of the control socket, as a trace. Does not
    /// block.
    pub fn finding(&self, finding: Finding) {
        let (id, print) = self.front_end.add(finding);
        self.reporter.tell(Note::Finding(id, print));
    }

    /// The device hangs, or did so for a while: a trace is written if `record_dir` is set. Does not block.
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

/// A producer's access to the recorder. An event costs a few stores, and recording never blocks.
#[derive(Debug)]
pub struct EventSink {
    instruments: Arc<Instruments>,
    writer: Option<TrackWriter>,
    progress: Option<usize>,
}

impl EventSink {
    /// Records an event that happens now.
    #[inline]
    pub fn record(&self, event: Event) {
        self.record_at(self.instruments.clock.now(), event);
    }

    /// Records an event that happened at this time.
    #[inline]
    pub fn record_at(&self, at: Duration, event: Event) {
        if let Some(writer) = &self.writer {
            writer.record(at, event);
        }
    }

    /// The instruments that this sink belongs to.
    pub fn instruments(&self) -> &Arc<Instruments> {
        &self.instruments
    }

    /// Publishes the progress of the engine's job; `None`: it has no job.
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
