//! The numbered scenarios in the soft guest, each a test of its own; those that need a VM are ignored, and asked for by
//! name they say why. `MIRRORGPU_SEED` decides what is left to chance.

use guest_driver_tests::suite::soft::{self, SoftPlace};
use guest_driver_tests::suite::table::{self, Scenario};
use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;

fn trial(scenario: &'static Scenario, place: SoftPlace) -> Trial {
    if let Some(reason) = soft::reason_against(scenario) {
        let failed = move || Err(Failed::from(format!("It is not shown without a VM: {reason}")));
        return Trial::test(scenario.id(), failed).with_ignored_flag(true);
    }
    Trial::test(scenario.id(), move || {
        let case = place.run(scenario).ok_or("There is nothing of it to run")?;
        soft::must_hold(case.outcome).map_err(Failed::from)
    })
}

fn main() -> ExitCode {
    let seed = std::env::var("MIRRORGPU_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let place = SoftPlace { seed, ..SoftPlace::default() };
    let trials = table::ALL.iter().map(|scenario| trial(scenario, place.clone()));
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
