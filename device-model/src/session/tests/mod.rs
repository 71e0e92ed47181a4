//! What the session decides, rule by rule, with jobs that only record what they are told.

mod audits;
mod close;
mod iotlb;
mod random;
mod replies;
mod rings;
mod verdicts;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::miss_port::{JobWait, MissAnswer, MissPort, MissRequest as PortRequest, SessionWaker, Waiter};
use super::*;
use crate::addr::{Access, ByteRange, FrontendVa, Iova, PAGE_SIZE};
use crate::jobs::job::JobId;
use crate::jobs::schedule::{AtRest, JobVerdict, Revealed};
use crate::jobs::verdict::InvalidationInfo;
use crate::mmu::miss::{MissRequest, Outcome};
use crate::mmu::{
    DrainWaker, MappedRange, MirrorConfig, Missing, Permissions, Pin, PinMode, PinRange, Reader, mirror,
};
use crate::telemetry::violation::{Fault, FaultCause};

const SPACE: DomainId = DomainId::DEVICE;
const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);
const MISS_TIMEOUT: Duration = Duration::from_secs(1);
/// The pretended address of memory that no test touches.
const FRAME: u64 = 0x10_0000_0000;

fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

fn pages(first: u64, count: u64) -> ByteRange<Iova> {
    ByteRange::new(Iova::new(first * PAGE_SIZE), count * PAGE_SIZE).unwrap()
}

fn missing(first: u64, count: u64, access: Access) -> Missing {
    Missing { space: SPACE, range: pages(first, count), access }
}

fn miss(page: u64, access: Access) -> MissRequest {
    MissRequest { space: SPACE, access, iova: Iova::new(page * PAGE_SIZE) }
}

/// Jobs that only record what they are told.
#[derive(Debug, Default)]
struct Noted {
    calls: Vec<&'static str>,
    /// Whether the ranges are judged.
    judged: bool,
    suspected: Vec<(InvalidationInfo, Vec<MappedRange>)>,
    /// What the next answer reveals.
    job_verdicts: Vec<JobVerdict>,
    asked: Vec<JobId>,
    touched: bool,
    parked: Option<AtRest>,
    unjudged: u64,
    /// Waits that jobs have given up.
    stale: Vec<JobWait>,
}

/// The first wait of a job.
fn wait(job: u64) -> JobWait {
    JobWait::for_tests(JobId::new(job), 1)
}

impl Jobs for Noted {
    fn pause(&mut self, _now: Duration) {
        self.calls.push("pause");
    }

    fn resume(&mut self, _now: Duration) {
        self.calls.push("resume");
    }

    fn discard(&mut self) {
        self.calls.push("discard");
    }

    fn invalidation_ended(&mut self) {
        self.calls.push("invalidation ended");
    }

    fn touches(&mut self, _space: DomainId, _range: ByteRange<Iova>) -> bool {
        self.touched
    }

    fn first_in(&mut self, _space: DomainId, _range: ByteRange<Iova>) -> Option<JobId> {
        None
    }

    fn judged(&mut self, _space: DomainId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        if self.judged { vec![range] } else { Vec::new() }
    }

    fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]) {
        self.suspected.push((by, mapped.to_vec()));
    }

    fn take_unjudged(&mut self) -> u64 {
        std::mem::take(&mut self.unjudged)
    }

    fn reveal(&mut self, _revealed: &Revealed, asked: &[JobId]) -> Vec<JobVerdict> {
        self.asked = asked.to_vec();
        std::mem::take(&mut self.job_verdicts)
    }

    fn forget_suspects(&mut self) {
        self.calls.push("forget suspects");
    }

    fn waiting_job(&mut self, _wait: JobWait, _page: MissRequest) -> Option<AtRest> {
        self.parked
    }

    fn is_current(&mut self, wait: JobWait) -> bool {
        !self.stale.contains(&wait)
    }
}

#[derive(Default)]
struct Wakes(AtomicUsize);

impl DrainWaker for Wakes {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

impl SessionWaker for Wakes {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A session, a reader that stands for an engine, and the port.
struct Rig {
    core: Session<u32, Noted>,
    reader: Reader,
    port: MissPort,
    wakes: Arc<Wakes>,
}

const IOMMU: u64 = ACCESS_PLATFORM | VHOST_USER_PROTOCOL_FEATURES;

/// A session that has received no message yet.
fn fresh() -> Rig {
    let wakes = Arc::new(Wakes::default());
    let (writer, mut readers) = mirror(MirrorConfig { readers: 1, table_limit: 1 << 24 }, wakes.clone());
    let port = MissPort::new(wakes.clone());
    let offer = Offer { virtio: IOMMU | 1, passed_on: 2, protocol: REPLY_ACK | BACKEND_REQ };
    let config = Config { drain_timeout: DRAIN_TIMEOUT, miss_timeout: MISS_TIMEOUT, offer };
    let core = Session::new(config, writer, Noted::default(), port.clone(), Arc::new(Stats::default()));
    Rig { core, reader: readers.pop().unwrap(), port, wakes }
}

/// A session with an IOMMU and a channel, whose device runs.
fn running() -> Rig {
    let mut rig = fresh();
    rig.core.set_protocol_features(REPLY_ACK | BACKEND_REQ).unwrap();
    rig.core.set_features(IOMMU).unwrap();
    rig.core.message(ms(0), Message::Channel { reply: None });
    rig.run();
    rig
}

impl Rig {
    /// Starts and enables the control ring.
    fn run(&mut self) {
        self.core.start_ring(ms(0), CONTROL_QUEUE);
        self.core.enable_ring(ms(0), CONTROL_QUEUE, true);
        self.effects();
        self.core.jobs_mut().calls.clear();
    }

    /// All effects of the session.
    fn effects(&mut self) -> Vec<Effect<u32>> {
        std::iter::from_fn(|| self.core.next_effect()).collect()
    }

    /// The same in words, without those that only record.
    fn done(&mut self) -> Vec<String> {
        let effects = self.effects().into_iter();
        effects
            .filter(|effect| !matches!(effect, Effect::Record { .. }))
            .map(|effect| word(&effect))
            .collect()
    }

    fn calls(&mut self) -> Vec<&'static str> {
        std::mem::take(&mut self.core.jobs_mut().calls)
    }

    fn invalidate(&mut self, now: Duration, range: ByteRange<Iova>) {
        self.core.message(now, Message::Invalidate { range, reply: Some(7) });
    }

    fn poll(&mut self, now: Duration) {
        self.core.poll(now, || false);
    }

    /// A job requests pages, and the session takes the request.
    fn ask(&mut self, now: Duration, waiter: Waiter, missing: Missing) {
        self.port.request(waiter, vec![missing]);
        self.take_requests(now);
    }

    fn take_requests(&mut self, now: Duration) {
        while let Some(request) = self.core.next_request() {
            self.core.ask(now, request);
        }
    }

    fn sent(&mut self, now: Duration) -> Vec<MissRequest> {
        std::iter::from_fn(|| self.core.next_miss(now)).collect()
    }

    /// The front-end grants the oldest MISS with an UPDATE of `range`.
    fn grant(&mut self, now: Duration, range: ByteRange<Iova>, claimed: Permissions) {
        self.update(now, range, claimed);
        self.answer(now, true);
    }

    fn update(&mut self, now: Duration, range: ByteRange<Iova>, claimed: Permissions) {
        let host = Some(HostRange::invented(FRAME + range.first().raw(), range.len() as u64));
        let target = ByteRange::new(FrontendVa::new(range.first().raw()), range.len() as u64).unwrap();
        let update = Update { range, target, host, claimed };
        self.core.message(now, Message::Update { update, reply: Some(3) });
    }

    fn answer(&mut self, now: Duration, granted: bool) {
        if let Some(settled) = self.core.channel_answered(now, granted).unwrap() {
            self.core.apply(now, settled);
        }
    }

    /// Maps pages as a MISS for writing would.
    fn map(&mut self, first: u64, count: u64) {
        self.ask(ms(0), Waiter::Ahead(wait(0)), missing(first, 1, Access::Write));
        assert_eq!(self.sent(ms(0)).len(), 1);
        self.grant(ms(0), pages(first, count), Permissions::READ_WRITE);
        self.effects();
    }

    fn pin(&self, mode: PinMode, first: u64, count: u64) -> Pin {
        let wanted = PinRange { space: SPACE, range: pages(first, count), access: Access::Write };
        self.reader.pin_as(mode, &[wanted]).unwrap()
    }

    fn can(&self, page: u64, access: Access) -> bool {
        self.reader.enter().translate(SPACE, Iova::new(page * PAGE_SIZE), access).is_ok()
    }
}

/// An effect in a word or two.
fn word(effect: &Effect<u32>) -> String {
    match effect {
        Effect::Ack { to, ended } => format!("ack {to:?} {}", ended.range()),
        Effect::Reply { to, ok } => format!("reply {to} {ok}"),
        Effect::End(End::Refused(refusal)) => format!("end: {refusal}"),
        Effect::End(End::Revoked) => "end: revoked".into(),
        Effect::SetRing { queue, started, enabled } => format!("ring {queue} {started} {enabled}"),
        Effect::ForgetKick { queue } => format!("forget kick {queue}"),
        Effect::ServeRing { queue } => format!("serve {queue}"),
        Effect::SetFeatures(features) => format!("features {features:#x}"),
        Effect::ResetDevice { features } => format!("reset {features:#x}"),
        Effect::Mapped { request, permissions, .. } => format!("mapped {} {permissions:?}", request.iova),
        Effect::MissAnswered { waiter, request, answer } => format!("{waiter:?} {} {answer:?}", request.iova),
        Effect::Fault(Fault { job, cause: FaultCause::Refused { range, .. }, .. }) => {
            format!("fault {} {range}", job.raw())
        }
        Effect::Fault(fault) => panic!("{fault:?}"),
        Effect::Violation(violation) => format!("violation {:?} {}", violation.verdict, violation.range),
        Effect::Incident(what) => format!("incident: {what}"),
        Effect::AuditProgress(_) => "audit".into(),
        Effect::AuditEnded(report) => format!("audit ended, interrupted: {}", report.interrupted),
        Effect::Record { event, .. } => format!("{event:?}"),
        other => format!("{other:?}"),
    }
}
