//! A storm: jobs in flight while memory comes and goes beside them. Knows the order; what a job is, and what comes and
//! goes, is a driver's business.

use crate::error::AgentError;
use std::collections::VecDeque;

/// Jobs that are in flight at the same time.
const DEPTH: usize = 4;
/// Times that memory comes and goes beside a job, at the most: one that does not end is to be noticed.
const CHURNS_PER_JOB: u32 = 1_000;

/// What a driver has to be able to do.
pub(crate) trait Driver {
    /// A job in flight.
    type InFlight;

    /// Submits the next job.
    fn submit_next(&mut self) -> Result<Self::InFlight, AgentError>;
    /// Whether a job has ended.
    fn has_ended(&mut self, job: &Self::InFlight) -> Result<bool, AgentError>;
    /// Waits until a job has ended, and well.
    fn end(&mut self, job: Self::InFlight) -> Result<(), AgentError>;
    /// Lets memory that no job uses come and go.
    fn churn(&mut self) -> Result<(), AgentError>;
}

/// Runs so many jobs, all beside memory that comes and goes.
pub(crate) fn run<D: Driver>(driver: &mut D, jobs: u32) -> Result<(), AgentError> {
    let mut in_flight = VecDeque::new();
    for _ in 0..jobs {
        in_flight.push_back(driver.submit_next()?);
        if in_flight.len() == DEPTH {
            churn_until_first_ends(driver, &mut in_flight)?;
        }
    }
    while !in_flight.is_empty() {
        churn_until_first_ends(driver, &mut in_flight)?;
    }
    Ok(())
}

fn churn_until_first_ends<D: Driver>(
    driver: &mut D,
    in_flight: &mut VecDeque<D::InFlight>,
) -> Result<(), AgentError> {
    let Some(first) = in_flight.pop_front() else { return Ok(()) };
    for _ in 0..CHURNS_PER_JOB {
        driver.churn()?;
        if driver.has_ended(&first)? {
            break;
        }
    }
    driver.end(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Jobs end when memory has come and gone twice since.
    #[derive(Default)]
    struct Fake {
        submitted: u32,
        churned: u32,
        most_in_flight: u32,
        ended: Vec<u32>,
    }

    impl Driver for Fake {
        type InFlight = (u32, u32);

        fn submit_next(&mut self) -> Result<(u32, u32), AgentError> {
            self.submitted += 1;
            self.most_in_flight = self.most_in_flight.max(self.submitted - self.ended.len() as u32);
            Ok((self.submitted, self.churned + 2))
        }

        fn has_ended(&mut self, job: &(u32, u32)) -> Result<bool, AgentError> {
            Ok(self.churned >= job.1)
        }

        fn end(&mut self, job: (u32, u32)) -> Result<(), AgentError> {
            self.ended.push(job.0);
            Ok(())
        }

        fn churn(&mut self) -> Result<(), AgentError> {
            self.churned += 1;
            Ok(())
        }
    }

    #[test]
    fn every_job_ends_in_order_beside_memory_that_comes_and_goes() {
        let mut fake = Fake::default();
        run(&mut fake, 6).unwrap();
        assert_eq!((fake.ended, fake.most_in_flight), (vec![1, 2, 3, 4, 5, 6], DEPTH as u32));
        assert!(fake.churned >= 6);
    }
}
