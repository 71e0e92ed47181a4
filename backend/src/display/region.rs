//! Rectangles of one scanout, and which of its pixels are not sent yet. Pure arithmetic.

use device_model::image::Rect;

/// Maximum number of rectangles in a region.
const MAX_RECTS: usize = 8;

/// The intersection of two rectangles, if it is not empty.
pub(super) fn intersection(a: Rect, b: Rect) -> Option<Rect> {
    let (x, y) = (a.x.max(b.x), a.y.max(b.y));
    let width = right(a).min(right(b)).checked_sub(u64::from(x))?;
    let height = bottom(a).min(bottom(b)).checked_sub(u64::from(y))?;
    (width > 0 && height > 0).then(|| Rect { x, y, width: length(width), height: length(height) })
}

/// The smallest rectangle that contains both.
fn bounding(a: Rect, b: Rect) -> Rect {
    let (x, y) = (a.x.min(b.x), a.y.min(b.y));
    let width = right(a).max(right(b)).saturating_sub(u64::from(x));
    let height = bottom(a).max(bottom(b)).saturating_sub(u64::from(y));
    Rect { x, y, width: length(width), height: length(height) }
}

/// Whether `inner` lies within `outer`.
fn contains(outer: Rect, inner: Rect) -> bool {
    intersection(outer, inner) == Some(inner)
}

fn right(rect: Rect) -> u64 {
    u64::from(rect.x).saturating_add(u64::from(rect.width))
}

fn bottom(rect: Rect) -> u64 {
    u64::from(rect.y).saturating_add(u64::from(rect.height))
}

fn length(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// The changed pixels: at most [`MAX_RECTS`] rectangles, which together cover everything that was added.
#[derive(Debug, Default)]
pub(super) struct DirtyRegion {
    rects: Vec<Rect>,
}

impl DirtyRegion {
    /// Whether no pixel has changed.
    pub(super) fn is_clean(&self) -> bool {
        self.rects.is_empty()
    }

    /// Adds a rectangle, which must not be empty. If there are too many, one bounding rectangle replaces all.
    pub(super) fn add(&mut self, rect: Rect) {
        if self.rects.iter().any(|known| contains(*known, rect)) {
            return;
        }
        self.rects.retain(|known| !contains(rect, *known));
        self.rects.push(rect);
        if self.rects.len() > MAX_RECTS {
            let all = self.rects.iter().copied().fold(rect, bounding);
            self.rects.clear();
            self.rects.push(all);
        }
    }

    /// Returns the rectangles and empties the region.
    pub(super) fn take(&mut self) -> Vec<Rect> {
        std::mem::take(&mut self.rects)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rect(x: u32, y: u32, width: u32, height: u32) -> Rect {
        Rect { x, y, width, height }
    }

    #[test]
    fn rectangles_that_only_touch_share_nothing() {
        assert_eq!(intersection(rect(0, 0, 10, 10), rect(10, 0, 10, 10)), None);
        assert_eq!(intersection(rect(0, 0, 10, 10), rect(0, 10, 10, 10)), None);
        assert_eq!(intersection(rect(0, 0, 10, 10), rect(9, 8, 10, 10)), Some(rect(9, 8, 1, 2)));
    }

    #[test]
    fn rectangles_at_the_end_of_the_number_range_do_not_wrap() {
        let far = rect(u32::MAX, u32::MAX, u32::MAX, u32::MAX);
        assert_eq!(intersection(far, rect(0, 0, 10, 10)), None);
        assert_eq!(intersection(far, rect(0, 0, u32::MAX, u32::MAX)), None);
        assert_eq!(intersection(far, far), Some(far));
        assert_eq!(bounding(far, rect(0, 0, 1, 1)), rect(0, 0, u32::MAX, u32::MAX));
    }

    #[test]
    fn what_is_known_already_is_not_kept_twice() {
        let mut region = DirtyRegion::default();
        region.add(rect(10, 10, 5, 5));
        region.add(rect(11, 11, 2, 2));
        assert_eq!(region.take(), [rect(10, 10, 5, 5)]);
        region.add(rect(10, 10, 5, 5));
        region.add(rect(0, 0, 100, 100));
        assert_eq!(region.take(), [rect(0, 0, 100, 100)]);
        assert!(region.is_clean());
    }

    /// Compares with a bitmap: every added pixel is covered, and the number of rectangles is bounded.
    #[test]
    fn a_region_covers_all_that_was_added_and_stays_small() {
        const SIDE: u32 = 64;
        let mut region = DirtyRegion::default();
        let mut touched = vec![false; (SIDE * SIDE) as usize];
        let mut seed = 1u32;
        for _ in 0..500 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let added = rect(seed >> 8 & 31, seed >> 14 & 31, 1 + (seed >> 20 & 7), 1 + (seed >> 24 & 7));
            region.add(added);
            mark(&mut touched, SIDE, added);
            assert!(region.rects.len() <= MAX_RECTS);
        }
        let mut covered = vec![false; touched.len()];
        for known in region.take() {
            mark(&mut covered, SIDE, known);
        }
        assert!(touched.iter().zip(&covered).all(|(touched, covered)| *covered || !touched));
    }

    fn mark(pixels: &mut [bool], side: u32, rect: Rect) {
        for y in rect.y..rect.y + rect.height {
            for x in rect.x..rect.x + rect.width {
                pixels[(y * side + x) as usize] = true;
            }
        }
    }
}
