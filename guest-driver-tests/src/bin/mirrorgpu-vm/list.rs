//! `mirrorgpu-vm list`: the scenarios, and where each is shown.

use guest_driver_tests::rig::error::RigError;
use guest_driver_tests::suite::results::Level;
use guest_driver_tests::suite::retry::Excuse;
use guest_driver_tests::suite::runner::{self, Shard};

/// What `list` understands.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Scenarios to list: a number, or a part of a name or group [default: all].
    #[arg(value_name = "PATTERN")]
    patterns: Vec<String>,
}

/// Prints the list.
pub(crate) fn run(arguments: &Arguments) -> Result<u8, RigError> {
    let mut group = "";
    for scenario in runner::matching(&arguments.patterns, Shard::WHOLE) {
        if scenario.group != group {
            group = scenario.group;
            println!("\n{group}");
        }
        let soft = scenario.on_stage(Level::Soft).next().is_some();
        let places = match (soft, scenario.has_real_part()) {
            (true, true) => "soft real",
            (true, false) => "soft     ",
            (false, true) => "     real",
            (false, false) => "not shown",
        };
        println!("  {:<26} {places}  {}", scenario.id(), scenario.promise);
        if !scenario.elsewhere.is_empty() {
            println!("  {:<26}            (elsewhere: {})", "", scenario.elsewhere);
        }
        if let Some(excuse) = Excuse::of(scenario.number) {
            println!("  {:<26}            (--retries: {})", "", excuse.reason);
        }
    }
    Ok(0)
}
