//! The stage of a scenario about jobs and mappings: a machine, its contexts, buffers and jobs, the back-end's counts,
//! and the notes of the scenario. Knows the job stream and virtio-gpu's commands; does not know which machine it is.

use crate::rig::instruments::{self, Verdicts};
use crate::soft_guest::control::Stats;
use crate::soft_guest::{PAGE, kind};
use crate::suite::failure::{Failure, Result, ensure};
use crate::suite::machine::{Area, Command, Machine, Permission, Response, SoftGuest, Then, Ticket};
use crate::suite::results::Level;
use job_stream::{At, Context, Crc32c, Mode, Range, Space, SpinBehaviour, Stream};
use serde_json::{Value, json};
use std::ops;
use std::time::{Duration, Instant};

/// The modes in which no job touches memory after its unmap.
pub const COHERENT: [Mode; 4] = [Mode::Strict, Mode::Fence, Mode::Preempt, Mode::Fault];
/// The contents of memory that has not been written.
pub const POISON: u8 = crate::soft_guest::oracle::POISON;
const _: () = assert!(POISON == guest_agent::remote::POISON, "both machines fill memory with the same");
/// The drain timeout of the back-ends that scenarios run on.
pub const DRAIN_TIMEOUT: Duration = Duration::from_millis(100);
/// How long an ack may take beyond the drain timeout: a step, and what a busy machine adds (I2).
pub const GRACE: Duration = Duration::from_millis(1_500);
/// The usual time limit for an expected event.
pub const PATIENCE: Duration = Duration::from_secs(20);
const MOMENT: Duration = Duration::from_millis(1);
/// Pages of a typical buffer.
pub const PAGES: usize = 16;

/// A buffer: an area and the resource whose backing it is.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// The resource.
    pub id: u32,
    /// Its memory.
    pub area: Area,
}

impl Buffer {
    /// A byte of it, to a job.
    pub fn at(&self, address: u64) -> At {
        At::new(Space::resource(self.id), address)
    }

    /// Some bytes of it, to a job.
    pub fn range(&self, address: u64, len: u64) -> Range {
        self.at(address).range(len)
    }

    /// All of it, to a job.
    pub fn whole(&self) -> Range {
        self.range(0, self.area.bytes())
    }
}

/// A job in flight.
#[derive(Clone, Copy, Debug)]
#[must_use = "it has to be waited for"]
pub struct Job {
    ticket: Ticket,
    /// Its context.
    pub context: u32,
    /// Its fence.
    pub fence: u64,
}

/// The stage.
pub struct Stage<'m> {
    machine: &'m mut dyn Machine,
    /// Decides the random choices.
    pub seed: u64,
    next_id: u32,
    next_fence: u64,
    contexts: Vec<u32>,
    buffers: Vec<Buffer>,
    numbers: Vec<(String, String)>,
    notes: Vec<String>,
    forgiven: u64,
    patience: Duration,
}

impl<'m> Stage<'m> {
    /// An empty stage.
    pub fn new(machine: &'m mut dyn Machine, seed: u64) -> Self {
        Self {
            machine,
            seed,
            next_id: 1,
            next_fence: 1,
            contexts: Vec::new(),
            buffers: Vec::new(),
            numbers: Vec::new(),
            notes: Vec::new(),
            forgiven: 0,
            patience: PATIENCE,
        }
    }

    /// The same with another time limit: for a device that is known to lose answers.
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The machine underneath.
    pub fn machine(&mut self) -> &mut dyn Machine {
        self.machine
    }

    /// Where this runs.
    pub fn level(&self) -> Level {
        self.machine.level()
    }

    /// The guest itself, for operations that only a guest without a VM supports.
    pub fn soft(&mut self) -> Result<&mut SoftGuest> {
        self.machine.soft().ok_or_else(|| Failure::Rig("This needs a guest without a VM".into()))
    }

    /// Records a figure for the reports.
    pub fn number(&mut self, name: impl Into<String>, value: impl ToString) {
        self.numbers.push((name.into(), value.to_string()));
    }

    /// Records a sentence for the reports.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// What was recorded.
    pub fn take_notes(&mut self) -> (Vec<(String, String)>, Vec<String>) {
        (std::mem::take(&mut self.numbers), std::mem::take(&mut self.notes))
    }

    fn id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// A context of this mode, which may use the existing buffers.
    pub fn context(&mut self, mode: Mode) -> Result<u32> {
        let context = self.id();
        self.ok(&Command::ctx_create(context))?;
        self.contexts.push(context);
        for buffer in self.buffers.clone() {
            self.attach(context, &buffer)?;
        }
        self.run_job(context, Stream::new().mode(mode))?;
        Ok(context)
    }

    /// Destroys a context, and creates another of this mode with the same buffers: for when one is lost.
    pub fn renew(&mut self, context: u32, mode: Mode) -> Result<u32> {
        self.destroy(context)?;
        self.context(mode)
    }

    /// Destroys a context.
    pub fn destroy(&mut self, context: u32) -> Result<()> {
        self.contexts.retain(|known| *known != context);
        self.ok(&Command::ctx_destroy(context)).map(drop)
    }

    /// A buffer of `pages` pages, each mapped by itself, which the existing contexts may use.
    pub fn buffer(&mut self, pages: usize) -> Result<Buffer> {
        let area = self.machine.map(pages, 1, Permission::ReadWrite)?;
        self.buffer_on(area)
    }

    /// A buffer of one mapping.
    pub fn buffer_in_one(&mut self, pages: usize) -> Result<Buffer> {
        let area = self.machine.map(1, pages, Permission::ReadWrite)?;
        self.buffer_on(area)
    }

    /// A buffer that the device may only read.
    pub fn read_only(&mut self, pages: usize) -> Result<Buffer> {
        let area = self.machine.map(pages, 1, Permission::ReadOnly)?;
        self.buffer_on(area)
    }

    /// A buffer on memory that is already mapped.
    pub fn buffer_on(&mut self, area: Area) -> Result<Buffer> {
        self.buffer_on_part(area, 0, area.bytes())
    }

    /// A buffer on a part of such memory; `area` is freed with it.
    pub fn buffer_on_part(&mut self, area: Area, at: u64, bytes: u64) -> Result<Buffer> {
        let buffer = Buffer { id: self.id(), area };
        let len = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.ok(&Command::create_buffer(buffer.id, len))?;
        let iova = crate::soft_guest::Iova(area.iova + at);
        self.ok(&Command::attach_backing(buffer.id, &[crate::soft_guest::dma::Segment { at: iova, len }]))?;
        for context in self.contexts.clone() {
            self.attach(context, &buffer)?;
        }
        self.buffers.push(buffer);
        Ok(buffer)
    }

    /// Lets the jobs of a context name a buffer.
    pub fn attach(&mut self, context: u32, buffer: &Buffer) -> Result<()> {
        self.ok(&Command::ctx_attach(context, buffer.id)).map(drop)
    }

    /// Frees a buffer as a correct driver does: UNREF, its answer, then unmap.
    pub fn free(&mut self, buffer: &Buffer) -> Result<()> {
        self.buffers.retain(|known| known.id != buffer.id);
        self.ok(&Command::unref(buffer.id))?;
        self.machine.free(&buffer.area)
    }

    /// A context that was given none of the existing buffers.
    pub fn stranger(&mut self, mode: Mode) -> Result<u32> {
        let known = std::mem::take(&mut self.buffers);
        let context = self.context(mode);
        self.buffers = known;
        context
    }

    /// A buffer's resource was destroyed by other means; the caller owns its memory.
    pub fn forget(&mut self, buffer: &Buffer) {
        self.buffers.retain(|known| known.id != buffer.id);
    }

    /// The device was reset: contexts and resources are gone.
    pub fn forget_all(&mut self) {
        self.buffers.clear();
        self.contexts.clear();
    }

    /// Sends a command to the device.
    pub fn command(&mut self, command: &Command) -> Result<Ticket> {
        self.machine.submit(command)
    }

    /// Sends a command to the device, and returns its answer.
    pub fn run(&mut self, command: &Command) -> Result<Response> {
        let ticket = self.machine.submit(command)?;
        self.answer(ticket, &format!("the command {:#x}", command.kind))
    }

    /// Sends a command that the device must not refuse.
    pub fn ok(&mut self, command: &Command) -> Result<Response> {
        let response = self.run(command)?;
        ensure!(response.is_ok(), "The command {:#x} was answered with {:#x}", command.kind, response.kind());
        Ok(response)
    }

    fn answer(&mut self, ticket: Ticket, what: &str) -> Result<Response> {
        let answer = self.machine.answer(ticket, self.patience)?;
        answer.ok_or_else(|| {
            let text = format!(
                "There was no answer to {what} within {:?}: its fence is lost, or it hangs",
                self.patience
            );
            Failure::Check(text)
        })
    }

    /// Submits a job with a fence.
    pub fn submit(&mut self, context: u32, stream: Stream) -> Result<Job> {
        let fence = self.next_fence;
        self.next_fence += 1;
        self.submit_as(context, stream, fence)
    }

    /// Submits a job with this fence.
    pub fn submit_as(&mut self, context: u32, stream: Stream, fence: u64) -> Result<Job> {
        let command = Command::submit_3d(context, &stream.finish()).fenced(fence);
        Ok(Job { ticket: self.machine.submit(&command)?, context, fence })
    }

    /// Submits a job that signals its end by a value at `at`: 1, or 2 if it fails. The command is answered at once.
    pub fn submit_with_user_fence(&mut self, context: u32, at: At, stream: Stream) -> Result<()> {
        let says = Context { mode: None, priority: None, fence: Some(at), done: 1, failed: 2 };
        let words = Stream::new().push(says).finish();
        let all: Vec<u32> = words.into_iter().chain(stream.finish()).collect();
        self.ok(&Command::submit_3d(context, &all)).map(drop)
    }

    /// Waits for the end of a job.
    pub fn end(&mut self, job: Job) -> Result<Response> {
        let response = self.answer(job.ticket, &format!("the job with fence {}", job.fence))?;
        ensure!(
            response.fence() == Some(job.fence),
            "The job with fence {} was answered with the fence {:?}",
            job.fence,
            response.fence()
        );
        Ok(response)
    }

    /// Waits for the end of a job that must succeed.
    pub fn end_well(&mut self, job: Job) -> Result<Response> {
        let response = self.end(job)?;
        ensure!(
            response.is_ok(),
            "The job with fence {} failed with {:#x}, where it should have ended well",
            job.fence,
            response.kind()
        );
        Ok(response)
    }

    /// Waits for the end of a job that must fail.
    pub fn end_badly(&mut self, job: Job) -> Result<Response> {
        let response = self.end(job)?;
        ensure!(
            response.kind() == kind::ERR_UNSPEC,
            "The job with fence {} was answered with {:#x}, where it should have failed with {:#x}",
            job.fence,
            response.kind(),
            kind::ERR_UNSPEC
        );
        Ok(response)
    }

    /// Submits a job and waits for its end.
    pub fn run_job(&mut self, context: u32, stream: Stream) -> Result<Response> {
        let job = self.submit(context, stream)?;
        self.end_well(job)
    }

    /// The answer to a job, if it has come.
    pub fn ended(&mut self, job: &Job) -> Result<Option<Response>> {
        self.machine.answer(job.ticket, Duration::ZERO)
    }

    /// Waits until a job of a context executes its packet `packet`, or a later one. It must be sure not to end meanwhile.
    pub fn until_packet(&mut self, context: u32, packet: u64) -> Result<()> {
        self.until(&format!("A job of context {context} at packet {packet}"), |stage| {
            stage.is_at_packet(context, packet)
        })
    }

    /// The same for a job that may end before anyone looks; gives its answer if it has.
    pub fn until_packet_or_end(&mut self, job: &Job, packet: u64) -> Result<Option<Response>> {
        let mut answer = None;
        self.until(&format!("A job of context {} at packet {packet}", job.context), |stage| {
            if stage.is_at_packet(job.context, packet)? {
                return Ok(true);
            }
            answer = stage.ended(job)?;
            Ok(answer.is_some())
        })?;
        Ok(answer)
    }

    fn is_at_packet(&mut self, context: u32, packet: u64) -> Result<bool> {
        let jobs = self.control("jobs", json!({}))?;
        let mut jobs = jobs["jobs"].as_array().into_iter().flatten();
        let is_there = |job: &Value| job["packet"].as_u64().is_some_and(|at| at >= packet);
        Ok(jobs.any(|job| job["context"] == context && is_there(job)))
    }

    /// Waits until something is so.
    pub fn until(&mut self, what: &str, mut is: impl FnMut(&mut Self) -> Result<bool>) -> Result<()> {
        let begin = Instant::now();
        while !is(self)? {
            ensure!(begin.elapsed() < self.patience, "{what} did not come within {:?}", self.patience);
            self.pause(MOMENT);
        }
        Ok(())
    }

    /// Lets time pass.
    pub fn pause(&self, time: Duration) {
        std::thread::sleep(time);
    }

    /// Unmaps pages of a buffer for good: other memory, not mapped yet, takes their place.
    pub fn take(&mut self, buffer: &Buffer, pages: ops::Range<usize>) -> Result<Duration> {
        self.machine.unmap(&buffer.area, pages, Then::Retire)
    }

    /// Unmaps pages and maps other memory in their place, at once.
    pub fn move_away(&mut self, buffer: &Buffer, pages: ops::Range<usize>) -> Result<Duration> {
        let took = self.machine.unmap(&buffer.area, pages.clone(), Then::Retire)?;
        self.machine.map_again(&buffer.area, pages, Permission::ReadWrite)?;
        Ok(took)
    }

    /// Maps the same memory with other rights.
    pub fn protect(
        &mut self,
        buffer: &Buffer,
        pages: ops::Range<usize>,
        access: Permission,
    ) -> Result<Duration> {
        let took = self.machine.unmap(&buffer.area, pages.clone(), Then::Keep)?;
        self.machine.map_again(&buffer.area, pages, access)?;
        Ok(took)
    }

    /// Bytes of a buffer.
    pub fn read(&mut self, buffer: &Buffer, at: u64, len: usize) -> Result<Vec<u8>> {
        self.machine.read(&buffer.area, at, len)
    }

    /// Writes to a buffer from the CPU.
    pub fn write(&mut self, buffer: &Buffer, at: u64, bytes: &[u8]) -> Result<()> {
        self.machine.write(&buffer.area, at, bytes)
    }

    /// A 32-bit word of a buffer.
    pub fn word(&mut self, buffer: &Buffer, at: u64) -> Result<u32> {
        let bytes = self.machine.read(&buffer.area, at, 4)?;
        Ok(bytes.try_into().map_or(0, u32::from_le_bytes))
    }

    /// Asserts, repeatedly, that some bytes of a buffer are these words.
    pub fn must_be(&mut self, buffer: &Buffer, at: u64, len: usize, word: u32) -> Result<()> {
        let due: Vec<u8> = word.to_le_bytes().into_iter().cycle().take(len).collect();
        if self.machine.checksum(&buffer.area, at, len)? == Crc32c::of(&due) {
            return Ok(());
        }
        let bytes = self.read(buffer, at, len)?;
        let wrong = bytes.chunks(4).position(|chunk| chunk != &word.to_le_bytes()[..chunk.len()]);
        let Some(wrong) = wrong else { return Ok(()) };
        let found = bytes.get(4 * wrong..4 * wrong + 4).unwrap_or_default();
        Err(Failure::Corrupted(format!(
            "Buffer {} holds {found:02x?} at {:#x}, where the word {word:#010x} was due",
            buffer.id,
            at + 4 * wrong as u64
        )))
    }

    /// No memory was touched after its unmap (I1).
    pub fn must_be_left_alone(&mut self) -> Result<()> {
        let late = self.machine.late()?;
        let what = if self.level() == Level::Soft { "pages were touched" } else { "bytes were written" };
        if late <= self.forgiven {
            return Ok(());
        }
        Err(Failure::Corrupted(format!(
            "{late} {what} after their unmap had returned: a translation outlived its ack (I1)"
        )))
    }

    /// What was touched late so far is as expected: the mode allows it.
    pub fn forgive_late(&mut self) -> Result<u64> {
        let late = self.machine.late()?;
        let new = late.saturating_sub(self.forgiven);
        self.forgiven = late;
        Ok(new)
    }

    /// The back-end's counts.
    pub fn stats(&mut self) -> Result<Stats> {
        self.control("stats", json!({})).map(Stats)
    }

    /// By how much a count has grown since.
    pub fn grown(&mut self, since: &Stats, name: &str) -> Result<u64> {
        Ok(self.stats()?.since(since, name)?)
    }

    /// Sends a command to the back-end's control socket.
    pub fn control(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.machine.control(command, arguments)
    }

    /// Turns a fault injection on, as `--inject` does.
    pub fn inject(&mut self, what: &str) -> Result<()> {
        let arguments = match what.split_once('=') {
            Some((name, argument)) => json!({ "on": name, "argument": argument }),
            None => json!({ "on": what }),
        };
        self.control("inject", arguments).map(drop)
    }

    /// Turns it off.
    pub fn end_injection(&mut self, name: &str) -> Result<()> {
        self.control("inject", json!({ "off": name })).map(drop)
    }

    /// Verdicts on jobs of this mode since then, by name.
    pub fn verdicts(&mut self, since: &Stats, mode: Mode) -> Result<Verdicts> {
        Ok(instruments::verdicts(&self.stats()?.0, mode).since(&instruments::verdicts(&since.0, mode)))
    }

    /// The number of the latest violation, if there was one.
    pub fn last_violation(&mut self) -> Result<u64> {
        let all = self.control("violations", json!({}))?;
        let ids = all["violations"].as_array().into_iter().flatten().filter_map(|one| one["id"].as_u64());
        Ok(ids.max().unwrap_or(0))
    }

    /// The report of the first violation after `last`, which has to come soon.
    pub fn report_after(&mut self, last: u64) -> Result<String> {
        let mut report = String::new();
        self.until("The report of a violation", |stage| {
            let all = stage.control("violations", json!({}))?;
            let mut new = all["violations"].as_array().into_iter().flatten();
            let found = new.find(|one| one["id"].as_u64().is_some_and(|id| id > last));
            report = found.and_then(|one| one["report"].as_str()).unwrap_or_default().to_owned();
            Ok(!report.is_empty())
        })?;
        Ok(report)
    }

    /// No job had to leave its engine for an invalidation since then: none has waited for a job. An ack that waited
    /// until the drain timeout would be late, but not later than a busy machine allows.
    pub fn nobody_was_taken_off(&mut self, since: &Stats, mode: Mode) -> Result<()> {
        let evictions = self.grown(since, "ladder_evictions")?;
        ensure!(
            evictions == 0,
            "An invalidation of memory that no job uses took a job in mode {mode} off its engine {evictions} times"
        );
        Ok(())
    }

    /// There were no accusations since then, in any mode.
    pub fn nobody_is_accused(&mut self, since: &Stats) -> Result<()> {
        for mode in Mode::ALL {
            let found = self.verdicts(since, *mode)?;
            ensure!(
                found.accusations() == 0,
                "A driver that does all right was accused in mode {mode}: {found:?}"
            );
        }
        Ok(())
    }

    /// Requests every translation in the mirror again; returns those that no longer hold although no INVALIDATE came.
    pub fn audit(&mut self) -> Result<Value> {
        self.control("audit", json!({ "restart": true }))?;
        let mut found = Value::Null;
        self.until("The end of an audit", |stage| {
            let state = stage.control("audit", json!({}))?;
            found = state["stale"].clone();
            Ok(state["state"] == "done")
        })?;
        Ok(found)
    }

    /// Destroys all contexts and buffers.
    pub fn clear(&mut self) -> Result<()> {
        for context in std::mem::take(&mut self.contexts) {
            self.ok(&Command::ctx_destroy(context))?;
        }
        for buffer in std::mem::take(&mut self.buffers) {
            self.ok(&Command::unref(buffer.id))?;
            self.machine.free(&buffer.area)?;
        }
        Ok(())
    }

    /// Destroys everything, and checks that the device releases it: no late touch, nothing left.
    pub fn close(&mut self) -> Result<()> {
        self.clear()?;
        self.must_be_left_alone()?;
        self.until("The end of all work in the back-end", |stage| {
            let contexts = stage.control("contexts", json!({}))?;
            Ok(contexts["contexts"].as_array().is_some_and(Vec::is_empty))
        })
    }
}

/// This many pages, in bytes.
pub fn pages(count: usize) -> u64 {
    count as u64 * PAGE
}

/// A spin that leaves its engine when requested.
pub fn spin(time: Duration) -> Stream {
    and_spin(Stream::new(), time)
}

/// The same after other packets.
pub fn and_spin(stream: Stream, time: Duration) -> Stream {
    stream.spin(SpinBehaviour::Preemptible, time.as_nanos() as u64)
}
