//! How fast the device is, as figures that mean something on a noisy machine: each stands beside a limit or a peer that
//! was measured in the same run, and is a median or a percentile. Knows what is measured; the soft guest does it.

mod echo;
mod measures;
mod subject;
mod waits;

use serde::Serialize;

pub use self::echo::{Echo, exchange, serve_if_asked};
pub use self::measures::{
    cold_buffer, copy, idle, invalidations, invalidations_under_load, no_op_jobs, transfers,
};
pub use self::subject::Subject;
pub use self::waits::{invalidations_beside_waits, small_jobs_beside_waits};

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was measured.
    pub what: String,
    /// How much.
    pub value: f64,
    /// Of what.
    pub unit: &'static str,
    /// What it is to be compared with.
    pub against: Option<Against>,
    /// What it is to be.
    pub target: Option<Target>,
}

/// What a figure is compared with, measured in the same run.
#[derive(Clone, Debug, Serialize)]
pub struct Against {
    /// What.
    pub what: String,
    /// How much, in the figure's unit.
    pub value: f64,
}

/// A bound.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// The ratio to what it is compared with is at the most this.
    RatioAtMost(f64),
    /// The ratio to what it is compared with is at least this.
    RatioAtLeast(f64),
    /// It is more than what it is compared with by this at the most.
    MoreByAtMost(f64),
    /// It is at the most this.
    AtMost(f64),
}

impl Figure {
    /// A figure that stands alone.
    pub fn new(what: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self { what: what.into(), value, unit, against: None, target: None }
    }

    /// With what it is to be compared.
    pub fn against(self, what: impl Into<String>, value: f64) -> Self {
        Self { against: Some(Against { what: what.into(), value }), ..self }
    }

    /// With what it is to be.
    pub fn target(self, target: Target) -> Self {
        Self { target: Some(target), ..self }
    }

    /// How it stands to what it is compared with.
    pub fn ratio(&self) -> Option<f64> {
        self.against.as_ref().map(|against| self.value / against.value)
    }

    /// Whether it is what it is to be.
    pub fn is_met(&self) -> Option<bool> {
        let more = self.against.as_ref().map(|against| self.value - against.value);
        match self.target? {
            Target::RatioAtMost(most) => self.ratio().map(|ratio| ratio <= most),
            Target::RatioAtLeast(least) => self.ratio().map(|ratio| ratio >= least),
            Target::MoreByAtMost(most) => more.map(|more| more <= most),
            Target::AtMost(most) => Some(self.value <= most),
        }
    }

    /// As a row: what, how much, compared with what, the ratio, and whether the target is met.
    pub fn row(&self) -> String {
        let value = format!("{:.1} {}", self.value, self.unit);
        let against = match (&self.against, self.ratio()) {
            (Some(against), Some(ratio)) => {
                format!("{ratio:>6.2} × {} ({:.1} {})", against.what, against.value, self.unit)
            }
            _ => String::new(),
        };
        let target = match (self.target, self.is_met()) {
            (Some(target), Some(met)) => {
                format!("{}: {}", target.text(self.unit), if met { "met" } else { "MISSED" })
            }
            _ => String::new(),
        };
        format!("{:<58} {value:>18}  {against:<52} {target}", self.what).trim_end().to_owned()
    }
}

impl Target {
    fn text(self, unit: &str) -> String {
        match self {
            Self::RatioAtMost(most) => format!("at most {most} ×"),
            Self::RatioAtLeast(least) => format!("at least {least} ×"),
            Self::MoreByAtMost(most) => format!("at most {most} {unit} more"),
            Self::AtMost(most) => format!("at most {most} {unit}"),
        }
    }
}

/// The value below which this part of them lies; they are sorted.
fn quantile(values: &mut [f64], part: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * part).round() as usize).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_or_missed_by_the_figure_and_what_it_is_compared_with() {
        let figure = Figure::new("ack", 30.0, "µs").against("echo", 20.0);
        for (target, met) in [
            (Target::RatioAtMost(1.5), true),
            (Target::RatioAtMost(1.4), false),
            (Target::RatioAtLeast(1.6), false),
            (Target::MoreByAtMost(10.0), true),
            (Target::MoreByAtMost(9.0), false),
            (Target::AtMost(29.0), false),
        ] {
            assert_eq!(figure.clone().target(target).is_met(), Some(met), "{target:?}");
        }
        assert_eq!(figure.is_met(), None);
        let row = figure.target(Target::RatioAtMost(1.5)).row();
        assert!(row.contains("1.50 × echo (20.0 µs)") && row.ends_with("at most 1.5 ×: met"), "{row}");
    }

    #[test]
    fn a_quantile_is_one_of_the_values() {
        let mut values: Vec<f64> = (1..=101).rev().map(f64::from).collect();
        assert_eq!((quantile(&mut values, 0.5), quantile(&mut values, 0.99)), (51.0, 100.0));
    }
}
