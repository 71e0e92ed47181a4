//! What the display should show, and which part of that was not sent yet. Commands change the wanted state at once, in
//! any number; the memory used is bounded, because later commands replace earlier ones. Knows nothing of sockets and
//! threads.

use std::sync::Arc;

use device_model::gpu::scanout::{CursorPixels, CursorPosition, DisplayCommand, MAX_SCANOUTS, ScanoutSource};
use device_model::image::Rect;

use super::region::{DirtyRegion, intersection};

/// One update to send to the display.
#[derive(Debug)]
pub(super) enum DisplayUpdate {
    /// The scanout is disabled.
    Off { scanout: u32 },
    /// Parts of a scanout have new pixels; if `resize`, the scanout gets its new size before them.
    Pixels { scanout: u32, source: ScanoutSource, resize: bool, parts: Vec<Rect> },
    /// A cursor has a new image.
    CursorLook { position: CursorPosition, look: CursorLook },
    /// A cursor has moved.
    CursorMove { position: CursorPosition },
    /// A cursor is hidden.
    CursorHide { position: CursorPosition },
}

/// The image of a cursor.
#[derive(Clone, Debug)]
pub(super) struct CursorLook {
    /// Its hot spot.
    pub(super) hot: (u32, u32),
    /// Its pixels.
    pub(super) pixels: Arc<CursorPixels>,
}

/// The wanted state of all scanouts and cursors, and what of it is unsent.
#[derive(Debug, Default)]
pub(super) struct Picture {
    scanouts: [Scanout; MAX_SCANOUTS],
    /// The scanout that is checked first, so that a busy one does not starve the others.
    turn: usize,
}

#[derive(Debug, Default)]
struct Scanout {
    source: Option<ScanoutSource>,
    /// The pixels to send, in coordinates of the scanout, not of the image.
    dirty: DirtyRegion,
    /// Width and height that this connection's display was sent; `None`: the scanout is disabled there.
    shown: Option<(u32, u32)>,
    cursor: Cursor,
}

#[derive(Debug, Default)]
struct Cursor {
    position: CursorPosition,
    /// The image; a hidden cursor keeps it, and a move may show it again.
    look: Option<CursorLook>,
    is_visible: bool,
    /// The display does not know all of this yet.
    is_unsent: bool,
    /// The display does not have the image yet.
    is_look_unsent: bool,
}

impl Picture {
    /// Applies a command. Returns whether it replaced one that was still unsent; an invalid scanout is ignored.
    pub(super) fn apply(&mut self, command: DisplayCommand) -> bool {
        match command {
            DisplayCommand::SetScanout { scanout, source } => self.on(scanout, |it| it.set_source(source)),
            DisplayCommand::Flush { scanout, rect } => self.on(scanout, |it| it.flush(rect)),
            DisplayCommand::UpdateCursor { position, hot_x, hot_y, pixels } => {
                let look = CursorLook { hot: (hot_x, hot_y), pixels: pixels.into() };
                self.on(position.scanout, |it| it.cursor.show(position, look))
            }
            DisplayCommand::MoveCursor(position) => self.on(position.scanout, |it| it.cursor.go(position)),
            DisplayCommand::HideCursor(position) => self.on(position.scanout, |it| it.cursor.hide(position)),
        }
    }

    fn on(&mut self, scanout: u32, change: impl FnOnce(&mut Scanout) -> bool) -> bool {
        self.scanouts.get_mut(scanout as usize).is_some_and(change)
    }

    /// The next update for the display, which counts as sent from now on.
    pub(super) fn next(&mut self) -> Option<DisplayUpdate> {
        for step in 0..MAX_SCANOUTS {
            let index = (self.turn + step) % MAX_SCANOUTS;
            let work = self.scanouts.get_mut(index).and_then(|scanout| scanout.next(index as u32));
            if work.is_some() {
                self.turn = (index + 1) % MAX_SCANOUTS;
                return work;
            }
        }
        None
    }

    /// A new display has connected: everything has to be sent again.
    pub(super) fn forget_told(&mut self) {
        for scanout in &mut self.scanouts {
            scanout.shown = None;
            scanout.set_all_dirty();
            let cursor = &mut scanout.cursor;
            cursor.is_look_unsent = cursor.look.is_some();
            cursor.is_unsent = cursor.is_look_unsent && cursor.is_visible;
        }
    }

    /// The device was reset: everything shown is disabled, also on the display.
    pub(super) fn clear(&mut self) {
        for scanout in &mut self.scanouts {
            scanout.set_source(None);
            let Cursor { position, is_visible, .. } = scanout.cursor;
            scanout.cursor = Cursor { position, is_unsent: is_visible, ..Cursor::default() };
        }
    }
}

impl Scanout {
    fn set_source(&mut self, source: Option<ScanoutSource>) -> bool {
        self.source = source.and_then(clipped);
        self.dirty.take();
        self.set_all_dirty();
        false
    }

    fn set_all_dirty(&mut self) {
        if let Some(source) = &self.source {
            self.dirty.add(Rect { x: 0, y: 0, ..source.rect });
        }
    }

    fn flush(&mut self, rect: Rect) -> bool {
        let Some(source) = &self.source else { return false };
        let Some(seen) = intersection(rect, source.rect) else { return false };
        let joined = !self.dirty.is_clean();
        self.dirty.add(Rect {
            x: seen.x.saturating_sub(source.rect.x),
            y: seen.y.saturating_sub(source.rect.y),
            ..seen
        });
        joined
    }

    fn next(&mut self, scanout: u32) -> Option<DisplayUpdate> {
        match &self.source {
            None if self.shown.take().is_some() => Some(DisplayUpdate::Off { scanout }),
            Some(source) if !self.dirty.is_clean() => {
                // QEMU creates a new surface at every SCANOUT and shows it at the next UPDATE; an UPDATE without a
                // SCANOUT, or after the one that disabled it, crashes QEMU. So both are sent together, here only.
                let size = Some((source.rect.width, source.rect.height));
                let resize = self.shown != size;
                self.shown = size;
                Some(DisplayUpdate::Pixels {
                    scanout,
                    source: source.clone(),
                    resize,
                    parts: self.dirty.take(),
                })
            }
            _ => self.cursor.next(),
        }
    }
}

impl Cursor {
    fn show(&mut self, position: CursorPosition, look: CursorLook) -> bool {
        *self = Self { position, look: Some(look), is_visible: true, is_unsent: true, is_look_unsent: true };
        false
    }

    /// Moves the cursor, and shows it if it has an image.
    fn go(&mut self, position: CursorPosition) -> bool {
        self.position = position;
        if self.look.is_some() {
            (self.is_visible, self.is_unsent) = (true, true);
        }
        false
    }

    fn hide(&mut self, position: CursorPosition) -> bool {
        self.position = position;
        (self.is_visible, self.is_unsent) = (false, true);
        false
    }

    fn next(&mut self) -> Option<DisplayUpdate> {
        if !std::mem::take(&mut self.is_unsent) {
            return None;
        }
        let position = self.position;
        match &self.look {
            Some(look) if self.is_visible => Some(if std::mem::take(&mut self.is_look_unsent) {
                DisplayUpdate::CursorLook { position, look: look.clone() }
            } else {
                DisplayUpdate::CursorMove { position }
            }),
            _ => Some(DisplayUpdate::CursorHide { position }),
        }
    }
}

/// The source, reduced to the part that lies within its image; `None` if there is none.
fn clipped(source: ScanoutSource) -> Option<ScanoutSource> {
    let whole = Rect { x: 0, y: 0, width: source.image.width(), height: source.image.height() };
    let rect = intersection(source.rect, whole)?;
    Some(ScanoutSource { rect, ..source })
}

#[cfg(test)]
mod tests {
    use device_model::gpu::scanout::ChannelOrder;
    use device_model::image::Image;

    use super::*;

    fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
        Rect { x, y, width, height }
    }

    fn set(picture: &mut Picture, scanout: u32, shown: Rect) {
        let image = Arc::new(Image::new(100, 80).unwrap());
        let order = ChannelOrder { blue: 0, green: 1, red: 2 };
        let source = Some(ScanoutSource { image, order, rect: shown });
        picture.apply(DisplayCommand::SetScanout { scanout, source });
    }

    fn look(picture: &mut Picture, scanout: u32, x: u32) {
        let position = CursorPosition { scanout, x, y: 0 };
        let pixels = Box::new([1; 16384]);
        picture.apply(DisplayCommand::UpdateCursor { position, hot_x: 0, hot_y: 0, pixels });
    }

    /// All updates until nothing is left, one word each.
    fn told(picture: &mut Picture) -> Vec<String> {
        std::iter::from_fn(|| picture.next()).map(|work| word(&work)).collect()
    }

    fn word(work: &DisplayUpdate) -> String {
        match work {
            DisplayUpdate::Off { scanout } => format!("off {scanout}"),
            DisplayUpdate::Pixels { scanout, resize, parts, .. } => {
                let parts: Vec<_> = parts.iter().map(|p| (p.x, p.y, p.width, p.height)).collect();
                format!("pixels {scanout} {} {parts:?}", if *resize { "new" } else { "same" })
            }
            DisplayUpdate::CursorLook { position, .. } => format!("look {} {}", position.scanout, position.x),
            DisplayUpdate::CursorMove { position } => format!("move {} {}", position.scanout, position.x),
            DisplayUpdate::CursorHide { position } => format!("hide {} {}", position.scanout, position.x),
        }
    }

    #[test]
    fn flushes_are_clipped_to_the_shown_part_and_given_in_its_coordinates() {
        let mut picture = Picture::default();
        set(&mut picture, 1, rect(20, 10, 50, 40));
        assert_eq!(told(&mut picture), ["pixels 1 new [(0, 0, 50, 40)]"]);
        let flush = |rect| DisplayCommand::Flush { scanout: 1, rect };
        assert!(!picture.apply(flush(rect(0, 0, 30, 11))));
        assert!(picture.apply(flush(rect(65, 45, 10, 10))));
        assert!(!picture.apply(flush(rect(0, 0, 20, 80))), "nothing of it is shown");
        assert_eq!(told(&mut picture), ["pixels 1 same [(0, 0, 10, 1), (45, 35, 5, 5)]"]);
    }

    #[test]
    fn a_display_is_never_told_to_turn_off_what_it_was_not_told_to_show() {
        let mut picture = Picture::default();
        let off =
            |picture: &mut Picture| picture.apply(DisplayCommand::SetScanout { scanout: 0, source: None });
        off(&mut picture);
        assert!(told(&mut picture).is_empty());
        set(&mut picture, 0, rect(0, 0, 10, 10));
        off(&mut picture);
        picture.apply(DisplayCommand::Flush { scanout: 0, rect: rect(0, 0, 10, 10) });
        assert!(told(&mut picture).is_empty());
        set(&mut picture, 0, rect(0, 0, 10, 10));
        told(&mut picture);
        off(&mut picture);
        assert_eq!(told(&mut picture), ["off 0"]);
    }

    #[test]
    fn another_image_of_the_same_size_is_sent_whole_without_a_new_scanout() {
        let mut picture = Picture::default();
        set(&mut picture, 0, rect(0, 0, 10, 10));
        told(&mut picture);
        set(&mut picture, 0, rect(5, 5, 10, 10));
        assert_eq!(told(&mut picture), ["pixels 0 same [(0, 0, 10, 10)]"]);
        set(&mut picture, 0, rect(5, 5, 10, 11));
        assert_eq!(told(&mut picture), ["pixels 0 new [(0, 0, 10, 11)]"]);
    }

    #[test]
    fn of_many_cursor_commands_the_last_state_is_told() {
        let mut picture = Picture::default();
        picture.apply(DisplayCommand::MoveCursor(CursorPosition { scanout: 2, x: 1, y: 1 }));
        assert!(told(&mut picture).is_empty(), "no cursor is shown yet");
        look(&mut picture, 2, 5);
        picture.apply(DisplayCommand::MoveCursor(CursorPosition { scanout: 2, x: 6, y: 1 }));
        assert_eq!(told(&mut picture), ["look 2 6"]);
        for x in 0..100 {
            picture.apply(DisplayCommand::MoveCursor(CursorPosition { scanout: 2, x, y: 1 }));
        }
        assert_eq!(told(&mut picture), ["move 2 99"]);
        look(&mut picture, 2, 7);
        picture.apply(DisplayCommand::HideCursor(CursorPosition { scanout: 2, x: 8, y: 1 }));
        assert_eq!(told(&mut picture), ["hide 2 8"]);
        let go = |picture: &mut Picture, x| {
            picture.apply(DisplayCommand::MoveCursor(CursorPosition { scanout: 2, x, y: 1 }));
        };
        go(&mut picture, 9);
        assert_eq!(told(&mut picture), ["look 2 9"], "the display has not had this image yet");
        picture.apply(DisplayCommand::HideCursor(CursorPosition { scanout: 2, x: 9, y: 1 }));
        assert_eq!(told(&mut picture), ["hide 2 9"]);
        picture.forget_told();
        assert!(told(&mut picture).is_empty());
        go(&mut picture, 10);
        assert_eq!(told(&mut picture), ["look 2 10"], "another display");
        picture.apply(DisplayCommand::HideCursor(CursorPosition { scanout: 2, x: 9, y: 1 }));
        go(&mut picture, 11);
        assert_eq!(told(&mut picture), ["move 2 11"]);
    }

    #[test]
    fn a_new_display_is_told_everything_that_is_shown() {
        let mut picture = Picture::default();
        set(&mut picture, 0, rect(0, 0, 10, 10));
        look(&mut picture, 0, 3);
        set(&mut picture, 15, rect(0, 0, 20, 20));
        let first = told(&mut picture);
        picture.forget_told();
        let mut again = told(&mut picture);
        again.sort();
        assert_eq!(again, ["look 0 3", "pixels 0 new [(0, 0, 10, 10)]", "pixels 15 new [(0, 0, 20, 20)]"]);
        assert_eq!(first.len(), 3);
        picture.clear();
        let mut cleared = told(&mut picture);
        cleared.sort();
        assert_eq!(cleared, ["hide 0 3", "off 0", "off 15"]);
        picture.forget_told();
        assert!(told(&mut picture).is_empty());
    }

    #[test]
    fn a_busy_scanout_does_not_starve_another() {
        let mut picture = Picture::default();
        set(&mut picture, 0, rect(0, 0, 10, 10));
        set(&mut picture, 1, rect(0, 0, 10, 10));
        let first = picture.next().map(|work| word(&work));
        picture.apply(DisplayCommand::Flush { scanout: 0, rect: rect(0, 0, 5, 5) });
        let second = picture.next().map(|work| word(&work));
        assert_eq!(first.as_deref(), Some("pixels 0 new [(0, 0, 10, 10)]"));
        assert_eq!(second.as_deref(), Some("pixels 1 new [(0, 0, 10, 10)]"));
    }

    #[test]
    fn a_scanout_or_a_rect_out_of_range_is_ignored() {
        let mut picture = Picture::default();
        set(&mut picture, MAX_SCANOUTS as u32, rect(0, 0, 10, 10));
        set(&mut picture, u32::MAX, rect(0, 0, 10, 10));
        set(&mut picture, 0, rect(100, 0, 10, 10));
        look(&mut picture, 16, 1);
        assert!(told(&mut picture).is_empty());
        set(&mut picture, 0, rect(90, 70, u32::MAX, u32::MAX));
        assert_eq!(told(&mut picture), ["pixels 0 new [(0, 0, 10, 10)]"]);
    }
}
