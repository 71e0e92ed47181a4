//! A job that fails, beside another context's that do not: the driver is told, the context is lost, and the others live
//! on. Knows what the driver makes of it; knows nothing of what takes a job off its engine.

use super::client::{Client, PageState, With};
use super::responses::Responses;
use crate::error::AgentError;
use guest_agent::stock_words::{Failing, Failure, Until};
use job_stream::{Compare, SpinBehaviour};
use std::time::{Duration, Instant};

/// For what does not come.
const PATIENCE_NS: u64 = 50_000_000;
/// A job that has nothing wrong spins for so long.
const SPIN_NS: u64 = 20_000_000;
/// In the order of submission: the other's, the one that fails, the other's, the other's, and the next of the one that
/// failed.
const FAILED: usize = 1;
const NEXT: usize = 4;
const ANSWERS: usize = 5;

/// Has a job fail in this way.
pub(super) fn run(how: Failure) -> Result<Failing, AgentError> {
    let (mut failing, mut other) = (Client::open()?, Client::open()?);
    let responses = Responses::listen()?;
    other.submit(Until::AtOnce)?;
    other.wait_end()?;
    let begin = Instant::now();
    let stream = failing.begin(1);
    let stream = match how {
        Failure::Hangs => stream.spin(SpinBehaviour::Wedged, 0),
        Failure::WaitsInVain => stream.wait(failing.never(), Compare::Equal, 1, PATIENCE_NS),
        Failure::Not => stream.spin(SpinBehaviour::Preemptible, SPIN_NS),
    };
    let words = failing.end(1, stream);
    failing.submit_words(&words, &With::default())?;
    failing.wait_begun(1)?;
    other.submit(Until::AtOnce)?;
    failing.wait_end()?;
    let took_ns = begin.elapsed().as_nanos() as u64;
    let (says_failed, signalled) = (failing.says_failed(1), failing.wait(Duration::ZERO)?);
    other.submit(Until::AtOnce)?;
    other.wait_end()?;
    failing.submit(Until::AtOnce)?;
    failing.wait_end()?;
    let mut answers = responses.fenced()?;
    answers.sort_by_key(|answer| answer.fence);
    if answers.len() != ANSWERS {
        return Err(AgentError::Answers { found: answers.len(), wanted: ANSWERS });
    }
    let kind = |index: usize| answers.get(index).map_or(0, |answer| answer.kind);
    let others = (1..other.next_number())
        .filter(|number| other.is_done(*number) && other.page(*number) == PageState::Filled);
    Ok(Failing {
        response: kind(FAILED),
        says_failed,
        signalled,
        stopped_there: failing.page(1) == PageState::Poison,
        next_response: kind(NEXT),
        others: others.count() as u32,
        took_ns,
    })
}
