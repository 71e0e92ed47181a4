//! The device: commands in, effects out. Made of resources, scanouts, the in-order ring of the 2D commands, contexts with
//! their queues of jobs, the timelines of fences and what is asked of the display. Knows nothing of queues, engines or sockets: a pending command is a `P` that is handed
//! back exactly once, and a job is a value that somebody else steps.
//!
//! What a command does to resources and scanouts happens at once, in the order of the commands: an id that was
//! unreferenced can be created again at once, a backing that was detached can be replaced. What a queued command still
//! uses of them, it shares. Only *answers* wait: those of transfers for their jobs, those of RESOURCE_FLUSH,
//! RESOURCE_UNREF and DETACH_BACKING for all transfers before them and all jobs that use the memory, and those that complete a fence for all fences
//! before theirs on their timeline.

use std::collections::BTreeMap;
use std::error::Error;

use crate::gpu::context::{ContextId, ContextInfo, Contexts, QueueId, Submission};
use crate::gpu::decode::{Command, DeviceQueue, command_name, command_table, decode};
use crate::gpu::error::CommandError;
use crate::gpu::fence::{FenceSlot, TimelineId, Timelines};
use crate::gpu::quota::Quotas;
use crate::gpu::reply::{Reply, Response};
use crate::gpu::request::{Fence, Header};
use crate::gpu::resource::{Resources, Retired};
use crate::gpu::ring::{Ring, RingCommand};
use crate::gpu::scanout::{DisplayAnswer, DisplayCommand, DisplayQuestion, MAX_SCANOUTS};
use crate::jobs::job::{Job, JobOutcome};
use crate::jobs::transfer::Transfer;
use crate::telemetry::names::BackingChange;
use crate::wire::gpu::command;
use crate::wire::payload;
use scanouts::Scanouts;
use virtio_bindings::virtio_gpu::{
    VIRTIO_GPU_F_CONTEXT_INIT, VIRTIO_GPU_F_EDID, VIRTIO_GPU_F_RESOURCE_BLOB, VIRTIO_GPU_F_VIRGL,
};

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

/// Rings of a context, each with a queue of jobs and a timeline of its own (virtio 1.3, 5.7.6.7).
pub const RINGS: u8 = 64;

/// Bytes of the longest response.
pub const MAX_RESPONSE_BYTES: usize = payload::MAX_RESPONSE;

/// The device-specific features that the device offers (virtio 1.3, 5.7.3).
pub const fn features() -> u64 {
    1 << VIRTIO_GPU_F_EDID
        | 1 << VIRTIO_GPU_F_VIRGL
        | 1 << VIRTIO_GPU_F_RESOURCE_BLOB
        | 1 << VIRTIO_GPU_F_CONTEXT_INIT
}

/// What a device is made with.
#[derive(Clone, Debug)]
pub struct DeviceConfig {
    /// What the guest may take.
    pub quotas: Quotas,
    /// How many scanouts there are: 1 to [`MAX_SCANOUTS`]; other values are clamped.
    pub scanouts: u32,
    /// How many of them the configuration space announces. A front-end that has the display (QEMU's vhost-user-gpu)
    /// writes a number of its own over it, up to [`MAX_SCANOUTS`].
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

/// What is to be done about a command, in this order.
#[derive(Debug)]
pub enum Effect<P> {
    /// Tell the guest.
    Complete {
        /// The command, as it was given to the device.
        pending: P,
        /// What to tell.
        response: Response,
    },
    /// Have an engine step the job to its end, then give it to [`Device::job_finished`].
    Run(Job),
    /// Tell the display.
    Display(DisplayCommand),
    /// Ask the display, then give its answer to [`Device::display_answer`]. There has to be one, if only "none".
    Ask {
        /// To be given back with the answer.
        ticket: u64,
        /// What to ask.
        question: DisplayQuestion,
    },
}

/// A command that has not been answered, with what its response has to carry.
#[derive(Debug)]
#[must_use = "the guest waits for an answer"]
struct Call<P> {
    pending: P,
    /// The number of the command, for the log.
    kind: u32,
    fence: Option<(Fence, FenceSlot)>,
}

/// What a handler wants done about the answer.
#[derive(Debug)]
enum Answer<P> {
    /// It goes out now.
    Now(Reply),
    /// It goes out when the ring has come to this.
    InOrder(RingCommand),
    /// It goes out when the display has answered this.
    Ask(DisplayQuestion),
    /// It goes out when all jobs that the context has now are done.
    Behind(ContextId),
    /// This is a job for the queue; with a fence, its end is the answer.
    Job(QueueId, Box<Submission<Call<P>>>),
}

/// What came of a handler.
type Handled<P> = Result<Answer<P>, CommandError>;

/// What handlers may tell the display on the way.
type Shown = Vec<DisplayCommand>;

/// What is in use of the quotas.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Resources.
    pub resources: u64,
    /// Bytes of images.
    pub resource_bytes: u64,
    /// Entries of backings.
    pub backing_entries: u64,
    /// Contexts, those included that are destroyed but whose last job has not ended.
    pub contexts: u64,
    /// Jobs of contexts.
    pub jobs: u64,
}

/// The device. `P` is a pending command: each one given to [`control`](Self::control) or [`cursor`](Self::cursor) comes
/// back exactly once, in an [`Effect::Complete`] or from [`reset`](Self::reset).
///
/// One device lives as long as its process, over resets and connections: the ids of its jobs stay unique, so that a job
/// that an engine still held at a reset is recognised when it comes back.
#[derive(Debug)]
pub struct Device<P> {
    config: DeviceConfig,
    /// The features that the guest accepted.
    features: u64,
    resources: Resources,
    scanouts: Scanouts,
    ring: Ring<Call<P>>,
    contexts: Contexts<Call<P>>,
    /// What was given up while a job used it.
    retiring: Vec<(Call<P>, Retired)>,
    fences: Timelines<(P, Response)>,
    asked: BTreeMap<u64, (Call<P>, DisplayQuestion)>,
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
            retiring: Vec::new(),
            fences: Timelines::new(),
            asked: BTreeMap::new(),
            next_job: 0,
            next_ticket: 0,
            config,
        }
    }

    /// The features that the guest accepted (SET_FEATURES); of others than [`features`] no notice is taken.
    pub fn set_features(&mut self, accepted: u64) {
        self.features = accepted & features();
    }

    /// The configuration space (virtio 1.3, 5.7.4).
    pub fn config_space(&self) -> [u8; CONFIG_BYTES] {
        payload::config(self.config.announced_scanouts.min(self.config.scanouts), 1)
    }

    /// How much of a command the device can make use of: whoever copies it out of the guest need not take more. A longer
    /// one is refused, whole or cut off here.
    pub fn max_request_bytes(&self) -> usize {
        payload::longest_request(self.config.quotas.backing_entries, self.config.jobs.limits().words)
    }

    /// What the guest has taken of its quotas.
    pub fn usage(&self) -> Usage {
        let (resources, resource_bytes, backing_entries) = self.resources.usage();
        let (contexts, jobs) = self.contexts.usage();
        Usage { resources, resource_bytes, backing_entries, contexts, jobs }
    }

    /// The image of a resource, for an oracle that compares it with what the guest's pages hold.
    #[cfg(any(test, feature = "test-utils"))]
    pub fn image(&self, resource: u32) -> Option<std::sync::Arc<crate::gpu::scanout::Image>> {
        self.resources.get(resource).ok()?.picture().ok().map(|picture| picture.image.clone())
    }

    /// Lets the numbers of jobs begin here, so that tests with several devices can tell their jobs apart.
    #[cfg(any(test, feature = "test-utils"))]
    pub(crate) fn number_jobs_from(&mut self, first: crate::jobs::job::JobId) {
        self.next_job = first.0;
    }

    /// What there is of contexts.
    pub fn contexts(&self) -> Vec<ContextInfo> {
        self.contexts.info()
    }

    /// Which resources were given memory, or lost it, since the last call; the newest few, if nobody asks.
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

    /// An engine is done with a job. `false`: it is from before a reset, and dropped without a word.
    pub fn job_finished(&mut self, job: Job, outcome: JobOutcome, effects: &mut Vec<Effect<P>>) -> bool {
        let (id, packet) = (job.id(), job.packet());
        // What it holds goes before what waits behind it is answered.
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
        if let Some(call) = call {
            self.finish(call, result, effects);
        }
        self.pump_context(context, effects);
        true
    }

    /// The display answered the question with this ticket. Answers to nothing, as after a reset, are dropped.
    pub fn display_answer(&mut self, ticket: u64, answer: DisplayAnswer, effects: &mut Vec<Effect<P>>) {
        let Some((call, question)) = self.asked.remove(&ticket) else { return };
        let reply = self.scanouts.reply(question, answer);
        self.finish(call, Ok(reply), effects);
    }

    /// RESET_DEVICE, or the end of a connection: resources, scanouts, queued commands and accepted features are gone.
    /// What was pending is handed back, in no particular order. The display is not told.
    pub fn reset(&mut self) -> Vec<P> {
        let asked = std::mem::take(&mut self.asked).into_values().map(|(call, _)| call);
        let retiring = self.retiring.drain(..).map(|(call, _)| call);
        let jobs = self.contexts.clear().into_iter();
        let calls = self.ring.clear().chain(asked).chain(retiring).chain(jobs).map(|call| call.pending);
        let pending = calls.chain(self.fences.clear().map(|(pending, _)| pending)).collect();
        self.resources = Resources::new(&self.config.quotas);
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
            Ok(Answer::Job(queue, job)) => self.enqueue(call, (queue, job), effects),
            Err(error) => self.finish(call, Err(error), effects),
        }
    }

    /// Answers a call: the only way for a pending command to go out. With a fence, it waits for its turn.
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

    /// Commands of the second hundred come with VIRTIO_GPU_F_VIRGL, others and rings with features of their own.
    fn check_negotiated(&self, header: &Header) -> Result<(), CommandError> {
        let kind = header.kind;
        let of_feature = match kind {
            command::RESOURCE_CREATE_BLOB | command::SET_SCANOUT_BLOB => Some(VIRTIO_GPU_F_RESOURCE_BLOB),
            command::GET_EDID => Some(VIRTIO_GPU_F_EDID),
            0x200..0x300 => Some(VIRTIO_GPU_F_VIRGL),
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

    fn ask(&mut self, call: Call<P>, question: DisplayQuestion, effects: &mut Vec<Effect<P>>) {
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
                    // Jobs of contexts are not in this ring, and nothing else waits for them.
                    self.retiring.push((call, retired));
                    self.retire_unused(effects);
                }
                RingCommand::Cursor(work) => {
                    effects.push(Effect::Display(self.scanouts.cursor(work)));
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
            /// Has a command handled: one line for each.
            fn handle(&mut self, command: Command<'_>, shown: &mut Shown) -> Handled<P> {
                match command {
                    $(Command::$variant(request) => self.$handler(request, shown),)*
                }
            }
        }
    };
}
command_table!(dispatch_commands);
