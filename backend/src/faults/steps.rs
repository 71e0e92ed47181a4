//! What is injected into the steps of jobs. Knows jobs; knows nothing of threads but that a step can take its time.

use std::thread;
use std::time::Duration;

use device_model::jobs::job::{Job, Step};
use device_model::mmu::{JobMemory, Missing, SeededBug};

use super::{Bug, Grade, Injection};

/// How long a step of a job takes that is stuck: longer than a drain bears, and shorter than the end of a session.
const STUCK: Duration = Duration::from_millis(600);

/// What a job does instead of its step; `None`: its step.
pub(crate) fn instead_of_step(injection: &Injection, job: &Job, memory: &impl JobMemory) -> Option<Step> {
    #[cfg(test)]
    injection.panic_if_told("in a step");
    // One that is to be killed is not kept from that.
    if injection.is_on(Bug::HangJob) && job.packet().is_some() && !job.is_cancelled() {
        match injection.grade(Bug::HangJob) {
            Some(Grade::Yielding) => return Some(Step::Spinning { stubborn: false }),
            Some(Grade::Stubborn) => return Some(Step::Spinning { stubborn: true }),
            Some(Grade::Stuck) => {
                thread::sleep(STUCK);
                return Some(Step::Yield);
            }
            None => {}
        }
    }
    if injection.fires(Bug::SignalBeforeWrite) {
        job.signal_early(memory, SeededBug::signal_before_write());
    }
    if injection.fires(Bug::SpuriousFault) {
        return some_page(job).map(Step::Missing);
    }
    None
}

/// A page that the job still has to touch.
fn some_page(job: &Job) -> Option<Missing> {
    let next = *job.working_set().first()?;
    Some(Missing { space: next.space, range: next.range.first().page_range(), access: next.access })
}
