//! Which jobs that have begun and not ended use a page, and what INVALIDATEs took from them.
//!
//! Jobs that name one backing share its list of pages, so a job costs as much as its packets name, not as much as the
//! backing holds. A page is looked up in the backings in use, and jobs are examined only where one of them uses the
//! page. The cost is bounded by [`PIECES`] and [`LOOKUPS`]; what exceeds them is not judged, and counted.
//!
//! Knows values only; knows nothing of where a job is, and nothing of who asks the front-end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use job_stream::Mode;

use super::suspects::{JobVerdict, Revealed, Settled, Stands, Suspects};
use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SHIFT, PAGE_SIZE};
use crate::jobs::backing::{Entries, Stretch};
use crate::jobs::job::{Job, JobId};
use crate::jobs::offsets::OffsetSet;
use crate::jobs::transfer::merged;
use crate::jobs::verdict::{Confidence, InvalidationInfo, Verdict};
use crate::jobs::working_set::{BackingPart, WorkingSet};
use crate::mmu::{MappedRange, Missing};

/// The most pieces of backings that all jobs together may name and still be judged.
const PIECES: usize = 1 << 16;

/// The most look-ups of a page's users for one answer.
const LOOKUPS: usize = 1 << 16;

/// The most pages that are requested at the end of a job.
const PAGES_ASKED: usize = 1024;

/// A job from its first turn to its end.
#[derive(Debug)]
struct JobFootprint {
    memory: Arc<WorkingSet>,
    mode: Mode,
    context: Option<u32>,
    /// Others can observe its progress in memory: by a SIGNAL, an ATOMIC or a user fence.
    tells: bool,
    /// How many INVALIDATEs had taken memory from jobs when it began.
    begun: u64,
    /// The last INVALIDATE that is known to have taken memory from it.
    convicted: Option<u64>,
}

impl JobFootprint {
    /// Whether what is invalidated under it is judged. A registration cache keeps using what it has.
    fn is_judged(&self) -> bool {
        self.mode != Mode::RegistrationCache
    }

    /// A job that needs a page is the best evidence. If a job has finished with it, only its fence shows that, unless
    /// the job has signalled progress in memory.
    fn confidence(&self, stands: Stands) -> Confidence {
        match (stands, self.tells) {
            (Stands::Needs, _) | (Stands::Checks, false) => Confidence::Certain,
            (Stands::Apart, false) => Confidence::Likely,
            (Stands::Checks | Stands::Apart, true) => Confidence::CannotTell,
        }
    }
}

/// A backing, by the address of its entries. No others can have that address while these are in use.
type BackingId = usize;

fn id_of(part: &BackingPart) -> BackingId {
    Arc::as_ptr(&part.entries).addr()
}

/// A backing in use by jobs.
#[derive(Debug)]
struct UsedBacking {
    entries: Arc<Entries>,
    /// The jobs, and which part of each job's working set this is.
    jobs: BTreeMap<JobId, usize>,
    /// What they use together. `None`: out of date, since a job has begun or ended.
    union: Option<Union>,
    /// The order of the last INVALIDATE that took something from it.
    hit: u64,
}

/// What all jobs of a backing use together, and what the judged ones use.
#[derive(Debug)]
struct Union {
    by_any: OffsetSet,
    by_judged: OffsetSet,
}

impl Union {
    fn of(users: &BTreeMap<JobId, usize>, jobs: &BTreeMap<JobId, JobFootprint>) -> Self {
        let (mut by_any, mut by_judged) = (Vec::new(), Vec::new());
        for (id, number) in users {
            let Some(footprint) = jobs.get(id) else { continue };
            let Some(part) = footprint.memory.parts().get(*number) else { continue };
            let pieces = || part.reads.outline().chain(part.writes.outline());
            by_any.extend(pieces());
            if footprint.is_judged() {
                by_judged.extend(pieces());
            }
        }
        Self { by_any: OffsetSet::new(by_any), by_judged: OffsetSet::new(by_judged) }
    }
}

/// The jobs that have begun and not ended, by the memory that they use.
#[derive(Debug, Default)]
pub(super) struct Footprints {
    jobs: BTreeMap<JobId, JobFootprint>,
    backings: BTreeMap<BackingId, UsedBacking>,
    /// Pieces that all jobs together name.
    pieces: usize,
    suspects: Suspects,
    /// How many INVALIDATEs were noted.
    noted: u64,
    /// How much was too much to be judged since this was last taken.
    unjudged: u64,
    /// Stretches and jobs examined so far: the cost of all this.
    looked: u64,
}

impl Footprints {
    /// An engine takes the job, for the first time or again.
    pub(super) fn begin(&mut self, job: &Job) {
        if self.jobs.contains_key(&job.id()) {
            return;
        }
        let mut memory = job.touches();
        if self.pieces.saturating_add(memory.len()) > PIECES {
            // It still counts as begun, and no INVALIDATE of its memory is judged.
            self.unjudged = self.unjudged.saturating_add(1);
            memory = Arc::default();
        }
        self.pieces = self.pieces.saturating_add(memory.len());
        for (number, part) in memory.parts().iter().enumerate() {
            let unused = || {
                let (entries, jobs) = (Arc::clone(&part.entries), BTreeMap::new());
                UsedBacking { entries, jobs, union: None, hit: 0 }
            };
            let backing = self.backings.entry(id_of(part)).or_insert_with(unused);
            backing.jobs.insert(job.id(), number);
            backing.union = None;
        }
        let (mode, context, tells) = (job.mode(), job.context(), job.tells_by_memory());
        let footprint = JobFootprint { memory, mode, context, tells, begun: self.noted, convicted: None };
        self.jobs.insert(job.id(), footprint);
    }

    /// The job has ended.
    pub(super) fn end(&mut self, id: JobId) {
        let Some(footprint) = self.jobs.remove(&id) else { return };
        self.pieces = self.pieces.saturating_sub(footprint.memory.len());
        for part in footprint.memory.parts() {
            let Some(backing) = self.backings.get_mut(&id_of(part)) else { continue };
            backing.jobs.remove(&id);
            backing.union = None;
            if backing.jobs.is_empty() {
                self.backings.remove(&id_of(part));
            }
        }
        if self.jobs.is_empty() {
            self.suspects.clear();
        }
    }

    /// All jobs are discarded.
    pub(super) fn clear(&mut self) {
        self.jobs.clear();
        self.backings.clear();
        self.suspects.clear();
        self.pieces = 0;
    }

    /// The jobs, in order.
    pub(super) fn ids(&self) -> impl Iterator<Item = JobId> {
        self.jobs.keys().copied()
    }

    /// The other jobs that use a backing to which this one writes.
    pub(super) fn readers_of(&self, id: JobId) -> BTreeSet<JobId> {
        let memory = self.jobs.get(&id).map(|footprint| footprint.memory.parts());
        let written = memory.into_iter().flatten().filter(|part| part.writes.len() > 0);
        let backings = written.filter_map(|part| self.backings.get(&id_of(part)));
        let users = backings.flat_map(|backing| backing.jobs.keys().copied());
        users.filter(|user| *user != id).collect()
    }

    /// Whether any job uses the range.
    pub(super) fn touches(&mut self, space: DomainId, range: ByteRange<Iova>) -> bool {
        self.first_stretch(space, range).is_some()
    }

    /// The first stretch of the range that a job uses, and its backing.
    fn first_stretch(&mut self, space: DomainId, range: ByteRange<Iova>) -> Option<(BackingId, Stretch)> {
        let range = in_device(space, range)?;
        for (id, UsedBacking { entries, jobs, union, .. }) in &mut self.backings {
            for stretch in entries.within(range) {
                self.looked = self.looked.saturating_add(1);
                let union = union.get_or_insert_with(|| Union::of(jobs, &self.jobs));
                if union.by_any.within(stretch.offsets).next().is_some() {
                    return Some((*id, stretch));
                }
            }
        }
        None
    }

    /// The first job that uses the first stretch that is found in the range.
    pub(super) fn first_in(&mut self, space: DomainId, range: ByteRange<Iova>) -> Option<JobId> {
        let (backing, stretch) = self.first_stretch(space, range)?;
        let mut users = self.backings.get(&backing)?.jobs.iter();
        let uses = |(id, number): &(&JobId, &usize)| {
            let part = self.jobs.get(id).and_then(|footprint| footprint.memory.parts().get(**number));
            part.is_some_and(|part| part.uses(stretch))
        };
        users.find(uses).map(|(id, _)| *id)
    }

    /// What judged jobs use of the range: whole pages, in order, no two ranges sharing a page.
    pub(super) fn judged(&mut self, space: DomainId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
        let Some(range) = in_device(space, range) else { return Vec::new() };
        let mut found = Vec::new();
        for UsedBacking { entries, jobs, union, hit } in self.backings.values_mut() {
            let before = found.len();
            for stretch in entries.within(range) {
                self.looked = self.looked.saturating_add(1);
                let union = union.get_or_insert_with(|| Union::of(jobs, &self.jobs));
                let used = union.by_judged.within(stretch.offsets).filter_map(|piece| stretch.part(piece));
                found.extend(used.map(ByteRange::page_aligned));
            }
            if found.len() > before {
                *hit = self.noted.saturating_add(1);
            }
        }
        merged(found)
    }

    /// An INVALIDATE removes these mappings, which lie in what [`Self::judged`] returned.
    pub(super) fn suspect(&mut self, by: InvalidationInfo, mapped: &[MappedRange]) {
        if mapped.is_empty() {
            return;
        }
        self.noted = self.noted.saturating_add(1);
        let oldest = self.jobs.values().map(|footprint| footprint.begun).min().unwrap_or(self.noted);
        let beyond = self.suspects.note((Arc::new(by), self.noted), mapped, oldest);
        self.looked = self.looked.saturating_add(mapped.len() as u64);
        self.unjudged = self.unjudged.saturating_add(beyond);
    }

    /// Earlier INVALIDATEs can no longer be judged: host addresses change their meaning.
    pub(super) fn forget(&mut self) {
        self.suspects.clear();
    }

    /// How much was too much to be judged since the last call: jobs, and ranges that were invalidated.
    pub(super) fn take_unjudged(&mut self) -> u64 {
        std::mem::take(&mut self.unjudged)
    }

    /// Judges earlier INVALIDATEs by an answer. `stands`: a job's relation to the answer, and the packet that it has
    /// reached, if that is known.
    pub(super) fn judge(
        &mut self,
        revealed: &Revealed,
        stands: impl Fn(JobId) -> (Stands, Option<usize>),
    ) -> Vec<JobVerdict> {
        let mut lookups = LOOKUPS;
        let mut found: Vec<(JobId, Access, ByteRange<Iova>, Settled)> = Vec::new();
        for settled in self.suspects.settle(revealed) {
            for (id, ranges) in self.users(&settled, &mut lookups) {
                let part = |range| (id, settled.access, range, settled.clone());
                found.extend(merged(ranges).into_iter().map(part));
            }
        }
        found.sort_by_key(|(id, access, range, _)| (*id, *access, *range));
        let judge = |(id, access, range, settled): (JobId, Access, ByteRange<Iova>, Settled)| {
            let footprint = self.jobs.get_mut(&id)?;
            let Settled { verdict, by, .. } = settled;
            let guilty = verdict != Verdict::Benign;
            let is_first = guilty && footprint.convicted.replace(by.number) != Some(by.number);
            let (stands, packet) = stands(id);
            let (confidence, context, mode) =
                (footprint.confidence(stands), footprint.context, footprint.mode);
            let (job, by) = (id, *by);
            Some(JobVerdict { verdict, confidence, job, context, packet, mode, range, access, by, is_first })
        };
        found.into_iter().filter_map(judge).collect()
    }

    /// The jobs that lost this range, and which pages of it each of them uses.
    fn users(&mut self, settled: &Settled, lookups: &mut usize) -> BTreeMap<JobId, Vec<ByteRange<Iova>>> {
        let (mut found, begun_with) = (BTreeMap::<JobId, Vec<ByteRange<Iova>>>::new(), *lookups);
        for UsedBacking { entries, jobs, union, .. } in self.backings.values_mut() {
            *lookups = lookups.saturating_sub(1);
            let union = union.get_or_insert_with(|| Union::of(jobs, &self.jobs));
            let used = |stretch: &Stretch| union.by_judged.within(stretch.offsets).next().is_some();
            let stretches: Vec<Stretch> = entries.within(settled.range).filter(used).collect();
            if stretches.is_empty() {
                continue;
            }
            for (id, number) in jobs {
                let Some(footprint) = self.jobs.get(id) else { continue };
                let Some(part) = footprint.memory.parts().get(*number) else { continue };
                if !footprint.is_judged() || footprint.begun >= settled.order {
                    continue;
                }
                let pages = found.entry(*id).or_default();
                for stretch in &stretches {
                    for range in part.parts_of(settled.access, *stretch) {
                        *lookups = lookups.saturating_sub(1);
                        pages.push(range.page_aligned());
                    }
                    *lookups = lookups.saturating_sub(1);
                    // A page that the guest has listed many times is counted once.
                    if *lookups == 0 || pages.last() == Some(&settled.range) {
                        break;
                    }
                }
                if *lookups == 0 {
                    // Whether this job uses it stays unknown.
                    self.unjudged = self.unjudged.saturating_add(1);
                }
            }
        }
        self.looked = self.looked.saturating_add(begun_with.saturating_sub(*lookups) as u64);
        found
    }

    /// What has to be requested before a job's fence, because no answer about it has come since it was invalidated.
    pub(super) fn to_check(&self, id: JobId) -> Vec<Missing> {
        let footprint = self.jobs.get(&id).filter(|footprint| footprint.mode == Mode::Fence);
        let Some(footprint) = footprint.filter(|_| !self.suspects.is_empty()) else { return Vec::new() };
        let is_hit = |part: &&BackingPart| {
            self.backings.get(&id_of(part)).is_some_and(|backing| backing.hit > footprint.begun)
        };
        let (mut missing, mut left) = (Vec::new(), PAGES_ASKED);
        for access in [Access::Read, Access::Write] {
            let memory = footprint.memory.parts().iter().filter(is_hit).flat_map(|part| part.memory(access));
            let taken = memory.flat_map(|range| {
                let range = range.page_aligned();
                self.suspects.of((DomainId::DEVICE, access), range, footprint.begun)
            });
            let mut pages = Vec::new();
            for range in taken.filter_map(|range| first_pages(range, &mut left)) {
                pages.push(range);
            }
            let one = |range| Missing { space: DomainId::DEVICE, range, access };
            missing.extend(merged(pages).into_iter().map(one));
        }
        missing
    }
}

/// Operands lie in the device's space only: the range in whole pages, if it is of that space.
fn in_device(space: DomainId, range: ByteRange<Iova>) -> Option<ByteRange<Iova>> {
    (space == DomainId::DEVICE).then(|| range.page_aligned())
}

/// The first pages of the range, as many as `left` allows; `left` is reduced by their number.
fn first_pages(range: ByteRange<Iova>, left: &mut usize) -> Option<ByteRange<Iova>> {
    let bytes = u128::from(PAGE_SIZE).saturating_mul(*left as u128).min(range.len());
    *left = left.saturating_sub(usize::try_from(bytes >> PAGE_SHIFT).unwrap_or(usize::MAX));
    let more = u64::try_from(bytes.checked_sub(1)?).ok()?;
    ByteRange::inclusive(range.first(), range.first().checked_add(more)?)
}

#[cfg(test)]
mod tests;
