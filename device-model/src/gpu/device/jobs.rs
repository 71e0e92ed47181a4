//! Handlers: contexts, buffers and jobs.
//!
//! A buffer is guest memory and nothing else; the host has no copy of it. So a transfer to or from it moves nothing; it
//! is answered when the jobs of its context that were submitted before it are done.

use std::time::Duration;

use job_stream::{CAPSET_ID, Limits, Mode, Packet, verify_bytes};
use virtio_bindings::virtio_gpu::VIRTIO_GPU_F_CONTEXT_INIT;

use super::{Answer, Call, Device, Effect, Handled, Shown};
use crate::gpu::context::{ContextId, Next, QueueId, Submission};
use crate::gpu::error::CommandError;
use crate::gpu::payload::MemEntries;
use crate::gpu::reply::Reply;
use crate::gpu::request::{
    ContextResource, CreateBlob, CreateBuffer, CreateContext, OfContext, Submit, TransferBuffer,
};
use crate::jobs::address_space::TlbPolicy;
use crate::jobs::job::{Job, JobId};
use crate::jobs::operands::{Operands, ResourceMemory};
use crate::jobs::program::Execution;

/// How the device treats jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobConfig {
    /// Whether the device offers jobs at all: contexts, buffers, blobs and the capability set.
    pub offered: bool,
    /// The mode of a context that requests none.
    pub default_mode: Mode,
    /// Whether a context may ask for the registration cache, which is incoherent.
    pub allow_incoherent: bool,
    /// The number of engines, for the capability set.
    pub engines: u32,
    /// How the TLBs of address spaces behave.
    pub tlb: TlbPolicy,
}

impl Default for JobConfig {
    fn default() -> Self {
        Self {
            offered: true,
            default_mode: Mode::Fence,
            allow_incoherent: false,
            engines: 1,
            tlb: TlbPolicy::Sticky,
        }
    }
}

impl JobConfig {
    /// The limits on a job stream.
    pub fn limits(&self) -> Limits {
        let limits = Limits::default();
        let modes =
            if self.allow_incoherent { limits.modes.with(Mode::RegistrationCache) } else { limits.modes };
        Limits { modes, ..limits }
    }
}

impl<P> Device<P> {
    pub(super) fn create_context(&mut self, request: CreateContext, _: &mut Shown) -> Handled<P> {
        self.check_context_init(&request)?;
        self.contexts.create(request.ctx)?;
        Ok(Answer::Now(Reply::NoData))
    }

    /// A context has a capability set: the device's own, also if it names none.
    fn check_context_init(&self, request: &CreateContext) -> Result<(), CommandError> {
        let CreateContext { ctx, init } = *request;
        let known = init == 0 || init == CAPSET_ID && self.has(VIRTIO_GPU_F_CONTEXT_INIT);
        if known { Ok(()) } else { Err(CommandError::ContextInit { ctx, init }) }
    }

    /// Waiting jobs fail, running ones are stopped; answered when they have ended.
    pub(super) fn destroy_context(&mut self, request: OfContext, _: &mut Shown) -> Handled<P> {
        let context = self.contexts.destroy(request.ctx)?;
        self.fail_faults_of(context);
        for asid in self.address_spaces.destroy_all_of(context) {
            self.close_faults(asid);
        }
        Ok(Answer::Behind(context))
    }

    pub(super) fn attach_to_context(&mut self, request: ContextResource, _: &mut Shown) -> Handled<P> {
        self.resources.get(request.resource)?;
        self.contexts.attach(request.ctx, request.resource)?;
        Ok(Answer::Now(Reply::NoData))
    }

    /// Answered when all earlier jobs of the context are done.
    pub(super) fn detach_from_context(&mut self, request: ContextResource, _: &mut Shown) -> Handled<P> {
        self.resources.get(request.resource)?;
        Ok(Answer::Behind(self.contexts.detach(request.ctx, request.resource)?))
    }

    pub(super) fn create_buffer(&mut self, request: CreateBuffer, _: &mut Shown) -> Handled<P> {
        self.resources.create_buffer(request)?;
        Ok(Answer::Now(Reply::NoData))
    }

    pub(super) fn create_blob(&mut self, request: CreateBlob<MemEntries<'_>>, _: &mut Shown) -> Handled<P> {
        let CreateBlob { id, memory, blob, size, entries } = request;
        let request = CreateBlob { id, memory, blob, size, entries: entries.iter() };
        self.resources.create_blob(request, entries.len())?;
        Ok(Answer::Now(Reply::NoData))
    }

    pub(super) fn transfer_buffer(&mut self, request: TransferBuffer, _: &mut Shown) -> Handled<P> {
        let TransferBuffer { ctx, resource: id, x, width } = request;
        let resource = self.resources.get(id)?;
        if resource.picture().is_ok() || u64::from(x).saturating_add(width.into()) > resource.bytes() {
            return Err(CommandError::BytesOutside { id, x, width });
        }
        if ctx == 0 {
            return Ok(Answer::Now(Reply::NoData));
        }
        self.contexts.check_attached(ctx, id)?;
        Ok(Answer::Behind(self.contexts.id(ctx)?))
    }

    /// All checks come first: a refused stream leaves no trace.
    pub(super) fn submit(&mut self, request: Submit<'_>, _: &mut Shown) -> Handled<P> {
        let Submit { ctx, ring, stream } = request;
        let context = self.contexts.open(ctx)?;
        let queue = QueueId { context, ring };
        let limits = self.limits();
        let program = verify_bytes(stream, &limits).map_err(CommandError::Stream)?;
        let asked = match program.packets().first() {
            Some(Packet::Context(context)) => (context.mode, context.priority),
            _ => (None, None),
        };
        let treatment = self.contexts.treatment(ctx, asked, self.config.jobs.default_mode)?;
        let packets = program.packets().len() as u64;
        let address_space = |asid| self.address_spaces.find(context, asid).cloned();
        let operands = Operands::resolve(program, |id| self.memory(ctx, id), address_space)?;
        self.contexts.take_room(queue.context, packets)?;
        let execution = Execution::new(operands, Duration::from_nanos(limits.wait_ns));
        Ok(Answer::Job(queue, Box::new(Submission { call: None, execution, treatment, packets })))
    }

    /// The limits on a job stream.
    pub(super) fn limits(&self) -> Limits {
        let address_spaces = u32::try_from(self.config.quotas.address_spaces).unwrap_or(u32::MAX);
        Limits { address_spaces, ..self.config.jobs.limits() }
    }

    /// The memory of a resource of the context, for a job.
    fn memory(&self, ctx: u32, id: u32) -> Result<ResourceMemory, CommandError> {
        let resource = self.resources.get(id)?;
        self.contexts.check_attached(ctx, id)?;
        let backing = resource.backing.clone().ok_or(CommandError::NothingBehind { id })?;
        Ok(ResourceMemory { bytes: resource.bytes(), backing })
    }

    /// Queues an accepted job. With a fence, its end is the answer; without, it is answered here.
    pub(super) fn enqueue(
        &mut self,
        call: Call<P>,
        (queue, mut submission): (QueueId, Box<Submission<Call<P>>>),
        effects: &mut Vec<Effect<P>>,
    ) {
        if call.fence.is_some() {
            submission.call = Some(call);
        } else {
            self.finish(call, Ok(Reply::NoData), effects);
        }
        self.contexts.submit(queue, submission);
        self.pump_queue(queue, effects);
    }

    /// Answers a call when all queues of its context have reached it.
    pub(super) fn answer_behind(&mut self, call: Call<P>, context: ContextId, effects: &mut Vec<Effect<P>>) {
        if let Some(call) = self.contexts.answer_behind(context, call) {
            self.finish(call, Ok(Reply::NoData), effects);
        }
        self.pump_context(context, effects);
    }

    /// Serves all queues of a context.
    pub(super) fn pump_context(&mut self, context: ContextId, effects: &mut Vec<Effect<P>>) {
        for queue in self.contexts.queue_ids(context) {
            self.pump_queue(queue, effects);
        }
        self.retire_unused(effects);
    }

    /// Serves a queue until it is empty or a job of it runs.
    fn pump_queue(&mut self, queue: QueueId, effects: &mut Vec<Effect<P>>) {
        while let Some(next) = self.contexts.next(queue, JobId(self.next_job)) {
            match next {
                Next::Nothing => {}
                Next::Answer(call, result) => {
                    let result = result.map(|()| Reply::NoData).map_err(CommandError::Job);
                    self.finish(call, result, effects);
                }
                Next::Start(treatment, execution) => {
                    effects.push(Effect::Run(Job::program(self.new_job(), treatment, *execution)));
                }
            }
        }
    }

    /// Answers those UNREFs and DETACHes whose memory is no longer used by any job.
    pub(super) fn retire_unused(&mut self, effects: &mut Vec<Effect<P>>) {
        let unused = self.retiring.extract_if(.., |(_, retired)| !retired.is_in_use());
        for (call, retired) in unused.collect::<Vec<_>>() {
            self.resources.retire(retired);
            self.finish(call, Ok(Reply::NoData), effects);
        }
    }

    pub(super) fn new_job(&mut self) -> JobId {
        let id = JobId(self.next_job);
        self.next_job = self.next_job.wrapping_add(1);
        id
    }
}
