//! What INVALIDATEs took from under jobs that have begun, or seemed to take. An INVALIDATE does not say what it meant:
//! Linux flushes whole domains, and VT-d rounds ranges up. What it meant shows when the front-end next answers a MISS
//! for the page: the same memory again, other memory, none. Knows values only; knows nothing of who asks.

use std::collections::BTreeMap;

use job_stream::Mode;

use crate::addr::{Access, ByteRange, Iova, SpaceId};
use crate::jobs::job::{Job, JobId};
use crate::mmu::miss::{Outcome, Resolution};
use crate::mmu::{MappedRange, Missing, PinRange};
use crate::telemetry::violation::{Confidence, InvalidationInfo, Verdict};

/// Ranges of a job that wait for a verdict, at the most; of what is beyond, nothing will be told.
const SUSPECTS: usize = 1024;

/// Pages that are asked for at the end of a job, at the most.
const PAGES_ASKED: u64 = 1024;

/// What the front-end's answer to a MISS shows.
#[derive(Clone, Copy, Debug)]
pub struct Revealed {
    /// The space.
    pub space: SpaceId,
    /// The pages that the answer is about.
    pub pages: ByteRange<Iova>,
    /// What the MISS asked for.
    pub access: Access,
    /// What is there.
    pub found: Found,
}

/// What is at some pages now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Memory; the first page is at this host address.
    Memory(u64),
    /// Nothing that may be accessed like this.
    Nothing,
    /// Nobody knows: no answer came in time, or none that is about these pages.
    Unknown,
}

impl Revealed {
    /// What an answer shows; `None`: of no whole page anything.
    pub fn by<W>(resolution: &Resolution<W>) -> Option<Self> {
        let request = resolution.request;
        let page = request.iova.page_range();
        let (pages, found) = match resolution.outcome {
            Outcome::Mapped { range, host, .. } => {
                let pages = range.whole_pages()?;
                let skipped = distance(range.first(), pages.first());
                (pages, Found::Memory(host.address().checked_add(skipped)?))
            }
            Outcome::Refused => (page, Found::Nothing),
            // That the front-end errs says nothing of the guest.
            Outcome::NotCovered | Outcome::TimedOut => (page, Found::Unknown),
        };
        Some(Self { space: request.space, pages, access: request.access, found })
    }
}

/// What an INVALIDATE turned out to mean for memory that a job uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// What it meant. [`Confidence::CannotTell`]: as far as it looks.
    pub verdict: Verdict,
    /// How sure that is.
    pub confidence: Confidence,
    /// Whose memory it is.
    pub job: JobId,
    /// Its context; a transfer has none.
    pub context: Option<u32>,
    /// The packet that it has come to, where that is known.
    pub packet: Option<usize>,
    /// What an INVALIDATE means to it.
    pub mode: Mode,
    /// The memory.
    pub range: ByteRange<Iova>,
    /// What the job uses it for.
    pub access: Access,
    /// The INVALIDATE.
    pub by: InvalidationInfo,
    /// No other memory that this INVALIDATE took from the job was found to be gone or moved before.
    pub is_first: bool,
}

/// What was mapped when it was taken away.
#[derive(Clone, Copy, Debug)]
struct Suspect {
    last: Iova,
    host: u64,
    by: InvalidationInfo,
}

/// How a job stands to an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stands {
    /// It asked, because it has come to the page or is about to.
    Needs,
    /// It is at its end, and asked to see whether its memory was still its own.
    Checks,
    /// Another asked.
    Apart,
}

/// A job from its first turn to its end.
#[derive(Debug)]
pub(super) struct Begun {
    /// What it touches: in order of access and address, no two of an access with a page in common.
    ranges: Vec<PinRange>,
    mode: Mode,
    context: Option<u32>,
    /// Others learn by memory how far it has come: by a SIGNAL, an ATOMIC or a user fence.
    tells: bool,
    suspects: BTreeMap<(SpaceId, Access, Iova), Suspect>,
    /// The last INVALIDATE that is known to have taken memory away.
    convicted: Option<u64>,
}

impl Begun {
    pub(super) fn new(job: &Job) -> Self {
        Self {
            ranges: job.working_set(),
            mode: job.mode(),
            context: job.context(),
            tells: job.tells_by_memory(),
            suspects: BTreeMap::new(),
            convicted: None,
        }
    }

    /// What it touches of a range.
    pub(super) fn touches(
        &self,
        space: SpaceId,
        range: ByteRange<Iova>,
    ) -> impl Iterator<Item = ByteRange<Iova>> {
        let used = self.ranges.iter().filter(move |used| used.space == space);
        used.filter_map(move |used| used.range.page_aligned().intersection(range))
    }

    /// Whether what is taken from under it is found out about. A registration cache goes on with what it has.
    pub(super) fn is_judged(&self) -> bool {
        self.mode != Mode::RegistrationCache
    }

    /// `mapped`, which it may have used, is being taken away.
    pub(super) fn suspect(&mut self, by: InvalidationInfo, mapped: &MappedRange) {
        for access in [Access::Read, Access::Write] {
            if !mapped.permissions.allow(access) {
                continue;
            }
            let key = |used: &PinRange| (used.access, used.range.page_aligned().last());
            let from = self.ranges.partition_point(|used| key(used) < (access, mapped.range.first()));
            for used in self.ranges.iter().skip(from).take_while(|used| used.access == access) {
                let Some(part) = used.range.page_aligned().intersection(mapped.range) else { break };
                if self.suspects.len() >= SUSPECTS {
                    return;
                }
                let host = mapped.host.saturating_add(distance(mapped.range.first(), part.first()));
                let suspect = Suspect { last: part.last(), host, by };
                // What waits for its verdict already was taken away before: that is the older deed.
                self.suspects.entry((mapped.space, access, part.first())).or_insert(suspect);
            }
        }
    }

    /// Judges what an answer shows of its suspects.
    pub(super) fn judge(
        &mut self,
        (job, packet): (JobId, Option<usize>),
        revealed: &Revealed,
        stands: Stands,
    ) -> Vec<Judgement> {
        let mut judgements = Vec::new();
        for access in [Access::Read, Access::Write] {
            if access != revealed.access && !matches!(revealed.found, Found::Memory(_)) {
                continue;
            }
            for (range, suspect) in self.take(revealed.space, access, revealed.pages) {
                let verdict = match revealed.found {
                    Found::Unknown => continue,
                    Found::Nothing => Verdict::Gone,
                    Found::Memory(host) => {
                        let now = host.saturating_add(distance(revealed.pages.first(), range.first()));
                        if now == suspect.host { Verdict::Benign } else { Verdict::Moved }
                    }
                };
                if verdict == Verdict::Benign && access != revealed.access {
                    // It is there; whether it may still be accessed like this, another answer will show.
                    self.suspects.insert((revealed.space, access, range.first()), suspect);
                    continue;
                }
                let guilty = verdict != Verdict::Benign;
                let is_first = guilty && self.convicted.replace(suspect.by.number) != Some(suspect.by.number);
                judgements.push(Judgement {
                    verdict,
                    confidence: self.confidence(stands),
                    job,
                    context: self.context,
                    packet,
                    mode: self.mode,
                    range,
                    access,
                    by: suspect.by,
                    is_first,
                });
            }
        }
        judgements
    }

    /// A job that needs a page is the best witness. Of one that is done with it, only its fence says so, unless it told
    /// others in memory.
    fn confidence(&self, stands: Stands) -> Confidence {
        match (stands, self.tells) {
            (Stands::Needs, _) | (Stands::Checks, false) => Confidence::Certain,
            (Stands::Apart, false) => Confidence::Likely,
            (Stands::Checks | Stands::Apart, true) => Confidence::CannotTell,
        }
    }

    /// What has to be asked for before its fence, for nobody has since its memory was taken away.
    pub(super) fn to_check(&self) -> Vec<Missing> {
        if self.mode != Mode::Fence {
            return Vec::new();
        }
        let mut left = PAGES_ASKED;
        let missing = self.suspects.iter().map_while(|((space, access, first), suspect)| {
            let most = first.checked_add(left.checked_mul(crate::addr::PAGE_SIZE)?.checked_sub(1)?);
            let last = most.map_or(suspect.last, |most| most.min(suspect.last));
            let missing =
                Missing { space: *space, range: ByteRange::inclusive(*first, last)?, access: *access };
            left = left.saturating_sub(missing.pages().count() as u64);
            Some(missing)
        });
        missing.collect()
    }

    /// Nothing can be told of what was taken away: host addresses mean something else now.
    pub(super) fn forget(&mut self) {
        self.suspects.clear();
    }

    /// Takes out what overlaps `pages`; the parts of it beyond stay.
    fn take(
        &mut self,
        space: SpaceId,
        access: Access,
        pages: ByteRange<Iova>,
    ) -> Vec<(ByteRange<Iova>, Suspect)> {
        let before = self.suspects.range(..=(space, access, pages.first())).next_back();
        let from = before.filter(|((s, a, _), _)| (*s, *a) == (space, access));
        let from = from.map_or(pages.first(), |((.., first), _)| *first);
        let keys: Vec<_> = self
            .suspects
            .range((space, access, from)..=(space, access, pages.last()))
            .map(|(key, _)| *key)
            .collect();
        let mut taken = Vec::new();
        for key in keys {
            let Some(suspect) = self.suspects.remove(&key) else { continue };
            let Some(all) = ByteRange::inclusive(key.2, suspect.last) else { continue };
            let Some(part) = all.intersection(pages) else {
                self.suspects.insert(key, suspect);
                continue;
            };
            let at = |first: Iova| suspect.host.saturating_add(distance(key.2, first));
            if let Some(last) = part.first().raw().checked_sub(1).map(Iova::new).filter(|last| *last >= key.2)
            {
                self.suspects.insert(key, Suspect { last, ..suspect });
            }
            if let Some(first) = part.last().checked_add(1).filter(|first| *first <= suspect.last) {
                self.suspects.insert((space, access, first), Suspect { host: at(first), ..suspect });
            }
            taken.push((part, Suspect { last: part.last(), host: at(part.first()), ..suspect }));
        }
        taken
    }
}

fn distance(from: Iova, to: Iova) -> u64 {
    to.raw().saturating_sub(from.raw())
}
