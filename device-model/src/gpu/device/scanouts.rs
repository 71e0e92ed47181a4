//! What the device shows: the image of each scanout, and the display's last answers. Knows values
//! of `crate::gpu::scanout`; knows nothing of commands or ids.

use std::sync::Arc;

use crate::gpu::edid;
use crate::gpu::reply::Reply;
use crate::gpu::resource::Format;
use crate::gpu::ring::{CursorChange, CursorWork};
use crate::gpu::scanout::{
    CURSOR_SIZE, CursorPixels, DisplayAnswer, DisplayCommand, DisplayMode, DisplayModes, DisplayQuery, Edid,
    MAX_SCANOUTS, ScanoutSource,
};
use crate::image::{Image, Rect};
use crate::wire::gpu::EDID_BYTES;

/// The assumed mode of a display that never reported one.
const DEFAULT_MODE: DisplayMode =
    DisplayMode { rect: Rect { x: 0, y: 0, width: 1024, height: 768 }, enabled: true, flags: 0 };

/// One scanout.
#[derive(Debug, Default)]
struct Scanout {
    source: Option<ScanoutSource>,
}

/// All scanouts. Their number is between 1 and [`MAX_SCANOUTS`].
#[derive(Debug)]
pub(super) struct Scanouts {
    all: Vec<Scanout>,
    /// The display's last answer; kept over resets, for the display stays.
    modes: Box<DisplayModes>,
}

impl Scanouts {
    pub(super) fn new(count: u32) -> Self {
        let mut modes = Box::<DisplayModes>::default();
        if let Some(first) = modes.first_mut() {
            *first = DEFAULT_MODE;
        }
        Self { all: (0..count).map(|_| Scanout::default()).collect(), modes }
    }

    pub(super) fn reset(&mut self) {
        self.all.fill_with(Scanout::default);
    }

    /// How many there are.
    pub(super) fn count(&self) -> u32 {
        // At most MAX_SCANOUTS.
        u32::try_from(self.all.len()).unwrap_or(0)
    }

    /// Shows `source` on a scanout, or nothing.
    pub(super) fn set(&mut self, scanout: u32, source: Option<ScanoutSource>) -> Option<DisplayCommand> {
        let place = self.all.get_mut(usize::try_from(scanout).ok()?)?;
        place.source.clone_from(&source);
        Some(DisplayCommand::SetScanout { scanout, source })
    }

    /// Removes the image from all scanouts that show it.
    pub(super) fn disable(&mut self, image: &Arc<Image>) -> Vec<DisplayCommand> {
        let showing: Vec<u32> = self.showing(image).map(|(scanout, _)| scanout).collect();
        showing.into_iter().filter_map(|scanout| self.set(scanout, None)).collect()
    }

    /// The scanouts that show the image, and which part of it.
    fn showing<'a>(&'a self, image: &'a Arc<Image>) -> impl Iterator<Item = (u32, Rect)> + 'a {
        (0..).zip(&self.all).filter_map(move |(scanout, place)| {
            let source = place.source.as_ref().filter(|source| Arc::ptr_eq(&source.image, image))?;
            Some((scanout, source.rect))
        })
    }

    /// What has to be redrawn when this part of the image changed.
    pub(super) fn flushes<'a>(
        &'a self,
        image: &'a Arc<Image>,
        changed: Rect,
    ) -> impl Iterator<Item = DisplayCommand> + 'a {
        self.showing(image).filter_map(move |(scanout, shown)| {
            Some(DisplayCommand::Flush { scanout, rect: changed.intersection(shown)? })
        })
    }

    /// The guest's reply once the display has answered, or failed to.
    pub(super) fn reply(&mut self, question: DisplayQuery, answer: DisplayAnswer) -> Reply {
        match question {
            DisplayQuery::Modes => {
                if let DisplayAnswer::Modes(Some(modes)) = answer {
                    self.modes = modes;
                    // Scanouts that the device does not have are ignored.
                    self.modes
                        .iter_mut()
                        .skip(self.all.len())
                        .for_each(|mode| *mode = DisplayMode::default());
                }
                Reply::DisplayInfo(self.modes.clone())
            }
            DisplayQuery::Edid { scanout } => match answer {
                DisplayAnswer::Edid(Some(edid)) if (1..=EDID_BYTES).contains(&edid.len()) => {
                    Reply::Edid(edid)
                }
                DisplayAnswer::Edid(_) | DisplayAnswer::Modes(_) => Reply::Edid(self.edid(scanout)),
            },
        }
    }

    /// A generated EDID from what is known of the scanout.
    fn edid(&self, scanout: u32) -> Edid {
        let mode = usize::try_from(scanout).ok().and_then(|index| self.modes.get(index));
        let rect = mode.map(|mode| mode.rect).filter(|rect| !rect.is_empty()).unwrap_or(DEFAULT_MODE.rect);
        edid::generate(rect.width, rect.height)
    }
}

const _: () = assert!(MAX_SCANOUTS == crate::wire::gpu::MAX_SCANOUTS as usize);

/// The display command for a cursor command.
pub(super) fn cursor_command(work: CursorWork) -> DisplayCommand {
    let CursorWork { request, change } = work;
    let position = request.position;
    match change {
        CursorChange::Define { image, format } => {
            let pixels = cursor_pixels(&image, format);
            DisplayCommand::UpdateCursor { position, hot_x: request.hot_x, hot_y: request.hot_y, pixels }
        }
        CursorChange::Move => DisplayCommand::MoveCursor(position),
        CursorChange::Hide => DisplayCommand::HideCursor(position),
    }
}

/// The pixels of a cursor as a8r8g8b8. The caller has checked the size of the image. Formats without an alpha channel
/// are opaque.
fn cursor_pixels(image: &Image, format: Format) -> Box<CursorPixels> {
    let mut cursor = Box::new([0_u8; 4 * (CURSOR_SIZE * CURSOR_SIZE) as usize]);
    let source = image.lock();
    for (to, from) in cursor.as_chunks_mut::<4>().0.iter_mut().zip(source.as_chunks::<4>().0) {
        let byte = |index: u8| from.get(usize::from(index)).copied().unwrap_or(0);
        let alpha = format.alpha.map_or(u8::MAX, byte);
        *to = [byte(format.order.blue), byte(format.order.green), byte(format.order.red), alpha];
    }
    cursor
}
