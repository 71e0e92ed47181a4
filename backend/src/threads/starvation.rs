//! Whether an engine that was asked to leave its job got processor time for that. On a busy host a runnable thread may
//! wait for longer than a drain may take without being stuck; revoking memory then would take the device from its guest
//! for nothing. Knows the kernel's view of threads; knows nothing of jobs.

use std::cell::RefCell;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::io::{ReadWriteFlags, preadv2};

/// Processor time that is ample for an engine to reach the end of any step.
const ENOUGH: Duration = Duration::from_millis(5);
/// How long starvation excuses an engine: after this the VM has stood still for too long, whatever the reason.
const PATIENCE: Duration = Duration::from_secs(2);

/// What the kernel says of a thread, which stays open: in the sandbox no file can be opened.
#[derive(Debug)]
struct ThreadFiles {
    /// /proc/PID/task/TID/stat.
    stat: File,
    /// Its processor time (pthread_getcpuclockid(3)).
    clock: libc::clockid_t,
}

thread_local! {
    static THIS_THREAD: RefCell<Option<Arc<ThreadFiles>>> = const { RefCell::new(None) };
}

/// Opens what the kernel says of this thread. Called before the thread enters the sandbox. If the kernel does not say, the
/// thread never starves.
pub(crate) fn know_this_thread() {
    THIS_THREAD.set(ThreadFiles::of_this_thread());
}

impl ThreadFiles {
    fn of_this_thread() -> Option<Arc<Self>> {
        let stat = File::open("/proc/thread-self/stat").ok()?;
        let mut clock = 0;
        // SAFETY: pthread_self does not access memory.
        let this = unsafe { libc::pthread_self() };
        // SAFETY: the thread is this one, and `clock` is valid for writes.
        let error = unsafe { libc::pthread_getcpuclockid(this, &raw mut clock) };
        (error == 0).then(|| Arc::new(Self { stat, clock }))
    }

    fn is_runnable(&self) -> bool {
        // The state follows the thread's name, which has at most 15 characters, of any kind.
        let mut start = [0; 64];
        let mut into = [IoSliceMut::new(&mut start)];
        let read = preadv2(&self.stat, &mut into, 0, ReadWriteFlags::empty()).unwrap_or(0);
        let state = start.get(..read).and_then(|text| text.rsplit(|&byte| byte == b')').next());
        state.is_some_and(|state| state.trim_ascii_start().starts_with(b"R"))
    }

    fn spent(&self) -> Duration {
        let mut time = MaybeUninit::<libc::timespec>::zeroed();
        // SAFETY: `time` is valid for writes. The clock is that of a thread of this process; a wrong one is an error.
        let result = unsafe { libc::clock_gettime(self.clock, time.as_mut_ptr()) };
        // SAFETY: all zeroes are a valid time.
        let time = unsafe { time.assume_init() };
        let whole = u64::try_from(time.tv_sec).ok().filter(|_| result == 0);
        Duration::new(whole.unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
    }
}

/// Which thread an engine is, which the thread itself stores.
#[derive(Clone, Debug, Default)]
pub struct ThreadName(Arc<OnceLock<Arc<ThreadFiles>>>);

impl ThreadName {
    /// Called on the thread itself, once.
    pub fn is_this_thread(&self) {
        let known = THIS_THREAD.with_borrow(Option::clone);
        if let Some(files) = known {
            let _ = self.0.set(files);
        }
    }

    /// Processor time so far, if the thread is runnable. None: it sleeps, has not started, or the kernel does not say.
    fn runnable(&self) -> Option<Duration> {
        self.0.get().filter(|thread| thread.is_runnable()).map(|thread| thread.spent())
    }

    fn spent(&self) -> Duration {
        self.0.get().map_or(Duration::ZERO, |thread| thread.spent())
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
    use std::sync::atomic::{AtomicI32, Ordering};

    use super::*;

    /// Runs `body` on another thread and returns whether that thread starved, judged by its processor time.
    fn starves_while(body: impl FnOnce() + Send + 'static, until: impl Fn(Duration) -> bool) -> bool {
        let name = ThreadName::default();
        let theirs = name.clone();
        let thread = std::thread::spawn(move || {
            know_this_thread();
            theirs.is_this_thread();
            body();
        });
        while name.0.get().is_none() {
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
        know_this_thread();
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
