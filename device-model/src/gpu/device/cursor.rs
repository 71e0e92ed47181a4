//! Handlers: the cursor. Commands are executed at once, unless the picture of the cursor is still being drawn, or
//! another cursor command of the same scanout waits for that.

use super::{Answer, Device, Handled, Shown, scanouts};
use crate::gpu::error::CommandError;
use crate::gpu::reply::Reply;
use crate::gpu::request::UpdateCursor;
use crate::gpu::ring::{CursorChange, CursorWork, RingCommand};
use crate::gpu::scanout::CURSOR_SIZE;

impl<P> Device<P> {
    pub(super) fn update_cursor(&mut self, request: UpdateCursor, shown: &mut Shown) -> Handled<P> {
        self.check_scanout(request.position.scanout)?;
        if request.resource == 0 {
            return self.change_cursor(request, CursorChange::Hide, shown);
        }
        let picture = self.resources.get(request.resource)?.picture()?;
        let (width, height) = (picture.image.width(), picture.image.height());
        if (width, height) != (CURSOR_SIZE, CURSOR_SIZE) {
            return Err(CommandError::CursorSize { width, height });
        }
        let change = CursorChange::Define { image: picture.image.clone(), format: picture.format };
        self.change_cursor(request, change, shown)
    }

    /// Uses only the position (virtio 1.3, 5.7.6.10), and whether there is a resource: QEMU's own device shows the cursor
    /// if there is one, and hides it if not (qemu: hw/display/virtio-gpu.c, update_cursor). Drivers rely on it.
    pub(super) fn move_cursor(&mut self, request: UpdateCursor, shown: &mut Shown) -> Handled<P> {
        self.check_scanout(request.position.scanout)?;
        let change = if request.resource == 0 { CursorChange::Hide } else { CursorChange::Move };
        self.change_cursor(request, change, shown)
    }

    fn change_cursor(
        &mut self,
        request: UpdateCursor,
        change: CursorChange,
        shown: &mut Shown,
    ) -> Handled<P> {
        let drawn = match &change {
            CursorChange::Define { image, .. } => !self.ring.uses(image),
            CursorChange::Hide | CursorChange::Move => true,
        };
        let work = CursorWork { request, change };
        if drawn && !self.ring.has_cursor(work.request.position.scanout) {
            shown.push(scanouts::cursor_command(work));
            return Ok(Answer::Now(Reply::NoData));
        }
        self.ring.room()?;
        Ok(Answer::InOrder(RingCommand::Cursor(work)))
    }
}
