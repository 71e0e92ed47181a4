//! A memory module that is plugged into a running machine and unplugged again: its own NUMA node, so that only
//! programs that ask for it use its memory, and it can be returned. Knows QMP and the agent's requests; does not know
//! what uses the memory.

use crate::rig::error::RigError;
use crate::rig::guest::unexpected;
use crate::rig::process::wait_until;
use crate::rig::run::Run;
use crate::rig::variation::Variation;
use guest_agent::protocol::{Command, Event};
use guest_agent::stock_words::{Step, StockCommand, StockEvent};
use serde_json::json;
use std::time::Duration;

/// MiB of the module.
const MIB: u32 = 256;
/// Its node, beside the one of all other memory.
pub(crate) const NODE: u32 = 1;
/// For a kernel that returns memory.
const LIMIT: Duration = Duration::from_secs(120);
/// A machine with a slot for it. The agent decides when the memory is used, and for what.
pub(crate) const SLOT: Variation = Variation {
    guest: "memhp_default_state=offline",
    qemu: &["-m", "slots=2,maxmem=4G", "-numa", "node,nodeid=0,memdev=mem0", "-numa", "node,nodeid=1"],
    has_nodes: true,
    ..Variation::NONE
};

/// Plugs the module in, and waits until the guest's kernel uses it.
pub(crate) fn plug(run: &mut Run<'_>) -> Result<(), RigError> {
    let qmp = run.qemu().qmp();
    let size = u64::from(MIB) << 20;
    let memory = json!({ "qom-type": "memory-backend-memfd", "id": "plugged", "size": size, "share": true });
    qmp.execute("object-add", memory)?;
    let module = json!({ "driver": "pc-dimm", "id": "module", "memdev": "plugged", "node": NODE });
    qmp.execute("device_add", module)?;
    match run.ask(
        "The use of new memory",
        Command::Stock(StockCommand::Step { step: Step::UseMemory { mib: MIB } }),
    )? {
        Event::Stock(StockEvent::Stepped(stepped)) if stepped.error == 0 => Ok(()),
        Event::Stock(StockEvent::Stepped(stepped)) => {
            Err(RigError::check(format!("The kernel does not take new memory: error {}", stepped.error)))
        }
        other => Err(unexpected(&other)),
    }
}

/// Asks the guest's kernel to return it, and waits until it is out.
pub(crate) fn unplug(run: &mut Run<'_>) -> Result<(), RigError> {
    let qmp = run.qemu().qmp();
    qmp.execute("device_del", json!({ "id": "module" }))?;
    wait_until("The end of a memory module", LIMIT, || {
        let modules = qmp.execute("query-memory-devices", json!({}))?;
        Ok(modules.as_array().is_some_and(Vec::is_empty))
    })?;
    qmp.execute("object-del", json!({ "id": "plugged" })).map(drop)
}
