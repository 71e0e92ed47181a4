//! How a job gets from a Gva to an Iova: through what its step has already looked up, the TLB, and the page tables, in
//! this order. A TLB entry is used as it is, as hardware would; but if the mirror has other memory at its IOVA than before,
//! or has none, or the page tables have said something else for long, the driver has forgotten a flush, and that is told.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

use job_stream::address_space::LAST_GVA;

use super::AddressSpace;
use super::fault::{CachedTranslation, FaultKind, GvaAccess, TranslationFault};
use super::tlb::{Lookup, OpenStep, TlbEntry, TlbPolicy, WalkStart};
use super::walk::{Ended, Leaf, Place, ROOT_LEVEL, walk};
use crate::addr::{Access, DomainId, Gva, Iova, PAGE_SIZE};
use crate::mmu::{HostPage, JobMemory, MemoryError};

/// How often an entry in use is compared with the page tables.
const CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// How long the page tables may contradict an entry in use before a missing flush is likely. A driver flushes at once, but
/// its processor may be busy elsewhere.
const FLUSH_IS_MISSING: Duration = Duration::from_secs(1);

/// The longest time between two checks of an entry after which the second continues the first.
const CHECKED_LATELY: Duration = Duration::from_millis(100);

/// Lookups that a step remembers.
const RECENT: usize = 2;

/// The most tables that a walk passes.
const PASSED: usize = ROOT_LEVEL as usize;

/// A job's use of an address space. A step of the job begins at its first lookup and has to be ended: flushes wait.
#[derive(Debug)]
pub(crate) struct SpaceUse {
    space: Arc<AddressSpace>,
    step: RefCell<Option<StepLookups>>,
    counts: Cell<TlbCounts>,
    /// A flush that is likely missing.
    overdue: Cell<Option<TranslationFault>>,
}

/// What a step has looked up. It stays valid until the step ends.
#[derive(Debug)]
struct StepLookups {
    open: OpenStep,
    recent: [Option<(Gva, Leaf)>; RECENT],
    has_prefetched: bool,
}

/// How often the TLB was asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlbCounts {
    /// Lookups that found an entry.
    pub hits: u64,
    /// Lookups that led to a walk.
    pub misses: u64,
}

/// How far a translation has come: what is blamed if the page that it needs is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Walked {
    /// The fault that this would be.
    pub(crate) fault: TranslationFault,
    /// The page that it needs: of a table, or of the memory itself.
    pub(crate) page: Iova,
    /// What it needs it for.
    pub(crate) accesses: &'static [Access],
    /// How many flushes of the address space had begun before this step.
    pub(crate) flushes: u64,
}

/// Why there is no translation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Untranslated {
    /// A table cannot be read.
    Memory(MemoryError, Box<Walked>),
    /// The tables do not permit the access.
    Fault(TranslationFault),
}

/// Where a Gva is, how many bytes follow in the same page, and what is blamed if it cannot be reached.
pub(crate) type Translation = (Place, u64, Option<Walked>);

/// An access in one step.
#[derive(Clone, Copy, Debug)]
struct Request {
    gva: Gva,
    access: GvaAccess,
    /// The device's running time.
    now: Duration,
}

impl SpaceUse {
    pub(crate) fn new(space: Arc<AddressSpace>) -> Self {
        Self { space, step: RefCell::default(), counts: Cell::default(), overdue: Cell::default() }
    }

    /// The address space.
    pub(crate) fn space(&self) -> &Arc<AddressSpace> {
        &self.space
    }

    /// Whether the driver answers this fault.
    pub(crate) fn raises(&self, fault: &TranslationFault) -> bool {
        self.space.answers_faults && fault.is_replayable()
    }

    /// Ends the current step, if it has looked anything up. Returns whether a flush may be over now.
    pub(crate) fn end_step(&self) -> bool {
        let step = self.step.take();
        step.is_some_and(|step| self.space.tlb.end_step(step.open))
    }

    /// How often the TLB was asked since the last call.
    pub(crate) fn take_counts(&self) -> TlbCounts {
        self.counts.take()
    }

    /// A flush that is likely missing, as found since the last call.
    pub(crate) fn take_overdue(&self) -> Option<TranslationFault> {
        self.overdue.take()
    }

    /// The page of a fault has been refused: what led there is no longer remembered.
    pub(crate) fn forget(&self, fault: &TranslationFault) {
        if fault.asid == self.space.asid {
            self.space.tlb.forget(fault.gva);
            self.space.tlb.forget_tables(fault.gva);
        }
    }

    /// Translates for an access.
    pub(crate) fn translate(
        &self,
        memory: &impl JobMemory,
        gva: Gva,
        access: GvaAccess,
        now: Duration,
    ) -> Result<Translation, Untranslated> {
        let request = Request { gva, access, now };
        if let Some(leaf) = self.recent(gva).filter(|leaf| leaf.check(access).is_ok()) {
            return Ok(self.result(request, leaf, None));
        }
        match self.space.tlb.lookup(gva) {
            Lookup::Hit(entry) if entry.leaf.check(access).is_ok() => self.hit(memory, request, entry),
            // The tables may permit more by now: that needs no flush.
            Lookup::Hit(_) => {
                self.space.tlb.forget(gva);
                match self.space.tlb.lookup(gva) {
                    Lookup::Miss(start) => self.miss(memory, request, start),
                    // Another engine has been faster, perhaps with what it had read before: the tables decide.
                    Lookup::Hit(_) => {
                        let found = self.walk_all(memory, gva);
                        let leaf = found.map_err(|ended| self.untranslated(request, ended, None))?;
                        self.permitted(request, leaf, None)
                    }
                }
            }
            Lookup::Miss(start) => self.miss(memory, request, start),
        }
    }

    /// Translates without remembering it, for a page that may be needed soon.
    pub(crate) fn peek(
        &self,
        memory: &impl JobMemory,
        gva: Gva,
        access: GvaAccess,
    ) -> Result<Translation, Untranslated> {
        let request = Request { gva, access, now: Duration::ZERO };
        self.recent(gva);
        let leaf = match self.space.tlb.lookup(gva) {
            Lookup::Hit(entry) => entry.leaf,
            Lookup::Miss(_) => {
                self.walk_all(memory, gva).map_err(|ended| self.untranslated(request, ended, None))?
            }
        };
        self.permitted(request, leaf, None)
    }

    /// What this step has looked up for the page before. Begins the step if it has not begun.
    fn recent(&self, gva: Gva) -> Option<Leaf> {
        let mut step = self.step.borrow_mut();
        let begin = || StepLookups {
            open: self.space.tlb.begin_step(),
            recent: [None; RECENT],
            has_prefetched: false,
        };
        let recent = step.get_or_insert_with(begin).recent;
        recent.into_iter().flatten().find(|(page, _)| *page == gva.page()).map(|(_, leaf)| leaf)
    }

    fn note(&self, gva: Gva, leaf: Leaf) {
        if let Some(step) = &mut *self.step.borrow_mut() {
            step.recent.rotate_right(1);
            step.recent[0] = Some((gva.page(), leaf));
        }
    }

    fn count(&self, add: impl FnOnce(&mut TlbCounts)) {
        let mut counts = self.counts.get();
        add(&mut counts);
        self.counts.set(counts);
    }

    /// The TLB has the page.
    fn hit(
        &self,
        memory: &impl JobMemory,
        request: Request,
        entry: TlbEntry,
    ) -> Result<Translation, Untranslated> {
        let Request { gva, access, now } = request;
        self.count(|counts| counts.hits = counts.hits.saturating_add(1));
        let (Place::Iova(at), _) = entry.leaf.place(gva) else {
            self.note(gva, entry.leaf);
            return Ok(self.result(request, entry.leaf, None));
        };
        let Some(host) = behind(memory, at, access) else {
            // It is about to be requested. If it is refused, this says what led there.
            let is_gone = entry.host.is_some() && behind(memory, at, GvaAccess::Read).is_none();
            let cached = Some(self.compare(memory, request, entry));
            let cached = cached.filter(|cached| cached.contradicts || is_gone);
            return Ok(self.result(request, entry.leaf, cached));
        };
        let has_moved = entry.host.is_some_and(|before| host.differs(before));
        if has_moved {
            let cached = self.compare(memory, request, entry);
            let fault = self.fault(request, FaultKind::Moved, entry.leaf, Some(cached));
            if cached.contradicts {
                self.space.tlb.forget(gva);
                return Err(Untranslated::Fault(fault));
            }
            // The page tables say the same, so a walk would lead there too. But a flush should have come before.
            self.overdue.set(Some(fault));
        }
        if entry.host != Some(host) {
            self.space.tlb.change(gva, &entry, |entry| entry.host = Some(host));
        }
        if now.saturating_sub(entry.checked) >= CHECK_INTERVAL {
            self.check(memory, request, entry);
        }
        self.note(gva, entry.leaf);
        Ok(self.result(request, entry.leaf, None))
    }

    /// Compares an entry that is in use with the page tables.
    fn check(&self, memory: &impl JobMemory, request: Request, entry: TlbEntry) {
        let Request { gva, now, .. } = request;
        let cached = self.compare(memory, request, entry);
        // Between two uses that are far apart, the tables may have been right again.
        let since = entry.outdated.filter(|_| now.saturating_sub(entry.checked) <= CHECKED_LATELY);
        let outdated = cached.contradicts.then(|| since.unwrap_or(now));
        let is_overdue = outdated.is_some_and(|since| now.saturating_sub(since) >= FLUSH_IS_MISSING);
        if is_overdue {
            self.overdue.set(Some(self.fault(request, FaultKind::NotFlushed, entry.leaf, Some(cached))));
        }
        self.space.tlb.change(gva, &entry, |entry| {
            entry.checked = now;
            // Told once in a while, not at each step.
            entry.outdated = outdated.filter(|_| !is_overdue);
        });
    }

    /// What the page tables say of an entry.
    fn compare(&self, memory: &impl JobMemory, request: Request, entry: TlbEntry) -> CachedTranslation {
        let Request { gva, now, .. } = request;
        let found = self.walk_all(memory, gva);
        let (tables, contradicts) = match found {
            Ok(leaf) => (Some(leaf.pte), !entry.leaf.is_within(leaf, gva)),
            Err(Ended::At { pte, .. }) => (Some(pte), true),
            Err(Ended::Unread { .. }) => (None, false),
        };
        let after_flush = self.space.tlb.was_flushed_before(gva, &entry);
        let age = now.saturating_sub(entry.filled);
        CachedTranslation { age_ns: Some(nanoseconds(age)), tables, contradicts, after_flush }
    }

    /// The TLB does not have the page: walks, and remembers what that finds.
    fn miss(
        &self,
        memory: &impl JobMemory,
        request: Request,
        start: WalkStart,
    ) -> Result<Translation, Untranslated> {
        self.count(|counts| counts.misses = counts.misses.saturating_add(1));
        let leaf = self.walk_and_fill(memory, request, start);
        let leaf = leaf.map_err(|ended| self.unreadable(memory, request, start, ended))?;
        let translation = self.permitted(request, leaf, None)?;
        self.note(request.gva, leaf);
        if let TlbPolicy::Prefetch { pages } = self.space.tlb.policy()
            && self.may_prefetch()
        {
            self.prefetch(memory, request, pages);
        }
        Ok(translation)
    }

    fn walk_and_fill(
        &self,
        memory: &impl JobMemory,
        request: Request,
        start: WalkStart,
    ) -> Result<Leaf, Ended> {
        let Request { gva, access, now } = request;
        let (mut tables, mut count) = ([(0, Iova::new(0)); PASSED], 0);
        let mut walk_from = |from| {
            count = 0;
            walk(memory, from, gva, |level, table| {
                if let Some(passed) = tables.get_mut(count) {
                    *passed = (level, table);
                    count = count.saturating_add(1);
                }
            })
        };
        let root = (ROOT_LEVEL, self.space.root);
        let mut found = walk_from(start.table.unwrap_or(root));
        // What is remembered of tables may be old, as hardware's is: a fault makes it walk again.
        if start.table.is_some() && matches!(found, Err(Ended::At { .. })) {
            self.space.tlb.forget_tables(gva);
            found = walk_from(root);
        }
        let leaf = found?;
        let host = match leaf.place(gva) {
            (Place::Iova(at), _) => behind(memory, at, access),
            (Place::Null, _) => None,
        };
        let entry = TlbEntry { leaf, host, filled: now, flushes: 0, checked: now, outdated: None };
        self.space.tlb.fill(start, gva, entry, tables.into_iter().take(count));
        Ok(leaf)
    }

    /// Once a step, which is bounded.
    fn may_prefetch(&self) -> bool {
        let mut step = self.step.borrow_mut();
        step.as_mut().is_some_and(|step| !std::mem::replace(&mut step.has_prefetched, true))
    }

    /// Looks up the pages behind this one too, as far as the tables can be read and map them.
    fn prefetch(&self, memory: &impl JobMemory, request: Request, pages: u8) {
        let mut gva = request.gva.page();
        for _ in 0..pages {
            let next = gva.checked_add(PAGE_SIZE).filter(|next| next.raw() <= LAST_GVA);
            let Some(next) = next else { return };
            gva = next;
            if let Lookup::Miss(start) = self.space.tlb.lookup(gva)
                && self.walk_and_fill(memory, Request { gva, ..request }, start).is_err()
            {
                return;
            }
        }
    }

    fn walk_all(&self, memory: &impl JobMemory, gva: Gva) -> Result<Leaf, Ended> {
        walk(memory, (ROOT_LEVEL, self.space.root), gva, |_, _| {})
    }

    fn permitted(
        &self,
        request: Request,
        leaf: Leaf,
        cached: Option<CachedTranslation>,
    ) -> Result<Translation, Untranslated> {
        leaf.check(request.access)
            .map_err(|kind| Untranslated::Fault(self.fault(request, kind, leaf, cached)))?;
        Ok(self.result(request, leaf, cached))
    }

    fn result(&self, request: Request, leaf: Leaf, cached: Option<CachedTranslation>) -> Translation {
        let (place, rest) = leaf.place(request.gva);
        let walked = match place {
            Place::Iova(at) => {
                let fault = self.fault(request, FaultKind::Refused, leaf, cached);
                Some(self.walked(fault, at, request.access.accesses()))
            }
            Place::Null => None,
        };
        (place, rest, walked)
    }

    /// As [`Self::untranslated`]. If the walk began at a table that was remembered, and the root does not lead to that table
    /// any more, the fault says so.
    fn unreadable(
        &self,
        memory: &impl JobMemory,
        request: Request,
        start: WalkStart,
        ended: Ended,
    ) -> Untranslated {
        let cached = match ended {
            Ended::Unread { .. } if start.table.is_some() => {
                let now = self.walk_all(memory, request.gva);
                let tables = match now {
                    Ok(leaf) => Some(leaf.pte),
                    Err(Ended::At { pte, .. }) => Some(pte),
                    Err(Ended::Unread { .. }) => None,
                };
                let contradicts = now != Err(ended);
                Some(CachedTranslation { age_ns: None, tables, contradicts, after_flush: false })
            }
            _ => None,
        };
        self.untranslated(request, ended, cached.filter(|cached| cached.contradicts))
    }

    fn untranslated(
        &self,
        request: Request,
        ended: Ended,
        cached: Option<CachedTranslation>,
    ) -> Untranslated {
        match ended {
            Ended::Unread { entry, level, error } => {
                let leaf = Leaf { level, pte: 0 };
                let fault = self.fault(request, FaultKind::Refused, leaf, cached);
                Untranslated::Memory(error, Box::new(self.walked(fault, entry, &[Access::Read])))
            }
            Ended::At { kind, level, pte } => {
                Untranslated::Fault(self.fault(request, kind, Leaf { level, pte }, None))
            }
        }
    }

    fn walked(&self, fault: TranslationFault, at: Iova, accesses: &'static [Access]) -> Walked {
        let flushes = self.step.borrow().as_ref().map_or(0, |step| step.open.flushes);
        Walked { fault, page: at.page(), accesses, flushes }
    }

    fn fault(
        &self,
        Request { gva, access, .. }: Request,
        kind: FaultKind,
        Leaf { level, pte }: Leaf,
        cached: Option<CachedTranslation>,
    ) -> TranslationFault {
        TranslationFault { asid: self.space.asid, gva, access, kind, level, pte, cached }
    }
}

/// The memory behind an IOVA; `None`: this access would miss.
fn behind(memory: &impl JobMemory, at: Iova, access: GvaAccess) -> Option<HostPage> {
    access
        .accesses()
        .iter()
        .try_fold(None, |_, access| memory.host_page(DomainId::DEVICE, at, *access).map(Some))?
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(all(test, not(loom)))]
mod tests;
