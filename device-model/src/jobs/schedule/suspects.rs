//! What INVALIDATEs took, or seemed to take, from jobs that have begun: kept once for all jobs that use it. An
//! INVALIDATE does not say what it meant: Linux flushes whole domains, and VT-d rounds ranges up. What it meant shows
//! when the front-end next answers a MISS for the page: the same memory again, other memory, none. Knows values only;
//! knows nothing of who asks.

use std::collections::BTreeMap;
use std::sync::Arc;

use job_stream::Mode;

use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use crate::jobs::job::JobId;
use crate::jobs::verdict::{Confidence, InvalidationInfo, Verdict};
use crate::mmu::miss::{Outcome, Resolution};
use crate::mmu::{MappedRange, MirrorWriter};

/// The most ranges, of all jobs together, that wait for a verdict: about 3 MiB of memory. That has room for each page
/// of the largest number of backing entries, once for reading and once for writing.
const SUSPECTS: usize = 1 << 15;

/// What the front-end's answer to a MISS shows.
#[derive(Clone, Copy, Debug)]
pub struct Revealed {
    /// The address space.
    pub space: DomainId,
    /// The pages that the answer is about.
    pub pages: ByteRange<Iova>,
    /// The access that the MISS requested.
    pub access: Access,
    /// What is mapped there.
    pub found: Found,
}

/// What is mapped at some pages now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Memory; the first page is at this host address.
    Memory(u64),
    /// Nothing that permits this access.
    Nothing,
    /// Unknown: no answer came in time, or none that covers these pages.
    Unknown,
}

impl Revealed {
    /// What an answer shows; `None`: nothing about any whole page.
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
            // An error of the front-end says nothing about the guest.
            Outcome::NotCovered | Outcome::TimedOut | Outcome::NoChannel => (page, Found::Unknown),
        };
        Some(Self { space: request.space, pages, access: request.access, found })
    }
}

/// What an INVALIDATE turned out to mean for memory that a job uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobVerdict {
    /// What it meant. With [`Confidence::CannotTell`]: what it seems to have meant.
    pub verdict: Verdict,
    /// How sure that is.
    pub confidence: Confidence,
    /// The job that uses the memory.
    pub job: JobId,
    /// Its context; a transfer has none.
    pub context: Option<u32>,
    /// The packet that it has reached, if known.
    pub packet: Option<usize>,
    /// What an INVALIDATE means to it.
    pub mode: Mode,
    /// The memory.
    pub range: ByteRange<Iova>,
    /// What the job uses it for.
    pub access: Access,
    /// The INVALIDATE.
    pub by: InvalidationInfo,
    /// No other memory that this INVALIDATE took from the job was found gone or moved before.
    pub is_first: bool,
}

/// A job's relation to an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stands {
    /// It asked, because it needs the page now or soon.
    Needs,
    /// It has ended, and asked to check whether its memory was unmapped under it.
    Checks,
    /// Something else asked.
    Apart,
}

/// A mapping at the time when it was invalidated.
#[derive(Clone, Debug)]
struct Suspect {
    last: Iova,
    host: u64,
    by: Arc<InvalidationInfo>,
    /// Its INVALIDATE's place in the order of all that were noted: it concerns the jobs that had begun before.
    order: u64,
}

/// A range whose INVALIDATE an answer has judged.
#[derive(Clone, Debug)]
pub(super) struct Settled {
    pub(super) access: Access,
    pub(super) range: ByteRange<Iova>,
    pub(super) verdict: Verdict,
    pub(super) by: Arc<InvalidationInfo>,
    /// As in [`Suspect`].
    pub(super) order: u64,
}

/// What was invalidated, and waits for its verdict.
///
/// INVARIANT: no two ranges of a space and an access overlap. A page can be invalidated again only after an answer has
/// mapped it again for this access, and that answer settles what was noted for it. If an INVALIDATE names it
/// nevertheless, the older one is kept while any job remains that had begun before it.
#[derive(Debug, Default)]
pub(super) struct Suspects(BTreeMap<(DomainId, Access, Iova), Suspect>);

impl Suspects {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// The INVALIDATE with this order removes these mappings. No remaining job had begun before the INVALIDATE with the
    /// order `oldest` was noted. Returns how many ranges did not fit.
    pub(super) fn note(
        &mut self,
        (by, order): (Arc<InvalidationInfo>, u64),
        mapped: &[MappedRange],
        oldest: u64,
    ) -> u64 {
        if self.0.len().saturating_add(mapped.len().saturating_mul(2)) > SUSPECTS {
            self.0.retain(|_, suspect| suspect.order > oldest);
        }
        let mut beyond = 0_u64;
        for access in [Access::Read, Access::Write] {
            let taken = mapped.iter().filter(|mapped| mapped.permissions.allow(access));
            let room = SUSPECTS.saturating_sub(self.0.len());
            let (noted, more) = (taken.clone().take(room), taken.skip(room).count());
            beyond = beyond.saturating_add(more as u64);
            let suspect = |mapped: &MappedRange| {
                let (last, host, by) = (mapped.range.last(), mapped.host, Arc::clone(&by));
                Suspect { last, host, by, order }
            };
            if self.is_new(access, mapped) {
                let key = |mapped: &MappedRange| (mapped.space, access, mapped.range.first());
                self.join(noted.map(|mapped| (key(mapped), suspect(mapped))).collect());
            } else {
                noted.for_each(|mapped| {
                    self.add((mapped.space, access), mapped.range, &suspect(mapped), oldest);
                });
            }
        }
        beyond
    }

    /// Whether the ranges are in order, and nothing is noted from the start of the first to the end of the last.
    fn is_new(&self, access: Access, mapped: &[MappedRange]) -> bool {
        let in_order = |low: &MappedRange, high: &MappedRange| {
            low.space == high.space && low.range.last() < high.range.first()
        };
        let ends = mapped.first().zip(mapped.last());
        let all = ends.and_then(|(first, last)| {
            Some((first.space, ByteRange::inclusive(first.range.first(), last.range.last())?))
        });
        all.is_some_and(|(space, all)| {
            mapped.is_sorted_by(in_order) && self.overlapping((space, access), all).next().is_none()
        })
    }

    /// Adds ranges that overlap nothing. Merging two maps of similar size is faster than inserting one into the other.
    fn join(&mut self, mut new: BTreeMap<(DomainId, Access, Iova), Suspect>) {
        if new.len() < self.0.len() {
            self.0.extend(new);
        } else {
            self.0.append(&mut new);
        }
    }

    /// Adds a range, except for the parts that an older INVALIDATE took from a job that still exists.
    fn add(
        &mut self,
        (space, access): (DomainId, Access),
        range: ByteRange<Iova>,
        suspect: &Suspect,
        oldest: u64,
    ) {
        let mut next = Some(range.first());
        for (older, kept) in self.take((space, access), range) {
            if kept.order <= oldest {
                continue;
            }
            let gap = next.zip(older.first().raw().checked_sub(1).map(Iova::new));
            self.put((space, access), range, gap, suspect);
            next = older.last().checked_add(1);
            self.0.insert((space, access, older.first()), kept);
        }
        self.put((space, access), range, next.zip(Some(range.last())), suspect);
    }

    /// Inserts a part of the range unless it is empty.
    fn put(
        &mut self,
        (space, access): (DomainId, Access),
        range: ByteRange<Iova>,
        part: Option<(Iova, Iova)>,
        suspect: &Suspect,
    ) {
        let Some(part) = part.and_then(|(first, last)| ByteRange::inclusive(first, last)) else { return };
        let host = suspect.host.saturating_add(distance(range.first(), part.first()));
        let suspect = Suspect { last: part.last(), host, ..suspect.clone() };
        self.0.insert((space, access, part.first()), suspect);
    }

    /// Judges what was noted for these pages by an answer, and removes it.
    pub(super) fn settle(&mut self, revealed: &Revealed) -> Vec<Settled> {
        let mut settled = Vec::new();
        for access in [Access::Read, Access::Write] {
            if access != revealed.access && !matches!(revealed.found, Found::Memory(_)) {
                continue;
            }
            for (range, suspect) in self.take((revealed.space, access), revealed.pages) {
                let verdict = match revealed.found {
                    Found::Unknown => continue,
                    Found::Nothing => Verdict::Gone,
                    Found::Memory(host) => {
                        let now = host.saturating_add(distance(revealed.pages.first(), range.first()));
                        if now == suspect.host { Verdict::Benign } else { Verdict::Moved }
                    }
                };
                if verdict == Verdict::Benign && access != revealed.access {
                    // It is mapped; another answer will show whether this access is still permitted.
                    self.0.insert((revealed.space, access, range.first()), suspect);
                    continue;
                }
                let Suspect { by, order, .. } = suspect;
                settled.push(Settled { access, range, verdict, by, order });
            }
        }
        settled
    }

    /// The parts of the range that jobs lost which had begun before this many INVALIDATEs were noted.
    pub(super) fn of(
        &self,
        of: (DomainId, Access),
        range: ByteRange<Iova>,
        begun: u64,
    ) -> impl Iterator<Item = ByteRange<Iova>> {
        let concerned = self.overlapping(of, range).filter(move |(_, suspect)| suspect.order > begun);
        concerned.filter_map(move |((_, _, first), suspect)| {
            ByteRange::inclusive(*first, suspect.last)?.intersection(range)
        })
    }

    fn overlapping(
        &self,
        (space, access): (DomainId, Access),
        range: ByteRange<Iova>,
    ) -> impl Iterator<Item = (&(DomainId, Access, Iova), &Suspect)> {
        let before = self.0.range(..(space, access, range.first())).next_back();
        let reaches = |((s, a, _), suspect): &(&(DomainId, Access, Iova), &Suspect)| {
            (*s, *a) == (space, access) && suspect.last >= range.first()
        };
        let within = self.0.range((space, access, range.first())..=(space, access, range.last()));
        before.filter(reaches).into_iter().chain(within)
    }

    /// Removes what overlaps `pages`; the parts outside stay.
    fn take(
        &mut self,
        (space, access): (DomainId, Access),
        pages: ByteRange<Iova>,
    ) -> Vec<(ByteRange<Iova>, Suspect)> {
        let keys: Vec<_> = self.overlapping((space, access), pages).map(|(key, _)| *key).collect();
        let mut taken = Vec::new();
        for key in keys {
            let Some(suspect) = self.0.remove(&key) else { continue };
            let all = ByteRange::inclusive(key.2, suspect.last);
            let Some((all, part)) = all.and_then(|all| Some((all, all.intersection(pages)?))) else {
                continue;
            };
            let before = part.first().raw().checked_sub(1).map(|last| (key.2, Iova::new(last)));
            self.put((space, access), all, before, &suspect);
            let after = part.last().checked_add(1).map(|first| (first, suspect.last));
            self.put((space, access), all, after, &suspect);
            let host = suspect.host.saturating_add(distance(key.2, part.first()));
            taken.push((part, Suspect { last: part.last(), host, ..suspect }));
        }
        taken
    }
}

/// The largest gap, in pages, between two ranges that one look-up in the mirror spans.
const SKIPPED: u64 = 16;

/// The mirror's mappings of these ranges, which are in order and do not overlap, as many as will be remembered as
/// invalidated.
pub fn mapped_of(mirror: &MirrorWriter, space: DomainId, ranges: &[ByteRange<Iova>]) -> Vec<MappedRange> {
    let is_near = |low: &ByteRange<Iova>, high: &ByteRange<Iova>| {
        distance(low.last(), high.first()) <= SKIPPED.saturating_mul(PAGE_SIZE)
    };
    let mut mapped = Vec::with_capacity(ranges.len().min(SUSPECTS));
    for near in ranges.chunk_by(is_near) {
        let ends = near.first().zip(near.last());
        let all = ends.and_then(|(first, last)| ByteRange::inclusive(first.first(), last.last()));
        let Some(all) = all else { continue };
        let mut rest = near;
        mirror.mapped_ranges(space, all, |found| {
            while let Some((_, later)) =
                rest.split_first().filter(|(range, _)| range.last() < found.range.first())
            {
                rest = later;
            }
            let parts = rest.iter().map_while(|range| range.intersection(found.range));
            let host = |part: ByteRange<Iova>| {
                found.host.saturating_add(distance(found.range.first(), part.first()))
            };
            // One more than fits, to show that there are more.
            let room = SUSPECTS.saturating_add(1).saturating_sub(mapped.len());
            mapped.extend(parts.take(room).map(|range| MappedRange { range, host: host(range), ..found }));
        });
    }
    mapped
}

fn distance(from: Iova, to: Iova) -> u64 {
    to.raw().saturating_sub(from.raw())
}
