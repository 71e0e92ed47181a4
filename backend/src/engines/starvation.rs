//! Whether an engine that was asked to leave its job got processor time for that. On a busy host a runnable thread may
//! wait for longer than a drain may take without being stuck; revoking memory then would take the device from its guest
//! for nothing. Knows the kernel's view of threads; knows nothing of jobs.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

/// Processor time that is ample for an engine to reach the end of any step.
const ENOUGH: Duration = Duration::from_millis(5);
/// How long starvation excuses an engine: after this the VM has stood still for too long, whatever the reason.
const PATIENCE: Duration = Duration::from_secs(2);

/// The kernel's id of a thread, which the thread itself stores.
#[derive(Clone, Debug, Default)]
pub struct ThreadName(Arc<AtomicI32>);

impl ThreadName {
    /// Called on the thread itself, once.
    pub fn is_this_thread(&self) {
        // ORDERING: Relaxed: the number orders nothing else.
        self.0.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
    }

    /// Processor time so far, if the thread is runnable. None: it sleeps, has not started, or the kernel does not say.
    fn runnable(&self) -> Option<Duration> {
        let directory = format!("/proc/self/task/{}", self.0.load(Ordering::Relaxed));
        let stat = fs::read_to_string(format!("{directory}/stat")).ok()?;
        // The state follows the thread's name, which may contain any character.
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

/// The engines' processor time since they were asked to leave their jobs.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    engines: Vec<ThreadName>,
    /// When they were asked, and each engine's processor time at that moment.
    told: Option<(Duration, Vec<Duration>)>,
}

impl Turns {
    /// For these engines.
    pub(crate) fn new(engines: Vec<ThreadName>) -> Self {
        Self { engines, told: None }
    }

    /// The engines are asked to leave their jobs.
    pub(crate) fn told(&mut self, now: Duration) {
        self.told = Some((now, self.engines.iter().map(ThreadName::spent).collect()));
    }

    /// Whether an engine is runnable, but has had hardly any processor time since it was asked to leave.
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

    /// Runs `body` on another thread and returns whether that thread starved, judged by its processor time.
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
        // This thread runs, and has had almost no processor time since then.
        let told = Duration::from_secs(7);
        turns.told(told);
        assert!(turns.starve(told));
        assert!(!turns.starve(told + PATIENCE));
    }
}
