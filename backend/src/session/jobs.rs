//! The session's access to the jobs: the scheduler that the engines share. `--inject` may withhold calls from it.

use std::sync::Arc;
use std::time::Duration;

use device_model::addr::{ByteRange, DomainId, Iova};
use device_model::jobs::job::JobId;
use device_model::jobs::schedule::{AtRest, JobVerdict, JobWait, Revealed};
use device_model::jobs::scheduler::Scheduler;
use device_model::jobs::verdict::InvalidationInfo;
use device_model::mmu::MappedRange;
use device_model::mmu::miss::MissRequest;
use device_model::session::Jobs;

use crate::fault_injection::{Bug, Injection};

/// The jobs of a device.
pub(super) struct DeviceJobs {
    scheduler: Arc<Scheduler>,
    injection: Arc<Injection>,
}

impl DeviceJobs {
    pub(super) fn new(scheduler: Arc<Scheduler>, injection: Arc<Injection>) -> Self {
        Self { scheduler, injection }
    }
}

impl Jobs for DeviceJobs {
    fn pause(&mut self, _now: Duration) {
        self.scheduler.pause();
    }

    fn resume(&mut self, _now: Duration) {
        self.scheduler.resume();
    }

    fn discard(&mut self) {
        if !self.injection.fires(Bug::KeepJobsOverReset) {
            self.scheduler.discard();
        }
    }

    fn invalidation_ended(&mut self) {
        self.scheduler.invalidation_ended();
    }

    fn touches(&mut self, space: DomainId, range: ByteRange<Iova>) -> bool {
        self.scheduler.touches(space, range)
    }

    fn first_in(&mut self, space: DomainId, range: ByteRange<Iova>) -> Option<JobId> {
        self.scheduler.first_in(space, range)
    }

    fn judged(&mut self, space: DomainId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        self.scheduler.judged(space, range)
    }

    fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]) {
        self.scheduler.suspect(by, mapped);
    }

    fn take_unjudged(&mut self) -> u64 {
        self.scheduler.take_unjudged()
    }

    fn reveal(&mut self, revealed: &Revealed, asked: &[JobId]) -> Vec<JobVerdict> {
        self.scheduler.reveal(revealed, asked)
    }

    fn forget_suspects(&mut self) {
        self.scheduler.forget_suspects();
    }

    fn waiting_job(&mut self, wait: JobWait, page: MissRequest) -> Option<AtRest> {
        self.scheduler.waiting_job(wait, page)
    }

    fn is_current(&mut self, wait: JobWait) -> bool {
        self.scheduler.is_current(wait)
    }
}
