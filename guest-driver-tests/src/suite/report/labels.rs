//! Labels on a picture that must not overlap: rows that know which space is taken, and ticks of an axis. All
//! characters have the same width. Knows nothing of what the labels say.

/// Width of a character, in pixels: 11 pixels of a monospace font, and a little more.
pub(super) const CHARACTER: f64 = 6.8;
/// Free space between two labels of a row.
const GAP: f64 = 8.0;

/// How wide a text is.
pub(super) fn width(text: &str) -> f64 {
    text.chars().count() as f64 * CHARACTER
}

/// A row of words.
#[derive(Debug)]
pub(super) struct Row {
    left: f64,
    right: f64,
    taken: Vec<(f64, f64)>,
}

impl Row {
    /// An empty row.
    pub(super) fn new(left: f64, right: f64) -> Self {
        Self { left, right, taken: Vec::new() }
    }

    /// Where a text starts that should start at `x`, or end at the row's end; `None`: there is no room.
    pub(super) fn place(&mut self, x: f64, text: &str) -> Option<f64> {
        let width = width(text);
        let begin = x.min(self.right - width).max(self.left);
        let end = begin + width;
        let free = self.taken.iter().all(|(from, to)| end + GAP <= *from || to + GAP <= begin);
        if !free || end > self.right + 0.5 {
            return None;
        }
        self.taken.push((begin, end));
        Some(begin)
    }
}

/// About seven round numbers between two others.
pub(super) fn ticks(from: f64, to: f64) -> (f64, Vec<f64>) {
    let rough = ((to - from) / 7.0).max(1e-3);
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    let first = (from / step).ceil() as i64;
    let last = (to / step).floor() as i64;
    (step, (first..=last.min(first.saturating_add(20))).map(|count| count as f64 * step).collect())
}

/// A time on an axis with this step, both in microseconds.
pub(super) fn tick(time: f64, step: f64) -> String {
    match step {
        1e6.. => format!("{} s", time / 1e6),
        1e3.. => format!("{} ms", (time / 1e2).round() / 10.0),
        _ => format!("{} µs", (time * 1e3).round() / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_a_row_do_not_touch_and_stay_inside() {
        let mut row = Row::new(100.0, 300.0);
        assert_eq!(row.place(100.0, "0123456789"), Some(100.0));
        assert_eq!(row.place(170.0, "x"), None);
        assert_eq!(row.place(299.0, "end"), Some(300.0 - 3.0 * CHARACTER));
        assert_eq!(row.place(180.0, "between"), Some(180.0));
        assert_eq!(Row::new(0.0, 10.0).place(0.0, "too long"), None);
    }

    #[test]
    fn ticks_are_round_and_few() {
        assert_eq!(ticks(-1_700.0, 23_000.0), (5_000.0, vec![0.0, 5_000.0, 10_000.0, 15_000.0, 20_000.0]));
        assert_eq!(ticks(0.0, 0.0).1, [0.0]);
        let (step, all) = ticks(-3.3, 9.1);
        assert_eq!((step, all.len()), (2.0, 6));
        assert_eq!(
            (tick(5_000.0, 5_000.0), tick(-0.5, 0.5), tick(2e6, 1e6)),
            ("5 ms".into(), "-0.5 µs".into(), "2 s".into())
        );
    }
}
