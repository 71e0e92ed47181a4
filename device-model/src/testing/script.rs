//! A script of events for a device: commands of both queues, steps and ends of jobs, answers of the display, resets.
//! [`play`] plays it and checks the promises that always hold: each pending command is returned once, fences complete
//! in the order of their timeline, and the quotas are kept and returned. The same scripts come from proptest
//! (`gpu::device::tests::streams`) and from the fuzz target `gpu_commands`. Uses the device from outside.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::addr::{ByteRange, Iova};
use crate::gpu::device::{Device, DeviceConfig, Effect, MAX_RESPONSE_BYTES, Usage, features};
use crate::gpu::quota::Quotas;
use crate::gpu::reply::Response;
use crate::gpu::scanout::{DisplayAnswer, DisplayQuery};
use crate::jobs::job::{Job, JobError, JobId, JobOutcome, Step, StepContext};
use crate::testing::memory::SparseMemory;
use crate::testing::requests::{HEADER, ctx_destroy, unref};
use virtio_bindings::virtio_gpu::{
    VIRTIO_GPU_F_CONTEXT_INIT, VIRTIO_GPU_FLAG_FENCE, VIRTIO_GPU_FLAG_INFO_RING_IDX,
};

/// One event.
#[derive(Clone, Debug)]
pub enum Action {
    /// A command of the control queue.
    Control(Vec<u8>),
    /// A command of the cursor queue.
    Cursor(Vec<u8>),
    /// All jobs on engines make a step with this budget.
    Step(usize),
    /// An engine gives a job back, however far it has come: as done, or as killed.
    Finish(usize, bool),
    /// An engine steps a job to its end and gives it back.
    Run(usize),
    /// The display answers a question, or says that it cannot.
    Answer(usize),
    /// The driver resets the device, and accepts features again: all, or none.
    Reset(bool),
}

/// The guest's quotas: small, so that a script reaches them.
const QUOTAS: Quotas = Quotas {
    queued_jobs: 6,
    resource_bytes: 64 << 10,
    backing_entries: 12,
    resources: 16,
    contexts: 4,
    address_spaces: 3,
    tlb_entries: 8,
};
/// Bytes of guest memory, from address 0 on.
const MEMORY: u64 = 0x8000;
/// A job that is run alone is considered endless after this many steps: its operands are small.
const MOST_STEPS: u32 = 100_000;

/// A command that the device has. It can be neither copied nor forged, so one that is returned was given to the device.
#[derive(Debug)]
struct Ticket(u64);

/// A timeline of fences: that of a ring of a context, or that of all commands that name no ring.
type Timeline = Option<(u32, u8)>;

/// What the guest has sent and was not answered.
#[derive(Default)]
struct Unanswered {
    next: u64,
    /// The fence of each, if it has one.
    commands: BTreeMap<u64, Option<(u64, Timeline)>>,
    /// The fences of each timeline, oldest first.
    timelines: BTreeMap<Timeline, VecDeque<u64>>,
}

impl Unanswered {
    fn send(&mut self, request: &[u8], with_rings: bool) -> Ticket {
        let number = self.next;
        self.next += 1;
        let fence = fence(request, with_rings);
        self.commands.insert(number, fence);
        if let Some((_, timeline)) = fence {
            self.timelines.entry(timeline).or_default().push_back(number);
        }
        Ticket(number)
    }

    fn answer(&mut self, ticket: Ticket, response: &Response) {
        let Ticket(number) = ticket;
        let fence = self.commands.remove(&number).expect("A command is answered twice");
        assert_eq!(response.fence(), fence.map(|(id, _)| id), "The fence of command {number}");
        assert!((HEADER..=MAX_RESPONSE_BYTES).contains(&response.as_bytes().len()));
        if let Some((_, timeline)) = fence {
            let oldest = self.timelines.get_mut(&timeline).and_then(VecDeque::pop_front);
            assert_eq!(oldest, Some(number), "A fence overtakes another on timeline {timeline:?}");
        }
    }

    fn reset(&mut self, handed_back: Vec<Ticket>) {
        let count = handed_back.len();
        let handed_back: BTreeSet<u64> = handed_back.into_iter().map(|Ticket(number)| number).collect();
        assert_eq!(handed_back.len(), count, "A command is handed back twice");
        assert!(handed_back.iter().eq(self.commands.keys()), "A reset keeps commands, or hands back others");
        self.commands.clear();
        self.timelines.clear();
    }
}

/// The fence of a command, from its header (virtio 1.3, 5.7.6.7).
fn fence(request: &[u8], with_rings: bool) -> Option<(u64, Timeline)> {
    let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().expect("four bytes"));
    if request.len() < HEADER || word(4) & VIRTIO_GPU_FLAG_FENCE == 0 {
        return None;
    }
    let on_ring = with_rings && word(4) & VIRTIO_GPU_FLAG_INFO_RING_IDX != 0;
    Some((u64::from(word(8)) | u64::from(word(12)) << 32, on_ring.then(|| (word(16), request[20]))))
}

/// A device with all that it has emitted and not got back.
struct Player {
    device: Device<Ticket>,
    memory: SparseMemory,
    with_rings: bool,
    unanswered: Unanswered,
    jobs: Vec<Job>,
    newest_job: Option<JobId>,
    asked: Vec<(u64, DisplayQuery)>,
    /// Numbers that the guest has used for resources and for contexts.
    resources: BTreeSet<u32>,
    contexts: BTreeSet<u32>,
    now: Duration,
}

/// Plays a script. Then returns everything that is out, and destroys every resource and context.
pub fn play(actions: impl IntoIterator<Item = Action>) {
    let mut player = Player::new();
    for action in actions {
        player.act(action);
        player.check_quotas();
    }
    player.settle();
    player.destroy_everything();
    assert_eq!(player.device.usage(), Usage::default(), "Something of the quotas is kept");
    assert!(player.unanswered.commands.is_empty(), "A command is never answered");
    assert!(player.device.reset().is_empty(), "The device keeps a command that it has answered");
}

impl Player {
    fn new() -> Self {
        let config = DeviceConfig { quotas: QUOTAS, scanouts: 2, ..DeviceConfig::default() };
        let mut memory = SparseMemory::new();
        memory.fill(ByteRange::new(Iova::new(0), MEMORY).expect("There is memory"));
        let mut player = Self {
            device: Device::new(config),
            memory,
            with_rings: false,
            unanswered: Unanswered::default(),
            jobs: Vec::new(),
            newest_job: None,
            asked: Vec::new(),
            resources: BTreeSet::new(),
            contexts: BTreeSet::new(),
            now: Duration::ZERO,
        };
        player.accept_features(true);
        player
    }

    fn accept_features(&mut self, all: bool) {
        let accepted = if all { features() } else { 0 };
        self.device.set_features(accepted);
        self.with_rings = accepted & 1 << VIRTIO_GPU_F_CONTEXT_INIT != 0;
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Control(request) => self.control(&request),
            Action::Cursor(request) => {
                let ticket = self.unanswered.send(&request, self.with_rings);
                self.with_effects(|device, effects| device.cursor(&request, ticket, effects));
            }
            Action::Step(budget) => self.step_all(budget),
            Action::Finish(which, done) if which < self.jobs.len() => {
                let failed = JobOutcome::Failed(JobError::Killed);
                let job = self.jobs.remove(which);
                self.give_back(job, if done { JobOutcome::Done } else { failed });
            }
            Action::Run(which) if which < self.jobs.len() => {
                let mut job = self.jobs.remove(which);
                let outcome = self.run(&mut job);
                self.give_back(job, outcome);
            }
            Action::Answer(which) if which < self.asked.len() => {
                let (ticket, question) = self.asked.remove(which);
                self.answer(ticket, question);
            }
            Action::Finish(..) | Action::Run(_) | Action::Answer(_) => {}
            Action::Reset(all) => {
                let handed_back = self.device.reset();
                self.unanswered.reset(handed_back);
                assert_eq!(self.device.usage(), Usage::default(), "Something outlives a reset");
                self.accept_features(all);
            }
        }
    }

    fn control(&mut self, request: &[u8]) {
        let word = |at: usize| {
            request.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes)
        };
        self.contexts.extend(word(16));
        self.resources.extend(word(HEADER));
        let ticket = self.unanswered.send(request, self.with_rings);
        self.with_effects(|device, effects| device.control(request, ticket, effects));
    }

    fn with_effects(&mut self, act: impl FnOnce(&mut Device<Ticket>, &mut Vec<Effect<Ticket>>)) {
        let mut effects = Vec::new();
        act(&mut self.device, &mut effects);
        for effect in effects {
            match effect {
                Effect::Complete { pending, response } => self.unanswered.answer(pending, &response),
                Effect::Run(job) => {
                    assert!(self.newest_job < Some(job.id()), "A job has the number of another one");
                    self.newest_job = Some(job.id());
                    self.jobs.push(job);
                }
                Effect::Ask { ticket, question } => self.asked.push((ticket, question)),
                Effect::Display(_) | Effect::AnswerFault { .. } => {}
            }
        }
    }

    fn step_all(&mut self, budget: usize) {
        let context = StepContext { now: self.now, running: self.now, budget };
        for job in &mut self.jobs {
            // The result of a step shows at the end of the job.
            let _ = job.step(&self.memory, context);
        }
    }

    /// Steps a job until it ends; missing pages are refused, and time passes while it waits.
    fn run(&mut self, job: &mut Job) -> JobOutcome {
        let mut pause = Duration::from_millis(1);
        for _ in 0..MOST_STEPS {
            match job.step(&self.memory, StepContext { now: self.now, running: self.now, budget: 64 << 10 }) {
                Step::Done => return JobOutcome::Done,
                Step::Error(error @ JobError::Memory(_)) => panic!("{error:?}"),
                Step::Error(error) => return JobOutcome::Failed(error),
                Step::Missing(missing) => return JobOutcome::Failed(JobError::Refused(missing)),
                // As if the driver answered with FAIL.
                Step::Fault(fault) => return JobOutcome::Failed(JobError::Translation(fault)),
                Step::Yield => {}
                Step::Spinning { .. } => {
                    self.now = self.now.saturating_add(pause);
                    pause = pause.saturating_mul(2);
                }
                Step::Waiting { until } => self.now = self.now.max(until),
            }
        }
        panic!("A job does not end: {job:?}");
    }

    fn give_back(&mut self, job: Job, outcome: JobOutcome) {
        self.with_effects(|device, effects| {
            device.job_finished(job, outcome, effects);
        });
    }

    fn answer(&mut self, ticket: u64, question: DisplayQuery) {
        let answer = match question {
            DisplayQuery::Modes => DisplayAnswer::Modes(None),
            DisplayQuery::Edid { .. } => DisplayAnswer::Edid(None),
        };
        self.with_effects(|device, effects| device.display_answer(ticket, answer, effects));
    }

    fn check_quotas(&self) {
        let usage = self.device.usage();
        let Usage { resources, resource_bytes, backing_entries, contexts, address_spaces, tlb_entries, jobs } =
            usage;
        assert!(resources <= QUOTAS.resources && resource_bytes <= QUOTAS.resource_bytes);
        assert!(backing_entries <= QUOTAS.backing_entries);
        assert!(contexts <= QUOTAS.contexts && jobs <= QUOTAS.queued_jobs);
        assert!(address_spaces <= QUOTAS.address_spaces && tlb_entries <= QUOTAS.tlb_entries);
    }

    /// Returns everything that is out.
    fn settle(&mut self) {
        while !self.jobs.is_empty() || !self.asked.is_empty() {
            for job in std::mem::take(&mut self.jobs) {
                self.give_back(job, JobOutcome::Done);
            }
            for (ticket, question) in std::mem::take(&mut self.asked) {
                self.answer(ticket, question);
            }
        }
    }

    fn destroy_everything(&mut self) {
        self.accept_features(true);
        let (resources, contexts) = (self.resources.clone(), self.contexts.clone());
        for request in resources.into_iter().map(unref).chain(contexts.into_iter().map(ctx_destroy)) {
            self.control(&request);
        }
    }
}
