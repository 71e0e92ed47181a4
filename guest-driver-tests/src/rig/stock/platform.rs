//! Platform events under jobs in flight: the driver is unloaded, the device removed, put to sleep, moved to another
//! domain. Knows what Linux 6.12 does then, where it is unusual; and that the device works afterwards.

use super::{all_done, ask, begin, counted_since, ended, in_flight, no_contexts, standing};
use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::report::{self, say};
use crate::rig::run::Run;
use crate::rig::scenario::{leaving_commands_behind, settled};
use crate::rig::stats::Stats;
use crate::rig::topology::Invalidations;
use crate::rig::variation::Variation;
use guest_agent::protocol::{Command, Event};
use guest_agent::stock_words::{Amount, Domain, Step, Stepped, StockCommand, StockEvent, Until};

/// A test of sleep takes 5 s, unless it is configured otherwise.
pub(crate) const SHORT_SLEEP: Variation = Variation { guest: "suspend.pm_test_delay=1", ..Variation::NONE };
/// Jobs in flight.
pub(super) const JOBS: u32 = 4;
/// Pages of the buffer that they fill.
pub(super) const PAGES: u32 = 16;
/// Errors of Linux.
const EAGAIN: i32 = 11;
const EPERM: i32 = 1;
const EBUSY: i32 = 16;
/// For fences that must not come.
const PATIENCE_MS: u64 = 500;

/// The module is not unloaded while a file is open or a buffer exists; then it is, and it can be loaded again.
pub(crate) fn unload(run: &mut Run<'_>) -> Result<(), RigError> {
    release_screen(run)?;
    begin(run, JOBS, Until::Told)?;
    step(run, Step::Unload, EAGAIN)?;
    all_done(standing(run, StockCommand::Finish)?, JOBS)?;
    begin(run, JOBS, Until::AtOnce)?;
    all_done(standing(run, StockCommand::KeepExport)?, JOBS)?;
    step(run, Step::Unload, EAGAIN)?;
    same_step(ask(run, StockCommand::DropExport)?, 0)?;
    settled(run)?;
    step(run, Step::Unload, 0)?;
    step(run, Step::Load, 0)?;
    works(run)
}

/// The function is removed with jobs in flight: nothing is written any more, no fence of theirs ever comes, and the
/// kernel survives it. Added again, it works.
pub(crate) fn remove(run: &mut Run<'_>) -> Result<(), RigError> {
    release_screen(run)?;
    let before = settled(run)?.unwrap_or_default();
    begin(run, JOBS, Until::Told)?;
    leaving_commands_behind(run, |run| {
        step(run, Step::Remove, 0)?;
        in_flight(standing(run, StockCommand::Look { wait_ms: PATIENCE_MS })?, JOBS)?;
        standing(run, StockCommand::Forget)?;
        step(run, Step::Rescan, 0)
    })?;
    discarded(run, &before)?;
    works(run)
}

/// Devices sleep with jobs in flight, and wake. Linux 6.12 then resets the device and does not set up its queues
/// again: the driver has no `restore`. So no fence comes any more, nothing is written, and the driver has to be bound
/// again.
pub(crate) fn sleep(run: &mut Run<'_>) -> Result<(), RigError> {
    if run.topology.modules.iter().any(|module| module == "virtio-iommu") {
        let reason =
            "in Linux 6.12 virtio-iommu does not wake from a sleep: whoever maps memory then waits for ever";
        return Err(RigError::Skip(reason.into()));
    }
    release_screen(run)?;
    let before = settled(run)?.unwrap_or_default();
    begin(run, JOBS, Until::Told)?;
    let mark = run.console_mark();
    let slept = step(run, Step::Sleep, 0)?;
    say(&format!("All devices slept for {}", report::duration(slept.took_ns)));
    standing(run, StockCommand::More(Amount { jobs: 1, until: Until::AtOnce }))?;
    in_flight(standing(run, StockCommand::Look { wait_ms: PATIENCE_MS })?, JOBS + 1)?;
    // Where QEMU starts the device anyway, it looks for its queues at address 0.
    for words in ["fault addr 0x0 ", "DRHD: handling fault status", "fault from EP"] {
        run.forgive(mark, words);
    }
    standing(run, StockCommand::Forget)?;
    leaving_commands_behind(run, |run| {
        step(run, Step::Unbind, 0)?;
        step(run, Step::Bind, 0)
    })?;
    discarded(run, &before)?;
    works(run)
}

/// The domain of the device is switched at run time. Linux refuses to remove translation under a driver, with or
/// without jobs; it accepts the switch to lazy unmaps at any time.
pub(crate) fn domain(run: &mut Run<'_>) -> Result<(), RigError> {
    release_screen(run)?;
    let before = settled(run)?.unwrap_or_default();
    begin(run, JOBS, Until::Told)?;
    step(run, Step::Domain(Domain::Identity), refusal(&run.kernel))?;
    if run.topology.invalidations == Invalidations::Strict {
        step(run, Step::Domain(Domain::DmaFq), 0)?;
    }
    all_done(standing(run, StockCommand::Finish)?, JOBS)?;
    ended(&counted_since(run, &before)?, JOBS.into(), 0)?;
    works(run)?;
    for domain in [Domain::Identity, own_domain(run.topology.invalidations)] {
        step(run, Step::Unbind, 0)?;
        step(run, Step::Domain(domain), 0)?;
        step(run, Step::Bind, 0)?;
        works(run)?;
    }
    Ok(())
}

/// The error with which Linux refuses to take the domain from a driver: another before 6.2.
fn refusal(kernel: &str) -> i32 {
    if kernel.starts_with("6.1.") { EBUSY } else { EPERM }
}

/// The type that the topology asks for: later scenarios rely on it.
fn own_domain(invalidations: Invalidations) -> Domain {
    match invalidations {
        Invalidations::None => Domain::Identity,
        Invalidations::Strict => Domain::Dma,
        Invalidations::Lazy => Domain::DmaFq,
    }
}

/// The function is reset under its driver, with jobs in flight. Linux 6.12 does not notify the driver, and its queues
/// are gone, as after a sleep.
pub(crate) fn reset(run: &mut Run<'_>) -> Result<(), RigError> {
    if !run.topology.has_root_port() {
        return Err(RigError::Skip("only a function behind a root port can be reset".into()));
    }
    release_screen(run)?;
    let before = settled(run)?.unwrap_or_default();
    begin(run, JOBS, Until::Told)?;
    step(run, Step::Reset, 0)?;
    in_flight(standing(run, StockCommand::Look { wait_ms: PATIENCE_MS })?, JOBS)?;
    standing(run, StockCommand::Forget)?;
    leaving_commands_behind(run, |run| {
        step(run, Step::Unbind, 0)?;
        step(run, Step::Bind, 0)
    })?;
    discarded(run, &before)?;
    works(run)
}

/// Of the earlier jobs, the scheduled one is discarded, and those behind it had not been submitted. With a front-end
/// that does not report a reset, like QEMU's test device, the next start shows that there was one.
fn discarded(run: &mut Run<'_>, before: &Stats) -> Result<(), RigError> {
    ended(&counted_since(run, before)?, 0, 1)
}

/// A device with a driver, as after a boot: jobs succeed, and leave nothing.
pub(super) fn works(run: &mut Run<'_>) -> Result<(), RigError> {
    let before = settled(run)?.unwrap_or_default();
    begin(run, JOBS, Until::Told)?;
    all_done(standing(run, StockCommand::Finish)?, JOBS)?;
    ended(&counted_since(run, &before)?, JOBS.into(), 0)?;
    no_contexts(run)
}

/// Releases the screen, so that only the scenario's programs have the device open.
pub(super) fn release_screen(run: &mut Run<'_>) -> Result<(), RigError> {
    match run.ask("The screen's release", Command::Release)? {
        Event::Released => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// Runs a platform operation, and the kernel prints this about it.
pub(super) fn step(run: &mut Run<'_>, step: Step, due: i32) -> Result<Stepped, RigError> {
    let event = ask(run, StockCommand::Step { step })?;
    same_step(event, due).map_err(|error| RigError::check(format!("{step:?}: {error}")))
}

fn same_step(event: StockEvent, due: i32) -> Result<Stepped, RigError> {
    match event {
        StockEvent::Stepped(stepped) if stepped.error == due => Ok(stepped),
        StockEvent::Stepped(stepped) => Err(RigError::check(format!(
            "The kernel answered with the error {}, where {due} was due",
            stepped.error
        ))),
        other => Err(unexpected(&Event::Stock(other))),
    }
}
