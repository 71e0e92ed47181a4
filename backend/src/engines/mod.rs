//! The engine threads: [`engine`] steps the jobs that [`device_model::jobs::scheduler`] hands out. This module owns the
//! threads.

pub mod engine;

use std::io;
use std::sync::Arc;

use device_model::jobs::scheduler::Scheduler;

use self::engine::Engine;
use crate::threads::pool::engine_name;
use crate::threads::{DeviceThread, ThreadFailures};

/// The running engines. Dropping them discards all jobs and waits until each thread has ended at its next step.
pub struct Engines {
    scheduler: Arc<Scheduler>,
    failures: ThreadFailures,
    threads: Vec<DeviceThread>,
}

impl Engines {
    /// An empty set of engines for this scheduler's jobs.
    pub fn new(scheduler: Arc<Scheduler>, failures: ThreadFailures) -> Self {
        Self { scheduler, failures, threads: Vec::new() }
    }

    /// Starts another engine.
    pub fn start(&mut self, engine: Engine) -> io::Result<()> {
        let name = engine_name(self.threads.len());
        self.threads.push(engine.spawn(&name, &self.failures)?);
        Ok(())
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        self.scheduler.pause();
        self.scheduler.discard();
        self.scheduler.close();
        // The fields join the threads when they are dropped.
    }
}
