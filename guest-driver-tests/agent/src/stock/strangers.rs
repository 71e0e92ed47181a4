//! Two contexts, of one process or of two, that name each other's memory. The device has to refuse it, and neither may
//! be the worse for it. Knows nothing of how a device tells them apart.

use super::client::{Client, LIMIT, PAGE, PageState, With};
use super::process::Child;
use super::responses::Responses;
use crate::error::AgentError;
use guest_agent::stock_words::{Strangers, Until};
use job_stream::{At, Space, Stream};

/// What the device answers to a job that names memory of which its context knows nothing.
const NO_SUCH_RESOURCE: u32 = 0x1203;
/// Jobs that each side does before and after on memory of its own.
const OWN: u32 = 2;
/// The page of the stranger's to which the other's memory would go.
const LOOT: u32 = 12;

/// Has one context name the other's memory in every way that there is.
pub(super) fn run(process: bool) -> Result<Strangers, AgentError> {
    let responses = Responses::listen()?;
    let mut owner = Client::open()?;
    owner.submit(Until::AtOnce)?;
    owner.wait_end()?;
    let theirs = owner.data.resource();
    let before = owner.data.bytes();
    let taken = if process {
        let mut child = Child::start(|mut parent| {
            let (trespasses, own, taken) = trespass(theirs)?;
            [u64::from(trespasses), u64::from(own), taken].iter().try_for_each(|number| parent.say(*number))
        })?;
        let numbers = (child.hear()?, child.hear()?, child.hear()?);
        child.ends(LIMIT)?;
        (numbers.0 as u32, numbers.1 as u32, numbers.2)
    } else {
        trespass(theirs)?
    };
    let (trespasses, own, bytes_taken) = taken;
    let refused = responses.fenced()?.iter().filter(|answer| answer.kind == NO_SUCH_RESOURCE).count();
    let changed = before.iter().zip(owner.data.bytes()).filter(|(was, is)| **was != *is).count();
    owner.submit(Until::AtOnce)?;
    owner.wait_end()?;
    let done = (1..=OWN).filter(|number| owner.is_done(*number) && owner.page(*number) == PageState::Filled);
    Ok(Strangers {
        trespasses,
        refused: refused as u32,
        bytes_taken: bytes_taken + changed as u64,
        own: own + done.count() as u32,
    })
}

/// What the other does: how many of its jobs named memory that is not its own, how many did not and were done, and how
/// many bytes came over.
fn trespass(theirs: u32) -> Result<(u32, u32, u64), AgentError> {
    let mut stranger = Client::open()?;
    stranger.submit(Until::AtOnce)?;
    let foreign = At::new(Space::resource(theirs), 0);
    let own = At::new(Space::resource(stranger.data.resource()), u64::from(LOOT) * PAGE as u64);
    let attempts = [
        Stream::new().fill(foreign.range(PAGE as u64), 0xbad),
        Stream::new().copy(foreign.range(PAGE as u64), own),
        Stream::new().copy(own.range(PAGE as u64), foreign),
        Stream::new().checksum(foreign.range(PAGE as u64), own),
        Stream::new().signal(foreign, 0xbad),
        Stream::new().add(own, 1, Some(foreign)),
    ];
    let trespasses = attempts.len() as u32;
    for attempt in attempts {
        stranger.submit_words(&attempt.finish(), &With::default())?;
    }
    stranger.wait_end()?;
    let last = stranger.next_number();
    stranger.submit(Until::AtOnce)?;
    stranger.wait_end()?;
    let taken = if stranger.page(LOOT) == PageState::Poison { 0 } else { PAGE as u64 };
    let is_done = |number: u32| stranger.is_done(number) && stranger.page(number) == PageState::Filled;
    Ok((trespasses, u32::from(is_done(1)) + u32::from(is_done(last)), taken))
}
