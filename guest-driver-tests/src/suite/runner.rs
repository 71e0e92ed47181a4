//! Runs the selected scenarios at the selected places: first those without a VM, then a guest for each topology,
//! several in parallel. Knows places; knows nothing of how a result is presented.

use crate::rig::run::Rig;
use crate::rig::topology::Topology;
use crate::soft_guest::turn::held;
use crate::suite::real::RealPlace;
use crate::suite::results::{Case, Level};
use crate::suite::soft::SoftPlace;
use crate::suite::table::{self, Scenario};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// One of several runs that together cover everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    index: usize,
    of: usize,
}

impl Shard {
    /// The whole.
    pub const WHOLE: Self = Self { index: 1, of: 1 };

    /// Reads `2/3`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let numbers =
            text.split_once('/').and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
        match numbers {
            Some((index, of)) if (1..=of).contains(&index) => Ok(Self { index, of }),
            _ => Err("must be I/N with I from 1 to N, such as 1/3".to_owned()),
        }
    }

    /// Whether this run includes the scenario at this position of the list.
    fn has(self, place: usize) -> bool {
        place % self.of == self.index - 1
    }
}

/// The scenarios that match some patterns: a number, or a part of `15-unmap-then-remap` or of a group's name. No
/// pattern: all.
pub fn matching(patterns: &[String], shard: Shard) -> Vec<&'static Scenario> {
    let is_named = |scenario: &Scenario| {
        let names = [scenario.id(), scenario.group.to_lowercase()];
        let names_it = |pattern: &String| match pattern.parse::<u32>() {
            Ok(number) => scenario.number == number,
            Err(_) => names.iter().any(|name| name.contains(&pattern.to_lowercase())),
        };
        patterns.is_empty() || patterns.iter().any(names_it)
    };
    let named = table::ALL.iter().filter(|scenario| is_named(scenario));
    named.enumerate().filter(|(place, _)| shard.has(*place)).map(|(_, scenario)| scenario).collect()
}

/// Where parts with their own machine run by default.
const VARIED: [&str; 1] = ["intel-iommu-strict"];

/// What to run where.
pub struct Plan<'r> {
    /// The scenarios.
    pub scenarios: Vec<&'static Scenario>,
    /// Without a VM, if at all.
    pub soft: Option<SoftPlace>,
    /// In real guests, if at all.
    pub rig: Option<&'r Rig>,
    /// On these machines.
    pub topologies: Vec<Topology>,
    /// Also run parts with their own machine there, where that is not the default.
    pub all_variations: bool,
    /// Decides the random choices.
    pub seed: u64,
    /// Guests, or scenarios without one, in parallel.
    pub side_by_side: usize,
    /// How often what has failed in a real guest is run again, where that is allowed.
    pub retries: u32,
}

impl Plan<'_> {
    /// The maximum number of cases.
    pub fn cases(&self) -> usize {
        let soft = |scenario: &&&Scenario| scenario.on_stage(Level::Soft).next().is_some();
        let softly = if self.soft.is_some() { self.scenarios.iter().filter(soft).count() } else { 0 };
        let real = self.scenarios.iter().filter(|scenario| scenario.has_real_part()).count();
        let topologies = if self.rig.is_some() { self.topologies.len() } else { 0 };
        // And the end of each guest.
        softly + topologies * (real + usize::from(real > 0))
    }

    /// Runs all of it; each case is passed on as soon as it has ended. Returns them all in order.
    pub fn run(&self, tell: &(dyn Fn(&Case) + Sync)) -> Vec<Case> {
        let cases = Mutex::new(Vec::new());
        let keep = |case: Case| {
            tell(&case);
            held(&cases).push(case);
        };
        if let Some(soft) = &self.soft {
            side_by_side(self.side_by_side, &self.scenarios, |scenario| {
                soft.run(scenario).into_iter().for_each(&keep);
            });
        }
        if let Some(rig) = self.rig {
            side_by_side(self.side_by_side, &self.topologies, |topology| {
                let variations = self.all_variations || VARIED.contains(&topology.name.as_str());
                let (seed, retries) = (self.seed, self.retries);
                RealPlace { rig, topology, seed, stock: true, variations, retries }
                    .run(&self.scenarios, &keep);
            });
        }
        let mut cases = cases.into_inner().unwrap_or_else(PoisonError::into_inner);
        cases.sort_by(|a, b| (a.number, a.level, &a.topology).cmp(&(b.number, b.level, &b.topology)));
        cases
    }
}

/// As many guests as there are processors and memory for: about 1 GiB each.
pub fn usual_jobs() -> usize {
    processors().min(memory_mib() / 1_024).max(1)
}

/// Processors that this process may use.
pub fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// MiB of available memory (linux: Documentation/filesystems/proc.rst, MemAvailable).
pub fn memory_mib() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<usize>().ok()).unwrap_or(0) / 1_024
}

/// Runs something for each item, so many in parallel.
fn side_by_side<T: Sync>(count: usize, items: &[T], each: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    // ORDERING: the counter hands out positions of a list that does not change; nothing else depends on it.
    let work = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            each(item);
        }
    };
    thread::scope(|scope| {
        for _ in 0..count.clamp(1, items.len().max(1)) {
            scope.spawn(work);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_a_number_or_a_part_of_a_name_or_of_a_group() {
        let numbers = |patterns: &[&str]| {
            let patterns: Vec<_> = patterns.iter().map(|pattern| (*pattern).to_owned()).collect();
            matching(&patterns, Shard::WHOLE).iter().map(|scenario| scenario.number).collect::<Vec<_>>()
        };
        assert_eq!(numbers(&["15"]), [15]);
        assert_eq!(numbers(&["remap", "1"]), [1, 15]);
        assert_eq!(numbers(&["range arith"]), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert_eq!(numbers(&[]).len(), table::ALL.len());
        assert!(numbers(&["no such thing"]).is_empty());
    }

    #[test]
    fn shards_have_each_scenario_once() {
        let mut all: Vec<u32> = Vec::new();
        for text in ["1/3", "2/3", "3/3"] {
            let shard = Shard::parse(text).unwrap();
            all.extend(matching(&[], shard).iter().map(|scenario| scenario.number));
        }
        all.sort_unstable();
        assert_eq!(all, table::ALL.iter().map(|scenario| scenario.number).collect::<Vec<_>>());
        for text in ["0/3", "4/3", "1", "a/b", "1/0"] {
            assert!(Shard::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn each_item_is_done_once_however_many_work_on_them() {
        let items: Vec<usize> = (0..50).collect();
        let done = Mutex::new(Vec::new());
        side_by_side(4, &items, |item| done.lock().unwrap().push(*item));
        let mut done = done.into_inner().unwrap();
        done.sort_unstable();
        assert_eq!(done, items);
    }
}
