//! Fault injection into answers that complete a fence: they are delayed, dropped, repeated or reordered. While no fault
//! is turned on, answers pass at once.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::ring::Pending;
use crate::fault_injection::{Bug, Injection};

/// How long an answer that is to be overtaken waits for the next one.
const PATIENCE: Duration = Duration::from_millis(20);

/// Offsets of a header's fields (virtio 1.3, 5.7.6.7).
const FLAGS: usize = 4;
const FENCE: u8 = 1;
const CONTEXT_AND_RING: std::ops::Range<usize> = 16..21;

/// An answer with the command that it is for.
type Answer = (Pending, Vec<u8>);

/// Answers that are held back.
#[derive(Default)]
pub(super) struct Held {
    late: VecDeque<(Instant, Answer)>,
    /// Waits for the next answer of its timeline, and goes out after it.
    overtaken: Option<(Instant, Answer)>,
}

impl Held {
    /// Takes an answer; appends the answers that are due now to `out`, in order.
    pub(super) fn pass(&mut self, injection: &Injection, answer: Answer, out: &mut Vec<Answer>) {
        let Some(timeline) = timeline(&answer.1) else { return out.push(answer) };
        if injection.fires(Bug::LoseFence) {
            return;
        }
        if injection.fires(Bug::RepeatFence) {
            out.push((answer.0.again(), answer.1.clone()));
        }
        let now = Instant::now();
        let first = self.overtaken.take().map(|(_, first)| first);
        match first {
            Some(first) if self::timeline(&first.1) == Some(timeline) => {
                injection.fires(Bug::ReorderFence);
                return out.extend([answer, first]);
            }
            other => out.extend(other),
        }
        if injection.is_on(Bug::ReorderFence) {
            self.overtaken = Some((now + PATIENCE, answer));
            return;
        }
        let delay = injection.delay(Bug::DelayFence);
        let behind = self.late.back().map(|(due, _)| *due);
        if delay.is_none() && behind.is_none() {
            return out.push(answer);
        }
        let due = now + delay.unwrap_or_default();
        self.late.push_back((behind.map_or(due, |behind| due.max(behind)), answer));
    }

    /// Appends the held answers that are due to `out`.
    pub(super) fn release(&mut self, out: &mut Vec<Answer>) {
        if self.next_due().is_none() {
            return;
        }
        let now = Instant::now();
        out.extend(self.overtaken.take_if(|(due, _)| *due <= now).map(|(_, answer)| answer));
        let due = self.late.partition_point(|(due, _)| *due <= now);
        out.extend(self.late.drain(..due).map(|(_, answer)| answer));
    }

    /// When the next held answer is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        [self.overtaken.as_ref(), self.late.front()].into_iter().flatten().map(|(due, _)| *due).min()
    }

    /// Drops the held answers: their commands no longer exist.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// The timeline of the fence that an answer completes; `None` if it completes none.
fn timeline(response: &[u8]) -> Option<[u8; 6]> {
    let flags = *response.get(FLAGS)?;
    if flags & FENCE == 0 {
        return None;
    }
    let mut timeline = [flags; 6];
    // Without a ring, there is one timeline for all contexts.
    if flags & !FENCE == 0 {
        return Some([0; 6]);
    }
    timeline[..5].copy_from_slice(response.get(CONTEXT_AND_RING)?);
    Some(timeline)
}
