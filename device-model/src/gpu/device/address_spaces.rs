//! Handlers: address spaces.

use job_stream::{AsCreate, AsDestroy, AsInvalidate};

use super::{Answer, Device, Effect, Handled, Shown};
use crate::gpu::reply::Reply;
use crate::gpu::request::OfAddressSpace;
use crate::gpu::resource::Retired;

impl<P> Device<P> {
    pub(super) fn create_address_space(
        &mut self,
        request: OfAddressSpace<AsCreate>,
        _: &mut Shown,
    ) -> Handled<P> {
        let context = self.contexts.id(request.ctx)?;
        self.address_spaces.create(context, request.command)?;
        Ok(Answer::Now(Reply::NoData))
    }

    /// Answered when no job uses it any more.
    pub(super) fn destroy_address_space(
        &mut self,
        request: OfAddressSpace<AsDestroy>,
        _: &mut Shown,
    ) -> Handled<P> {
        let context = self.contexts.id(request.ctx)?;
        let space = self.address_spaces.destroy(context, request.command.asid)?;
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

    /// A step has ended that an AS_INVALIDATE may wait for.
    pub fn flush_ended(&mut self, effects: &mut Vec<Effect<P>>) {
        self.retire_unused(effects);
    }
}
