//! The order in which jobs end, as a program sees it by its fences and the driver by the device's answers: in order on
//! a ring, and without order between contexts. Knows nothing of what delays an end.

use super::client::{Client, PageState};
use super::responses::{Response, Responses};
use crate::error::AgentError;
use guest_agent::stock_words::{Order, Overtaking, Until};
use std::time::{Duration, Instant};

/// Milliseconds for which jobs spin, one after the other: what comes behind a long one is short.
const SPINS: [u32; 5] = [12, 0, 4, 0, 1];
/// Between two looks.
const LOOK: Duration = Duration::from_micros(100);
/// For a fence that must not come.
const PATIENCE: Duration = Duration::from_millis(300);

/// When the end of a job was seen in memory, and when by its fence.
#[derive(Clone, Copy, Default)]
struct Seen {
    done: Option<Instant>,
    signalled: Option<Instant>,
}

/// Runs jobs of mixed lengths on one ring.
pub(super) fn run(jobs: u32) -> Result<Order, AgentError> {
    let mut client = Client::open()?;
    let responses = Responses::listen()?;
    for (_, spin) in (0..jobs).zip(SPINS.iter().cycle()) {
        client.submit(if *spin == 0 { Until::AtOnce } else { Until::Spun(*spin) })?;
    }
    let mut order = Order { least_delay_ns: u64::MAX, ..Order::default() };
    let mut seen = vec![Seen::default(); jobs as usize];
    let begin = Instant::now();
    while order.jobs < jobs {
        if begin.elapsed() > super::client::LIMIT {
            return Err(AgentError::Late {
                what: "the last fence".into(),
                seconds: super::client::LIMIT.as_secs(),
            });
        }
        look(&client, &mut seen, &mut order)?;
        std::thread::sleep(LOOK);
    }
    let answers = responses.fenced()?;
    order.answers = answers.len() as u32;
    order.answers_overtook = overtook(&answers);
    Ok(order)
}

/// Looks at all jobs, the last one first: what is not signalled yet when it is looked at was not so before.
fn look(client: &Client, seen: &mut [Seen], order: &mut Order) -> Result<(), AgentError> {
    let mut later_is_signalled = false;
    let jobs = (1..).zip(client.fences()).zip(seen).collect::<Vec<_>>();
    for ((number, fence), seen) in jobs.into_iter().rev() {
        if client.is_done(number) {
            seen.done.get_or_insert_with(Instant::now);
        }
        if seen.signalled.is_some() {
            later_is_signalled = true;
        } else if fence.is_signalled(Duration::ZERO)? {
            later_is_signalled = true;
            let now = *seen.signalled.insert(Instant::now());
            order.jobs += 1;
            let is_there = client.is_done(number) && client.page(number) == PageState::Filled;
            order.early += u32::from(!is_there);
            let delay = now.saturating_duration_since(seen.done.unwrap_or(now));
            order.least_delay_ns = order.least_delay_ns.min(delay.as_nanos() as u64);
        } else {
            order.overtook += u32::from(later_is_signalled);
        }
    }
    Ok(())
}

/// Answers that came before the answer to a fence that comes first.
fn overtook(answers: &[Response]) -> u32 {
    answers.windows(2).filter(|pair| matches!(pair, [first, second] if first.fence > second.fence)).count()
        as u32
}

/// Has a job of one context wait, and another context's job come behind it.
pub(super) fn overtaking() -> Result<Overtaking, AgentError> {
    let (mut first, mut second) = (Client::open()?, Client::open()?);
    let responses = Responses::listen()?;
    first.submit(Until::Told)?;
    first.wait_begun(1)?;
    second.submit(Until::AtOnce)?;
    second.wait_past(1)?;
    let signalled = second.wait(PATIENCE)?;
    let first_stands = !first.wait(Duration::ZERO)? && !first.is_done(1);
    let done = second.is_done(1) && second.page(1) == PageState::Filled;
    first.tell(1);
    first.wait_end()?;
    second.wait_end()?;
    let answers = responses.fenced()?;
    if answers.len() != 2 {
        return Err(AgentError::Answers { found: answers.len(), wanted: 2 });
    }
    let answered_last = overtook(&answers) == 1;
    Ok(Overtaking { timelines: first.ring.is_some(), done, signalled, first_stands, answered_last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_before_one_that_comes_first_is_noticed() {
        let answers = |fences: &[u64]| -> Vec<Response> {
            fences.iter().map(|fence| Response { kind: 0x1100, fence: *fence }).collect()
        };
        assert_eq!(overtook(&answers(&[3, 4, 9])), 0);
        assert_eq!(overtook(&answers(&[3, 9, 4])), 1);
    }
}
