//! The screen, through KMS as any program without a GPU would use it: dumb buffers, page flips, a cursor. It counts
//! what it does. Knows nothing of virtio, nor of who asks.

use crate::error::{AgentError, Doing};
use crate::port::wait_readable;
use drm::buffer::{Buffer, DrmFourcc};
use drm::control::dumbbuffer::DumbBuffer;
use drm::control::{ClipRect, Device as _, Event, Mode, PageFlipFlags, connector, crtc, framebuffer};
use guest_agent::picture::{self, Canvas};
use guest_agent::protocol::Drawn;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

const FLIP_WAIT: Duration = Duration::from_secs(20);
const CURSOR_SIZE: u32 = 64;
/// Width and height of a buffer that comes and goes: 64 pages.
const CHURN_SIZE: u32 = 256;

struct Card(File);

impl AsFd for Card {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
impl drm::Device for Card {}
impl drm::control::Device for Card {}

/// A buffer that the screen can show.
struct Page {
    buffer: DumbBuffer,
    frame: framebuffer::Handle,
}

/// The screen, held until it is dropped; then the kernel frees all that was made here.
pub(crate) struct Screen {
    card: Card,
    crtc: crtc::Handle,
    pages: [Page; 2],
    /// Which of the pages is on screen.
    front: usize,
    frame: u32,
    cursor: Option<DumbBuffer>,
    counts: Drawn,
}

impl Screen {
    /// Takes the screen in its preferred mode and shows frame 0.
    pub(crate) fn take(path: &Path) -> Result<Self, AgentError> {
        let file =
            File::options().read(true).write(true).open(path).doing(format!("open {}", path.display()))?;
        let card = Card(file);
        let (crtc, connector, mode) = find_output(&card)?;
        let (width, height) = mode.size();
        let size = (u32::from(width), u32::from(height));
        let pages = [make_page(&card, size)?, make_page(&card, size)?];
        let [front, _] = &pages;
        card.set_crtc(crtc, Some(front.frame), (0, 0), &[connector], Some(mode)).doing("set the mode")?;
        let counts = Drawn { width: size.0, height: size.1, mode_sets: 1, ..Drawn::default() };
        Ok(Self { card, crtc, pages, front: 0, frame: 0, cursor: None, counts })
    }

    /// Draws the next frame on the page behind and flips to it; ends when the kernel says that it is shown.
    pub(crate) fn flip(&mut self) -> Result<(), AgentError> {
        self.front = 1 - self.front;
        self.frame += 1;
        let handle = self.draw()?;
        self.card.page_flip(self.crtc, handle, PageFlipFlags::EVENT, None).doing("flip the page")?;
        self.wait_for_flip()?;
        self.counts.page_flips += 1;
        Ok(())
    }

    /// Draws the next frame on the page that is shown, and says what has changed.
    pub(crate) fn flush_dirty(&mut self) -> Result<(), AgentError> {
        self.frame += 1;
        let handle = self.draw()?;
        let all = ClipRect::new(0, 0, self.counts.width as u16, self.counts.height as u16);
        self.card.dirty_framebuffer(handle, &[all]).doing("flush a dirty rectangle")?;
        self.counts.dirty_flushes += 1;
        Ok(())
    }

    /// Shows the cursor, if it is not shown yet.
    pub(crate) fn show_cursor(&mut self) -> Result<(), AgentError> {
        if self.cursor.is_some() {
            return Ok(());
        }
        let size = (CURSOR_SIZE, CURSOR_SIZE);
        let mut buffer = self
            .card
            .create_dumb_buffer(size, DrmFourcc::Argb8888, 32)
            .doing("create the cursor's buffer")?;
        let mut map = self.card.map_dumb_buffer(&mut buffer).doing("map the cursor's buffer")?;
        for (to, from) in map.as_mut().iter_mut().zip(picture::cursor()) {
            *to = from;
        }
        drop(map);
        #[expect(deprecated, reason = "the older call is the one that needs no atomic state")]
        self.card.set_cursor(self.crtc, Some(&buffer)).doing("show the cursor")?;
        self.cursor = Some(buffer);
        self.counts.cursor_images += 1;
        Ok(())
    }

    /// Moves the cursor a step along its way across the screen.
    pub(crate) fn move_cursor(&mut self, step: u32) -> Result<(), AgentError> {
        let x = (step * 7 + 1) % self.counts.width;
        let y = (step * 5 + 1) % self.counts.height;
        #[expect(deprecated, reason = "the older call is the one that needs no atomic state")]
        self.card.move_cursor(self.crtc, (x as i32, y as i32)).doing("move the cursor")?;
        self.counts.cursor_moves += 1;
        Ok(())
    }

    /// Lets a buffer come and go: its mappings in the IOMMU come and go with it.
    pub(crate) fn churn(&mut self) -> Result<(), AgentError> {
        let size = (CHURN_SIZE, CHURN_SIZE);
        let buffer = self.card.create_dumb_buffer(size, DrmFourcc::Xrgb8888, 32).doing("create a buffer")?;
        self.card.destroy_dumb_buffer(buffer).doing("destroy a buffer")?;
        self.counts.buffers_churned += 1;
        Ok(())
    }

    /// What was counted since the last time, with what stands on the screen.
    pub(crate) fn take_counts(&mut self) -> Drawn {
        let Drawn { width, height, .. } = self.counts;
        let next = Drawn { width, height, ..Drawn::default() };
        Drawn { frame: self.frame, ..std::mem::replace(&mut self.counts, next) }
    }

    fn draw(&mut self) -> Result<framebuffer::Handle, AgentError> {
        let [first, second] = &mut self.pages;
        let page = if self.front == 0 { first } else { second };
        let (width, height) = page.buffer.size();
        let stride = page.buffer.pitch() as usize;
        let mut map = self.card.map_dumb_buffer(&mut page.buffer).doing("map a buffer")?;
        Canvas::new(map.as_mut(), stride, width, height).draw_frame(self.frame);
        Ok(page.frame)
    }

    fn wait_for_flip(&self) -> Result<(), AgentError> {
        loop {
            if !wait_readable(self.card.as_fd(), FLIP_WAIT).doing("wait for a page flip")? {
                return Err(AgentError::NoFlipEvent { seconds: FLIP_WAIT.as_secs() });
            }
            let mut events = self.card.receive_events().doing("read the card's events")?;
            if events.any(|event| matches!(event, Event::PageFlip(_))) {
                return Ok(());
            }
        }
    }
}

fn find_output(card: &Card) -> Result<(crtc::Handle, connector::Handle, Mode), AgentError> {
    let resources = card.resource_handles().doing("list the card's resources")?;
    let crtc = *resources.crtcs().first().ok_or(AgentError::NoConnector)?;
    for &handle in resources.connectors() {
        let info = card.get_connector(handle, true).doing("ask a connector")?;
        if let (connector::State::Connected, Some(&mode)) = (info.state(), info.modes().first()) {
            return Ok((crtc, handle, mode));
        }
    }
    Err(AgentError::NoConnector)
}

fn make_page(card: &Card, size: (u32, u32)) -> Result<Page, AgentError> {
    let mut buffer = card.create_dumb_buffer(size, DrmFourcc::Xrgb8888, 32).doing("create a buffer")?;
    let stride = buffer.pitch() as usize;
    let mut map = card.map_dumb_buffer(&mut buffer).doing("map a buffer")?;
    let mut canvas = Canvas::new(map.as_mut(), stride, size.0, size.1);
    canvas.draw_still();
    canvas.draw_frame(0);
    drop(map);
    let frame = card.add_framebuffer(&buffer, 24, 32).doing("add a frame buffer")?;
    Ok(Page { buffer, frame })
}
