//! What an INVALIDATE meant: before it, what it takes from jobs is noted; each answer to a MISS says what is there now;
//! what a driver did wrong is recorded and printed. Who is suspected and why, [`device_model::jobs::schedule`] knows.

use std::collections::VecDeque;
use std::time::Duration;

use device_model::addr::{ByteRange, Iova, SpaceId};
use device_model::jobs::job::JobId;
use device_model::jobs::schedule::{Judgement, Revealed, mapped_of};
use device_model::mmu::miss::Resolution;
use device_model::telemetry::record::Event;
use device_model::telemetry::violation::{Confidence, InvalidationInfo, Verdict, Violation};
use job_stream::Mode;

use super::state::SessionState;
use device_model::session::miss_port::Waiter;

/// How many acks are remembered.
const ACKS: usize = 64;

/// The INVALIDATE messages of a connection.
#[derive(Debug, Default)]
pub struct TakenAway {
    /// How many there were.
    count: u64,
    /// When the newest were acked.
    acks: VecDeque<(u64, Duration)>,
}

impl TakenAway {
    /// The number of the last one, counted from 1.
    pub(super) fn number(&self) -> u64 {
        self.count
    }

    fn acked(&self, number: u64) -> Option<Duration> {
        self.acks.iter().find(|(acked, _)| *acked == number).map(|(_, at)| *at)
    }
}

impl SessionState {
    /// An INVALIDATE of this range has come: what it takes away from jobs is noted, to be compared with what is found
    /// there when it is next asked for.
    pub(super) fn suspect(&mut self, range: ByteRange<Iova>) {
        self.taken.count = self.taken.count.saturating_add(1);
        let (number, begun) = (self.taken.count, self.scheduler.now());
        self.sink.record_at(begun, Event::Invalidation { number, range });
        let judged = self.scheduler.judged(SpaceId::DEVICE, range.page_aligned());
        if !judged.is_empty() {
            let mapped = mapped_of(&self.mirror, SpaceId::DEVICE, &judged);
            self.scheduler.suspect(InvalidationInfo { number, range, begun, acked: None }, &mapped);
        }
        self.stats.unjudged.add(self.scheduler.take_unjudged());
    }

    /// The last INVALIDATE is acked now.
    pub(super) fn acked(&mut self, now: Duration) {
        if self.taken.acks.len() >= ACKS {
            self.taken.acks.pop_front();
        }
        self.taken.acks.push_back((self.taken.count, now));
    }

    /// What an answer says of what was taken away under jobs.
    pub(super) fn judge(&mut self, resolution: &Resolution<Waiter>) {
        let Some(revealed) = Revealed::by(resolution) else { return };
        let asked: Vec<JobId> = resolution.waiters.iter().filter_map(|waiter| waiter.job()).collect();
        for judgement in self.scheduler.reveal(&revealed, &asked) {
            self.stats.verdicts.count(judgement.mode, judgement.verdict, judgement.confidence);
            if is_violation(&judgement) {
                self.report(&judgement);
            }
        }
    }

    fn report(&self, judgement: &Judgement) {
        let Judgement { verdict, confidence, job, context, packet, mode, range, access, .. } = *judgement;
        let invalidation = InvalidationInfo { acked: self.taken.acked(judgement.by.number), ..judgement.by };
        let at = self.scheduler.now();
        let violation = Violation {
            id: 0,
            at,
            verdict,
            confidence,
            mode,
            job,
            context,
            packet,
            range,
            access,
            invalidation,
        };
        // Written and printed elsewhere: this thread has the front-end to serve.
        self.sink.instruments().violation(violation);
    }
}

/// In fault mode the guest may take away what it likes, and of what cannot be told nobody is accused. A job and an
/// INVALIDATE make one violation, however many pages they share.
fn is_violation(judgement: &Judgement) -> bool {
    judgement.is_first
        && judgement.verdict != Verdict::Benign
        && judgement.confidence != Confidence::CannotTell
        && judgement.mode != Mode::Fault
}
