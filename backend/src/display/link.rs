//! One connection to a display: the vhost-user-gpu protocol over `vhost`'s `GpuBackend`. Every call may block for as
//! long as the display does not answer; it ends when the socket is shut down. Knows nothing of the callers.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use device_model::gpu::scanout::{
    CursorPosition, DisplayAnswer, DisplayMode, DisplayModes, DisplayQuery, Edid, ScanoutSource,
};
use device_model::image::Rect;
use device_model::telemetry::stats::Stats;
use vhost::vhost_user::GpuBackend;
use vhost::vhost_user::gpu_message::{
    VhostUserGpuCursorPos, VhostUserGpuCursorUpdate, VhostUserGpuEdidRequest, VhostUserGpuScanout,
    VhostUserGpuUpdate, VirtioGpuRespDisplayInfo, VirtioGpuRespGetEdid,
};
use vhost::vhost_user::message::VhostUserU64;

use super::picture::{CursorLook, DisplayUpdate};
use super::pixels;

/// VHOST_USER_GPU_PROTOCOL_F_EDID is bit 0. (The crate's own constants are bit numbers where masks are needed.)
const FEATURE_EDID: u64 = 1 << 0;

/// A negotiated connection.
pub(super) struct Link {
    backend: GpuBackend,
    edid: bool,
    stats: Arc<Stats>,
    /// Pixels of one UPDATE: complete before its header is sent, because QEMU's main loop blocks until it has read all.
    buffer: Vec<u8>,
}

impl Link {
    /// Negotiates the protocol's features.
    pub(super) fn open(socket: UnixStream, stats: Arc<Stats>) -> io::Result<Self> {
        // `GpuBackend` retries without limit after EAGAIN, so calls have to block until they complete or fail.
        socket.set_nonblocking(false)?;
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        let backend = GpuBackend::from_stream(socket);
        let offered = backend.get_protocol_features()?.value;
        let wanted = offered & FEATURE_EDID;
        backend.set_protocol_features(&VhostUserU64::new(wanted))?;
        Ok(Self { backend, edid: wanted & FEATURE_EDID != 0, stats, buffer: Vec::new() })
    }

    /// Sends one update to the display.
    pub(super) fn tell(&mut self, work: DisplayUpdate) -> io::Result<()> {
        match work {
            DisplayUpdate::Off { scanout } => self.set_size(scanout, 0, 0),
            DisplayUpdate::Pixels { scanout, source, resize, parts } => {
                if resize {
                    self.set_size(scanout, source.rect.width, source.rect.height)?;
                }
                self.update(scanout, &source, &parts)
            }
            DisplayUpdate::CursorLook { position, look } => self.cursor(position, &look),
            DisplayUpdate::CursorMove { position } => self.backend.cursor_pos(&wire_position(position)),
            DisplayUpdate::CursorHide { position } => self.backend.cursor_pos_hide(&wire_position(position)),
        }
    }

    /// Sends a query to the display and waits for the answer.
    pub(super) fn ask(&mut self, query: DisplayQuery) -> io::Result<DisplayAnswer> {
        match query {
            DisplayQuery::Modes => {
                let modes = modes(&self.backend.get_display_info()?);
                Ok(DisplayAnswer::Modes(Some(Box::new(modes))))
            }
            DisplayQuery::Edid { scanout } => Ok(DisplayAnswer::Edid(self.edid(scanout)?)),
        }
    }

    fn set_size(&self, scanout_id: u32, width: u32, height: u32) -> io::Result<()> {
        self.backend.set_scanout(&VhostUserGpuScanout { scanout_id, width, height })
    }

    fn update(&mut self, scanout_id: u32, source: &ScanoutSource, parts: &[Rect]) -> io::Result<()> {
        for piece in parts.iter().copied().flat_map(pixels::pieces) {
            pixels::read(source, piece, &mut self.buffer);
            let Rect { x, y, width, height } = piece;
            let update = VhostUserGpuUpdate { scanout_id, x, y, width, height };
            // Counted first: a test that sees the pixels also sees the count.
            self.stats.display_updates.add(1);
            self.backend.update_scanout(&update, &self.buffer)?;
        }
        Ok(())
    }

    fn cursor(&self, position: CursorPosition, look: &CursorLook) -> io::Result<()> {
        let (hot_x, hot_y) = look.hot;
        let update = VhostUserGpuCursorUpdate { pos: wire_position(position), hot_x, hot_y };
        self.backend.cursor_update(&update, &look.pixels)
    }

    /// The EDID of a scanout, or `None` if the display has none. QEMU does not answer at all for a scanout that does
    /// not exist; it does not say how many exist, but the first one and every enabled one do.
    fn edid(&mut self, scanout_id: u32) -> io::Result<Option<Edid>> {
        if !self.edid {
            return Ok(None);
        }
        if scanout_id != 0 {
            let modes = modes(&self.backend.get_display_info()?);
            if !modes.get(scanout_id as usize).is_some_and(|mode| mode.enabled) {
                return Ok(None);
            }
        }
        Ok(edid(&self.backend.get_edid(&VhostUserGpuEdidRequest { scanout_id })?))
    }
}

fn modes(reply: &VirtioGpuRespDisplayInfo) -> DisplayModes {
    reply.pmodes.map(|one| DisplayMode {
        rect: Rect { x: one.r.x, y: one.r.y, width: one.r.width, height: one.r.height },
        enabled: one.enabled != 0,
        flags: one.flags,
    })
}

/// The block without its padding; `None` if it is empty or its size exceeds the field.
fn edid(reply: &VirtioGpuRespGetEdid) -> Option<Edid> {
    reply.edid.get(..reply.size as usize).filter(|block| !block.is_empty()).map(<[u8]>::to_vec)
}

fn wire_position(position: CursorPosition) -> VhostUserGpuCursorPos {
    VhostUserGpuCursorPos { scanout_id: position.scanout, x: position.x, y: position.y }
}
