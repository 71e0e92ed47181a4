//! A rectangle, and arithmetic wide enough for every number that a guest can write.

use std::fmt;

/// A rectangle in pixels. Whether it fits its image is checked where it enters the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rect {
    /// Left edge.
    pub x: u32,
    /// Upper edge.
    pub y: u32,
    /// Width.
    pub width: u32,
    /// Height.
    pub height: u32,
}

impl Rect {
    /// Whether it has no pixels.
    pub fn is_empty(self) -> bool {
        self.width == 0 || self.height == 0
    }

    /// Whether it lies completely in an image of `width` × `height` pixels.
    pub fn fits(self, width: u32, height: u32) -> bool {
        fn ends_within(start: u32, len: u32, limit: u32) -> bool {
            start.checked_add(len).is_some_and(|end| end <= limit)
        }
        ends_within(self.x, self.width, width) && ends_within(self.y, self.height, height)
    }

    /// The common pixels, if there are any.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (x, width) = overlap((self.x, self.width), (other.x, other.width))?;
        let (y, height) = overlap((self.y, self.height), (other.y, other.height))?;
        Some(Self { x, y, width, height })
    }
}

/// The common part of two stretches (start, length).
fn overlap(one: (u32, u32), two: (u32, u32)) -> Option<(u32, u32)> {
    let end = |(start, len): (u32, u32)| u64::from(start).saturating_add(u64::from(len));
    let first = one.0.max(two.0);
    let len = end(one).min(end(two)).checked_sub(u64::from(first))?;
    // At most the shorter of two 32-bit lengths.
    let len = u32::try_from(len).ok().filter(|len| *len > 0)?;
    Some((first, len))
}

impl fmt::Display for Rect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}+{}+{}", self.width, self.height, self.x, self.y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
        Rect { x, y, width, height }
    }

    #[test]
    fn a_rect_that_wraps_fits_nothing() {
        assert!(!rect(u32::MAX, 0, 2, 1).fits(u32::MAX, 1));
        assert!(!rect(0, 2, 1, u32::MAX - 1).fits(1, u32::MAX));
        assert!(rect(0, 0, u32::MAX, u32::MAX).fits(u32::MAX, u32::MAX));
    }

    #[test]
    fn neighbours_have_no_pixel_in_common() {
        assert_eq!(rect(0, 0, 4, 4).intersection(rect(4, 0, 4, 4)), None);
        assert_eq!(rect(0, 0, 4, 4).intersection(rect(1, 1, 0, 2)), None);
    }

    #[test]
    fn the_intersection_is_what_both_have_also_at_the_far_edge() {
        assert_eq!(rect(0, 0, 4, 4).intersection(rect(2, 3, 9, 9)), Some(rect(2, 3, 2, 1)));
        let far = rect(u32::MAX - 1, 0, u32::MAX, 1);
        assert_eq!(far.intersection(rect(u32::MAX, 0, 1, 1)), Some(rect(u32::MAX, 0, 1, 1)));
    }
}
