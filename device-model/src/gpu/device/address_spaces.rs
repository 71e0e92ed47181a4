//! Handlers: address spaces.

use job_stream::address_space::{CREATE_FAULTS, FAULT_FAIL, FAULT_REPLAY};
use job_stream::{AsAnswerFault, AsCreate, AsDestroy, AsFetchFault, AsInvalidate};

use super::{Answer, Call, Device, Effect, Handled, Shown};
use crate::addr::Asid;
use crate::gpu::context::ContextId;
use crate::gpu::error::CommandError;
use crate::gpu::reply::Reply;
use crate::gpu::request::OfAddressSpace;
use crate::gpu::resource::Retired;
use crate::jobs::job::JobError;
use crate::jobs::schedule::FaultedJob;

impl<P> Device<P> {
    pub(super) fn create_address_space(
        &mut self,
        request: OfAddressSpace<AsCreate>,
        _: &mut Shown,
    ) -> Handled<P> {
        let context = self.contexts.id(request.ctx)?;
        let AsCreate { asid, flags, .. } = request.command;
        let space = self.address_spaces.create(context, request.command)?;
        if flags & CREATE_FAULTS != 0 {
            self.faults.open(Asid::new(asid), context, space);
        }
        Ok(Answer::Now(Reply::NoData))
    }

    /// Answered when no job uses it any more.
    pub(super) fn destroy_address_space(
        &mut self,
        request: OfAddressSpace<AsDestroy>,
        _: &mut Shown,
    ) -> Handled<P> {
        let context = self.contexts.id(request.ctx)?;
        let asid = request.command.asid;
        let space = self.address_spaces.destroy(context, asid)?;
        self.close_faults(Asid::new(asid));
        Ok(Answer::Unused(Retired::AddressSpace(space)))
    }

    /// Answered when the steps that had begun before have ended.
    pub(super) fn invalidate_address_space(
        &mut self,
        request: OfAddressSpace<AsInvalidate>,
        _: &mut Shown,
    ) -> Handled<P> {
        let context = self.contexts.id(request.ctx)?;
        Ok(Answer::Unused(Retired::Translations(self.address_spaces.invalidate(context, request.command)?)))
    }

    /// Answered when there is a fault.
    pub(super) fn fetch_fault(&mut self, request: OfAddressSpace<AsFetchFault>, _: &mut Shown) -> Handled<P> {
        let asid = self.with_faults(request.ctx, request.command.asid)?;
        Ok(Answer::Fault(asid))
    }

    pub(super) fn answer_fault(
        &mut self,
        request: OfAddressSpace<AsAnswerFault>,
        _: &mut Shown,
    ) -> Handled<P> {
        let AsAnswerFault { asid, action, id } = request.command;
        let number = self.with_faults(request.ctx, asid)?;
        if action != FAULT_REPLAY && action != FAULT_FAIL {
            return Err(CommandError::BadFaultAnswer { asid, id, action });
        }
        let faulted = self.faults.answer(number, id)?;
        let error = JobError::Translation(faulted.fault);
        Ok(Answer::Resume(faulted, if action == FAULT_REPLAY { Ok(()) } else { Err(error) }))
    }

    /// An address space of the context whose faults the driver answers.
    fn with_faults(&self, ctx: u32, asid: u32) -> Result<Asid, CommandError> {
        self.address_spaces.find(self.contexts.id(ctx)?, asid)?;
        let number = Asid::new(asid);
        self.faults.check(number)?;
        Ok(number)
    }

    /// A job is parked until the driver has answered its fault.
    pub fn job_faulted(&mut self, faulted: FaultedJob, effects: &mut Vec<Effect<P>>) {
        let asid = faulted.fault.asid;
        if self.contexts.is_killed(faulted.wait.job) {
            self.unanswerable.1.push((faulted, JobError::Killed));
        } else if let Err(faulted) = self.faults.raise(faulted) {
            let error = JobError::Translation(faulted.fault);
            self.unanswerable.1.push((faulted, error));
        }
        self.answer_fetches(asid, effects);
        self.end_unanswerable(effects);
    }

    pub(super) fn fetch_fault_for(&mut self, call: Call<P>, asid: Asid, effects: &mut Vec<Effect<P>>) {
        self.faults.fetch(asid, call);
        self.answer_fetches(asid, effects);
    }

    fn answer_fetches(&mut self, asid: Asid, effects: &mut Vec<Effect<P>>) {
        while let Some((call, fault)) = self.faults.next(asid) {
            self.finish(call, Ok(Reply::Fault(fault)), effects);
        }
    }

    /// The address space has lost its number: its driver answers no fault of it any more.
    pub(super) fn close_faults(&mut self, asid: Asid) {
        let (fetches, faults) = self.faults.close(asid);
        self.unanswerable.0.extend(fetches);
        let failed = faults.into_iter().map(|faulted| {
            let error = JobError::Translation(faulted.fault);
            (faulted, error)
        });
        self.unanswerable.1.extend(failed);
    }

    /// The jobs of a context are killed: those that wait for answers go on, to end.
    pub(super) fn fail_faults_of(&mut self, context: ContextId) {
        let faults = self.faults.take_all_of(context).into_iter();
        self.unanswerable.1.extend(faults.map(|faulted| (faulted, JobError::Killed)));
    }

    /// Answers what no driver answers any more.
    pub(super) fn end_unanswerable(&mut self, effects: &mut Vec<Effect<P>>) {
        let (calls, faults) = std::mem::take(&mut self.unanswerable);
        for (faulted, error) in faults {
            effects.push(Effect::AnswerFault { wait: faulted.wait, answer: Err(error) });
        }
        for call in calls {
            self.finish(call, Err(CommandError::AddressSpaceEnded), effects);
        }
    }

    /// A step has ended that an AS_INVALIDATE may wait for.
    pub fn flush_ended(&mut self, effects: &mut Vec<Effect<P>>) {
        self.retire_unused(effects);
    }
}
