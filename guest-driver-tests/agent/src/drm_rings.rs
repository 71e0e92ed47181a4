//! Contexts with rings, and buffers that are blobs, through the stock driver: a job that waits holds back what comes
//! behind it on its own ring, and nothing else. Knows nothing of ioctls.

use crate::error::AgentError;
use crate::virtgpu::{Buffer, RenderNode, SyncFile};
use guest_agent::protocol::RingCounts;
use job_stream::{At, Compare, Space, Stream};
use std::time::Duration;

const RINGS: u32 = 2;
const BYTES: usize = 4096;
const FENCE_LIMIT: Duration = Duration::from_secs(20);
/// Where a job waits for a value of the guest's, where one that stands behind it writes, and where the others do.
const WAITS: u64 = 0;
const BEHIND: u64 = 8;
const BESIDE: u64 = 16;
const VALUE: u32 = 0x600d;

/// Has a job wait on a ring, and looks at which others get past it.
pub(crate) fn run() -> Result<RingCounts, AgentError> {
    let (first, second) = (RenderNode::open_with_rings(RINGS)?, RenderNode::open_with_rings(RINGS)?);
    let (blob, context_init) = (first.has_blobs()?, first.has_rings()?);
    let ours = first.create_buffer(BYTES)?;
    let theirs = if blob { second.create_blob(BYTES)? } else { second.create_buffer(BYTES)? };
    let blocked = submit(&first, 0, &ours, |at| {
        Stream::new().wait(at.plus(WAITS), Compare::Equal, VALUE, 0).signal(at.plus(BEHIND), 1)
    })?;
    let behind = submit(&first, 0, &ours, |at| Stream::new().signal(at.plus(BEHIND), VALUE))?;
    let mut overtook = 0;
    for (node, ring, buffer) in [(&first, 1, &ours), (&second, 0, &theirs), (&second, 1, &theirs)] {
        let place = BESIDE + 8 * u64::from(ring);
        let fence = submit(node, ring, buffer, |at| Stream::new().signal(at.plus(place), VALUE))?;
        let is_past = fence.is_signalled(FENCE_LIMIT)? && !blocked.is_signalled(Duration::ZERO)?;
        overtook += u32::from(is_past && buffer.word(place) == VALUE);
    }
    let in_order = !behind.is_signalled(Duration::ZERO)? && ours.word(BEHIND) == 0;
    ours.write(&VALUE.to_le_bytes());
    let all_end = blocked.is_signalled(FENCE_LIMIT)? && behind.is_signalled(FENCE_LIMIT)?;
    let in_order = in_order && all_end && ours.word(BEHIND) == VALUE;
    Ok(RingCounts { blob, context_init, overtook, in_order })
}

fn submit(
    node: &RenderNode,
    ring: u32,
    buffer: &Buffer,
    stream: impl FnOnce(At) -> Stream,
) -> Result<SyncFile, AgentError> {
    let words = stream(At::new(Space::resource(buffer.resource()), 0)).finish();
    node.submit_on(Some(ring), &words, std::slice::from_ref(buffer))
}
