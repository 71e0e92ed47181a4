//! What the kernel says of a thread's turns on the processors, so that a test on a busy host can tell what took time from
//! what was kept waiting (linux: Documentation/scheduler/sched-stats.rst). Knows nothing of what the thread does.

use std::fs;
use std::time::Duration;

use super::error::{Error, Result};

/// The turns of a thread so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turns {
    /// For how long it has run.
    pub ran: Duration,
    /// For how long it could have run, and another did. A wait that is not over is not in it.
    pub waited: Duration,
}

impl Turns {
    /// Those of a thread of a process.
    pub fn of(process: u32, thread: u32) -> Result<Self> {
        Self::read(&format!("/proc/{process}/task/{thread}/schedstat"))
    }

    /// Those of the calling thread.
    pub fn of_this_thread() -> Result<Self> {
        Self::read("/proc/thread-self/schedstat")
    }

    fn read(path: &str) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io(format!("read {path}")))?;
        let mut numbers = text.split_whitespace().map(|number| number.parse().map(Duration::from_nanos));
        match (numbers.next(), numbers.next()) {
            (Some(Ok(ran)), Some(Ok(waited))) => Ok(Self { ran, waited }),
            _ => Err(Error::Reply { message: "schedstat", got: text }),
        }
    }

    /// The turns since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self { ran: self.ran.saturating_sub(earlier.ran), waited: self.waited.saturating_sub(earlier.waited) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_thread_that_computes_runs_or_waits_all_the_time_and_one_that_sleeps_does_neither() {
        // The kernel accounts at each tick, so a reading is up to a tick old: begin at an update, and at a time before it.
        let (mut begin, first) = (Instant::now(), Turns::of_this_thread().unwrap());
        let before = loop {
            let looked = Instant::now();
            let turns = Turns::of_this_thread().unwrap();
            if turns.ran != first.ran {
                break turns;
            }
            begin = looked;
        };
        let mut turns = Turns::of_this_thread().unwrap().since(before);
        while turns.ran < Duration::from_millis(20) {
            turns = Turns::of_this_thread().unwrap().since(before);
        }
        // The scheduler's clock and the monotonic one may drift apart by 500 ppm.
        let elapsed = begin.elapsed() + Duration::from_millis(1);
        assert!(turns.ran + turns.waited <= elapsed, "{turns:?} within {elapsed:?}");
        let before = Turns::of_this_thread().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let slept = Turns::of_this_thread().unwrap().since(before);
        assert!(slept.ran < Duration::from_millis(40), "{slept:?}");
    }
}
