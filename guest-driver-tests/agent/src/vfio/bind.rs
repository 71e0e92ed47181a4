//! Whose the PCI function is: the kernel's driver's, or ours by way of vfio-pci. Knows sysfs; knows nothing of VFIO's
//! own calls.

use crate::error::{AgentError, Doing};
use crate::system;
use std::fs;
use std::path::{Path, PathBuf};

const DEVICES: &str = "/sys/bus/pci/devices";
const PROBE: &str = "/sys/bus/pci/drivers_probe";
const OURS: &str = "vfio-pci";

/// A function that vfio-pci has.
pub(crate) struct Taken {
    device: PathBuf,
    name: String,
}

impl Taken {
    /// Takes the virtio-gpu from its driver.
    pub(crate) fn take() -> Result<Self, AgentError> {
        let entries = fs::read_dir(DEVICES).doing(format!("read {DEVICES}"))?;
        let device = entries.flatten().map(|entry| entry.path()).find(|path| system::is_gpu(path));
        let device = device.ok_or_else(|| AgentError::NotBound(DEVICES.into()))?;
        let name = device.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let taken = Self { device, name };
        taken.give_to(OURS)?;
        match taken.driver() {
            Some(driver) if driver == OURS => Ok(taken),
            _ => Err(AgentError::NotBound(taken.device)),
        }
    }

    /// Its name on the bus.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The node of its IOMMU group.
    pub(crate) fn group(&self) -> Result<PathBuf, AgentError> {
        let link = self.device.join("iommu_group");
        let group = fs::read_link(&link).doing(format!("read {}", link.display()))?;
        Ok(Path::new("/dev/vfio").join(group.file_name().unwrap_or_default()))
    }

    /// Gives it back to the driver that the kernel finds for it, and waits for the display.
    pub(crate) fn give_back(self) -> Result<(), AgentError> {
        self.give_to("\n")?;
        system::wait_for_card().map(drop)
    }

    fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.device.join("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    fn give_to(&self, driver: &str) -> Result<(), AgentError> {
        let write = |path: PathBuf, text: &str| {
            fs::write(&path, text).doing(format!("write {text:?} to {}", path.display()))
        };
        write(self.device.join("driver_override"), driver)?;
        if self.driver().is_some() {
            write(self.device.join("driver/unbind"), &self.name)?;
        }
        write(PROBE.into(), &self.name)
    }
}
