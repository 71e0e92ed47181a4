//! An audit: every translation that the mirror holds is asked for again, and what no longer holds is reported. That is
//! an *under-invalidation*: the guest changed a mapping and did not say so. At a bounded rate, and beside everything
//! else. A state machine of values; time is a parameter. Knows nothing of sockets, nor of who is told.
//!
//! A refusal alone is no finding: a guest in lazy mode takes a mapping away up to 10 ms before it says so. So a finding
//! is *suspected* first, and stands only if no INVALIDATE of the page comes for [`GRACE`].

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use crate::addr::{Access, ByteRange, Iova, PAGE_SIZE, SpaceId};
use crate::mmu::MappedRange;
use crate::mmu::miss::{MissRequest, Outcome};

/// How long the guest may take to say what it has changed.
pub const GRACE: Duration = Duration::from_millis(200);
/// Pages that are asked for at once, and how often so many more.
const BATCH: usize = 16;
const PAUSE: Duration = Duration::from_millis(1);
/// Findings that are listed; more are counted.
pub const FINDINGS: usize = 256;

/// What was found instead of a translation that the mirror holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stale {
    /// The front-end refuses the page.
    Gone,
    /// Another page is there.
    Moved,
}

/// A translation that no longer holds, and whose end nobody told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The pages.
    pub range: ByteRange<Iova>,
    /// What for.
    pub access: Access,
    /// What is there instead.
    pub stale: Stale,
}

/// How an audit is getting on, or how it ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Translations that were asked for: pages, or larger stretches that one answer covered, each for each access.
    pub checked: u64,
    /// Translations that no longer hold.
    pub findings: Vec<Finding>,
    /// More of them, which are not listed.
    pub more: u64,
    /// Questions that were not answered in time, or not with what was asked.
    pub unanswered: u64,
    /// It did not come to its end: the device was stopped, or the front-end is gone.
    pub interrupted: bool,
}

/// A stretch of the mirror that is being asked for, page after page.
#[derive(Clone, Copy, Debug)]
struct Walk {
    rest: ByteRange<Iova>,
    /// Where the first byte of the rest is, as the mirror has it.
    host: u64,
    access: Access,
}

impl Walk {
    /// What is left behind `covered` bytes.
    fn after(self, covered: u64) -> Option<Self> {
        let first = self.rest.first().checked_add(covered)?;
        let rest = ByteRange::inclusive(first, self.rest.last())?;
        Some(Self { rest, host: self.host.checked_add(covered)?, ..self })
    }

    /// What is left of it around `range`.
    fn without(self, range: ByteRange<Iova>) -> impl Iterator<Item = Self> {
        let Some(common) = self.rest.intersection(range) else {
            return [Some(self), None].into_iter().flatten();
        };
        let before = common.first().raw().checked_sub(1).map(Iova::new);
        let before = before.and_then(|last| ByteRange::inclusive(self.rest.first(), last));
        let before = before.map(|rest| Self { rest, ..self });
        let covered = common.last().raw().saturating_sub(self.rest.first().raw()).checked_add(1);
        [before, covered.and_then(|covered| self.after(covered))].into_iter().flatten()
    }
}

/// A finding that is not yet sure.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    finding: Finding,
    since: Duration,
}

/// An audit under way.
#[derive(Debug)]
pub struct Audit {
    /// Where the list of the mirror goes on; `None`: all of it was listed.
    cursor: Option<Iova>,
    waiting: VecDeque<Walk>,
    /// Asked and not answered, by number.
    asked: BTreeMap<u32, Walk>,
    next: u32,
    suspects: Vec<Suspect>,
    /// When more may be asked.
    pause: Duration,
    report: AuditReport,
}

impl Audit {
    /// An audit that begins now.
    pub fn begin(now: Duration) -> Self {
        Self {
            cursor: Some(Iova::new(0)),
            waiting: VecDeque::new(),
            asked: BTreeMap::new(),
            next: 0,
            suspects: Vec::new(),
            pause: now,
            report: AuditReport::default(),
        }
    }

    /// From where on it wants to know what the mirror holds; `None`: it has enough for now. (See [`Self::listed`].)
    pub fn wants(&self, now: Duration) -> Option<Iova> {
        self.cursor.filter(|_| self.waiting.len() < BATCH && self.may_ask(now))
    }

    /// What the mirror holds there, and from where on more is to be listed.
    pub fn listed(&mut self, ranges: impl IntoIterator<Item = MappedRange>, next: Option<Iova>) {
        for MappedRange { range, host, permissions, .. } in ranges {
            let accesses = [(Access::Read, permissions.read), (Access::Write, permissions.write)];
            let walks = accesses.into_iter().filter(|(_, proved)| *proved);
            self.waiting.extend(walks.map(|(access, _)| Walk { rest: range, host, access }));
        }
        self.cursor = next;
    }

    fn may_ask(&self, now: Duration) -> bool {
        self.pause <= now && self.asked.is_empty()
    }

    /// What is to be asked now; each with the number to answer it by.
    pub fn questions(&mut self, now: Duration) -> Vec<(u32, MissRequest)> {
        if !self.may_ask(now) {
            return Vec::new();
        }
        let count = self.waiting.len().min(BATCH);
        let mut questions = Vec::new();
        for walk in self.waiting.drain(..count) {
            let number = self.next;
            self.next = self.next.wrapping_add(1);
            self.asked.insert(number, walk);
            let (space, access) = (SpaceId::DEVICE, walk.access);
            questions.push((number, MissRequest { space, access, iova: walk.rest.first() }));
        }
        if !questions.is_empty() {
            self.pause = now.saturating_add(PAUSE);
        }
        questions
    }

    /// A question could not be asked: it comes again.
    pub fn not_asked(&mut self, number: u32) {
        self.waiting.extend(self.asked.remove(&number));
    }

    /// The answer to a question.
    pub fn answered(&mut self, now: Duration, number: u32, outcome: &Outcome) {
        let Some(walk) = self.asked.remove(&number) else { return };
        self.report.checked = self.report.checked.saturating_add(1);
        let mut covered = PAGE_SIZE;
        match outcome {
            Outcome::NotCovered | Outcome::TimedOut | Outcome::NoChannel => {
                self.report.unanswered = self.report.unanswered.saturating_add(1)
            }
            Outcome::Refused => self.suspect(now, walk, Stale::Gone),
            Outcome::Mapped { range, host, .. } => {
                let first = walk.rest.first();
                let within = first.raw().saturating_sub(range.first().raw());
                if host.address().checked_add(within) == Some(walk.host) {
                    // Both are contiguous: what the answer covers of the stretch is as it was.
                    let more = range.last().raw().saturating_sub(first.raw());
                    covered = more.checked_add(1).unwrap_or(more).max(PAGE_SIZE);
                } else {
                    self.suspect(now, walk, Stale::Moved);
                }
            }
        }
        self.waiting.extend(walk.after(covered));
    }

    fn suspect(&mut self, now: Duration, walk: Walk, stale: Stale) {
        if let Ok(range) = ByteRange::new(walk.rest.first(), PAGE_SIZE)
            && self.suspects.len() < FINDINGS.saturating_mul(16)
        {
            let finding = Finding { range, access: walk.access, stale };
            self.suspects.push(Suspect { finding, since: now });
        }
    }

    /// The guest took a range away, as it should: nothing that is known of it is stale.
    pub fn invalidated(&mut self, range: ByteRange<Iova>) {
        self.suspects.retain(|suspect| !suspect.finding.range.overlaps(range));
        let walks = std::mem::take(&mut self.waiting).into_iter();
        self.waiting = walks.chain(self.take_asked(range)).flat_map(|walk| walk.without(range)).collect();
    }

    /// Takes back the questions whose answers would be about something else by now.
    fn take_asked(&mut self, range: ByteRange<Iova>) -> Vec<Walk> {
        let asked = std::mem::take(&mut self.asked).into_iter();
        let (hit, kept): (Vec<_>, Vec<_>) = asked.partition(|(_, walk)| walk.rest.overlaps(range));
        self.asked = kept.into_iter().collect();
        hit.into_iter().map(|(_, walk)| walk).collect()
    }

    /// Makes findings of what was suspected long enough ago.
    fn settle(&mut self, now: Duration) {
        let ripe = |suspect: &mut Suspect| suspect.since.saturating_add(GRACE) <= now;
        for suspect in self.suspects.extract_if(.., ripe) {
            if self.report.findings.len() < FINDINGS {
                self.report.findings.push(suspect.finding);
            } else {
                self.report.more = self.report.more.saturating_add(1);
            }
        }
    }

    /// When to come back, if nothing else happens before.
    pub fn deadline(&self) -> Option<Duration> {
        let asks = (self.asked.is_empty() && (self.cursor.is_some() || !self.waiting.is_empty()))
            .then_some(self.pause);
        let ripe = self.suspects.iter().map(|suspect| suspect.since.saturating_add(GRACE)).min();
        asks.into_iter().chain(ripe).min()
    }

    /// How far it is.
    pub fn report(&self) -> &AuditReport {
        &self.report
    }

    /// Its result, if it is at its end.
    pub fn finished(&mut self, now: Duration) -> Option<AuditReport> {
        self.settle(now);
        let done = self.cursor.is_none()
            && self.waiting.is_empty()
            && self.asked.is_empty()
            && self.suspects.is_empty();
        done.then(|| std::mem::take(&mut self.report))
    }

    /// It cannot go on: what it has found so far.
    pub fn interrupt(mut self, now: Duration) -> AuditReport {
        self.settle(now);
        AuditReport { interrupted: true, ..self.report }
    }
}

#[cfg(test)]
mod tests;
