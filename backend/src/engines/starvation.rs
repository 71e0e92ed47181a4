//! Whether an engine that was told to leave got a processor for that. On a busy host a thread that could run may wait for
//! its turn for longer than any drain bears, and is not stuck for that: its guest would lose the device for nothing.
//! Knows the kernel's view of threads; knows nothing of jobs.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

/// Processor time in which an engine reaches the end of any step, many times over.
const ENOUGH: Duration = Duration::from_millis(5);
/// How long a host may starve an engine: beyond this, whatever the reason, the VM has stood still for too long.
const PATIENCE: Duration = Duration::from_secs(2);

/// A thread that says itself who it is.
#[derive(Clone, Debug, Default)]
pub struct ThreadName(Arc<AtomicI32>);

impl ThreadName {
    /// Called on the thread itself, once.
    pub fn is_this_thread(&self) {
        // ORDERING: a number by itself.
        self.0.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
    }

    /// Processor time so far, if the thread could run now. None: it sleeps, has not started, or the kernel does not say.
    fn runnable(&self) -> Option<Duration> {
        let directory = format!("/proc/self/task/{}", self.0.load(Ordering::Relaxed));
        let stat = fs::read_to_string(format!("{directory}/stat")).ok()?;
        // The state follows the name, which may hold anything.
        if !stat.rsplit_once(')')?.1.trim_start().starts_with('R') {
            return None;
        }
        let times = fs::read_to_string(format!("{directory}/schedstat")).ok()?;
        times.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
    }

    fn spent(&self) -> Duration {
        let file = format!("/proc/self/task/{}/schedstat", self.0.load(Ordering::Relaxed));
        let times = fs::read_to_string(file).unwrap_or_default();
        let spent = times.split_whitespace().next().and_then(|spent| spent.parse().ok());
        Duration::from_nanos(spent.unwrap_or(0))
    }
}

/// The engines' turns on the processors since they were told to leave.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    engines: Vec<ThreadName>,
    /// When they were told, and the processor time that each had had.
    told: Option<(Duration, Vec<Duration>)>,
}

impl Turns {
    /// Of these engines.
    pub(crate) fn new(engines: Vec<ThreadName>) -> Self {
        Self { engines, told: None }
    }

    /// The engines are told to leave.
    pub(crate) fn told(&mut self, now: Duration) {
        self.told = Some((now, self.engines.iter().map(ThreadName::spent).collect()));
    }

    /// Whether an engine could run, and has hardly been let since it was told to leave.
    pub(crate) fn starve(&self, now: Duration) -> bool {
        let Some((at, before)) = &self.told else { return false };
        let starves = |(engine, before): (&ThreadName, &Duration)| {
            engine.runnable().is_some_and(|spent| spent.saturating_sub(*before) < ENOUGH)
        };
        now.saturating_sub(*at) < PATIENCE && self.engines.iter().zip(before).any(starves)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `body` on another thread and says whether that thread starved, by what it was seen to have done.
    fn starves_while(body: impl FnOnce() + Send + 'static, until: impl Fn(Duration) -> bool) -> bool {
        let name = ThreadName::default();
        let theirs = name.clone();
        let thread = std::thread::spawn(move || {
            theirs.is_this_thread();
            body();
        });
        while name.0.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        let mut turns = Turns::new(vec![name.clone()]);
        turns.told(Duration::ZERO);
        while !until(name.spent().saturating_sub(turns.told.as_ref().unwrap().1[0])) {
            std::thread::yield_now();
        }
        let starves = turns.starve(Duration::from_millis(1));
        thread.thread().unpark();
        thread.join().unwrap();
        starves
    }

    #[test]
    fn a_thread_that_runs_or_sleeps_does_not_starve() {
        let stop = Arc::new(AtomicI32::new(0));
        let theirs = Arc::clone(&stop);
        let busy = move || {
            while theirs.load(Ordering::Relaxed) == 0 {
                std::hint::spin_loop();
            }
        };
        let had_enough = move |spent| {
            let enough = spent >= 2 * ENOUGH;
            stop.store(i32::from(enough), Ordering::Relaxed);
            enough
        };
        assert!(!starves_while(busy, had_enough));
        assert!(!starves_while(std::thread::park, |_| true));
    }

    #[test]
    fn nobody_starves_before_being_told_nor_for_ever() {
        let name = ThreadName::default();
        name.is_this_thread();
        let mut turns = Turns::new(vec![name.clone()]);
        assert!(!turns.starve(Duration::ZERO));
        // This thread runs, and has had next to nothing since it was told.
        let told = Duration::from_secs(7);
        turns.told(told);
        assert!(turns.starve(told));
        assert!(!turns.starve(told + PATIENCE));
    }
}
