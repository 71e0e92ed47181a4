//! The engine threads: [`engine`] steps the jobs that [`device_model::jobs::scheduler`] hands out, [`starvation`] tells an
//! engine that is stuck from one that the host does not schedule. Here is what owns the threads.

pub mod engine;
pub(crate) mod starvation;

use std::io;
use std::sync::Arc;

use device_model::jobs::scheduler::Scheduler;

use self::engine::Engine;
use crate::threads::{DeviceThread, ThreadFailures};

/// The running engines. Dropping them discards all jobs, ends the threads at their next step and waits for that.
pub struct Engines {
    scheduler: Arc<Scheduler>,
    failures: ThreadFailures,
    threads: Vec<DeviceThread>,
}

impl Engines {
    /// No engines yet, for the jobs of this scheduler.
    pub fn new(scheduler: Arc<Scheduler>, failures: ThreadFailures) -> Self {
        Self { scheduler, failures, threads: Vec::new() }
    }

    /// Starts one more.
    pub fn start(&mut self, engine: Engine) -> io::Result<()> {
        let name = format!("engine-{}", self.threads.len());
        self.threads.push(engine.spawn(&name, &self.failures)?);
        Ok(())
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        self.scheduler.pause();
        self.scheduler.discard();
        self.scheduler.close();
        // The threads are waited for when the fields are dropped.
    }
}
