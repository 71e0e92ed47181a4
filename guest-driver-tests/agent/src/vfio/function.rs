//! The device's registers: PCI configuration space and virtio's common structure (virtio 1.3, 4.1.4), by reads and
//! writes of the device's file. Knows how a virtio device is started and stopped; knows nothing of what it is.

use super::container::region;
use super::queue::Addresses;
use crate::error::{AgentError, Doing};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

const CONFIG_REGION: u32 = 7;
const COMMAND: u64 = 4;
/// Memory space, bus mastering, no interrupts.
const COMMAND_BITS: u16 = 0x2 | 0x4 | 0x400;
const CAPABILITIES: u64 = 0x34;
const VENDOR_SPECIFIC: u8 = 9;
const COMMON: u8 = 1;
const NOTIFY: u8 = 2;

const FEATURE_SELECT: u64 = 0;
const FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_VECTOR: u64 = 26;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY: u64 = 30;
const QUEUE_ADDRESSES: [u64; 3] = [32, 40, 48];
const NO_VECTOR: u16 = 0xffff;

const ACKNOWLEDGED: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const RESET_LIMIT: Duration = Duration::from_secs(5);

/// The device.
pub(crate) struct Function {
    device: File,
    common: u64,
    notify: u64,
    notify_step: u32,
}

impl Function {
    /// Finds the structures, and lets the device at memory.
    pub(crate) fn open(device: File) -> Result<Self, AgentError> {
        let config = region(&device, CONFIG_REGION)?;
        let mut found = Self { device, common: 0, notify: 0, notify_step: 0 };
        let command = u16::from_le_bytes(found.read(config + COMMAND)?) | COMMAND_BITS;
        found.write(config + COMMAND, &command.to_le_bytes())?;
        let [mut at] = found.read(config + CAPABILITIES)?;
        while at != 0 {
            let here = config + u64::from(at);
            let [id, next, _, structure, bar] = found.read(here)?;
            if id == VENDOR_SPECIFIC && (structure == COMMON || structure == NOTIFY) {
                let offset = u32::from_le_bytes(found.read(here + 8)?);
                let place = region(&found.device, bar.into())? + u64::from(offset);
                match structure {
                    COMMON => found.common = place,
                    _ => {
                        found.notify = place;
                        found.notify_step = u32::from_le_bytes(found.read(here + 16)?);
                    }
                }
            }
            at = next;
        }
        if found.common == 0 || found.notify == 0 { Err(AgentError::NotVirtio) } else { Ok(found) }
    }

    /// Resets the device, and agrees on as many of the features `wanted` as it has. Gives those.
    pub(crate) fn begin(&self, wanted: u64) -> Result<u64, AgentError> {
        self.reset()?;
        self.set_status(ACKNOWLEDGED | DRIVER)?;
        let mut agreed = 0;
        for half in [0_u32, 1] {
            self.write_common(FEATURE_SELECT, &half.to_le_bytes())?;
            let offered = u64::from(u32::from_le_bytes(self.read(self.common + FEATURE)?)) << (32 * half);
            let features = offered & wanted;
            self.write_common(DRIVER_FEATURE_SELECT, &half.to_le_bytes())?;
            self.write_common(DRIVER_FEATURE, &((features >> (32 * half)) as u32).to_le_bytes())?;
            agreed |= features;
        }
        self.set_status(ACKNOWLEDGED | DRIVER | FEATURES_OK)?;
        match self.status()? & FEATURES_OK {
            0 => Err(AgentError::Features { wanted, found: agreed }),
            _ => Ok(agreed),
        }
    }

    /// Says where a queue lies.
    pub(crate) fn enable_queue(&self, index: u16, queue: Addresses) -> Result<(), AgentError> {
        self.write_common(QUEUE_SELECT, &index.to_le_bytes())?;
        self.write_common(QUEUE_SIZE, &queue.size.to_le_bytes())?;
        self.write_common(QUEUE_VECTOR, &NO_VECTOR.to_le_bytes())?;
        for (register, address) in QUEUE_ADDRESSES.into_iter().zip(queue.parts) {
            self.write_common(register, &(address as u32).to_le_bytes())?;
            self.write_common(register + 4, &((address >> 32) as u32).to_le_bytes())?;
        }
        self.write_common(QUEUE_ENABLE, &1_u16.to_le_bytes())
    }

    /// The queues are there: the device may begin.
    pub(crate) fn start(&self) -> Result<(), AgentError> {
        self.set_status(ACKNOWLEDGED | DRIVER | FEATURES_OK | DRIVER_OK)
    }

    /// Tells the device that a queue has something new.
    pub(crate) fn notify(&self, index: u16) -> Result<(), AgentError> {
        self.write_common(QUEUE_SELECT, &index.to_le_bytes())?;
        let offset = u16::from_le_bytes(self.read(self.common + QUEUE_NOTIFY)?);
        let place = self.notify + u64::from(offset) * u64::from(self.notify_step);
        self.write(place, &index.to_le_bytes())
    }

    /// Resets the device; afterwards it touches nothing any more.
    pub(crate) fn reset(&self) -> Result<(), AgentError> {
        self.set_status(0)?;
        let end = Instant::now() + RESET_LIMIT;
        while self.status()? != 0 {
            if Instant::now() > end {
                return Err(AgentError::NoReset { seconds: RESET_LIMIT.as_secs() });
            }
            thread::yield_now();
        }
        Ok(())
    }

    fn status(&self) -> Result<u8, AgentError> {
        let [status] = self.read(self.common + STATUS)?;
        Ok(status)
    }

    fn set_status(&self, status: u8) -> Result<(), AgentError> {
        self.write_common(STATUS, &[status])
    }

    fn write_common(&self, register: u64, bytes: &[u8]) -> Result<(), AgentError> {
        self.write(self.common + register, bytes)
    }

    fn read<const N: usize>(&self, at: u64) -> Result<[u8; N], AgentError> {
        let mut bytes = [0; N];
        self.device.read_exact_at(&mut bytes, at).doing("read a register of the device")?;
        Ok(bytes)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), AgentError> {
        self.device.write_all_at(bytes, at).doing("write a register of the device")
    }
}
