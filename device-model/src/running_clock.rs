//! A clock that stands still while something is paused: for limits that are of no account to whoever cannot help being
//! late. A value; the time that it is set by is a parameter. Knows nothing of what pauses it.

use std::time::Duration;

/// How long something has been running.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RunningClock {
    /// Since when it stands still, if it does.
    paused_since: Option<Duration>,
    /// For how long it stood still before that.
    paused: Duration,
}

/// In a word: it stands still. The other bits are the time at which it does, else for how long it stood still.
const STANDS_STILL: u64 = 1 << 63;

impl RunningClock {
    /// A clock that stands still at 0, until it is resumed.
    pub(crate) fn paused() -> Self {
        Self { paused_since: Some(Duration::ZERO), paused: Duration::ZERO }
    }

    /// What it shows at `now`.
    pub(crate) fn running(&self, now: Duration) -> Duration {
        self.paused_since.unwrap_or(now).saturating_sub(self.paused)
    }

    /// At what time it will show `running`; `None` while it stands still.
    pub(crate) fn when(&self, running: Duration) -> Option<Duration> {
        self.paused_since.is_none().then(|| running.saturating_add(self.paused))
    }

    /// It stands still from now on.
    pub(crate) fn pause(&mut self, now: Duration) {
        self.paused_since.get_or_insert(now);
    }

    /// It goes on.
    pub(crate) fn resume(&mut self, now: Duration) {
        if let Some(since) = self.paused_since.take() {
            self.paused = self.paused.saturating_add(now.saturating_sub(since));
        }
    }

    /// The same in one word, for threads that read it without a lock.
    pub(crate) fn word(&self) -> u64 {
        match self.paused_since {
            Some(since) => STANDS_STILL | nanoseconds(since.saturating_sub(self.paused)),
            None => nanoseconds(self.paused),
        }
    }

    /// What the clock of which this is the word shows at `now`.
    pub(crate) fn running_by(word: u64, now: Duration) -> Duration {
        let time = Duration::from_nanos(word & !STANDS_STILL);
        if word & STANDS_STILL == 0 { now.saturating_sub(time) } else { time }
    }
}

/// Enough for 292 years.
fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX) & !STANDS_STILL
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_shows_the_time_without_the_pauses_and_its_word_shows_the_same() {
        let ms = Duration::from_millis;
        let mut clock = RunningClock::paused();
        let shows = |clock: &RunningClock, now, running| {
            assert_eq!(clock.running(ms(now)), ms(running));
            assert_eq!(RunningClock::running_by(clock.word(), ms(now)), ms(running));
        };
        shows(&clock, 30, 0);
        assert_eq!(clock.when(ms(5)), None);
        clock.resume(ms(100));
        shows(&clock, 107, 7);
        assert_eq!(clock.when(ms(10)), Some(ms(110)));
        clock.pause(ms(110));
        clock.pause(ms(500));
        shows(&clock, 700, 10);
        clock.resume(ms(1000));
        clock.resume(ms(1010));
        shows(&clock, 1020, 30);
        assert_eq!(clock.when(ms(31)), Some(ms(1021)));
    }
}
