//! What rig and agent say to each other of scenarios with the stock driver. Most are made of a few words: jobs begin
//! and stand there, something happens beside them, one looks at them, they finish. Knows nothing of ioctls.

use serde::{Deserialize, Serialize};

/// What the rig asks of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stock", rename_all = "kebab-case", deny_unknown_fields)]
pub enum StockCommand {
    /// Open a context and submit jobs, which are kept; answered by `Standing`.
    Begin(Amount),
    /// Submit more jobs to the same context; answered by `Standing`.
    More(Amount),
    /// Wait for so long for the end of all jobs, and look; answered by `Standing`.
    Look {
        /// Milliseconds.
        wait_ms: u64,
    },
    /// Close the handle of the buffer that the jobs write to, under them; answered by `Standing`.
    CloseBuffer,
    /// Let the jobs that wait go on, wait for all, look, and close the context; answered by `Standing`.
    Finish,
    /// Close the context under its jobs, wait for their fences, and look at the memory; answered by `Standing`.
    Abandon,
    /// Give up on jobs whose device is gone: close the context without waiting for anything; answered by `Standing`.
    Forget,
    /// Wait for all jobs, keep the buffer that they fill as a dma-buf, and close the context; answered by `Standing`.
    KeepExport,
    /// Close that dma-buf; answered by `Stepped`.
    DropExport,
    /// Have a job write for longer than anybody waits ([`WRITER`]); answered by `Stepped` when it does.
    Write,
    /// Do something to the platform; answered by `Stepped`.
    Step {
        /// What.
        step: Step,
    },
    /// Have a job fill a buffer of so many MiB, but for its edges; answered by `Huge`.
    Huge {
        /// MiB.
        mib: u32,
    },
    /// Have a process begin so many jobs that wait, kill it, and look at its memory; answered by `Standing`.
    Kill {
        /// How many jobs.
        jobs: u32,
    },
    /// Have two contexts, of two processes if so asked, name each other's memory; answered by `Strangers`.
    Strangers {
        /// The second context is of a process of its own.
        process: bool,
    },
    /// Run jobs of mixed lengths on one ring, and look at the order of their ends; answered by `Order`.
    Order {
        /// How many jobs.
        jobs: u32,
    },
    /// Have a job of one context wait and look at who gets past it; answered by `Overtaking`.
    Overtaking,
    /// Have a job of one context fail in this way beside another's; answered by `Failing`.
    Failing {
        /// How it fails.
        how: Failure,
    },
    /// Have jobs wait for fences of jobs, by merged files and by points of a timeline; answered by `Points`.
    Points,
    /// Have jobs wait for a fence of another driver's; answered by `Foreign`.
    Foreign,
    /// Share buffers with another driver; answered by `Shared`.
    Share,
    /// Fill the control queue with jobs that wait, and close a buffer behind them; answered by `Full`.
    Fill {
        /// How many jobs: more than the queue has room for.
        jobs: u32,
    },
}

/// Jobs to submit. Each fills a page of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Amount {
    /// How many, 15 at the most in one context.
    pub jobs: u32,
    /// What they do before they fill it.
    pub until: Until,
}

/// What a job does first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Until {
    /// Nothing.
    AtOnce,
    /// It waits for a value of the guest's.
    Told,
    /// It holds the engine for so many milliseconds.
    Spun(u32),
}

/// How a job fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// It holds its engine for ever.
    Hangs,
    /// It waits for a value that does not come, and gives up.
    WaitsInVain,
    /// Nothing is wrong with it.
    Not,
}

/// What the agent tells the rig.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stock", rename_all = "kebab-case", deny_unknown_fields)]
pub enum StockEvent {
    /// How jobs stand.
    Standing(Standing),
    /// What two contexts could do to each other.
    Strangers(Strangers),
    /// In which order jobs of one ring have ended.
    Order(Order),
    /// Who got past a job that waits.
    Overtaking(Overtaking),
    /// What came of a job that failed.
    Failing(Failing),
    /// Who waited for whom.
    Points(Points),
    /// What came of fences of another driver's.
    Foreign(Foreign),
    /// What came of shared buffers.
    Shared(Shared),
    /// What a full queue was like.
    Full(Full),
    /// What came of something that was done to the platform.
    Stepped(Stepped),
    /// What a job on a large buffer has left.
    Huge(Huge),
}

/// How jobs stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Jobs that were submitted.
    pub submitted: u32,
    /// Those whose fence the driver has signalled.
    pub signalled: u32,
    /// Those whose user fence says that they are done.
    pub done: u32,
    /// Those whose user fence says that they failed.
    pub failed: u32,
    /// Pages that a job has filled, whole.
    pub filled: u32,
    /// Pages that hold nothing but poison.
    pub poison: u32,
    /// Nanoseconds that the wait took.
    pub waited_ns: u64,
}

/// What two contexts could do to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Strangers {
    /// Jobs of one that named memory of the other.
    pub trespasses: u32,
    /// Those that the device refused.
    pub refused: u32,
    /// Bytes that changed hands.
    pub bytes_taken: u64,
    /// Jobs on memory of one's own that were done afterwards, of both.
    pub own: u32,
}

/// In which order jobs of one ring have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// Jobs whose fence came.
    pub jobs: u32,
    /// Fences that were seen before one that comes first.
    pub overtook: u32,
    /// Fences that were seen before what their job writes.
    pub early: u32,
    /// Answers of the device to them, as the driver's tracepoint has them.
    pub answers: u32,
    /// Answers that came before one that comes first.
    pub answers_overtook: u32,
    /// The shortest time between a job's last word and its fence, in nanoseconds.
    pub least_delay_ns: u64,
}

/// Who got past a job that waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overtaking {
    /// Contexts have timelines of their own.
    pub timelines: bool,
    /// The other context's job was done while the first waited.
    pub done: bool,
    /// The driver had signalled its fence by then.
    pub signalled: bool,
    /// The fence of the first was not signalled by then.
    pub first_stands: bool,
    /// The device's answer to the first came behind the other's.
    pub answered_last: bool,
}

/// What came of a job that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failing {
    /// The device's answer to it.
    pub response: u32,
    /// Its user fence says that it failed.
    pub says_failed: bool,
    /// The driver has signalled its fence.
    pub signalled: bool,
    /// The page behind where it failed is still poison.
    pub stopped_there: bool,
    /// The device's answer to the next job of the same context.
    pub next_response: u32,
    /// Jobs of another context that were done, before, beside and after it.
    pub others: u32,
    /// Nanoseconds from the submission to the fence.
    pub took_ns: u64,
}

/// Who waited for whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Points {
    /// The driver has syncobjs.
    pub offered: bool,
    /// Contexts have timelines of their own.
    pub timelines: bool,
    /// A merged fence came when both of its jobs had ended, and not before.
    pub merged: bool,
    /// A wait for a point began before any job was to signal it, and ended when the job of the point had.
    pub waited_before_submit: bool,
    /// An eventfd was told of the point then, and not before.
    pub eventfd: bool,
    /// The timeline stood at the points of the jobs that had ended.
    pub counted: bool,
    /// A job of another context did not begin before the point that it was to wait for.
    pub held_back: bool,
    /// Jobs that were done in the end.
    pub done: u32,
}

/// What came of fences of another driver's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreign {
    /// A job behind such a fence stood for as long as it was not signalled.
    pub stood: bool,
    /// Jobs of another context that were done meanwhile.
    pub beside: u32,
    /// It was done when the fence was signalled.
    pub went_on: bool,
    /// A process whose job stands behind one that never comes can be killed.
    pub killed: bool,
    /// One that nobody signals ended after so many nanoseconds, and its job was done.
    pub expired_ns: u64,
}

/// What came of shared buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shared {
    /// What a job fills is seen by way of the other driver.
    pub seen: bool,
    /// It was still so for a job in flight when its own handle and its context were closed.
    pub outlives: bool,
    /// A buffer that comes back is the same one.
    pub comes_back: bool,
    /// The error by which the driver refuses another driver's buffer; 0 if it takes it.
    pub import_error: i32,
    /// Jobs that were done.
    pub done: u32,
}

/// What a full queue was like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Full {
    /// Jobs that found room before the first had ended.
    pub found_room: u32,
    /// The end of a buffer waited behind them.
    pub close_waited: bool,
    /// And came.
    pub closed: bool,
    /// Jobs that were done in the end.
    pub done: u32,
    /// Fences that came.
    pub signalled: u32,
}

/// What a job does that writes for longer than anybody waits: the buffer of so many bytes is filled with `value`, then
/// with `value` + 1, and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writer {
    /// Bytes of the buffer.
    pub bytes: u64,
    /// What it is filled with first.
    pub value: u32,
    /// How often it is filled: less than [`Self::PASSES`].
    pub passes: u32,
}

impl Writer {
    /// Passes that have values of their own.
    const PASSES: u32 = 1 << 16;

    /// In which pass this word was written, if it was.
    pub fn pass(&self, word: u32) -> Option<u32> {
        word.checked_sub(self.value).filter(|pass| *pass < self.passes)
    }
}

/// That job.
pub const WRITER: Writer = Writer { bytes: 2 << 20, value: 0x57a1_0000, passes: 8_000 };

const _: () =
    assert!(WRITER.passes < Writer::PASSES && WRITER.value.is_multiple_of(Writer::PASSES), "values differ");

/// Something that is done to the platform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// All devices are suspended, and resumed after a while.
    Sleep,
    /// The PCI function is removed, as if it had been pulled out.
    Remove,
    /// The bus is looked at again.
    Rescan,
    /// The driver's module is unloaded.
    Unload,
    /// And loaded.
    Load,
    /// The PCI function is taken from its driver.
    Unbind,
    /// And given back.
    Bind,
    /// Its IOMMU group gets a domain of this kind.
    Domain(Domain),
    /// The PCI function is reset.
    Reset,
    /// The kernel uses memory that is new, as soon as there is so much.
    UseMemory {
        /// MiB.
        mib: u32,
    },
}

/// A kind of a domain, as Linux names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Domain {
    /// Translated; each unmap is invalidated at once.
    Dma,
    /// Translated; unmaps are invalidated later, together.
    DmaFq,
    /// Not translated.
    Identity,
}

/// What came of something that was done to the platform.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stepped {
    /// The kernel's error; 0 if there was none.
    pub error: i32,
    /// Nanoseconds that it took.
    pub took_ns: u64,
}

/// What a job on a large buffer has left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Huge {
    /// Bytes that it was to fill.
    pub bytes: u64,
    /// Bytes that it has filled.
    pub filled: u64,
    /// Bytes outside that are poison still.
    pub poison: u64,
    /// The device's checksum of all of it is that of the bytes that are there.
    pub checksum: bool,
}
