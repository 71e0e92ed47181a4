//! The screen as QEMU shows it, and whether it is the picture that the guest reports to have drawn. Knows nothing of
//! how the dump was made.

use crate::rig::error::{Doing, RigError};
use guest_agent::picture;
use guest_agent::protocol::Drawn;
use std::fs;
use std::path::Path;

const RGB: usize = 3;

/// A picture: rows of red, green, blue.
pub struct Screen {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Screen {
    /// Reads a binary PPM.
    pub fn read(path: &Path) -> Result<Self, RigError> {
        let bytes = fs::read(path).doing(format!("read {}", path.display()))?;
        Self::parse(&bytes).ok_or_else(|| RigError::check(format!("{} is not a PPM picture", path.display())))
    }

    /// The picture that the guest reports to be on the screen.
    pub fn expected(drawn: &Drawn) -> Self {
        let Drawn { width, height, frame, .. } = *drawn;
        let pixels = picture::whole(width, height, frame);
        let rgb = |pixel: &[u8]| match *pixel {
            [blue, green, red, ..] => [red, green, blue],
            _ => [0; RGB],
        };
        Self { width, height, pixels: pixels.chunks_exact(picture::PIXEL).flat_map(rgb).collect() }
    }

    /// Where this differs from `other`, in a sentence; `None` if every byte is the same.
    pub fn difference(&self, other: &Self) -> Option<String> {
        if (self.width, self.height) != (other.width, other.height) {
            let (width, height) = (other.width, other.height);
            return Some(format!("{} × {} pixels instead of {width} × {height}", self.width, self.height));
        }
        let pairs = || self.pixels.chunks_exact(RGB).zip(other.pixels.chunks_exact(RGB)).zip(0u32..);
        let wrong = || pairs().filter(|((ours, theirs), _)| ours != theirs);
        let ((ours, theirs), at) = wrong().next()?;
        let (x, y) = (at % self.width, at / self.width);
        let (count, all) = (wrong().count(), self.width * self.height);
        Some(format!(
            "{count} of {all} pixels differ; the first, at ({x}, {y}), is {ours:02x?}, not {theirs:02x?}"
        ))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut fields = bytes.splitn(4, |&byte| byte == b'\n');
        (fields.next()? == b"P6").then_some(())?;
        let size = std::str::from_utf8(fields.next()?).ok()?;
        let (width, height) = size.split_once(' ')?;
        (fields.next()? == b"255").then_some(())?;
        let (width, height) = (width.parse().ok()?, height.parse().ok()?);
        let pixels = fields.next()?.to_vec();
        (pixels.len() == width as usize * height as usize * RGB).then_some(Self { width, height, pixels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn screen(pixels: &[u8]) -> Screen {
        let mut bytes = b"P6\n2 1\n255\n".to_vec();
        bytes.extend_from_slice(pixels);
        Screen::parse(&bytes).unwrap()
    }

    #[test]
    fn one_wrong_byte_is_a_difference_and_is_named() {
        let (right, wrong) = (screen(&[1, 2, 3, 4, 10, 6]), screen(&[1, 2, 3, 4, 5, 6]));
        assert_eq!(right.difference(&screen(&[1, 2, 3, 4, 10, 6])), None);
        let text = "1 of 2 pixels differ; the first, at (1, 0), is [04, 05, 06], not [04, 0a, 06]";
        assert_eq!(wrong.difference(&right).as_deref(), Some(text));
    }

    #[test]
    fn a_picture_that_is_cut_short_is_not_one() {
        assert!(Screen::parse(b"P6\n2 1\n255\n12345").is_none());
    }

    #[test]
    fn the_expected_picture_has_the_guests_pixels_in_the_order_of_the_dump() {
        let drawn = Drawn { width: 64, height: 40, frame: 3, ..Drawn::default() };
        let (expected, pixels) = (Screen::expected(&drawn), picture::whole(64, 40, 3));
        assert_eq!(expected.pixels[..3], [pixels[2], pixels[1], pixels[0]]);
    }
}
