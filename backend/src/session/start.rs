//! Starts and ends a session's threads. Every connection gets its own mirror, device, queue thread and engines, so that
//! the next one starts from a clean state.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use device_model::gpu::device::{Device, DeviceConfig};
use device_model::jobs::schedule::JobReport;
use device_model::jobs::scheduler::Scheduler;
use device_model::mmu::{DrainWaker, MirrorConfig, Reader, RingMemory, mirror};
use device_model::session::{Config, Effect, Session};
use device_model::telemetry::stats::Stats;
use vhost_user_backend::{VringMutex, VringT};

use super::injected::InjectedFaults;
use super::jobs::DeviceJobs;
use super::queries::Queries;
use super::requests::offer;
use super::state::{SessionState, abort};
use crate::display::Display;
use crate::engines::Engines;
use crate::engines::engine::Engine;
use crate::fault_injection::{Bug, Injection};
use crate::queues::mailbox::{Mailbox, QueueMessage};
use crate::queues::ring::SharedRing;
use crate::queues::{MAX_QUEUE_SIZE, QueueThread};
use crate::telemetry::instruments::query_channel::Connection;
use crate::telemetry::instruments::{Instruments, Producer};
use crate::threads::ThreadFailures;
use crate::threads::starvation::{ThreadName, Turns};
use crate::wake::{Poller, Waker, Wakers};
use device_model::session::miss_port::MissPort;

/// The configuration of a device.
#[derive(Clone, Debug)]
pub struct DeviceSettings {
    /// Quotas and scanouts.
    pub device: DeviceConfig,
    /// Number of engine threads.
    pub engines: usize,
    /// Maximum size of the mirror's tables in bytes.
    pub iotlb_limit: usize,
    /// Time after which jobs that a drain waits for are preempted.
    pub drain_timeout: Duration,
    /// Time limit for the answer to a MISS.
    pub miss_timeout: Duration,
    /// The faults to inject.
    pub injection: Arc<Injection>,
}

#[cfg(test)]
impl DeviceSettings {
    /// A small device without injected faults.
    pub(crate) fn for_tests() -> Self {
        let (engines, iotlb_limit, miss_timeout) = (2, 64 << 20, Duration::from_secs(1));
        Self {
            device: DeviceConfig::default(),
            engines,
            iotlb_limit,
            drain_timeout: Duration::from_millis(100),
            miss_timeout,
            injection: Arc::default(),
        }
    }
}

/// Starts the threads of a session, which `wakers` wake. If one cannot start, those already started end.
pub fn start(
    settings: &DeviceSettings,
    stats: &Arc<Stats>,
    instruments: &Arc<Instruments>,
    wakers: &Wakers,
) -> io::Result<SessionState> {
    let waker = &wakers.session;
    // One reader for each engine, and one for the queue thread.
    let config = MirrorConfig { readers: settings.engines + 1, table_limit: settings.iotlb_limit };
    let drain_waker = LastOneOut { session: waker.clone(), injection: Arc::clone(&settings.injection) };
    let (writer, mut readers) = mirror(config, Arc::new(drain_waker));
    let Some(ring_reader) = readers.pop() else { unreachable!("The mirror was asked for a reader") };
    let mailbox = Mailbox::new(wakers.queue.clone());
    let miss_port = MissPort::new(Arc::new(waker.clone()));
    let scheduler = Arc::new(Scheduler::new(instruments.clock().shared()));
    let answers = mailbox.clone();
    let failures = ThreadFailures::new(waker.clone());
    let display = Display::spawn(Arc::clone(stats), &failures, move |ticket, answer| {
        answers.post(QueueMessage::DisplayAnswered { ticket, answer });
    })?;
    let device = Device::new(settings.device.clone());
    let (config_space, device_features) = (device.config_space().to_vec(), device.offered_features());
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
    let mut engines = Engines::new(Arc::clone(&scheduler), failures.clone());
    common.start_engines(&mut engines, readers, &threads)?;

    let questions = connect_query_channel(instruments, waker, &mailbox, &scheduler);
    let config = Config {
        drain_timeout: settings.drain_timeout,
        miss_timeout: settings.miss_timeout,
        offer: offer(device_features),
    };
    let jobs = DeviceJobs::new(Arc::clone(&scheduler), Arc::clone(&settings.injection));
    Ok(SessionState {
        core: Session::new(config, writer, jobs, miss_port.clone(), Arc::clone(stats)),
        memory: crate::vhost_user::memory::MemoryTable::default(),
        channel: None,
        engines,
        turns: Turns::new(threads),
        queue: queue.spawn(&failures)?,
        scheduler,
        display,
        stats: Arc::clone(stats),
        injection: Arc::clone(&settings.injection),
        faults: InjectedFaults::new(Arc::clone(&settings.injection)),
        config_space,
        refusal: None,
        sink: instruments.sink(Producer::Session),
        queries: questions,
        failures,
        front_end_check: None,
    })
}

/// Makes the threads of this session available to the control thread's queries.
fn connect_query_channel(
    instruments: &Arc<Instruments>,
    waker: &Waker,
    queue: &Mailbox,
    scheduler: &Arc<Scheduler>,
) -> Queries {
    let (session, questions) = channel();
    let (waker, queue, scheduler) = (waker.clone(), queue.clone(), Arc::clone(scheduler));
    let contexts = Arc::new(move |answer| queue.post(QueueMessage::Describe(answer)));
    let connected = instruments.connect(Connection { session, waker, contexts, scheduler });
    Queries::new(questions, connected)
}

/// Wakes the session when the last section or pin that a drain waits for has ended.
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
    Ok(SharedRing::new(vring))
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
        engines: &mut Engines,
        readers: Vec<Reader>,
        threads: &[ThreadName],
    ) -> io::Result<()> {
        let mut each = readers.into_iter().zip(threads.iter().cloned()).enumerate();
        each.try_for_each(|(index, (reader, thread))| engines.start(self.engine(index, reader, thread)))
    }

    fn engine(&self, index: usize, reader: Reader, thread: ThreadName) -> Engine {
        let mailbox = self.mailbox.clone();
        Engine {
            reader,
            scheduler: Arc::clone(self.scheduler),
            misses: self.misses.clone(),
            report: Box::new(move |report| {
                mailbox.post(match report {
                    JobReport::Finished(finished) => QueueMessage::JobFinished(finished),
                    JobReport::Faulted(faulted) => QueueMessage::JobFaulted(faulted),
                });
            }),
            flush_ended: {
                let mailbox = self.mailbox.clone();
                Box::new(move || mailbox.post(QueueMessage::FlushEnded))
            },
            stats: Arc::clone(self.stats),
            injection: Arc::clone(&self.settings.injection),
            sink: self.instruments.sink(Producer::Engine(index)),
            thread,
        }
    }
}

impl SessionState {
    /// Ends the session's threads and unmaps its memory, once nothing uses it. `poller` watches `waker`.
    pub fn close(mut self, poller: &Poller, waker: &Waker) {
        self.sink.instruments().query_channel.disconnect();
        let now = self.now();
        self.core.close(now);
        self.scheduler.close();
        self.display.disconnect();
        while !self.is_closed(poller, waker) {}
        let Self { queue, engines, memory, .. } = self;
        // Dropping them ends their threads, before memory is unmapped.
        drop(queue);
        drop(engines);
        drop(memory);
    }

    /// Carries out the effects of the session's end, and waits until there may be more.
    fn is_closed(&mut self, poller: &Poller, waker: &Waker) -> bool {
        loop {
            let now = self.now();
            self.carry_out(now);
            match self.core.next_effect() {
                Some(Effect::Closed) => return true,
                Some(Effect::Revoke) => {
                    let proof = self.revoke_memory();
                    self.core.revoked(now, proof);
                }
                Some(Effect::Abort) => abort(),
                // The front-end is gone: replies are dropped.
                Some(_) => {}
                None => break,
            }
        }
        let left = self.core.next_deadline().map_or(Duration::ZERO, |due| due.saturating_sub(self.now()));
        let timeout = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // A failed wait is treated like one that has ended: the deadlines of the drain apply either way.
        let _ = poller.wait(timeout.max(1), &mut Vec::new());
        waker.clear();
        let Self { core, turns, scheduler, .. } = self;
        let now = scheduler.now();
        core.poll(now, || turns.starve(now));
        false
    }
}
