//! A job stream of the guest, as the oracle knows it: what it may touch, how far it has come, and its twin. Knows
//! nothing of the device.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use job_stream::twin::{self, OutOfBounds, Outcome, interpret};
use job_stream::{At, Mode, Program};

use super::follower::{Follower, JobEvent, Places, locate};
use super::guest::{Guest, page_at};
use super::memory::Memory;
use crate::addr::{Access, PAGE_SIZE};
use crate::jobs::job::JobOutcome;

/// A context, with a unique identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ContextKey {
    pub(super) device: usize,
    pub(super) number: u32,
    /// How many contexts the driver had created before.
    pub(super) generation: u64,
}

/// The state of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// The device has not processed it, or has refused it: it touches no memory.
    Outside,
    /// It waits in its queue and touches no memory.
    Queued,
    /// It was given to the engines and may touch memory.
    Out,
    /// An engine reported its end; it touches no more memory.
    Ended(JobOutcome),
}

/// A job stream.
#[derive(Clone, Debug)]
pub(super) struct Submitted {
    pub(super) context: ContextKey,
    pub(super) ring: u8,
    pub(super) asked: Option<Mode>,
    pub(super) program: Program,
    pub(super) places: Places,
    /// The backings of the buffers that it names.
    pub(super) buffers: BTreeSet<u64>,
    pub(super) stage: Stage,
    pub(super) mode: Mode,
    /// When the device received it.
    pub(super) since: u64,
    pub(super) follower: Follower,
    /// A step reported that it is done.
    pub(super) is_done: bool,
    /// A refused access of it was recorded.
    pub(super) has_fault: bool,
    /// The pages that it names, with the access.
    footprint: BTreeSet<(usize, Access)>,
    begun: bool,
    snapshot: Option<Snapshot>,
}

impl Submitted {
    pub(super) fn new(
        (context, ring): (ContextKey, u8),
        asked: Option<Mode>,
        program: Program,
        (places, buffers): (Places, BTreeSet<u64>),
    ) -> Self {
        let mut submitted = Self {
            context,
            ring,
            asked,
            program,
            places,
            buffers,
            stage: Stage::Outside,
            mode: Mode::Fence,
            since: 0,
            follower: Follower::default(),
            is_done: false,
            has_fault: false,
            footprint: BTreeSet::new(),
            begun: false,
            snapshot: None,
        };
        submitted.footprint = submitted.find_footprint();
        submitted
    }

    /// It may still touch memory, or is not answered yet.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(self.stage, Stage::Queued | Stage::Out)
    }

    /// Whether it names a page.
    pub(super) fn touches(&self, page: usize) -> bool {
        self.footprint.iter().any(|(other, _)| *other == page)
    }

    /// Computes the pages that it names, with the access.
    fn find_footprint(&self) -> BTreeSet<(usize, Access)> {
        let mut pages = BTreeSet::new();
        for (_, operand) in self.program.operands() {
            let Some(backing) = self.places.get(&operand.range.space.raw()) else { continue };
            let mut done = 0;
            while let Some((at, more)) = locate(backing, operand.range.address + done)
                && done < operand.range.length
            {
                let page = page_at(at);
                pages.extend(page.filter(|_| operand.access.reads()).map(|page| (page, Access::Read)));
                pages.extend(page.filter(|_| operand.access.writes()).map(|page| (page, Access::Write)));
                done += more.min(PAGE_SIZE - at.page_offset());
            }
        }
        pages
    }

    /// An engine is about to step it. Before the first step, its twin gets a copy of the memory if all pages are
    /// mapped.
    pub(super) fn steps(&mut self, guest: &Guest, memory: &Memory) {
        if !std::mem::replace(&mut self.begun, true) {
            self.snapshot = Snapshot::of(&self.footprint, guest, memory);
        }
    }

    pub(super) fn follow(&mut self, event: JobEvent<'_>, times: (Duration, Duration)) -> Result<(), String> {
        self.follower.follow((&self.program, &self.places), event, times)
    }

    /// Drops the twin: what it would compute is unknown.
    pub(super) fn disturb(&mut self) {
        self.snapshot = None;
    }

    /// Something else changes a page.
    pub(super) fn disturb_page(&mut self, page: usize) {
        self.snapshot.take_if(|snapshot| snapshot.pages.contains_key(&page));
    }

    /// Something else changes a frame.
    pub(super) fn disturb_frame(&mut self, frame: usize) {
        self.snapshot.take_if(|snapshot| snapshot.pages.values().any(|(other, _)| *other == frame));
    }

    /// A step reports that the job is done: its results must be those of its twin, unless something disturbed it.
    /// Returns whether they were compared.
    pub(super) fn done(&mut self, memory: &Memory) -> Result<bool, String> {
        self.is_done = true;
        if !self.follower.is_done(&self.program) {
            return Err(format!("The job is said to be done, and is not: {:?}", self.follower));
        }
        let Some(snapshot) = self.snapshot.take() else { return Ok(false) };
        let (places, times) = (&self.places, self.follower.times.clone().into_iter());
        let mut twin = Twin { pages: snapshot.pages, places, times };
        match interpret(&self.program, &mut twin) {
            Ok(Outcome::Done) => {}
            other => return Err(format!("The job is done, and its twin says {other:?}")),
        }
        match twin.pages.iter().find(|(_, (frame, bytes))| !memory.equals(*frame, 0, bytes)) {
            Some((page, _)) => Err(format!("Page {page} does not hold what the twin of the job left there")),
            None => Ok(true),
        }
    }
}

/// The pages of a job before its first step: frame and bytes.
#[derive(Clone, Debug)]
struct Snapshot {
    pages: BTreeMap<usize, (usize, Vec<u8>)>,
}

impl Snapshot {
    fn of(footprint: &BTreeSet<(usize, Access)>, guest: &Guest, memory: &Memory) -> Option<Self> {
        let page = |&(page, _): &(usize, Access)| {
            let frame = guest.unchanged_since(page, u64::MAX)?.frame;
            Some((page, (frame, memory.bytes(frame))))
        };
        Some(Self { pages: footprint.iter().map(page).collect::<Option<_>>()? })
    }
}

/// Memory for the naive interpreter.
struct Twin<'a, T> {
    pages: BTreeMap<usize, (usize, Vec<u8>)>,
    places: &'a Places,
    times: T,
}

impl<T> Twin<'_, T> {
    /// Calls `each` with every part of the range that lies in one page.
    fn stretches(
        &mut self,
        at: At,
        len: usize,
        mut each: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), OutOfBounds> {
        let error = OutOfBounds { range: at.range(len as u64) };
        let backing = self.places.get(&at.space.raw()).ok_or(error)?;
        let mut done = 0;
        while done < len {
            let (at, more) = locate(backing, at.address + done as u64).ok_or(error)?;
            let (start, page) = (at.page_offset() as usize, page_at(at).ok_or(error)?);
            let count = (more as usize).min(len - done).min(PAGE_SIZE as usize - start);
            let (_, bytes) = self.pages.get_mut(&page).ok_or(error)?;
            each(done, bytes.get_mut(start..start + count).ok_or(error)?);
            done += count;
        }
        Ok(())
    }
}

impl<T: Iterator<Item = u64>> twin::Memory for Twin<'_, T> {
    fn read(&mut self, at: At, into: &mut [u8]) -> Result<(), OutOfBounds> {
        let len = into.len();
        self.stretches(at, len, |done, bytes| into[done..done + bytes.len()].copy_from_slice(bytes))
    }

    fn write(&mut self, at: At, from: &[u8]) -> Result<(), OutOfBounds> {
        self.stretches(at, from.len(), |done, bytes| bytes.copy_from_slice(&from[done..done + bytes.len()]))
    }

    fn now(&mut self) -> u64 {
        self.times.next().unwrap_or_default()
    }
}
