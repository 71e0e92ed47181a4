//! An audit requests every translation in the mirror again, and reports those that no longer hold. That is an
//! *under-invalidation*: the guest changed a mapping and sent no INVALIDATE. An audit runs at a bounded rate beside all
//! other work. A state machine of values; time is a parameter. Knows nothing of sockets, nor of who gets the report.
//!
//! A refusal alone is no finding: in lazy mode, a guest unmaps up to 10 ms before it sends the INVALIDATE. So a finding
//! is *suspected* first, and reported only if no INVALIDATE of the page comes for [`GRACE`].

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use crate::mmu::MappedRange;
use crate::mmu::miss::{MissRequest, Outcome};

/// How late the INVALIDATE of a change may be.
pub const GRACE: Duration = Duration::from_millis(200);
/// Pages that are requested at once, and the pause before the next batch.
const BATCH: usize = 16;
const PAUSE: Duration = Duration::from_millis(1);
/// The most findings that are listed; more are only counted.
pub const FINDINGS: usize = 256;

/// What was found instead of a translation in the mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stale {
    /// The front-end refuses the page.
    Gone,
    /// Another page is mapped.
    Moved,
}

/// A translation that no longer holds, and that no INVALIDATE has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The pages.
    pub range: ByteRange<Iova>,
    /// The access.
    pub access: Access,
    /// What was found instead.
    pub stale: Stale,
}

/// The progress or the result of an audit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Translations that were checked: pages, or larger stretches that one answer covered, each for each access.
    pub checked: u64,
    /// Translations that no longer hold.
    pub findings: Vec<Finding>,
    /// The number of further ones, which are not listed.
    pub more: u64,
    /// Questions that got no answer in time, or one about another page.
    pub unanswered: u64,
    /// It ended early: the device was stopped, or the front-end is gone.
    pub interrupted: bool,
}

/// A stretch of the mirror that is requested page by page.
#[derive(Clone, Copy, Debug)]
struct Walk {
    rest: ByteRange<Iova>,
    /// The mirror's host address of the first remaining byte.
    host: u64,
    access: Access,
}

impl Walk {
    /// What is left after `covered` bytes.
    fn after(self, covered: u64) -> Option<Self> {
        let first = self.rest.first().checked_add(covered)?;
        let rest = ByteRange::inclusive(first, self.rest.last())?;
        Some(Self { rest, host: self.host.checked_add(covered)?, ..self })
    }

    /// What is left of it outside of `range`.
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

/// A finding that is not confirmed.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    finding: Finding,
    since: Duration,
}

/// An audit under way.
#[derive(Debug)]
pub struct Audit {
    /// Where listing the mirror goes on; `None`: all of it was listed.
    cursor: Option<Iova>,
    waiting: VecDeque<Walk>,
    /// Unanswered questions, by number.
    asked: BTreeMap<u32, Walk>,
    next: u32,
    suspects: Vec<Suspect>,
    /// When more may be requested.
    pause: Duration,
    report: AuditReport,
}

impl Audit {
    /// Starts an audit.
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

    /// The address from which it needs the mirror's contents; `None`: it has enough for now. (See [`Self::listed`].)
    pub fn wants(&self, now: Duration) -> Option<Iova> {
        self.cursor.filter(|_| self.waiting.len() < BATCH && self.may_ask(now))
    }

    /// Takes the mirror's contents from there, and the address at which to go on.
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

    /// The questions to ask now, each with its number.
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
            let (space, access) = (DomainId::DEVICE, walk.access);
            questions.push((number, MissRequest { space, access, iova: walk.rest.first() }));
        }
        if !questions.is_empty() {
            self.pause = now.saturating_add(PAUSE);
        }
        questions
    }

    /// A question could not be asked: it will be repeated.
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
                    // Both are contiguous: the part of the stretch that the answer covers is unchanged.
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

    /// The guest invalidated a range, as it should: nothing known of the range is stale.
    pub fn invalidated(&mut self, range: ByteRange<Iova>) {
        self.suspects.retain(|suspect| !suspect.finding.range.overlaps(range));
        let walks = std::mem::take(&mut self.waiting).into_iter();
        self.waiting = walks.chain(self.take_asked(range)).flat_map(|walk| walk.without(range)).collect();
    }

    /// Withdraws the questions whose answers would now be about another mapping.
    fn take_asked(&mut self, range: ByteRange<Iova>) -> Vec<Walk> {
        let asked = std::mem::take(&mut self.asked).into_iter();
        let (hit, kept): (Vec<_>, Vec<_>) = asked.partition(|(_, walk)| walk.rest.overlaps(range));
        self.asked = kept.into_iter().collect();
        hit.into_iter().map(|(_, walk)| walk).collect()
    }

    /// Turns suspicions that are old enough into findings.
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

    /// When to come back if nothing else happens earlier.
    pub fn deadline(&self) -> Option<Duration> {
        let asks = (self.asked.is_empty() && (self.cursor.is_some() || !self.waiting.is_empty()))
            .then_some(self.pause);
        let ripe = self.suspects.iter().map(|suspect| suspect.since.saturating_add(GRACE)).min();
        asks.into_iter().chain(ripe).min()
    }

    /// Its progress.
    pub fn report(&self) -> &AuditReport {
        &self.report
    }

    /// Its result, if it has ended.
    pub fn finished(&mut self, now: Duration) -> Option<AuditReport> {
        self.settle(now);
        let done = self.cursor.is_none()
            && self.waiting.is_empty()
            && self.asked.is_empty()
            && self.suspects.is_empty();
        done.then(|| std::mem::take(&mut self.report))
    }

    /// Ends it early; returns what it has found so far.
    pub fn interrupt(mut self, now: Duration) -> AuditReport {
        self.settle(now);
        AuditReport { interrupted: true, ..self.report }
    }
}

#[cfg(test)]
mod tests;
