//! Commands to a display, and its answers: values only. The backend's display thread translates them to the
//! vhost-user-gpu protocol; without a display socket they are dropped.

use std::sync::Arc;

use crate::image::{Image, Rect};

/// The most scanouts of a device (virtio 1.3, 5.7.4: VIRTIO_GPU_MAX_SCANOUTS).
pub const MAX_SCANOUTS: usize = 16;
/// Width and height of a cursor image in pixels (vhost-user-gpu CURSOR_UPDATE).
pub const CURSOR_SIZE: u32 = 64;

/// How the four bytes of a pixel in memory become x8r8g8b8: the byte that holds blue, green and red.
/// (virtio 1.3, 5.7.6.8: the format's name gives the bytes in memory order.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChannelOrder {
    /// Index of the blue byte.
    pub blue: u8,
    /// Index of the green byte.
    pub green: u8,
    /// Index of the red byte.
    pub red: u8,
}

/// The part of an image that a scanout shows.
#[derive(Clone, Debug)]
pub struct ScanoutSource {
    /// The image.
    pub image: Arc<Image>,
    /// Its pixel layout.
    pub order: ChannelOrder,
    /// The part of the image that is shown; it fits the image.
    pub rect: Rect,
}

/// Where a cursor is, on which scanout.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CursorPosition {
    /// Scanout, below [`MAX_SCANOUTS`].
    pub scanout: u32,
    /// Pixels from the left.
    pub x: u32,
    /// Pixels from the top.
    pub y: u32,
}

/// Pixels of a cursor: 64 × 64, a8r8g8b8, little-endian.
pub type CursorPixels = [u8; 4 * (CURSOR_SIZE * CURSOR_SIZE) as usize];

/// A command to the display. The device does not wait for any of them.
#[derive(Debug)]
pub enum DisplayCommand {
    /// Show `source` on the scanout, or nothing.
    SetScanout {
        /// Scanout, below [`MAX_SCANOUTS`].
        scanout: u32,
        /// The new source.
        source: Option<ScanoutSource>,
    },
    /// The part `rect` (in pixels of the image that the scanout shows) has new contents. Flushes that the
    /// display has not yet executed coalesce.
    Flush {
        /// Scanout, below [`MAX_SCANOUTS`].
        scanout: u32,
        /// The changed part, in coordinates of the image; not empty.
        rect: Rect,
    },
    /// Show this cursor.
    UpdateCursor {
        /// The position.
        position: CursorPosition,
        /// Hot spot, from the left.
        hot_x: u32,
        /// Hot spot, from the top.
        hot_y: u32,
        /// The picture.
        pixels: Box<CursorPixels>,
    },
    /// Move the cursor that is shown.
    MoveCursor(CursorPosition),
    /// Hide the cursor.
    HideCursor(CursorPosition),
}

/// One scanout's mode as the display wants it (virtio 1.3, 5.7.6.8, struct virtio_gpu_display_one).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DisplayMode {
    /// Preferred position and size.
    pub rect: Rect,
    /// Whether a display is connected.
    pub enabled: bool,
    /// Flags as the front-end gave them.
    pub flags: u32,
}

/// The modes of all scanouts.
pub type DisplayModes = [DisplayMode; MAX_SCANOUTS];

/// An EDID block as the display or the device itself made it: up to 1,024 bytes.
pub type Edid = Vec<u8>;

/// A question to the display. If no answer comes, the device answers from what it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DisplayQuery {
    /// The modes of all scanouts.
    Modes,
    /// The EDID of a scanout.
    Edid {
        /// Scanout, below [`MAX_SCANOUTS`].
        scanout: u32,
    },
}

/// The answer to a [`DisplayQuery`]; `None`: there is no display, or it did not answer in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DisplayAnswer {
    /// To [`DisplayQuery::Modes`].
    Modes(Option<Box<DisplayModes>>),
    /// To [`DisplayQuery::Edid`].
    Edid(Option<Edid>),
}
