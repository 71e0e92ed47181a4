//! Jobs that begin, stand, and end; and contexts and buffers that end under them. Knows nothing of what happens beside.

use super::client::{Client, JOBS, LIMIT, count_pages, map_export, wait_for_all};
use crate::error::AgentError;
use guest_agent::stock_words::{Amount, Standing, Until};
use std::time::{Duration, Instant};

/// Submits so many jobs, and waits until the first that waits has begun.
pub(super) fn submit(client: &mut Client, amount: Amount) -> Result<Standing, AgentError> {
    let first = client.next_number();
    if first + amount.jobs > JOBS + 1 {
        return Err(AgentError::TooMany { jobs: amount.jobs, limit: JOBS + 1 - first });
    }
    for _ in 0..amount.jobs {
        client.submit(amount.until)?;
    }
    if amount.until == Until::Told {
        client.wait_begun(first)?;
    }
    client.standing()
}

/// Waits for the end of all jobs for so long, and looks.
pub(super) fn look(client: &Client, limit: Duration) -> Result<Standing, AgentError> {
    let begin = Instant::now();
    client.wait(limit)?;
    let waited_ns = begin.elapsed().as_nanos() as u64;
    Ok(Standing { waited_ns, ..client.standing()? })
}

/// Closes the buffer that jobs write to, under them; its memory stays mapped.
pub(super) fn close_buffer(client: &mut Client) -> Result<Standing, AgentError> {
    client.data.close()?;
    client.standing()
}

/// Lets all jobs go on, and waits for their end.
pub(super) fn finish(client: Client) -> Result<Standing, AgentError> {
    client.tell(JOBS);
    let begin = Instant::now();
    client.wait_end()?;
    let waited_ns = begin.elapsed().as_nanos() as u64;
    Ok(Standing { waited_ns, ..client.standing()? })
}

/// Ends the context under its jobs. What user fences say cannot be seen any more.
pub(super) fn abandon(client: Client) -> Result<Standing, AgentError> {
    let memory = map_export(client.export()?)?;
    let begin = Instant::now();
    let fences = client.close();
    let submitted = fences.len() as u32;
    let mut standing = Standing { submitted, ..Standing::default() };
    if wait_for_all(&fences, LIMIT)? {
        standing.signalled = submitted;
    }
    standing.waited_ns = begin.elapsed().as_nanos() as u64;
    count_pages(&mut standing, &memory.bytes());
    Ok(standing)
}
