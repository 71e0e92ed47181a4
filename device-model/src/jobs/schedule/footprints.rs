//! Which jobs that have begun and not ended use a page, and what INVALIDATEs took from them.
//!
//! Jobs that name one backing share its list of pages, so that a job costs what its packets name, and not what lies behind
//! that. A page is looked for in the backings that are in use; jobs are looked at only where one of them uses the page.
//! What that costs is bounded, by [`PIECES`] and [`LOOKS`]: what is beyond that is not judged, and counted.
//!
//! Knows values only; knows nothing of where a job is, and nothing of who asks the front-end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use job_stream::Mode;

use super::suspects::{Judgement, Revealed, Settled, Stands, Suspects};
use crate::addr::{Access, ByteRange, Iova, PAGE_SHIFT, PAGE_SIZE, SpaceId};
use crate::jobs::backing::{Entries, Stretch};
use crate::jobs::job::{Job, JobId};
use crate::jobs::offsets::OffsetSet;
use crate::jobs::transfer::merged;
use crate::jobs::working_set::{BackingPart, WorkingSet};
use crate::mmu::{MappedRange, Missing};
use crate::telemetry::violation::{Confidence, InvalidationInfo, Verdict};

/// Pieces of backings that all jobs together may name, to be judged.
const PIECES: usize = 1 << 16;

/// Looks for the users of memory that one answer is about.
const LOOKS: usize = 1 << 16;

/// Pages that are asked for at the end of a job.
const PAGES_ASKED: usize = 1024;

/// A job from its first turn to its end.
#[derive(Debug)]
struct JobFootprint {
    memory: Arc<WorkingSet>,
    mode: Mode,
    context: Option<u32>,
    /// Others learn by memory how far it has come: by a SIGNAL, an ATOMIC or a user fence.
    tells: bool,
    /// How many INVALIDATEs had taken memory from jobs when it began.
    begun: u64,
    /// The last INVALIDATE that is known to have taken memory away from it.
    convicted: Option<u64>,
}

impl JobFootprint {
    /// Whether what is taken from under it is found out about. A registration cache goes on with what it has.
    fn is_judged(&self) -> bool {
        self.mode != Mode::RegistrationCache
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
}

/// Which backing: the place of its entries. While they are in use, no others lie there.
type BackingId = usize;

fn id_of(part: &BackingPart) -> BackingId {
    Arc::as_ptr(&part.entries).addr()
}

/// A backing that jobs use.
#[derive(Debug)]
struct UsedBacking {
    entries: Arc<Entries>,
    /// The jobs, and which of its parts this is for each.
    jobs: BTreeMap<JobId, usize>,
    /// What they use together. `None`: a job has come or gone since that was last asked for.
    union: Option<Union>,
    /// How many INVALIDATEs had been noted, with the one to come, when one last took something from it.
    hit: u64,
}

/// What all jobs of a backing use together, and those that are judged.
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

/// The jobs that have begun and not ended, by what they use.
#[derive(Debug, Default)]
pub(super) struct Footprints {
    jobs: BTreeMap<JobId, JobFootprint>,
    backings: BTreeMap<BackingId, UsedBacking>,
    /// Pieces that all jobs together name.
    pieces: usize,
    suspects: Suspects,
    /// How many INVALIDATEs were noted.
    noted: u64,
    /// What is not judged because it is too much, since this was last taken.
    unjudged: u64,
    /// Stretches and jobs that were looked at so far: what all this costs.
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
            // It has begun all the same, and nothing is ever taken from it.
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

    /// The job is at its end.
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

    /// The jobs that use a backing to which this one writes, other than itself.
    pub(super) fn readers_of(&self, id: JobId) -> BTreeSet<JobId> {
        let memory = self.jobs.get(&id).map(|footprint| footprint.memory.parts());
        let written = memory.into_iter().flatten().filter(|part| part.writes.len() > 0);
        let backings = written.filter_map(|part| self.backings.get(&id_of(part)));
        let users = backings.flat_map(|backing| backing.jobs.keys().copied());
        users.filter(|user| *user != id).collect()
    }

    /// Whether a job uses any of the range.
    pub(super) fn touches(&mut self, space: SpaceId, range: ByteRange<Iova>) -> bool {
        self.first_stretch(space, range).is_some()
    }

    /// The first stretch of the range that a job uses, and its backing.
    fn first_stretch(&mut self, space: SpaceId, range: ByteRange<Iova>) -> Option<(BackingId, Stretch)> {
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

    /// The first job that uses any of the stretch of the range that is found first.
    pub(super) fn first_in(&mut self, space: SpaceId, range: ByteRange<Iova>) -> Option<JobId> {
        let (backing, stretch) = self.first_stretch(space, range)?;
        let mut users = self.backings.get(&backing)?.jobs.iter();
        let uses = |(id, number): &(&JobId, &usize)| {
            let part = self.jobs.get(id).and_then(|footprint| footprint.memory.parts().get(**number));
            part.is_some_and(|part| part.uses(stretch))
        };
        users.find(uses).map(|(id, _)| *id)
    }

    /// What jobs that are judged use of the range: whole pages, in order, no two ranges with a page in common.
    pub(super) fn judged(&mut self, space: SpaceId, range: ByteRange<Iova>) -> Vec<ByteRange<Iova>> {
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

    /// An INVALIDATE takes away what was mapped like this, of what [`Self::judged`] has said.
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

    /// Nothing can be told of what was taken away: host addresses mean something else now.
    pub(super) fn forget(&mut self) {
        self.suspects.clear();
    }

    /// What was not judged because it was too much, since this was last asked: jobs, and ranges that were taken away.
    pub(super) fn take_unjudged(&mut self) -> u64 {
        std::mem::take(&mut self.unjudged)
    }

    /// Judges what an answer shows of what was taken away. `stands`: how a job stands to the answer, and the packet that
    /// it has come to, where that is known.
    pub(super) fn judge(
        &mut self,
        revealed: &Revealed,
        stands: impl Fn(JobId) -> (Stands, Option<usize>),
    ) -> Vec<Judgement> {
        let mut looks = LOOKS;
        let mut found: Vec<(JobId, Access, ByteRange<Iova>, Settled)> = Vec::new();
        for settled in self.suspects.settle(revealed) {
            for (id, ranges) in self.users(&settled, &mut looks) {
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
            Some(Judgement { verdict, confidence, job, context, packet, mode, range, access, by, is_first })
        };
        found.into_iter().filter_map(judge).collect()
    }

    /// The jobs from which this was taken, and which pages of it each uses.
    fn users(&mut self, settled: &Settled, looks: &mut usize) -> BTreeMap<JobId, Vec<ByteRange<Iova>>> {
        let (mut found, begun_with) = (BTreeMap::<JobId, Vec<ByteRange<Iova>>>::new(), *looks);
        for UsedBacking { entries, jobs, union, .. } in self.backings.values_mut() {
            *looks = looks.saturating_sub(1);
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
                        *looks = looks.saturating_sub(1);
                        pages.push(range.page_aligned());
                    }
                    *looks = looks.saturating_sub(1);
                    // A page that the guest has listed many times is found once.
                    if *looks == 0 || pages.last() == Some(&settled.range) {
                        break;
                    }
                }
                if *looks == 0 {
                    // Whether this job uses it is not known.
                    self.unjudged = self.unjudged.saturating_add(1);
                }
            }
        }
        self.looked = self.looked.saturating_add(begun_with.saturating_sub(*looks) as u64);
        found
    }

    /// What has to be asked for before the fence of a job, because nothing has been heard of it since it was taken away.
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
                self.suspects.of((SpaceId::DEVICE, access), range, footprint.begun)
            });
            let mut pages = Vec::new();
            for range in taken.filter_map(|range| first_pages(range, &mut left)) {
                pages.push(range);
            }
            let one = |range| Missing { space: SpaceId::DEVICE, range, access };
            missing.extend(merged(pages).into_iter().map(one));
        }
        missing
    }
}

/// Operands name the space of the device, and no other one: the range, in whole pages, if it is of that.
fn in_device(space: SpaceId, range: ByteRange<Iova>) -> Option<ByteRange<Iova>> {
    (space == SpaceId::DEVICE).then(|| range.page_aligned())
}

/// The first pages of the range, as many as are left, which become fewer.
fn first_pages(range: ByteRange<Iova>, left: &mut usize) -> Option<ByteRange<Iova>> {
    let bytes = u128::from(PAGE_SIZE).saturating_mul(*left as u128).min(range.len());
    *left = left.saturating_sub(usize::try_from(bytes >> PAGE_SHIFT).unwrap_or(usize::MAX));
    let more = u64::try_from(bytes.checked_sub(1)?).ok()?;
    ByteRange::inclusive(range.first(), range.first().checked_add(more)?)
}

#[cfg(test)]
mod tests;
