//! The in-order ring of the 2D device: commands that use the backing of a resource, or must not overtake one that does.
//! One transfer runs at a time. Knows the order; knows nothing of what the commands do or of who sent them.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::gpu::quota::{OverQuota, Quota};
use crate::gpu::request::UpdateCursor;
use crate::gpu::resource::{Format, Retired};
use crate::gpu::scanout::ScanoutSource;
use crate::image::{Image, Rect};
use crate::jobs::job::JobId;
use crate::jobs::transfer::Transfer;

/// What an item of the ring does when its turn comes.
#[derive(Debug)]
pub(crate) enum RingCommand {
    /// TRANSFER_TO_HOST_2D.
    Transfer(Transfer),
    /// RESOURCE_FLUSH: shows what was written to this part of the image.
    Flush { image: Arc<Image>, rect: Rect },
    /// SET_SCANOUT: the scanout shows this from now on.
    Show { scanout: u32, source: Option<ScanoutSource> },
    /// RESOURCE_UNREF, DETACH_BACKING: no job uses this any more.
    Retire(Retired),
    /// UPDATE_CURSOR or MOVE_CURSOR, after the transfers that draw the cursor.
    Cursor(CursorWork),
}

impl RingCommand {
    /// The image that it writes or reads.
    fn image(&self) -> Option<&Arc<Image>> {
        match self {
            Self::Transfer(transfer) => Some(transfer.image()),
            Self::Flush { image, .. } => Some(image),
            Self::Cursor(CursorWork { change: CursorChange::Define { image, .. }, .. }) => Some(image),
            Self::Cursor(_) | Self::Show { .. } | Self::Retire(_) => None,
        }
    }
}

/// A cursor command, with what it needs of its resource.
#[derive(Debug)]
pub(crate) struct CursorWork {
    pub(crate) request: UpdateCursor,
    pub(crate) change: CursorChange,
}

/// The effect on a cursor besides its new position.
#[derive(Debug)]
pub(crate) enum CursorChange {
    /// A new picture.
    Define { image: Arc<Image>, format: Format },
    /// It is hidden.
    Hide,
    /// None.
    Move,
}

/// The ring. `C` is the call that an item answers.
#[derive(Debug)]
pub(crate) struct Ring<C> {
    waiting: VecDeque<(C, RingCommand)>,
    running: Option<Running<C>>,
    limit: u64,
}

#[derive(Debug)]
struct Running<C> {
    id: JobId,
    image: Arc<Image>,
    call: C,
}

impl<C> Ring<C> {
    /// A ring that holds up to `limit` items, including the running job.
    pub(crate) fn new(limit: u64) -> Self {
        Self { waiting: VecDeque::new(), running: None, limit }
    }

    /// Whether one more item may be pushed.
    pub(crate) fn room(&self) -> Result<(), OverQuota> {
        let used = (self.waiting.len() as u64).saturating_add(self.running.is_some().into());
        if used < self.limit {
            return Ok(());
        }
        Err(OverQuota { quota: Quota::QueuedJobs, wanted: 1, used, limit: self.limit })
    }

    /// Appends an item. The caller has made sure that there is room.
    pub(crate) fn push(&mut self, call: C, work: RingCommand) {
        self.waiting.push_back((call, work));
    }

    /// Takes the next item, unless a job runs.
    pub(crate) fn next(&mut self) -> Option<(C, RingCommand)> {
        if self.running.is_some() {
            return None;
        }
        self.waiting.pop_front()
    }

    /// A job for `call` writes `image` now: all other items wait for it.
    pub(crate) fn start(&mut self, id: JobId, image: Arc<Image>, call: C) {
        debug_assert!(self.running.is_none(), "one job at a time");
        self.running = Some(Running { id, image, call });
    }

    /// The job ended. `None`: it is not the one that runs, but one from before a reset.
    pub(crate) fn finish(&mut self, id: JobId) -> Option<C> {
        self.running.take_if(|running| running.id == id).map(|running| running.call)
    }

    /// Whether an item uses this image.
    pub(crate) fn uses(&self, image: &Arc<Image>) -> bool {
        let same = |other: &Arc<Image>| Arc::ptr_eq(other, image);
        self.running.as_ref().is_some_and(|running| same(&running.image))
            || self.waiting.iter().any(|(_, work)| work.image().is_some_and(same))
    }

    /// Whether a cursor command of this scanout waits.
    pub(crate) fn has_cursor(&self, scanout: u32) -> bool {
        let is = |work: &RingCommand| matches!(work, RingCommand::Cursor(work) if work.request.position.scanout == scanout);
        self.waiting.iter().any(|(_, work)| is(work))
    }

    /// Empties the ring and returns the calls.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = C> + '_ {
        let running = self.running.take().map(|running| running.call);
        running.into_iter().chain(self.waiting.drain(..).map(|(call, _)| call))
    }
}
