//! What is done to the platform under the driver: sleep, removal, unloading, another domain of the IOMMU. An error of the
//! kernel's is an answer here. Knows sysfs; knows nothing of what was in flight.

use super::blocks;
use crate::error::{AgentError, Doing};
use crate::system;
use guest_agent::stock_words::{Domain, Step, Stepped};
use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

const DRIVER: &str = "/sys/bus/pci/drivers/virtio-pci";
const MODULES: &str = "/modules";

/// Takes a step.
pub(super) fn take(step: Step) -> Result<Stepped, AgentError> {
    let begin = Instant::now();
    let error = match done(step)? {
        Ok(()) => 0,
        Err(error) => error.raw_os_error().unwrap_or(-1),
    };
    let took_ns = begin.elapsed().as_nanos() as u64;
    Ok(Stepped { error, took_ns })
}

/// What the kernel says to it.
fn done(step: Step) -> Result<io::Result<()>, AgentError> {
    Ok(match step {
        Step::Sleep => sleep(),
        Step::Remove => fs::write(system::find_gpu()?.join("remove"), "1"),
        Step::Rescan => {
            fs::write("/sys/bus/pci/rescan", "1").doing("look at the bus again")?;
            return system::wait_for_card().map(|_| Ok(()));
        }
        Step::Unload => system::unload_module(c"virtio_gpu"),
        Step::Load => {
            system::load_modules(MODULES)?;
            return system::wait_for_card().map(|_| Ok(()));
        }
        Step::Unbind => fs::write(Path::new(DRIVER).join("unbind"), name_of(&system::find_gpu()?)),
        Step::Bind => {
            let bound = fs::write(Path::new(DRIVER).join("bind"), name_of(&system::find_gpu()?));
            if bound.is_ok() {
                system::wait_for_card()?;
            }
            bound
        }
        Step::Domain(domain) => fs::write(system::find_gpu()?.join("iommu_group/type"), name(domain)),
        Step::Reset => fs::write(system::find_gpu()?.join("reset"), "1"),
        Step::UseMemory { mib } => blocks::use_all(mib)?,
    })
}

/// Devices are suspended and resumed as for a sleep; the machine itself stays awake.
fn sleep() -> io::Result<()> {
    fs::write("/sys/power/pm_test", "devices")?;
    let slept = fs::write("/sys/power/state", "freeze");
    fs::write("/sys/power/pm_test", "none")?;
    slept
}

fn name_of(device: &Path) -> Vec<u8> {
    device.file_name().unwrap_or_default().as_encoded_bytes().to_vec()
}

fn name(domain: Domain) -> &'static str {
    match domain {
        Domain::Dma => "DMA",
        Domain::DmaFq => "DMA-FQ",
        Domain::Identity => "identity",
    }
}
