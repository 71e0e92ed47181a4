//! Fault injection into the steps of jobs. Knows jobs; knows nothing of threads except that a step can take its time.

use std::thread;
use std::time::Duration;

use device_model::jobs::job::{Job, Step};
use device_model::mmu::{JobMemory, Missing, SeededBug};

use super::{Bug, Grade, Injection};

/// Duration of a stuck job's step: longer than a drain may take, and shorter than the end of a session.
const STUCK: Duration = Duration::from_millis(600);

/// What a job does instead of its step; `None`: the step itself.
pub(crate) fn instead_of_step(injection: &Injection, job: &Job, memory: &impl JobMemory) -> Option<Step> {
    #[cfg(test)]
    injection.panic_if_told("in a step");
    // A cancelled job must be able to end.
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

/// A page that the job will access.
fn some_page(job: &Job) -> Option<Missing> {
    let next = *job.working_set().first()?;
    Some(Missing { space: next.space, range: next.range.first().page_range(), access: next.access })
}
