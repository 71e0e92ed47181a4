//! The start and the end of a session's threads. Every connection gets a mirror, a device, a queue thread and
//! engines of its own, so that the next one starts from a clean state.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use device_model::gpu::device::{self, Device, DeviceConfig};
use device_model::jobs::scheduler::Scheduler;
use device_model::mmu::miss::MissTable;
use device_model::mmu::{DrainWaker, Drained, Invalidation, MirrorConfig, Reader, RingMemory, mirror};
use device_model::telemetry::record::Event;
use device_model::telemetry::stats::Stats;
use log::error;
use vhost_user_backend::{VringMutex, VringT};

use super::drain::STEP_END;
use super::questions::Questions;
use super::seeded::Seeded;
use super::verdicts::TakenAway;
use super::{LAST_DRAIN, SessionState};
use crate::display::Display;
use crate::engines::engine::{Engine, FinishedJob};
use crate::engines::starvation::{ThreadName, Turns};
use crate::faults::{Bug, Injection};
use crate::queues::mailbox::{Mail, Mailbox};
use crate::queues::ring::SharedRing;
use crate::queues::{MAX_QUEUE_SIZE, QUEUES, QueueThread};
use crate::telemetry::instruments::query_channel::{Connection, Question};
use crate::telemetry::instruments::{Instruments, Producer};
use crate::wake::{Poller, Waker};
use device_model::session::miss_port::MissPort;

/// What a device is built from.
#[derive(Clone, Debug)]
pub struct DeviceSettings {
    /// Quotas and scanouts.
    pub device: DeviceConfig,
    /// Engine threads.
    pub engines: usize,
    /// Bytes of the mirror's tables.
    pub iotlb_limit: usize,
    /// How long an answer to a MISS may take.
    pub miss_timeout: Duration,
    /// What misbehaves.
    pub injection: Arc<Injection>,
}

/// Starts the threads of a session; `waker` wakes the session.
pub fn start(
    settings: &DeviceSettings,
    stats: &Arc<Stats>,
    instruments: &Arc<Instruments>,
    waker: &Waker,
) -> io::Result<SessionState> {
    // One reader an engine, and one for the queue thread.
    let config = MirrorConfig { readers: settings.engines + 1, table_limit: settings.iotlb_limit };
    let drain_waker = LastOneOut { session: waker.clone(), injection: Arc::clone(&settings.injection) };
    let (writer, mut readers) = mirror(config, Arc::new(drain_waker));
    let Some(ring_reader) = readers.pop() else { unreachable!("The mirror was asked for a reader") };
    let (mailbox, miss_port) = (Mailbox::new()?, MissPort::new(Arc::new(waker.clone())));
    let scheduler = Arc::new(Scheduler::new(instruments.clock().shared()));
    let answers = mailbox.clone();
    let display = Display::spawn(Arc::clone(stats), move |ticket, answer| {
        answers.post(Mail::DisplayAnswered { ticket, answer });
    })?;
    let device = Device::new(settings.device.clone());
    let (config_space, device_features) = (device.config_space().to_vec(), device::features());
    let memory = RingMemory::new(ring_reader);
    let queue = QueueThread {
        device,
        rings: Arc::new([shared_ring(&memory)?, shared_ring(&memory)?]),
        memory,
        mailbox: mailbox.clone(),
        scheduler: Arc::clone(&scheduler),
        misses: miss_port.clone(),
        display: display.clone(),
        stats: Arc::clone(stats),
        sinks: std::array::from_fn(|queue| instruments.sink(Producer::Ring(queue))),
        injection: Arc::clone(&settings.injection),
    };
    let threads: Vec<_> = (0..settings.engines).map(|_| ThreadName::default()).collect();
    let common =
        Common { settings, scheduler: &scheduler, misses: &miss_port, mailbox: &mailbox, stats, instruments };
    let questions = connect_query_channel(instruments, waker, &mailbox, &scheduler);
    Ok(SessionState {
        features: 0,
        protocol_features: 0,
        memory: crate::vhost_user::memory::MemoryTable::default(),
        mirror: writer,
        misses: MissTable::new(settings.miss_timeout),
        channel: None,
        engines: common.start_engines(readers, &threads)?,
        turns: Turns::new(threads),
        queue: queue.spawn()?,
        miss_port,
        backlog: VecDeque::new(),
        scheduler,
        display,
        stats: Arc::clone(stats),
        seeded: Seeded::new(Arc::clone(&settings.injection)),
        config_space,
        device_features,
        running: false,
        bases: [None; QUEUES],
        taken: TakenAway::default(),
        refusal: None,
        sink: instruments.sink(Producer::Session),
        questions: Questions::new(questions),
        referee: None,
    })
}

/// Lets the control thread ask the threads of this session from now on.
fn connect_query_channel(
    instruments: &Instruments,
    waker: &Waker,
    queue: &Mailbox,
    scheduler: &Arc<Scheduler>,
) -> Receiver<Question> {
    let (session, questions) = channel();
    let (waker, queue, scheduler) = (waker.clone(), queue.clone(), Arc::clone(scheduler));
    instruments.query_channel.connect(Some(Connection { session, waker, queue, scheduler }));
    questions
}

/// Wakes the session for a drain whose last one is out.
struct LastOneOut {
    session: Waker,
    injection: Arc<Injection>,
}

impl DrainWaker for LastOneOut {
    fn wake(&self) {
        if !self.injection.fires(Bug::ForgetWake) {
            self.session.wake();
        }
    }
}

fn shared_ring(memory: &RingMemory) -> io::Result<SharedRing> {
    let vring = VringMutex::new(memory.clone(), MAX_QUEUE_SIZE).map_err(io::Error::other)?;
    let (fresh, resets) = (AtomicBool::new(false), AtomicU64::new(0));
    Ok(SharedRing { vring, fresh, error_event: Mutex::new(None), resets })
}

/// What all engines share.
struct Common<'a> {
    settings: &'a DeviceSettings,
    scheduler: &'a Arc<Scheduler>,
    misses: &'a MissPort,
    mailbox: &'a Mailbox,
    stats: &'a Arc<Stats>,
    instruments: &'a Arc<Instruments>,
}

impl Common<'_> {
    fn start_engines(
        &self,
        readers: Vec<Reader>,
        threads: &[ThreadName],
    ) -> io::Result<Vec<std::thread::JoinHandle<()>>> {
        let engines = readers.into_iter().zip(threads.iter().cloned()).enumerate();
        engines.map(|(index, (reader, thread))| self.engine(index, reader, thread).spawn(index)).collect()
    }

    fn engine(&self, index: usize, reader: Reader, thread: ThreadName) -> Engine {
        let mailbox = self.mailbox.clone();
        Engine {
            reader,
            scheduler: Arc::clone(self.scheduler),
            misses: self.misses.clone(),
            finished: Box::new(move |finished: FinishedJob| mailbox.post(Mail::JobFinished(finished))),
            stats: Arc::clone(self.stats),
            injection: Arc::clone(&self.settings.injection),
            sink: self.instruments.sink(Producer::Engine(index)),
            thread,
        }
    }
}

impl SessionState {
    /// Ends the session's threads and gives its memory back, once nothing uses it any more. `poller` watches
    /// `waker`.
    pub fn close(mut self, poller: &Poller, waker: &Waker) {
        self.stop_all();
        let now = self.scheduler.now();
        self.interrupt_audit(now);
        self.sink.instruments().query_channel.connect(None);
        self.scheduler.pause();
        self.scheduler.discard();
        self.scheduler.close();
        self.display.disconnect();
        let invalidation = self.begin_everything();
        invalidation.evict();
        self.turns.told(self.scheduler.now());
        let drained = self.drain_to_the_end(invalidation, poller, waker);
        // No reply waits for this one.
        drop(self.end(drained));
        let Self { queue, engines, memory, .. } = self;
        queue.close();
        for engine in engines {
            // A panic was reported by the panic hook; what the engine held is drained.
            let _ = engine.join();
        }
        drop(memory);
    }

    /// Waits for what is in flight: a step at the most. If that does not end, memory is revoked, and if even
    /// then an engine does not come back, the process ends, and its threads with it.
    fn drain_to_the_end(&self, invalidation: Invalidation, poller: &Poller, waker: &Waker) -> Drained {
        let mut invalidation = match self.wait(invalidation, STEP_END, poller, waker) {
            Ok(drained) => return drained,
            Err(invalidation) => invalidation,
        };
        error!(
            "An engine does not reach the end of its step: revoking all guest memory. This is a bug of MirrorGPU"
        );
        self.sink.record(Event::Revoked { number: 0 });
        self.sink.instruments().incident("Memory was revoked at the end of a session");
        if self.memory.revoke().is_ok() {
            invalidation = match self.wait(invalidation, LAST_DRAIN, poller, waker) {
                Ok(drained) => return drained,
                Err(invalidation) => invalidation,
            };
        }
        error!("An engine is stuck in {}: ending the process", invalidation.range());
        std::process::abort()
    }

    /// Polls for this long, and longer while an engine only waits for a processor.
    fn wait(
        &self,
        mut invalidation: Invalidation,
        patience: Duration,
        poller: &Poller,
        waker: &Waker,
    ) -> Result<Drained, Invalidation> {
        let end = Instant::now() + patience;
        let mut tokens = Vec::new();
        loop {
            waker.clear();
            invalidation = match invalidation.poll() {
                Ok(drained) => return Ok(drained),
                Err(invalidation) => invalidation,
            };
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() && !self.turns.starve(self.scheduler.now()) {
                return Err(invalidation);
            }
            let timeout = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
            if poller.wait(timeout.max(1), &mut tokens).is_err() {
                return Err(invalidation);
            }
        }
    }
}
