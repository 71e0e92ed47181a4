//! Runs scenarios in real guests: one boot for many of them, and a new one after a failure. Knows when a guest has to
//! be booted and which driver has the device; knows nothing of what a scenario does.

use crate::rig::error::RigError;
use crate::rig::run::{Rig, Run};
use crate::rig::scenario::{self, Needs};
use crate::rig::topology::Topology;
use crate::rig::variation::Variation;
use crate::rig::vfio;
use crate::suite::excerpt;
use crate::suite::failure::{Failure, Result};
use crate::suite::machine::vfio::VfioMachine;
use crate::suite::results::{Case, Evidence, Level, Outcome};
use crate::suite::retry::{self, Excuse};
use crate::suite::stage::Stage;
use crate::suite::table::{OnStage, Scenario, StockPart};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// A topology to run scenarios on.
pub struct RealPlace<'r> {
    /// Tools and programs.
    pub rig: &'r Rig,
    /// The machine.
    pub topology: &'r Topology,
    /// Decides the random choices.
    pub seed: u64,
    /// Also run the parts with the stock driver, not only those with the user-space one.
    pub stock: bool,
    /// Also run parts that need a machine that differs from the topology's: one boot each.
    pub variations: bool,
    /// How often what has failed is run again, in a fresh guest, where the reason for that is known ([`retry::EXCUSES`]).
    pub retries: u32,
}

/// Which driver has the device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Holder {
    Stock,
    Vfio,
}

/// A part of a scenario that can be run in a real guest.
#[derive(Clone, Copy)]
enum Act {
    /// With the stock driver.
    Stock(StockPart),
    /// With a user-space driver.
    Stage(Variation, OnStage),
}

impl Act {
    fn holder(self) -> Holder {
        match self {
            Self::Stock(_) => Holder::Stock,
            Self::Stage(..) => Holder::Vfio,
        }
    }

    fn variation(self) -> Variation {
        match self {
            Self::Stock(part) => part.variation,
            Self::Stage(variation, _) => variation,
        }
    }
}

/// What a part has shown.
#[derive(Default)]
struct Shown {
    outcome: Option<Outcome>,
    took: Duration,
    evidence: Evidence,
}

impl Shown {
    /// The worse of two, with the evidence of both.
    fn add(&mut self, other: Self) {
        let rank = |shown: &Self| match shown.outcome {
            None => 0,
            Some(Outcome::Skipped(_)) => 1,
            Some(Outcome::Passed) => 2,
            Some(Outcome::Flaky(_)) => 3,
            Some(Outcome::Broken(_)) => 4,
            Some(Outcome::Failed(_)) => 5,
        };
        if rank(&other) > rank(self) {
            self.outcome = other.outcome;
        }
        self.took += other.took;
        self.evidence.add(other.evidence);
    }
}

impl RealPlace<'_> {
    /// Runs these scenarios, and passes each case to `tell` when all its parts have run. Scenarios without a part in
    /// a real guest are skipped silently.
    pub fn run(&self, scenarios: &[&'static Scenario], tell: &(dyn Fn(Case) + Sync)) {
        let mut shown: Vec<(&Scenario, usize, Shown)> = Vec::new();
        let mut acts: Vec<(usize, Option<&Excuse>, Act)> = Vec::new();
        for scenario in scenarios {
            let (mut result, mut count, mut has_part) = (Shown::default(), 0, false);
            let stages = scenario.on_stage(Level::Real).map(|(variation, act)| Act::Stage(variation, act));
            let stock = scenario.with_the_stock_driver().filter(|_| self.stock);
            for act in stock.map(Act::Stock).chain(stages) {
                has_part = true;
                match self.cannot_show(act) {
                    Some(reason) => {
                        result.add(Shown { outcome: Some(Outcome::Skipped(reason)), ..Shown::default() });
                    }
                    None => {
                        acts.push((shown.len(), Excuse::of(scenario.number), act));
                        count += 1;
                    }
                }
            }
            if has_part {
                shown.push((scenario, count, result));
            }
        }
        // The driver changes only once; parts that need a different machine come last, each with its own boot.
        let mut variations = vec![Variation::NONE];
        for (.., act) in &acts {
            if !variations.contains(&act.variation()) {
                variations.push(act.variation());
            }
        }
        acts.sort_by_key(|(.., act)| {
            let variation = variations.iter().position(|known| *known == act.variation());
            (variation, act.holder() == Holder::Vfio)
        });
        for (scenario, _, result) in shown.iter_mut().filter(|(_, count, _)| *count == 0) {
            tell(self.case(scenario, std::mem::take(result)));
        }
        let mut house = House::new(self);
        for (index, excuse, act) in acts {
            let one = house.act(act, excuse);
            let Some((scenario, left, result)) = shown.get_mut(index) else { continue };
            result.add(one);
            *left -= 1;
            if *left == 0 {
                tell(self.case(scenario, std::mem::take(result)));
            }
        }
        if let Some(last) = house.end() {
            tell(last);
        }
    }

    /// Runs a closure with the user-space driver, in its own guest.
    pub fn on_stage(&self, act: OnStage) -> (Outcome, Evidence) {
        let shown = House::new(self).act(Act::Stage(Variation::NONE, act), None);
        (shown.outcome.unwrap_or(Outcome::Broken("Nothing of it was run".into())), shown.evidence)
    }

    fn case(&self, scenario: &Scenario, shown: Shown) -> Case {
        Case {
            number: scenario.number,
            name: scenario.name.into(),
            group: scenario.group,
            promise: scenario.promise,
            level: Level::Real,
            topology: Some(self.topology.name.clone()),
            outcome: shown.outcome.unwrap_or_else(|| Outcome::Broken("Nothing of it was run".into())),
            took: shown.took,
            evidence: shown.evidence,
        }
    }

    /// Why this machine cannot run a part, if so.
    fn cannot_show(&self, act: Act) -> Option<String> {
        if let Some(reason) = self.rig.cannot_run(self.topology) {
            return Some(reason);
        }
        if !self.variations && !act.variation().is_none() {
            return Some(format!(
                "it boots a machine of its own: `--topology {}` does so here",
                self.topology.name
            ));
        }
        if act.holder() == Holder::Vfio && !self.rig.has_backend() {
            return Some("QEMU's own device takes no jobs".to_owned());
        }
        lacks(act, self.topology).map(str::to_owned)
    }
}

/// What a topology lacks for a part, if so.
fn lacks(act: Act, topology: &Topology) -> Option<&'static str> {
    let needs = match act {
        Act::Stage(..) if topology.has_iommu() => return None,
        Act::Stage(..) => {
            return Some("a driver in user space takes the device by way of VFIO, which needs an IOMMU");
        }
        Act::Stock(part) => part.needs,
    };
    let what = match needs {
        Needs::Nothing => "",
        Needs::Screen => "it has no screen",
        Needs::Iommu => "it has no IOMMU",
        Needs::Ats => "it has no ATS",
        Needs::Strict => "it has no IOMMU that is told of each unmap at once",
        Needs::AllFeatures => "QEMU's vhost-user-gpu does not pass blobs and context-init on",
    };
    (!scenario::has(needs, topology)).then_some(what)
}

/// Why no part of a scenario can run on a topology, if so.
pub fn reason_against(scenario: &Scenario, topology: &Topology) -> Option<&'static str> {
    let stages = scenario.on_stage(Level::Real).map(|(variation, act)| Act::Stage(variation, act));
    let acts = scenario.with_the_stock_driver().map(Act::Stock).chain(stages);
    let mut reasons = acts.map(|act| lacks(act, topology));
    let first = reasons.next()??;
    reasons.all(|reason| reason.is_some()).then_some(first)
}

/// A guest that is up, or none.
struct House<'h, 'r> {
    place: &'h RealPlace<'r>,
    guest: Option<(Run<'h>, Holder)>,
    /// Why the last boot failed: it is not tried again.
    boot_failed: Option<String>,
    /// What was found when guests ended.
    complaints: Vec<Failure>,
    /// How many guests have ended by themselves.
    ended: usize,
}

impl<'h, 'r> House<'h, 'r> {
    fn new(place: &'h RealPlace<'r>) -> Self {
        Self { place, guest: None, boot_failed: None, complaints: Vec::new(), ended: 0 }
    }

    /// Runs a part, and runs it again if it fails with this excuse.
    fn act(&mut self, act: Act, excuse: Option<&Excuse>) -> Shown {
        let (begin, mut evidence) = (Instant::now(), Evidence::default());
        let mut boot_failed = self.boot_failed.take();
        let outcome = retry::judge(self.place.retries, excuse, || {
            self.boot_failed = boot_failed.take();
            self.once(act, &mut evidence)
        });
        Shown { outcome: Some(outcome), took: begin.elapsed(), evidence }
    }

    /// Runs a part, in a guest that is booted for it if necessary. A guest in which something has failed is not used
    /// again, because its state is unknown.
    fn once(&mut self, act: Act, evidence: &mut Evidence) -> Result<()> {
        if let Some(reason) = &self.boot_failed {
            return Err(Failure::Skip(format!("The guest did not boot: {reason}")));
        }
        let seed = self.place.seed;
        let run = match self.guest_for(act) {
            Ok(run) => run,
            Err(failure) => {
                if self.guest.is_none() && act.variation().is_none() {
                    self.boot_failed = failure.to_string().lines().next().map(str::to_owned);
                }
                self.guest = None;
                return Err(failure);
            }
        };
        let (result, seen) = perform(run, act, seed);
        evidence.add(seen);
        if act.variation().alone || result.as_ref().is_err_and(|failure| !matches!(failure, Failure::Skip(_)))
        {
            self.guest = None;
        }
        result
    }

    /// A guest on the right machine, with the device bound to the right driver.
    fn guest_for(&mut self, act: Act) -> Result<&mut Run<'h>> {
        let (wanted, variation) = (act.holder(), act.variation());
        if self.guest.as_ref().is_some_and(|(run, _)| run.variation != variation) {
            self.leave();
        }
        if self.guest.is_none() {
            let place = self.place;
            let run = Run::boot_varied(place.rig, place.topology, variation)?;
            self.guest = Some((run, Holder::Stock));
        }
        let Some((run, holder)) = &mut self.guest else {
            return Err(Failure::Rig("There is no guest".into()));
        };
        if *holder != wanted {
            let changed = match wanted {
                Holder::Vfio => {
                    // From here on the IOMMU has reason to complain.
                    run.expect_faults();
                    vfio::take(run)
                }
                Holder::Stock => vfio::give_back(run),
            };
            changed.map_err(|error| run.explain(error))?;
            *holder = wanted;
        }
        Ok(run)
    }

    /// Ends the guest, and checks its logs.
    fn leave(&mut self) {
        if let Some((run, _)) = self.guest.take() {
            self.ended += 1;
            self.complaints.extend(run.end().map_err(Failure::from).err());
        }
    }

    /// Ends the last guest; returns how all have ended.
    fn end(mut self) -> Option<Case> {
        let begin = Instant::now();
        self.leave();
        if self.ended == 0 {
            return None;
        }
        let (number, name, group, promise) = CLEAN_END;
        Some(Case {
            number,
            name: name.into(),
            group,
            promise,
            level: Level::Real,
            topology: Some(self.place.topology.name.clone()),
            outcome: self.complaints.into_iter().next().map_or(Outcome::Passed, Outcome::from),
            took: begin.elapsed(),
            evidence: Evidence::default(),
        })
    }
}

/// What ends each guest: number, name, group, promise.
const CLEAN_END: (u32, &str, &str, &str) =
    (112, "clean-end", "Platform", "Guest, QEMU and back-end end, and none has complained.");

fn perform(run: &mut Run<'_>, act: Act, seed: u64) -> (Result<()>, Evidence) {
    let (begin, mark) = (Instant::now(), run.console_mark());
    let (log_before, last) = (run.backend_log().len(), last_violation(run));
    let mut seen = Evidence::default();
    let result = match act {
        Act::Stock(part) => with_stock_driver(run, part),
        Act::Stage(_, act) => on_stage(run, act, seed, &mut seen),
    };
    // A WARN, a BUG or an oops fails the scenario that caused it.
    let result = result.and_then(|()| run.no_troubles_since(mark));
    seen.reports = reports_after(run, last);
    seen.trace = matches!(act, Act::Stage(..)).then(|| trace(run, begin.elapsed())).flatten();
    if run.topology.has_display && matches!(act, Act::Stock(_)) {
        seen.screenshot = screenshot(run);
    }
    // The evidence is collected before the guest ends.
    let result = result.map_err(|error| Failure::from(run.explain(error)));
    seen.console = run.console_since(mark);
    seen.backend_log = run.backend_log().get(log_before..).unwrap_or_default().to_owned();
    (result, seen)
}

/// Releases the screen for parts that do not need it: its holder is a context of the device.
fn with_stock_driver(run: &mut Run<'_>, part: StockPart) -> std::result::Result<(), RigError> {
    if part.needs != Needs::Screen {
        scenario::release_screen(run)?;
    }
    (part.run)(run)
}

fn on_stage(
    run: &mut Run<'_>,
    act: OnStage,
    seed: u64,
    evidence: &mut Evidence,
) -> std::result::Result<(), RigError> {
    let mut machine = VfioMachine::new(run);
    machine.forget_retired().map_err(|failure| RigError::Missing(failure.to_string()))?;
    let mut stage = Stage::new(&mut machine, seed);
    let result = act(&mut stage).and_then(|()| stage.close());
    (evidence.numbers, evidence.notes) = stage.take_notes();
    result.map_err(|failure| match failure {
        Failure::Check(text) => RigError::Check(text),
        Failure::Corrupted(text) => RigError::Corrupted(text),
        Failure::Skip(text) => RigError::Skip(text),
        Failure::Rig(text) => RigError::Missing(text),
    })
}

fn violations(run: &mut Run<'_>) -> Vec<Value> {
    let all = run.control("violations", json!({})).ok().flatten().unwrap_or_default();
    all["violations"].as_array().cloned().unwrap_or_default()
}

/// The number of the back-end's latest report of a violation; 0: there is none.
pub(super) fn last_violation(run: &mut Run<'_>) -> u64 {
    violations(run).iter().filter_map(|one| one["id"].as_u64()).max().unwrap_or(0)
}

/// Its reports of violations after that one.
pub(super) fn reports_after(run: &mut Run<'_>, last: u64) -> Vec<String> {
    let new = violations(run).into_iter().filter(|one| one["id"].as_u64().is_some_and(|id| id > last));
    new.filter_map(|one| one["report"].as_str().map(str::to_owned)).collect()
}

fn trace(run: &mut Run<'_>, took: Duration) -> Option<Value> {
    let path = run.folder().join("trace.json");
    run.control("record", json!({ "path": path })).ok()?;
    excerpt::of(serde_json::from_slice(&std::fs::read(&path).ok()?).ok()?, took)
}

fn screenshot(run: &mut Run<'_>) -> Option<Vec<u8>> {
    let path = run.folder().join("screen.png");
    run.save_picture(&path).ok()?;
    std::fs::read(&path).ok()
}
