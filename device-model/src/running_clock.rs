//! A clock that stands still while something is paused: for timeouts that must not count such a pause. A value; the
//! time is a parameter. Knows nothing of what pauses it.

use std::time::Duration;

/// How long something has been running.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RunningClock {
    /// When the current pause began, if there is one.
    paused_since: Option<Duration>,
    /// The total length of earlier pauses.
    paused: Duration,
}

/// A flag of the word: the clock is paused. The other bits are then its reading, else the total length of pauses.
const STANDS_STILL: u64 = 1 << 63;

impl RunningClock {
    /// A clock that is paused at 0.
    pub(crate) fn paused() -> Self {
        Self { paused_since: Some(Duration::ZERO), paused: Duration::ZERO }
    }

    /// Its reading at `now`.
    pub(crate) fn running(&self, now: Duration) -> Duration {
        self.paused_since.unwrap_or(now).saturating_sub(self.paused)
    }

    /// When its reading will be `running`; `None` while it is paused.
    pub(crate) fn when(&self, running: Duration) -> Option<Duration> {
        self.paused_since.is_none().then(|| running.saturating_add(self.paused))
    }

    /// Pauses it.
    pub(crate) fn pause(&mut self, now: Duration) {
        self.paused_since.get_or_insert(now);
    }

    /// Resumes it.
    pub(crate) fn resume(&mut self, now: Duration) {
        if let Some(since) = self.paused_since.take() {
            self.paused = self.paused.saturating_add(now.saturating_sub(since));
        }
    }

    /// The clock in one word, for threads that read it without a lock.
    pub(crate) fn word(&self) -> u64 {
        match self.paused_since {
            Some(since) => STANDS_STILL | nanoseconds(since.saturating_sub(self.paused)),
            None => nanoseconds(self.paused),
        }
    }

    /// The reading at `now` of the clock with this word.
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
