//! The words that rig and agent exchange over the guest's second serial port: one JSON object a line. Knows
//! nothing of the port.

use crate::remote::{Operation, Outcome};
use crate::stock_words::{StockCommand, StockEvent};
use job_stream::Mode;
use serde::{Deserialize, Serialize};

/// What the rig asks of the agent. Each is answered with one event; `Draw` with two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Take the screen if it is not held yet, and draw so much; answered by `Drawn`.
    Picture(Amount),
    /// Draw until `Stop` comes, while buffers come and go beside it; answered by `Drawing` at once.
    Draw,
    /// End `Draw`; answered by `Drawn`.
    Stop,
    /// Let the screen go; answered by `Released`.
    Release,
    /// Let the screen go, take the device from its driver and give it back; answered by `Rebound`.
    Rebind {
        /// Which driver.
        driver: Driver,
    },
    /// Run the test jobs through the stock driver in a context of `mode`: each case once, then a storm; answered by
    /// `Ran`.
    Jobs {
        /// The mode of the context.
        #[serde(with = "mode_name")]
        mode: Mode,
        /// Jobs of the storm: they are in flight while buffers come and go beside them.
        storm: u32,
    },
    /// Have a job wait on a ring of a context, and others beside it, through the stock driver; answered by `Rings`.
    Rings,
    /// Take the device from its driver, by way of VFIO, and bring it up with a driver in the agent; answered by
    /// `Taken`.
    TakeByVfio,
    /// Run the test jobs through the agent's own driver, as `Jobs`; an idle range comes and goes beside them.
    JobsByVfio {
        /// The mode of the context.
        #[serde(with = "mode_name")]
        mode: Mode,
        /// Jobs of the storm.
        storm: u32,
    },
    /// Do what a driver must not; answered by `Broken`.
    Break {
        /// The mode of the context.
        #[serde(with = "mode_name")]
        mode: Mode,
        /// What is done wrong.
        bug: Bug,
    },
    /// One operation of the agent's own driver; answered by `Operated`.
    Operate {
        /// Which.
        operation: Operation,
    },
    /// Something with the stock driver; answered by `Stock`.
    Stock(StockCommand),
    /// Run a program that was packed with the agent; answered by `Ended`.
    Program(Program),
    /// Reset the device and give it back to its driver; answered by `Rebound`.
    GiveBack,
    /// Load a second kernel; answered by `Loaded`.
    Load {
        /// How it is to be entered.
        way: Way,
    },
    /// Enter it; the next event is its agent's `Ready`.
    Enter {
        /// How.
        way: Way,
    },
    /// Read words of the memory of the kernel that has crashed; answered by `Dumped`.
    Dump {
        /// Where, in physical memory.
        addresses: Vec<u64>,
    },
    /// Reboot the machine; the next event is the next boot's `Ready`.
    Reboot,
    /// Switch the machine off; nothing answers.
    PowerOff,
}

/// How much to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// Page flips, each waited for.
    pub page_flips: u32,
    /// Dirty-rectangle flushes of the buffer on screen.
    pub dirty_flushes: u32,
    /// Moves of the cursor.
    pub cursor_moves: u32,
}

/// The drivers of the device, from the outside in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Driver {
    /// The driver of the PCI function; the IOMMU's domain goes with it.
    VirtioPci,
    /// The driver of the virtio device.
    VirtioGpu,
}

/// How a second kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// The first one ends as before a reboot, and jumps.
    Jump,
    /// The first one crashes: nothing ends, and its memory is left alone.
    Crash,
}

/// A word of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// Where it lies.
    pub address: u64,
    /// What it holds.
    pub value: u32,
}

/// A program to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Where it is in the guest.
    pub path: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// The longest that it may run.
    pub seconds: u64,
    /// Huge pages that the kernel is to hold ready for it; 0: as many as it has.
    pub huge_pages: u32,
}

/// How a program has ended. With neither a code nor a signal it did not end in time, and was killed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Its exit code.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// It could not even be killed: it hangs in the kernel.
    pub hangs: bool,
    /// How long it ran.
    pub milliseconds: u64,
    /// What it printed; of a long output, the beginning and the end.
    pub output: String,
}

/// Bugs that drivers have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bug {
    /// A buffer is unmapped while a job that writes to it is in flight.
    UnmapBeforeFence,
    /// The same, and other memory is mapped there at once.
    RemapBeforeFence,
}

/// What the agent tells the rig.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    /// The agent runs, and the kernel has a display device.
    Ready {
        /// The kernel's release.
        kernel: String,
    },
    /// `Draw` has begun: its first page flip is over.
    Drawing,
    /// What was drawn since the last `Drawn`, and what stands on the screen now.
    Drawn(Drawn),
    /// The screen is free; the kernel may still be taking the buffers back.
    Released,
    /// The driver has the device again.
    Rebound,
    /// All jobs have ended, and every byte of every buffer was right.
    Ran(JobCounts),
    /// Which jobs got past one that waits.
    Rings(RingCounts),
    /// The agent's own driver has the device.
    Taken,
    /// The bug was made, and the job has ended.
    Broken(Broken),
    /// What came of an operation.
    Operated {
        /// That.
        outcome: Outcome,
    },
    /// A second kernel is loaded.
    Loaded {
        /// The memory that was kept for it, if any was: first byte and last.
        reserved: Option<[u64; 2]>,
    },
    /// What a kernel that has crashed has left.
    Dumped {
        /// In the order of the question.
        words: Vec<Word>,
    },
    /// What came of something with the stock driver.
    Stock(StockEvent),
    /// A program has ended.
    Ended(Ended),
    /// A command failed; the agent goes on.
    Failed {
        /// What failed, in a sentence.
        what: String,
    },
    /// A command found memory that holds what it must not; the agent goes on.
    Corrupted {
        /// Which, in a sentence.
        what: String,
    },
}

/// What the agent counted since the last time that it said so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drawn {
    /// Width of the screen in pixels.
    pub width: u32,
    /// Height of the screen in pixels.
    pub height: u32,
    /// Number of the frame on screen: with width and height it names every pixel.
    pub frame: u32,
    /// Times that a mode was set.
    pub mode_sets: u32,
    /// Page flips whose event came.
    pub page_flips: u32,
    /// Dirty-rectangle flushes.
    pub dirty_flushes: u32,
    /// Cursor images that were handed over.
    pub cursor_images: u32,
    /// Moves of the cursor.
    pub cursor_moves: u32,
    /// Buffers that came and went beside the drawing.
    pub buffers_churned: u32,
}

/// What the agent counted of its jobs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobCounts {
    /// Jobs whose fence came.
    pub jobs: u64,
    /// Bytes that their packets have moved, by the twin's reckoning.
    pub bytes_moved: u64,
    /// Bytes of buffers that were compared with the twin's.
    pub bytes_compared: u64,
    /// Buffers, or ranges, that came and went while jobs were in flight.
    pub buffers_churned: u64,
    /// Nanoseconds that the unmap of an idle range took while a long job was in flight. 0 with the stock driver.
    pub idle_unmap_ns: u64,
}

/// Who got past a job that waits on a ring of a context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingCounts {
    /// The driver has blobs.
    pub blob: bool,
    /// The driver has contexts with rings.
    pub context_init: bool,
    /// Jobs that ended meanwhile, of three: on another ring of the context, and on two rings of another.
    pub overtook: u32,
    /// What came behind it on its own ring waited for it, and ended after it.
    pub in_order: bool,
}

/// What the guest saw of its own bug.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broken {
    /// The type of the device's answer to the job.
    pub response: u32,
    /// Nanoseconds that the unmap took.
    pub unmap_ns: u64,
    /// Bytes that were written to the old memory after the unmap had returned.
    pub late_bytes: u64,
    /// What the job's user fence says.
    pub user_fence: u64,
}

/// A mode in JSON: its name.
mod mode_name {
    use job_stream::{Choice, Mode};
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(mode: &Mode, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(mode.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Mode, D::Error> {
        let name = String::deserialize(deserializer)?;
        Mode::from_name(&name).ok_or_else(|| D::Error::custom(format!("There is no mode {name:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_events_are_flat_objects_of_one_line() {
        let amount = Amount { page_flips: 1, dirty_flushes: 2, cursor_moves: 3 };
        let line = serde_json::to_string(&Command::Picture(amount)).unwrap();
        assert_eq!(line, r#"{"command":"picture","page_flips":1,"dirty_flushes":2,"cursor_moves":3}"#);
        let jobs = Command::Jobs { mode: Mode::RegistrationCache, storm: 4 };
        let line = serde_json::to_string(&jobs).unwrap();
        assert_eq!(line, r#"{"command":"jobs","mode":"registration-cache","storm":4}"#);
        assert_eq!(serde_json::from_str::<Command>(&line).unwrap(), jobs);
        let kill = Command::Stock(StockCommand::Kill { jobs: 3 });
        let line = serde_json::to_string(&kill).unwrap();
        assert_eq!(line, r#"{"command":"stock","stock":"kill","jobs":3}"#);
        assert_eq!(serde_json::from_str::<Command>(&line).unwrap(), kill);
        let event: Event = serde_json::from_str(r#"{"event":"failed","what":"No card"}"#).unwrap();
        assert_eq!(event, Event::Failed { what: "No card".into() });
    }
}
