//! Images in host memory, and rectangles of them. Knows pixels; knows nothing of guest memory, resources or scanouts.

// Guest-controlled numbers must not make this code panic or overflow. Exceptions state their reason.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::unwrap_used
    )
)]

mod rect;

use std::fmt;
use std::sync::{Mutex, MutexGuard, TryLockError};

use zerocopy::FromZeros;

pub use self::rect::Rect;
use crate::locking::lock;

/// Bytes of a pixel, in every format.
pub(crate) const BYTES_PER_PIXEL: u64 = 4;

/// The host's copy of a 2D resource: rows of 32-bit pixels without padding, in the resource's own format.
///
/// LOCKING: the lock is a leaf, held for one step's copy at most (64 KiB), and never waited for inside a section, so
/// that no drain waits for it.
pub struct Image {
    width: u32,
    height: u32,
    pixels: Mutex<Box<[u8]>>,
}

impl Image {
    /// A black image of `width` × `height` pixels; the caller has bounded and accounted for the size. `None`: this host
    /// has no memory for it.
    pub fn new(width: u32, height: u32) -> Option<Self> {
        let bytes = (width as usize).checked_mul(height as usize)?.checked_mul(4)?;
        // Zeroed by the system, so that only pages that are drawn on take memory.
        let pixels = <[u8]>::new_box_zeroed_with_elems(bytes).ok()?;
        Some(Self { width, height, pixels: Mutex::new(pixels) })
    }

    /// Width in pixels.
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        self.height
    }

    /// Bytes from one row to the next.
    #[cfg_attr(
        not(test),
        expect(
            clippy::arithmetic_side_effects,
            reason = "an image is created only if its bytes can be counted"
        )
    )]
    pub fn stride(&self) -> usize {
        self.width as usize * 4
    }

    /// The pixels, for one bounded copy.
    pub fn lock(&self) -> MutexGuard<'_, Box<[u8]>> {
        // A copy cannot leave the pixels in an invalid state, so a poisoned lock can be ignored.
        lock(&self.pixels)
    }

    /// The pixels, unless another thread has them: for callers that must not wait, such as every section.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, Box<[u8]>>> {
        match self.pixels.try_lock() {
            Ok(pixels) => Some(pixels),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Image({}x{})", self.width, self.height)
    }
}
