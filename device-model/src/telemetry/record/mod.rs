//! The flight recorder: the last events of the device, always on, in bounded memory. Each producer has its own track, a
//! ring of packed events that only it writes, without a lock and without waiting; a reader takes a snapshot
//! concurrently. Events are values of one table ([`event`]), packed by [`pack`]; the ring is [`track`]. Time is a
//! parameter. Knows nothing of threads, nor of what a snapshot is for ([`super::names`] adds names to it).

pub mod event;
mod pack;
mod track;

pub use event::{Event, LeftFor, MissEnd, StepEnd, UpdateUse};
pub use pack::Nanoseconds;
pub use track::{Recorded, Snapshot, TrackWriter};

use std::sync::Arc;

use self::track::Track;

/// Events that all tracks together hold.
pub const EVENTS: u64 = 64 << 10;

/// All tracks.
#[derive(Debug)]
pub struct Recorder {
    tracks: Vec<Arc<Track>>,
}

impl Recorder {
    /// A recorder with a track for each of these producers; they share [`EVENTS`] evenly. Memory is allocated when
    /// events are recorded.
    pub fn new(producers: impl IntoIterator<Item = String>) -> Self {
        let names: Vec<String> = producers.into_iter().collect();
        let each = EVENTS / (names.len().max(1) as u64).next_power_of_two();
        Self { tracks: names.into_iter().map(|name| Arc::new(Track::new(name, each))).collect() }
    }

    /// The right to write the track with this number: `None` while another producer has it.
    pub fn writer(&self, track: usize) -> Option<TrackWriter> {
        TrackWriter::take(self.tracks.get(track)?)
    }

    /// The current contents of the tracks. Events that are being written or overwritten meanwhile are left out.
    pub fn snapshot(&self) -> Vec<Snapshot> {
        self.tracks.iter().map(|track| track.snapshot()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn all_tracks_together_keep_64_k_events_and_use_no_memory_before() {
        for producers in [1_usize, 4, 5, 8] {
            let recorder = Recorder::new((0..producers).map(|n| n.to_string()));
            let kept: u64 = recorder.tracks.iter().map(|track| track.capacity()).sum();
            assert!(kept <= EVENTS && kept > EVENTS / 2, "{kept}");
            assert_eq!(recorder.tracks.iter().map(|track| track.chunks()).sum::<usize>(), 0);
            recorder.writer(0).unwrap().record(Duration::ZERO, Event::Reset {});
            assert_eq!(recorder.tracks.iter().map(|track| track.chunks()).sum::<usize>(), 1);
        }
    }

    #[test]
    fn a_track_has_one_writer_at_a_time_and_goes_on_with_the_next() {
        let recorder = Recorder::new(["a".to_owned(), "b".to_owned()]);
        let first = recorder.writer(0).unwrap();
        assert!(recorder.writer(0).is_none() && recorder.writer(1).is_some() && recorder.writer(2).is_none());
        first.record(Duration::from_nanos(1), Event::Start {});
        drop(first);
        recorder.writer(0).unwrap().record(Duration::from_nanos(2), Event::Stop {});
        let [track, _] = recorder.snapshot().try_into().unwrap();
        let events: Vec<_> = track.events.iter().map(|event| (event.number, event.event)).collect();
        assert_eq!(events, [(0, Event::Start {}), (1, Event::Stop {})]);
    }
}
