//! The device: commands in, effects out. It consists of resources, scanouts, the in-order ring of the 2D commands,
//! contexts with their queues of jobs, the timelines of fences and the questions to the display. Knows nothing of
//! queues, engines or sockets: a pending command is a `P` that is returned exactly once, and a job is a value that an
//! engine steps.
//!
//! A command changes resources and scanouts at once, in the order of the commands: an unreferenced id can be created
//! again, a detached backing can be replaced. Queued commands share what they still use of the old ones. Only *answers*
//! wait: those of transfers for their jobs, those of RESOURCE_FLUSH, RESOURCE_UNREF and DETACH_BACKING for all earlier
//! transfers and all jobs that use the memory, those of AS_DESTROY for all jobs that use the address space, those of
//! AS_INVALIDATE for the steps that do, those of AS_FETCH_FAULT for a fault, and those that complete a fence for all
//! earlier fences on their timeline.

use std::collections::BTreeMap;
use std::error::Error;

use crate::addr::Asid;
use crate::gpu::address_spaces::AddressSpaces;
use crate::gpu::context::{ContextId, ContextInfo, Contexts, QueueId, Submission};
use crate::gpu::decode::{Command, DeviceQueue, command_name, command_table, decode};
use crate::gpu::error::CommandError;
use crate::gpu::faults::Faults;
use crate::gpu::fence::{FenceSlot, TimelineId, Timelines};
use crate::gpu::payload;
use crate::gpu::quota::Quotas;
use crate::gpu::reply::{Reply, Response};
use crate::gpu::request::{Fence, Header};
use crate::gpu::resource::{Resources, Retired};
use crate::gpu::ring::{Ring, RingCommand};
use crate::gpu::scanout::{DisplayAnswer, DisplayCommand, DisplayQuery, MAX_SCANOUTS};
use crate::jobs::job::{Job, JobError, JobOutcome};
use crate::jobs::schedule::{FaultedJob, JobWait};
use crate::jobs::transfer::Transfer;
use crate::telemetry::names::BackingChange;
use crate::wire::gpu::command;
use scanouts::Scanouts;
use virtio_bindings::virtio_gpu::{
    VIRTIO_GPU_F_CONTEXT_INIT, VIRTIO_GPU_F_EDID, VIRTIO_GPU_F_RESOURCE_BLOB, VIRTIO_GPU_F_VIRGL,
};

mod address_spaces;
mod cursor;
mod display;
mod jobs;
mod resources_2d;
mod scanouts;
#[cfg(test)]
mod tests;

pub use display::MIN_SCANOUT;
pub use jobs::JobConfig;

/// Bytes of the configuration space.
pub const CONFIG_BYTES: usize = 16;

/// Rings of a context, each with its own queue of jobs and timeline (virtio 1.3, 5.7.6.7).
pub const RINGS: u8 = 64;

/// Bytes of the longest response.
pub const MAX_RESPONSE_BYTES: usize = payload::MAX_RESPONSE;

/// The device-specific features that the device offers, unless it has no jobs (virtio 1.3, 5.7.3).
pub const fn features() -> u64 {
    1 << VIRTIO_GPU_F_EDID
        | 1 << VIRTIO_GPU_F_VIRGL
        | 1 << VIRTIO_GPU_F_RESOURCE_BLOB
        | 1 << VIRTIO_GPU_F_CONTEXT_INIT
}

/// The device's settings.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// The guest's quotas.
    pub quotas: Quotas,
    /// How many scanouts there are: 1 to [`MAX_SCANOUTS`]; other values are clamped.
    pub scanouts: u32,
    /// How many of them the configuration space announces. A front-end that owns the display (QEMU's vhost-user-gpu)
    /// overwrites the number with its own, up to [`MAX_SCANOUTS`].
    pub announced_scanouts: u32,
    /// How jobs are treated.
    pub jobs: JobConfig,
}

impl Default for DeviceConfig {
    fn default() -> Self {
        Self {
            quotas: Quotas::default(),
            scanouts: MAX_SCANOUTS as u32,
            announced_scanouts: 1,
            jobs: JobConfig::default(),
        }
    }
}

/// What has to be done for a command, in this order.
#[derive(Debug)]
pub enum Effect<P> {
    /// Answer the guest.
    Complete {
        /// The command, as it was given to the device.
        pending: P,
        /// The response.
        response: Response,
    },
    /// Have an engine step the job until it ends, then give it to [`Device::job_finished`].
    Run(Job),
    /// Tell the schedule how the driver has answered a fault.
    AnswerFault {
        /// The wait of the job.
        wait: JobWait,
        /// `Ok`: the job tries again. `Err`: it fails.
        answer: Result<(), JobError>,
    },
    /// Send a command to the display.
    Display(DisplayCommand),
    /// Ask the display, then give its answer to [`Device::display_answer`]. There has to be one, even if it is "none".
    Ask {
        /// To be returned with the answer.
        ticket: u64,
        /// The question.
        question: DisplayQuery,
    },
}

/// A command that has not been answered, with what its response needs.
#[derive(Debug)]
#[must_use = "the guest waits for an answer"]
struct Call<P> {
    pending: P,
    /// The number of the command, for the log.
    kind: u32,
    fence: Option<(Fence, FenceSlot)>,
}

/// When a command is answered.
#[derive(Debug)]
enum Answer<P> {
    /// Now.
    Now(Reply),
    /// When the in-order ring reaches this command.
    InOrder(RingCommand),
    /// When the display has answered this question.
    Ask(DisplayQuery),
    /// When all current jobs of the context are done.
    Behind(ContextId),
    /// When no job uses this any more.
    Unused(Retired),
    /// When a job raises a fault in this address space.
    Fault(Asid),
    /// Now, and a fault of this job is answered.
    Resume(FaultedJob, Result<(), JobError>),
    /// Queue this job; if it has a fence, the end of the job is the answer.
    Job(QueueId, Box<Submission<Call<P>>>),
}

/// The result of a handler.
type Handled<P> = Result<Answer<P>, CommandError>;

/// Display commands that handlers issue directly.
type Shown = Vec<DisplayCommand>;

/// How much of each quota is in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Resources.
    pub resources: u64,
    /// Bytes of images.
    pub resource_bytes: u64,
    /// Entries of backings.
    pub backing_entries: u64,
    /// Contexts, including destroyed ones whose last job has not ended.
    pub contexts: u64,
    /// Address spaces, including destroyed ones that jobs still use.
    pub address_spaces: u64,
    /// TLB entries of all address spaces.
    pub tlb_entries: u64,
    /// Jobs of contexts.
    pub jobs: u64,
}

/// The device. `P` is a pending command: each one given to [`control`](Self::control) or [`cursor`](Self::cursor) is
/// returned exactly once, in an [`Effect::Complete`] or from [`reset`](Self::reset).
///
/// One device lives as long as its process, over resets and connections: the ids of its jobs stay unique, so that a job
/// that was on an engine during a reset is recognised when it comes back.
#[derive(Debug)]
pub struct Device<P> {
    config: DeviceConfig,
    /// The features that the guest accepted.
    features: u64,
    resources: Resources,
    scanouts: Scanouts,
    ring: Ring<Call<P>>,
    contexts: Contexts<Call<P>>,
    address_spaces: AddressSpaces,
    faults: Faults<Call<P>>,
    /// Calls that waited for faults of address spaces that have ended, and faults of jobs that no driver answers.
    unanswerable: (Vec<Call<P>>, Vec<(FaultedJob, JobError)>),
    /// What was removed, detached or flushed while a job used it.
    retiring: Vec<(Call<P>, Retired)>,
    fences: Timelines<(P, Response)>,
    asked: BTreeMap<u64, (Call<P>, DisplayQuery)>,
    /// The number of the next job, and of the next question: never reset.
    next_job: u64,
    next_ticket: u64,
}

impl<P> Device<P> {
    /// A device without resources.
    pub fn new(mut config: DeviceConfig) -> Self {
        config.scanouts = config.scanouts.clamp(1, MAX_SCANOUTS as u32);
        Self {
            features: 0,
            resources: Resources::new(&config.quotas),
            scanouts: Scanouts::new(config.scanouts),
            ring: Ring::new(config.quotas.queued_jobs),
            contexts: Contexts::new(&config.quotas),
            address_spaces: AddressSpaces::new(&config.quotas, config.jobs.tlb),
            faults: Faults::new(),
            unanswerable: (Vec::new(), Vec::new()),
            retiring: Vec::new(),
            fences: Timelines::new(),
            asked: BTreeMap::new(),
            next_job: 0,
            next_ticket: 0,
            config,
        }
    }

    /// The device-specific features that this device offers. Without jobs it is a 2D display: Linux then takes no path
    /// of its 3D driver, and may hibernate (linux: drivers/gpu/drm/virtio/virtgpu_drv.c).
    pub fn offered_features(&self) -> u64 {
        if self.config.jobs.offered { features() } else { 1 << VIRTIO_GPU_F_EDID }
    }

    /// Sets the features that the guest accepted (SET_FEATURES); those that are not offered are ignored.
    pub fn set_features(&mut self, accepted: u64) {
        self.features = accepted & self.offered_features();
    }

    /// The configuration space (virtio 1.3, 5.7.4).
    pub fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let scanouts = self.config.announced_scanouts.min(self.config.scanouts);
        payload::config(scanouts, self.config.jobs.offered.into())
    }

    /// The most bytes of a command that the device uses: the caller need not copy more out of the guest. A longer
    /// command is refused, whether it is passed whole or truncated to this.
    pub fn max_request_bytes(&self) -> usize {
        payload::longest_request(self.config.quotas.backing_entries, self.config.jobs.limits().words)
    }

    /// How much of its quotas the guest uses.
    pub fn usage(&self) -> Usage {
        let (resources, resource_bytes, backing_entries) = self.resources.usage();
        let (contexts, jobs) = self.contexts.usage();
        let address_spaces = self.address_spaces.usage();
        let tlb_entries = self.address_spaces.tlb_entries();
        Usage { resources, resource_bytes, backing_entries, contexts, address_spaces, tlb_entries, jobs }
    }

    /// The image of a resource, for an oracle that compares it with what the guest's pages hold.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn image(&self, resource: u32) -> Option<std::sync::Arc<crate::image::Image>> {
        self.resources.get(resource).ok()?.picture().ok().map(|picture| picture.image.clone())
    }

    /// Starts the numbers of jobs here, so that tests with several devices can tell their jobs apart.
    #[cfg(any(test, feature = "test-utils"))]
    pub(crate) fn number_jobs_from(&mut self, first: crate::jobs::job::JobId) {
        self.next_job = first.0;
    }

    /// The contexts.
    pub fn contexts(&self) -> Vec<ContextInfo> {
        self.contexts.info()
    }

    /// Which resources gained or lost a backing since the last call; only the last few if this is called rarely.
    pub fn take_backing_changes(&mut self) -> impl Iterator<Item = BackingChange> + use<P> {
        self.resources.take_changes().into_iter()
    }

    /// One command of the control queue.
    pub fn control(&mut self, request: &[u8], pending: P, effects: &mut Vec<Effect<P>>) {
        self.command(DeviceQueue::Control, request, pending, effects);
    }

    /// One command of the cursor queue.
    pub fn cursor(&mut self, request: &[u8], pending: P, effects: &mut Vec<Effect<P>>) {
        self.command(DeviceQueue::Cursor, request, pending, effects);
    }

    /// An engine has finished a job. `false`: it is from before a reset, and dropped silently.
    pub fn job_finished(&mut self, job: Job, outcome: JobOutcome, effects: &mut Vec<Effect<P>>) -> bool {
        let (id, packet) = (job.id(), job.packet());
        // Releases what the job holds before anything that waits for it is answered.
        drop(job);
        let result = match outcome {
            JobOutcome::Done => Ok(Reply::NoData),
            JobOutcome::Failed(error) => Err(error.into()),
        };
        if let Some(call) = self.ring.finish(id) {
            self.finish(call, result, effects);
            self.pump(effects);
            return true;
        }
        let Some((context, call)) = self.contexts.finish(id, result.is_err()) else { return false };
        if let (JobOutcome::Failed(error), Some(packet)) = (outcome, packet) {
            log::debug!("Job {} failed at packet {packet}, and its context is lost: {error}", id.raw());
        }
        if result.is_err() {
            self.fail_faults_of(context);
        }
        if let Some(call) = call {
            self.finish(call, result, effects);
        }
        self.pump_context(context, effects);
        self.end_unanswerable(effects);
        true
    }

    /// The display answered the question with this ticket. Answers to unknown tickets, as after a reset, are dropped.
    pub fn display_answer(&mut self, ticket: u64, answer: DisplayAnswer, effects: &mut Vec<Effect<P>>) {
        let Some((call, question)) = self.asked.remove(&ticket) else { return };
        let reply = self.scanouts.reply(question, answer);
        self.finish(call, Ok(reply), effects);
    }

    /// RESET_DEVICE, or the end of a connection: drops resources, scanouts, queued commands and accepted features.
    /// Returns the pending commands, in no particular order. The display is not told.
    pub fn reset(&mut self) -> Vec<P> {
        let asked = std::mem::take(&mut self.asked).into_values().map(|(call, _)| call);
        let retiring = self.retiring.drain(..).map(|(call, _)| call);
        let jobs = self.contexts.clear().into_iter();
        let (fetches, _) = std::mem::take(&mut self.unanswerable);
        let fetches = fetches.into_iter().chain(self.faults.clear());
        let calls = self.ring.clear().chain(asked).chain(retiring).chain(jobs).chain(fetches);
        let calls = calls.map(|call| call.pending);
        let pending = calls.chain(self.fences.clear().map(|(pending, _)| pending)).collect();
        self.resources = Resources::new(&self.config.quotas);
        self.address_spaces.clear();
        self.scanouts.reset();
        self.features = 0;
        pending
    }

    fn command(&mut self, queue: DeviceQueue, request: &[u8], pending: P, effects: &mut Vec<Effect<P>>) {
        let (header, command) = decode(queue, request);
        let kind = header.map_or(0, |header| header.kind);
        let fence =
            header.and_then(|header| Some((header.fence?, self.fences.begin(self.timeline(&header)))));
        let call = Call { pending, kind, fence };
        let mut shown = Shown::new();
        let handled = command.and_then(|command| {
            header.map_or(Ok(()), |header| self.check_negotiated(&header))?;
            self.handle(command, &mut shown)
        });
        effects.extend(shown.into_iter().map(Effect::Display));
        match handled {
            Ok(Answer::Now(reply)) => self.finish(call, Ok(reply), effects),
            Ok(Answer::InOrder(work)) => {
                self.ring.push(call, work);
                self.pump(effects);
            }
            Ok(Answer::Ask(question)) => self.ask(call, question, effects),
            Ok(Answer::Behind(context)) => self.answer_behind(call, context, effects),
            Ok(Answer::Unused(retired)) => {
                self.retiring.push((call, retired));
                self.retire_unused(effects);
            }
            Ok(Answer::Fault(asid)) => self.fetch_fault_for(call, asid, effects),
            Ok(Answer::Resume(faulted, answer)) => {
                effects.push(Effect::AnswerFault { wait: faulted.wait, answer });
                self.finish(call, Ok(Reply::NoData), effects);
            }
            Ok(Answer::Job(queue, job)) => self.enqueue(call, (queue, job), effects),
            Err(error) => self.finish(call, Err(error), effects),
        }
        self.end_unanswerable(effects);
    }

    /// Answers a call: the only way for a pending command to be completed. One with a fence waits for its turn.
    fn finish(&mut self, call: Call<P>, result: Result<Reply, CommandError>, effects: &mut Vec<Effect<P>>) {
        let Call { pending, kind, fence } = call;
        if let Err(error) = &result {
            let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
            log::debug!("{}: {error}{cause}", command_name(kind));
        }
        let response = Response::new(&result, fence.as_ref().map(|(fence, _)| fence));
        let Some((_, slot)) = fence else {
            return effects.push(Effect::Complete { pending, response });
        };
        let complete = |(pending, response)| effects.push(Effect::Complete { pending, response });
        self.fences.end(slot, (pending, response), complete);
    }

    /// The timeline of a command's fence.
    fn timeline(&self, header: &Header) -> TimelineId {
        match header.ring {
            Some(ring) if self.has(VIRTIO_GPU_F_CONTEXT_INIT) => TimelineId::Ring { ctx: header.ctx, ring },
            _ => TimelineId::Global,
        }
    }

    /// Commands from 0x200 on, and those about address spaces, need VIRTIO_GPU_F_VIRGL, and other commands and rings have
    /// features of their own.
    fn check_negotiated(&self, header: &Header) -> Result<(), CommandError> {
        let kind = header.kind;
        let of_feature = match kind {
            command::RESOURCE_CREATE_BLOB | command::SET_SCANOUT_BLOB => Some(VIRTIO_GPU_F_RESOURCE_BLOB),
            command::GET_EDID => Some(VIRTIO_GPU_F_EDID),
            0x200..0x300 => Some(VIRTIO_GPU_F_VIRGL),
            kind if command::ADDRESS_SPACES.contains(&kind) => Some(VIRTIO_GPU_F_VIRGL),
            _ => None,
        };
        if of_feature.is_some_and(|feature| !self.has(feature)) {
            return Err(CommandError::Unknown { kind });
        }
        match header.ring {
            Some(ring) if !self.has(VIRTIO_GPU_F_CONTEXT_INIT) => Err(CommandError::NoRings { ring }),
            Some(ring) if ring >= RINGS => Err(CommandError::NoSuchRing { ring }),
            _ => Ok(()),
        }
    }

    /// Whether this feature was accepted.
    fn has(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }

    fn ask(&mut self, call: Call<P>, question: DisplayQuery, effects: &mut Vec<Effect<P>>) {
        let ticket = self.next_ticket;
        self.next_ticket = ticket.wrapping_add(1);
        self.asked.insert(ticket, (call, question));
        effects.push(Effect::Ask { ticket, question });
    }

    /// Serves the ring until it is empty or a job runs.
    fn pump(&mut self, effects: &mut Vec<Effect<P>>) {
        while let Some((call, work)) = self.ring.next() {
            match work {
                RingCommand::Transfer(transfer) => self.start(call, transfer, effects),
                RingCommand::Flush { image, rect } => {
                    let flushes = self.scanouts.flushes(&image, rect);
                    effects.extend(flushes.map(Effect::Display));
                    self.finish(call, Ok(Reply::NoData), effects);
                }
                RingCommand::Show { scanout, source } => {
                    effects.extend(self.scanouts.set(scanout, source).map(Effect::Display));
                    self.finish(call, Ok(Reply::NoData), effects);
                }
                RingCommand::Retire(retired) => {
                    if let Retired::Resource(resource) = &retired
                        && let Ok(picture) = resource.picture()
                    {
                        effects
                            .extend(self.scanouts.disable(&picture.image).into_iter().map(Effect::Display));
                    }
                    // Jobs of contexts are not in this ring, and no later item waits for them.
                    self.retiring.push((call, retired));
                    self.retire_unused(effects);
                }
                RingCommand::Cursor(work) => {
                    effects.push(Effect::Display(scanouts::cursor_command(work)));
                    self.finish(call, Ok(Reply::NoData), effects);
                }
            }
        }
    }

    fn start(&mut self, call: Call<P>, transfer: Transfer, effects: &mut Vec<Effect<P>>) {
        let id = self.new_job();
        self.ring.start(id, transfer.image().clone(), call);
        effects.push(Effect::Run(Job::transfer(id, transfer)));
    }
}

macro_rules! dispatch_commands {
    ($($name:ident $variant:ident($payload:ty) $queue:ident $handler:ident;)*) => {
        impl<P> Device<P> {
            /// Dispatches a command: one line for each.
            fn handle(&mut self, command: Command<'_>, shown: &mut Shown) -> Handled<P> {
                match command {
                    $(Command::$variant(request) => self.$handler(request, shown),)*
                }
            }
        }
    };
}
command_table!(dispatch_commands);
