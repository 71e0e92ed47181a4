//! Handlers: resources, their backings and transfers to their images.

use super::{Answer, Device, Handled, Shown};
use crate::gpu::error::CommandError;
use crate::gpu::payload::MemEntries;
use crate::gpu::reply::Reply;
use crate::gpu::request::{AttachBacking, CreateResource, Flush, OfResource, TransferToHost};
use crate::gpu::resource::Retired;
use crate::gpu::ring::RingCommand;
use crate::jobs::transfer::Transfer;

impl<P> Device<P> {
    pub(super) fn create(&mut self, request: CreateResource, _: &mut Shown) -> Handled<P> {
        self.resources.create(request)?;
        Ok(Answer::Now(Reply::NoData))
    }

    /// Answered when no queued transfer uses the backing any more: the guest unmaps it after the answer.
    pub(super) fn unref(&mut self, request: OfResource, _: &mut Shown) -> Handled<P> {
        self.ring.room()?;
        let resource = self.resources.remove(request.id)?;
        self.contexts.forget(request.id);
        Ok(Answer::InOrder(RingCommand::Retire(Retired::Resource(resource))))
    }

    pub(super) fn attach(&mut self, request: AttachBacking<MemEntries<'_>>, _: &mut Shown) -> Handled<P> {
        let entries = request.entries;
        self.resources.attach(request.resource, entries.len(), entries.iter())?;
        Ok(Answer::Now(Reply::NoData))
    }

    /// Like RESOURCE_UNREF.
    pub(super) fn detach(&mut self, request: OfResource, _: &mut Shown) -> Handled<P> {
        self.ring.room()?;
        let backing = self.resources.detach(request.id)?;
        Ok(Answer::InOrder(RingCommand::Retire(Retired::Backing(backing))))
    }

    pub(super) fn transfer(&mut self, request: TransferToHost, _: &mut Shown) -> Handled<P> {
        self.ring.room()?;
        let resource = self.resources.get(request.resource)?;
        let backing = resource.backing.clone().ok_or(CommandError::NoBacking { id: request.resource })?;
        let picture = resource.picture()?;
        let rect = picture.bounded(request.rect)?;
        if rect.is_empty() {
            return Ok(Answer::Now(Reply::NoData));
        }
        let transfer = Transfer::new(picture.image.clone(), backing, rect, request.offset)?;
        Ok(Answer::InOrder(RingCommand::Transfer(transfer)))
    }

    pub(super) fn flush(&mut self, request: Flush, _: &mut Shown) -> Handled<P> {
        self.ring.room()?;
        let picture = self.resources.get(request.resource)?.picture()?;
        let rect = picture.bounded(request.rect)?;
        Ok(Answer::InOrder(RingCommand::Flush { image: picture.image.clone(), rect }))
    }
}
