//! The numbered scenarios in the soft guest, each a test of its own. `MIRRORGPU_SEED` decides what is left to chance.

use guest_driver_tests::suite::results::{Level, Outcome};
use guest_driver_tests::suite::soft::SoftPlace;
use guest_driver_tests::suite::table;
use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;

fn main() -> ExitCode {
    let seed = std::env::var("MIRRORGPU_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let place = SoftPlace { seed, ..SoftPlace::default() };
    let shown = table::ALL.iter().filter(|scenario| scenario.on_stage(Level::Soft).next().is_some());
    let trials = shown.map(|scenario| {
        let place = place.clone();
        Trial::test(scenario.id(), move || match place.run(scenario).map(|case| case.outcome) {
            Some(Outcome::Passed | Outcome::Skipped(_)) | None => Ok(()),
            Some(Outcome::Failed(text) | Outcome::Broken(text) | Outcome::Flaky(text)) => {
                Err(Failed::from(text))
            }
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
