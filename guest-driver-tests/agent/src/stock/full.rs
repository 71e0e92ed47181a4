//! A control queue that is full of jobs that do not end, while a buffer is to end behind them. Knows that Linux waits
//! there; knows nothing of how long the queue is.

use super::client::{Client, LIMIT, PAGE};
use crate::error::AgentError;
use crate::virtgpu::{RenderNode, Submission, SyncFile};
use guest_agent::stock_words::Full;
use job_stream::{Compare, Stream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// A queue that takes no job for so long is full.
const PATIENCE: Duration = Duration::from_millis(400);

/// Fills the queue with so many jobs, and closes a buffer behind them.
pub(super) fn run(jobs: u32) -> Result<Full, AgentError> {
    let client = Client::open()?;
    let bystander = client.node.create_buffer(PAGE)?;
    bystander.wait()?;
    let submitted = Arc::new(AtomicU32::new(0));
    let stream = Stream::new().wait(client.told(), Compare::GreaterOrEqual, 1, 0);
    let words = stream.add(client.counter(), 1, None).finish();
    let (node, ring, count) = (client.node.clone(), client.ring, Arc::clone(&submitted));
    let submitter = thread::spawn(move || submit_all(&node, ring, &words, jobs, &count));
    let found_room = until_it_stands(&submitted);
    let handle = bystander.into_handle();
    let node = client.node.clone();
    let closer = thread::spawn(move || node.close_handle(handle));
    thread::sleep(PATIENCE);
    let close_waited = !closer.is_finished();
    client.tell(1);
    let fences = submitter.join().map_err(|_| AgentError::Thread)??;
    let closed = closer.join().map_err(|_| AgentError::Thread)?.is_ok();
    super::client::wait_for_all(&fences, LIMIT)?;
    let mut signalled = 0;
    for fence in &fences {
        signalled += u32::from(fence.is_signalled(Duration::ZERO)?);
    }
    Ok(Full { found_room, close_waited, closed, done: client.count(), signalled })
}

fn submit_all(
    node: &RenderNode,
    ring: Option<u32>,
    words: &[u32],
    jobs: u32,
    count: &AtomicU32,
) -> Result<Vec<SyncFile>, AgentError> {
    let submit = |_| {
        let fence = node.submit_job(&Submission { words, ring, ..Submission::default() })?;
        // ORDERING: a number to look at, and nothing hangs on it.
        count.fetch_add(1, Ordering::Relaxed);
        Ok(fence)
    };
    (0..jobs).map(submit).collect()
}

/// How many there are once no more come.
fn until_it_stands(count: &AtomicU32) -> u32 {
    let (mut last, mut since) = (0, Instant::now());
    while last == 0 || since.elapsed() < PATIENCE {
        // ORDERING: as above.
        let now = count.load(Ordering::Relaxed);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        thread::sleep(Duration::from_millis(1));
    }
    last
}
