//! Jobs through our own driver, which maps and unmaps as it likes: rightly, while jobs are in flight and after their
//! fences; and wrongly on purpose, before them. Knows nothing of VFIO's calls, nor of what a case does.

use crate::error::AgentError;
use crate::mapping::Mapping;
use crate::storm;
use crate::vfio::{Command, Gpu, OK, Ticket};
use guest_agent::jobs::{
    self, BEGUN, BUFFER_BYTES, BUFFERS, CASES, COUNTER, Case, Ids, LONG, PUBLICATION, PUBLISHED, STORM, Twin,
};
use guest_agent::protocol::{Broken, Bug, JobCounts};
use job_stream::Mode;
use std::time::{Duration, Instant};

const IDS: Ids = [11, 12, 13];
/// A buffer lies at a multiple of its size, and not beside another: an unmap that is rounded up reaches nobody.
const BUFFERS_AT: u64 = 0x1100_0000;
const SPARE_AT: u64 = 0x1200_0000;
const STRIDE: u64 = 4 * BUFFER_BYTES as u64;
const START_LIMIT: Duration = Duration::from_secs(10);
const LATE_POISON: u8 = 0x5c;

/// Runs all cases, a storm of `storm` jobs beside which an idle range comes and goes, and a move of a buffer to other
/// memory, in a context of `mode`.
pub(crate) fn run(gpu: &mut Gpu, mode: Mode, storm: u32) -> Result<JobCounts, AgentError> {
    let mut client = Client::new(gpu, mode)?;
    for case in &CASES {
        client.check(case)?;
    }
    storm::run(&mut client, storm)?;
    client.compare(&STORM)?;
    client.long_job()?;
    client.move_buffer()?;
    client.close(BUFFERS)
}

/// Takes a buffer from under a job that is in flight.
pub(crate) fn break_on_purpose(gpu: &mut Gpu, mode: Mode, bug: Bug) -> Result<Broken, AgentError> {
    let mut client = Client::new(gpu, mode)?;
    let words = jobs::overtaken(IDS, mode);
    let ticket = client.gpu.submit(&Command::submit(client.context(), 1, &words))?;
    client.wait_for_counter(|counter| counter == BEGUN)?;
    let begin = Instant::now();
    client.gpu.unmap(address(0), BUFFER_BYTES)?;
    let unmap_ns = begin.elapsed().as_nanos() as u64;
    let mut mapped = BUFFERS - 1;
    let old = client.buffers.swap_first(filled(LATE_POISON)?);
    if bug == Bug::RemapBeforeFence {
        client.map(0)?;
        mapped = BUFFERS;
    }
    // Whoever still writes through the translation from before the unmap is seen here.
    old.write(0, &[LATE_POISON; BUFFER_BYTES]);
    let response = client.gpu.wait(ticket)?;
    let late_bytes = old.bytes().iter().filter(|byte| **byte != LATE_POISON).count() as u64;
    let user_fence = jobs::user_fence(&client.buffers.last().bytes());
    client.close(mapped)?;
    Ok(Broken { response, unmap_ns, late_bytes, user_fence })
}

/// The memory behind the buffers; the first may be exchanged.
struct Memory([Mapping; BUFFERS]);

impl Memory {
    fn swap_first(&mut self, with: Mapping) -> Mapping {
        let [first, ..] = &mut self.0;
        std::mem::replace(first, with)
    }

    fn last(&self) -> &Mapping {
        let [.., last] = &self.0;
        last
    }
}

struct Client<'a> {
    gpu: &'a mut Gpu,
    mode: Mode,
    buffers: Memory,
    spare: Mapping,
    twin: Twin,
    counts: JobCounts,
}

impl<'a> Client<'a> {
    fn new(gpu: &'a mut Gpu, mode: Mode) -> Result<Self, AgentError> {
        let memory = || Mapping::anonymous(BUFFER_BYTES);
        let buffers = Memory([memory()?, memory()?, memory()?]);
        let (spare, twin) = (memory()?, Twin::new(IDS, mode));
        let mut client = Self { gpu, mode, buffers, spare, twin, counts: JobCounts::default() };
        client.gpu.run(&Command::create_context(client.context()))?;
        for (index, id) in IDS.into_iter().enumerate() {
            if let Some(buffer) = client.buffers.0.get(index) {
                buffer.write(0, &jobs::poison(index));
            }
            client.map(index)?;
            client.gpu.run(&Command::create_buffer(id, BUFFER_BYTES as u32))?;
            client.gpu.run(&Command::attach_backing(id, address(index), BUFFER_BYTES as u32))?;
            client.gpu.run(&Command::attach_to_context(client.context(), id))?;
        }
        Ok(client)
    }

    /// Contexts of different modes have different numbers.
    fn context(&self) -> u32 {
        self.mode as u32
    }

    fn map(&mut self, index: usize) -> Result<(), AgentError> {
        let Some(buffer) = self.buffers.0.get(index) else { return Ok(()) };
        self.gpu.map(address(index), buffer, BUFFER_BYTES)
    }

    fn submit(&mut self, case: &Case) -> Result<Ticket, AgentError> {
        let words = self.twin.job(case);
        self.gpu.submit(&Command::submit(self.context(), self.twin.jobs(), &words))
    }

    fn wait(&mut self, ticket: Ticket, case: &Case) -> Result<(), AgentError> {
        match self.gpu.wait(ticket)? {
            OK => Ok(()),
            response => Err(AgentError::JobFailed { case: case.name, mode: self.mode, response }),
        }
    }

    fn check(&mut self, case: &Case) -> Result<(), AgentError> {
        let ticket = self.submit(case)?;
        self.wait(ticket, case)?;
        self.compare(case)
    }

    fn compare(&mut self, case: &Case) -> Result<(), AgentError> {
        for (index, buffer) in self.buffers.0.iter().enumerate() {
            let bytes = buffer.bytes();
            self.counts.bytes_compared += bytes.len() as u64;
            if let Some(difference) = self.twin.difference(index, &bytes) {
                return Err(AgentError::wrong_byte(case, self.mode, difference));
            }
        }
        Ok(())
    }

    /// Maps and unmaps the idle range; gives the nanoseconds that the unmap took.
    fn unmap_idle(&mut self) -> Result<u64, AgentError> {
        self.gpu.map(SPARE_AT, &self.spare, BUFFER_BYTES)?;
        let begin = Instant::now();
        self.gpu.unmap(SPARE_AT, BUFFER_BYTES)?;
        self.counts.buffers_churned += 1;
        Ok(begin.elapsed().as_nanos() as u64)
    }

    /// An idle range goes while a job is in flight that takes much longer: the unmap has nothing to wait for.
    fn long_job(&mut self) -> Result<(), AgentError> {
        let before = self.counter();
        let ticket = self.submit(&LONG)?;
        self.wait_for_counter(|counter| counter != before)?;
        self.counts.idle_unmap_ns = self.unmap_idle()?;
        self.wait(ticket, &LONG)?;
        self.compare(&LONG)
    }

    fn counter(&self) -> u32 {
        let mut bytes = [0; 4];
        self.buffers.last().read(COUNTER, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Looks for it without a pause: what was written before it must be there at that moment.
    fn wait_for_counter(&self, is_it: impl Fn(u32) -> bool) -> Result<(), AgentError> {
        let end = Instant::now() + START_LIMIT;
        while !is_it(self.counter()) {
            if Instant::now() > end {
                return Err(AgentError::NoStart { mode: self.mode, seconds: START_LIMIT.as_secs() });
            }
        }
        Ok(())
    }

    /// Who sees a SIGNAL sees what was written before it, even where the device has to find each page first.
    fn signal_after_fill(&mut self) -> Result<(), AgentError> {
        let ticket = self.submit(&PUBLISHED)?;
        self.wait_for_counter(|counter| counter == PUBLICATION)?;
        let [first, ..] = &self.buffers.0;
        if let Some(difference) = self.twin.difference(0, &first.bytes()) {
            return Err(AgentError::wrong_byte(&PUBLISHED, self.mode, difference));
        }
        self.wait(ticket, &PUBLISHED)?;
        self.compare(&PUBLISHED)
    }

    /// After its fence a buffer gets other memory under the same address: jobs see that, and not what was there.
    fn move_buffer(&mut self) -> Result<(), AgentError> {
        self.gpu.unmap(address(0), BUFFER_BYTES)?;
        let old = self.buffers.swap_first(Mapping::anonymous(BUFFER_BYTES)?);
        let contents = old.bytes();
        let [first, ..] = &self.buffers.0;
        first.write(0, &contents);
        old.write(0, &[LATE_POISON; BUFFER_BYTES]);
        self.map(0)?;
        self.signal_after_fill()?;
        for case in &CASES {
            self.check(case)?;
        }
        match old.bytes().iter().position(|byte| *byte != LATE_POISON) {
            Some(at) => Err(AgentError::LateTouch { mode: self.mode, at }),
            None => Ok(()),
        }
    }

    /// Ends the context and the buffers, of which the last `mapped` are mapped.
    fn close(mut self, mapped: usize) -> Result<JobCounts, AgentError> {
        self.gpu.run(&Command::destroy_context(self.context()))?;
        for (index, id) in IDS.into_iter().enumerate() {
            self.gpu.run(&Command::unref(id))?;
            if index >= BUFFERS - mapped {
                self.gpu.unmap(address(index), BUFFER_BYTES)?;
            }
        }
        self.counts.jobs = self.twin.jobs();
        self.counts.bytes_moved = self.twin.bytes_moved();
        Ok(self.counts)
    }
}

impl storm::Driver for Client<'_> {
    type InFlight = Ticket;

    fn submit_next(&mut self) -> Result<Ticket, AgentError> {
        self.submit(&STORM)
    }

    fn has_ended(&mut self, job: &Ticket) -> Result<bool, AgentError> {
        self.gpu.is_answered(job)
    }

    fn end(&mut self, job: Ticket) -> Result<(), AgentError> {
        self.wait(job, &STORM)
    }

    fn churn(&mut self) -> Result<(), AgentError> {
        self.unmap_idle().map(drop)
    }
}

fn address(index: usize) -> u64 {
    BUFFERS_AT + index as u64 * STRIDE
}

fn filled(byte: u8) -> Result<Mapping, AgentError> {
    let memory = Mapping::anonymous(BUFFER_BYTES)?;
    memory.write(0, &[byte; BUFFER_BYTES]);
    Ok(memory)
}
