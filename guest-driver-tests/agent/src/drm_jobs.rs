//! Jobs through the stock driver: each case once, then a storm of jobs in flight while buffers come and go beside
//! them. Every byte of every buffer is compared with the twin's. Knows nothing of ioctls, nor of what a case does.

use crate::error::AgentError;
use crate::storm;
use crate::virtgpu::{Buffer, RenderNode, SyncFile};
use guest_agent::jobs::{self, BUFFER_BYTES, BUFFERS, CASES, Case, STORM, Twin};
use guest_agent::protocol::JobCounts;
use job_stream::{Choice, Mode};
use std::time::Duration;

const FENCE_LIMIT: Duration = Duration::from_secs(20);
/// Bytes of a buffer that comes and goes: 16 pages.
const CHURN_BYTES: usize = 16 * 4096;

/// Runs all cases and a storm of `storm` jobs in a context of `mode`.
pub(crate) fn run(mode: Mode, storm: u32) -> Result<JobCounts, AgentError> {
    let node = RenderNode::open()?;
    if node.capset()?.modes & 1 << mode.raw() == 0 {
        return Err(AgentError::NoMode { mode });
    }
    let mut client = Client::new(node, mode)?;
    for case in &CASES {
        let fence = client.submit(case)?;
        client.wait(&fence, case)?;
        client.compare(case)?;
    }
    storm::run(&mut client, storm)?;
    client.compare(&STORM)?;
    Ok(client.counts())
}

struct Client {
    node: RenderNode,
    mode: Mode,
    buffers: [Buffer; BUFFERS],
    twin: Twin,
    bytes_compared: u64,
    buffers_churned: u64,
}

impl Client {
    fn new(node: RenderNode, mode: Mode) -> Result<Self, AgentError> {
        let buffer = || node.create_buffer(BUFFER_BYTES);
        let buffers = [buffer()?, buffer()?, buffer()?];
        for (index, buffer) in buffers.iter().enumerate() {
            buffer.write(&jobs::poison(index));
        }
        let [a, b, c] = &buffers;
        let twin = Twin::new([a.resource(), b.resource(), c.resource()], mode);
        Ok(Self { node, mode, buffers, twin, bytes_compared: 0, buffers_churned: 0 })
    }

    fn submit(&mut self, case: &Case) -> Result<SyncFile, AgentError> {
        self.node.submit(&self.twin.job(case), &self.buffers)
    }

    fn wait(&self, fence: &SyncFile, case: &Case) -> Result<(), AgentError> {
        if fence.is_signalled(FENCE_LIMIT)? {
            return Ok(());
        }
        let (case, mode, seconds) = (case.name, self.mode, FENCE_LIMIT.as_secs());
        Err(AgentError::NoFence { case, mode, seconds })
    }

    /// All bytes are what the twin says. A job that was killed is seen here: its fence does not tell.
    fn compare(&mut self, case: &Case) -> Result<(), AgentError> {
        for (index, buffer) in self.buffers.iter().enumerate() {
            buffer.wait()?;
            let bytes = buffer.bytes();
            self.bytes_compared += bytes.len() as u64;
            if let Some(difference) = self.twin.difference(index, &bytes) {
                return Err(AgentError::wrong_byte(case, self.mode, difference));
            }
            if index == BUFFERS - 1 && case.measures_time() {
                check_times(&bytes, self.mode)?;
            }
        }
        Ok(())
    }

    fn counts(&self) -> JobCounts {
        JobCounts {
            jobs: self.twin.jobs(),
            bytes_moved: self.twin.bytes_moved(),
            bytes_compared: self.bytes_compared,
            buffers_churned: self.buffers_churned,
            ..JobCounts::default()
        }
    }
}

impl storm::Driver for Client {
    type InFlight = SyncFile;

    fn submit_next(&mut self) -> Result<SyncFile, AgentError> {
        self.submit(&STORM)
    }

    fn has_ended(&mut self, job: &SyncFile) -> Result<bool, AgentError> {
        job.is_signalled(Duration::ZERO)
    }

    fn end(&mut self, job: SyncFile) -> Result<(), AgentError> {
        self.wait(&job, &STORM)
    }

    fn churn(&mut self) -> Result<(), AgentError> {
        let buffer = self.node.create_buffer(CHURN_BYTES)?;
        buffer.write(&[0xaa; CHURN_BYTES]);
        self.buffers_churned += 1;
        Ok(())
    }
}

fn check_times(last_buffer: &[u8], mode: Mode) -> Result<(), AgentError> {
    let (found, least) = (jobs::time_between(last_buffer), jobs::least_time());
    if found.is_some_and(|time| time >= least) {
        Ok(())
    } else {
        Err(AgentError::WrongTime { mode, found, least })
    }
}
