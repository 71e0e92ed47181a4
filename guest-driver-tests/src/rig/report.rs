//! What a person reads while the rig works and when it is done. Knows nothing of where the figures come from.

use crate::soft_guest::turn::held;
use std::io::{self, Write};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

use indicatif::ProgressBar;

static START: OnceLock<Instant> = OnceLock::new();
/// What is drawn below the lines.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// Prints a line with the time since the first one.
pub fn say(text: &str) {
    let elapsed = START.get_or_init(Instant::now).elapsed().as_secs_f64();
    let write = || {
        // A closed output is no reason to stop.
        let _ = writeln!(io::stdout().lock(), "{elapsed:6.1} s  {text}");
    };
    match &*held(&BAR) {
        Some(bar) => bar.suspend(write),
        None => write(),
    }
}

/// From now on lines are printed above this bar; `None`: there is no bar any more.
pub fn keep_below(bar: Option<ProgressBar>) {
    *held(&BAR) = bar;
}

/// A duration in nanoseconds, in the unit that suits it.
pub fn duration(nanoseconds: u64) -> String {
    let value = nanoseconds as f64;
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.1} µs", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", value / 1e6),
        _ => format!("{:.2} s", value / 1e9),
    }
}

/// A number of bytes, in the unit that suits it.
pub fn bytes(count: u64) -> String {
    let value = count as f64;
    match count {
        0..1_024 => format!("{count} B"),
        1_024..1_048_576 => format!("{:.1} KiB", value / 1_024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", value / 1_048_576.0),
        _ => format!("{:.2} GiB", value / 1_073_741_824.0),
    }
}

/// Lines of columns: the first to the left, the others to the right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_in_the_unit_that_suits_them() {
        assert_eq!(duration(999), "999 ns");
        assert_eq!(duration(12_345), "12.3 µs");
        assert_eq!(duration(1_500_000_000), "1.50 s");
        assert_eq!(bytes(1_023), "1023 B");
        assert_eq!(bytes(5 << 20), "5.0 MiB");
    }

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [vec!["misses".into(), "1".into()], vec!["µ".into(), "1234".into()]];
        assert_eq!(table(&rows), "misses     1\nµ       1234");
    }
}
