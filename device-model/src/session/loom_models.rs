//! The engines' scheduler and the miss port under loom: small models, one for each race, with at most two engines
//! beside the session. Run them like those of [`mmu`](crate::mmu). Time stands still, and loom never lets a wait time
//! out, so a lost wake-up is a deadlock, which loom reports.

use std::ops::ControlFlow;
use std::sync::Arc as StdArc;
use std::time::Duration;

use job_stream::{Mode, Stream};
use loom::cell::UnsafeCell;
use loom::thread;

use super::miss_port::{MissPort, SessionWaker, Waiter};
use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use crate::jobs::engine::{EngineHost, Leaves, Left, Running};
use crate::jobs::job::{Job, JobOutcome, Step};
use crate::jobs::schedule::ScheduledJob;
use crate::jobs::scheduler::Scheduler;
use crate::jobs::testing::{execution, job, place};
use crate::mmu::miss::MissRequest;
use crate::mmu::{DrainWaker, Drained, Invalidation, JobMemory, MirrorConfig, Missing, mirror};
use crate::sync::{Arc, AtomicU64, Condvar, Mutex, Ordering, lock};

/// Wakes the session; loom reports a lost ring. (Not `Notify`: when two threads notify it, loom wakes one of them from
/// its condition variable without removing it from the list of waiters.)
#[derive(Default)]
struct Bell {
    rung: Mutex<bool>,
    rings: Condvar,
}

impl Bell {
    fn ring(&self) {
        *lock(&self.rung) = true;
        self.rings.notify_one();
    }

    fn wait(&self) {
        let mut rung = lock(&self.rung);
        while !*rung {
            rung = self.rings.wait(rung).unwrap();
        }
        *rung = false;
    }
}

impl SessionWaker for Bell {
    fn wake(&self) {
        self.ring();
    }
}

impl DrainWaker for Bell {
    fn wake(&self) {
        self.ring();
    }
}

/// A running scheduler, and this many jobs that engines have taken.
fn scheduler(jobs: u64) -> (Arc<Scheduler>, Vec<ScheduledJob>) {
    let scheduler = Scheduler::new(StdArc::new(|| Duration::ZERO));
    scheduler.resume();
    for id in 0..jobs {
        scheduler.submit(job(id, Mode::Strict, execution(Stream::new().signal(place(), 1))));
    }
    let taken = (0..jobs).map(|_| scheduler.next().unwrap()).collect();
    (Arc::new(scheduler), taken)
}

fn port() -> (MissPort, StdArc<Bell>) {
    let bell = StdArc::new(Bell::default());
    (MissPort::new(bell.clone()), bell)
}

fn missing(page: u64) -> Leaves {
    let range = ByteRange::new(Iova::new(page * PAGE_SIZE), PAGE_SIZE).unwrap();
    Leaves::Missing(vec![Missing { space: DomainId::DEVICE, range, access: Access::Read }])
}

fn done() -> Leaves {
    Leaves::Finished(JobOutcome::Done)
}

/// Answers the requests of current waits; returns the pages.
fn serve(scheduler: &Scheduler, port: &MissPort) -> Vec<u64> {
    let mut pages = Vec::new();
    while let Some(request) = port.take() {
        let Waiter::Job(wait) = request.waiter else { panic!("{:?}", request.waiter) };
        if !scheduler.is_current(wait) {
            continue;
        }
        for iova in request.missing.pages() {
            pages.push(iova.raw() / PAGE_SIZE);
            let page = MissRequest { space: DomainId::DEVICE, access: Access::Read, iova };
            scheduler.miss_answered(wait, page, Ok(()));
        }
    }
    pages
}

/// Two jobs wait for the end of one invalidation: each finds an engine, though neither engine comes back for another.
#[test]
fn loom_as_many_engines_wake_as_one_call_makes_jobs_ready() {
    loom::model(|| {
        let (scheduler, jobs) = scheduler(2);
        for work in jobs {
            let _ = scheduler.dispose(Left { work, leaves: Leaves::Invalidating });
        }
        let engines: Vec<_> = (0..2)
            .map(|_| {
                let scheduler = Arc::clone(&scheduler);
                thread::spawn(move || drop(scheduler.next().unwrap()))
            })
            .collect();
        scheduler.invalidation_ended();
        engines.into_iter().for_each(|engine| engine.join().unwrap());
    });
}

/// Jobs that wait when the device stops are ready at the next start, and are taken. Closing wakes all engines.
#[test]
fn loom_a_start_has_all_jobs_taken_and_the_end_wakes_all_engines() {
    loom::model(|| {
        let (scheduler, jobs) = scheduler(2);
        for (page, work) in (1..).zip(jobs) {
            let _ = scheduler.dispose(Left { work, leaves: missing(page) });
        }
        let (bell, taken) = (StdArc::new(Bell::default()), Arc::new(AtomicU64::new(0)));
        let engines: Vec<_> = (0..2)
            .map(|_| {
                let (scheduler, bell, taken) = (Arc::clone(&scheduler), bell.clone(), Arc::clone(&taken));
                thread::spawn(move || {
                    while let Some(work) = scheduler.next() {
                        drop(work);
                        taken.fetch_add(1, Ordering::Relaxed);
                        bell.ring();
                    }
                })
            })
            .collect();
        scheduler.pause();
        scheduler.resume();
        while taken.load(Ordering::Relaxed) < 2 {
            bell.wait();
        }
        scheduler.close();
        engines.into_iter().for_each(|engine| engine.join().unwrap());
    });
}

/// A job is parked before its pages are requested: the answer finds it, and its engine, which may or may not sleep yet.
#[test]
fn loom_an_answer_finds_the_job_that_waits_for_it() {
    loom::model(|| {
        let (scheduler, mut jobs) = scheduler(1);
        let (port, bell) = port();
        let work = jobs.pop().unwrap();
        let engine = {
            let (scheduler, port) = (Arc::clone(&scheduler), port.clone());
            thread::spawn(move || {
                let mut work = work;
                for page in 1..=2 {
                    assert!(port.give_back(&scheduler, Left { work, leaves: missing(page) }).is_none());
                    work = scheduler.next().unwrap();
                }
                assert!(port.give_back(&scheduler, Left { work, leaves: done() }).is_some());
            })
        };
        let mut answered = Vec::new();
        while answered.len() < 2 {
            bell.wait();
            answered.extend(serve(&scheduler, &port));
        }
        assert_eq!(answered, [1, 2]);
        engine.join().unwrap();
    });
}

/// An engine may be delayed between parking a job and requesting its page, over a stop and a start, while another
/// engine parks the job for another page. The job comes back when that page is there, and not before.
#[test]
fn loom_an_answer_to_an_earlier_wait_does_not_end_a_later_one() {
    loom::model(|| {
        let (scheduler, mut jobs) = scheduler(1);
        let (port, bell) = port();
        let mapped = Arc::new(AtomicU64::new(0));
        let work = jobs.pop().unwrap();
        let held_up = {
            let (scheduler, port) = (Arc::clone(&scheduler), port.clone());
            thread::spawn(move || {
                assert!(port.give_back(&scheduler, Left { work, leaves: missing(1) }).is_none());
            })
        };
        let other = {
            let (scheduler, port, mapped) = (Arc::clone(&scheduler), port.clone(), Arc::clone(&mapped));
            thread::spawn(move || {
                let work = scheduler.next().unwrap();
                assert!(port.give_back(&scheduler, Left { work, leaves: missing(2) }).is_none());
                let work = scheduler.next().unwrap();
                assert_eq!(mapped.load(Ordering::Relaxed), 2, "back for nothing");
                drop(work);
            })
        };
        scheduler.pause();
        port.clear();
        scheduler.resume();
        while mapped.load(Ordering::Relaxed) != 2 {
            bell.wait();
            while let Some(request) = port.take() {
                let Waiter::Job(wait) = request.waiter else { panic!("{:?}", request.waiter) };
                for iova in request.missing.pages().filter(|_| scheduler.is_current(wait)) {
                    mapped.store(iova.raw() / PAGE_SIZE, Ordering::Relaxed);
                    let page = MissRequest { space: DomainId::DEVICE, access: Access::Read, iova };
                    scheduler.miss_answered(wait, page, Ok(()));
                }
            }
        }
        held_up.join().unwrap();
        other.join().unwrap();
    });
}

/// Runs steps that touch a frame, whatever the mirror says: the case without an IOMMU.
struct Touch<'a> {
    scheduler: &'a Scheduler,
    frame: &'a UnsafeCell<u8>,
}

impl EngineHost for Touch<'_> {
    fn now(&self) -> Duration {
        Duration::ZERO
    }

    fn step(&mut self, _: &mut Job, _: &impl JobMemory) -> Step {
        // SAFETY: loom's own cell; it reports an access at the same time.
        assert_eq!(self.frame.with(|frame| unsafe { *frame }), 0, "the next driver's");
        Step::Yield
    }

    fn flush_ended(&mut self) {}

    fn must_leave(&self, work: &ScheduledJob) -> bool {
        self.scheduler.must_leave(work)
    }
}

fn drained(mut invalidation: Invalidation, bell: &Bell) -> Drained {
    loop {
        match invalidation.poll() {
            Ok(drained) => return drained,
            Err(parked) => invalidation = parked,
        }
        bell.wait();
    }
}

/// A stop, a reset and the next start beside a job that is stepped: what it touches belongs to it until its step ends.
#[test]
fn loom_no_step_of_a_job_touches_what_is_the_next_drivers() {
    loom::model(|| {
        let (scheduler, mut jobs) = scheduler(1);
        let bell = StdArc::new(Bell::default());
        let config = MirrorConfig { readers: 1, table_limit: 1 << 30 };
        let (mut writer, mut readers) = mirror(config, bell.clone());
        let frame = Arc::new(UnsafeCell::new(0));
        let (work, reader) = (jobs.pop().unwrap(), readers.pop().unwrap());
        let engine = {
            let (scheduler, frame) = (Arc::clone(&scheduler), Arc::clone(&frame));
            thread::spawn(move || {
                let mut running = Running::start(&reader, work);
                for _ in 0..2 {
                    let mut host = Touch { scheduler: &scheduler, frame: &frame };
                    let ControlFlow::Continue(job) = running else { break };
                    running = job.step(&reader, &mut host);
                }
            })
        };
        scheduler.pause();
        let drained = drained(writer.begin_for_good(DomainId::DEVICE, ByteRange::everything()), &bell);
        drop(writer.end(drained));
        // SAFETY: loom's own cell; it reports an access at the same time.
        frame.with_mut(|frame| unsafe { *frame = 1 });
        scheduler.discard();
        scheduler.resume();
        engine.join().unwrap();
    });
}
