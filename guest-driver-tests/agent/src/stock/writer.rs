//! A job that writes for longer than anybody waits: a buffer is filled again and again, each time with another value, so
//! that one sees in memory where it has stopped. Knows nothing of what becomes of it.

use super::client::wait_for;
use crate::error::AgentError;
use crate::virtgpu::{Buffer, RenderNode, Submission, SyncFile};
use guest_agent::stock_words::WRITER;
use job_stream::{At, Space, Stream};

/// What is alive of it.
pub(super) struct Writer {
    _node: RenderNode,
    _buffer: Buffer,
    _fence: SyncFile,
}

impl Writer {
    /// Submits the job, and waits until it has filled the buffer once.
    pub(super) fn begin() -> Result<Self, AgentError> {
        let (node, ring) = RenderNode::open_best(1)?;
        let buffer = node.create_buffer(WRITER.bytes as usize)?;
        let all = At::new(Space::resource(buffer.resource()), 0).range(WRITER.bytes);
        let passes = WRITER.value..WRITER.value + WRITER.passes;
        let words = passes.fold(Stream::new(), |stream, value| stream.fill(all, value)).finish();
        let handles = [buffer.handle()];
        let fence =
            node.submit_job(&Submission { words: &words, handles: &handles, ring, ..Submission::default() })?;
        let last = WRITER.bytes - 4;
        wait_for("the first pass of a job that writes", || WRITER.pass(buffer.word(last)).is_some())?;
        Ok(Self { _node: node, _buffer: buffer, _fence: fence })
    }
}
