//! The TLB of an address space: what the device remembers of the guest's page tables until the driver flushes it. It holds
//! IOVAs, never host addresses to go through: the mirror decides at each access, so a driver that forgets to flush is
//! found out, and harms no memory that it does not own. Knows entries, steps and flushes; knows nothing of walks or jobs.
//!
//! A step of a job that uses the address space registers itself, and what it has looked up stays valid for it until it
//! ends. A flush drops entries, and is over when every step that had begun before has ended. What such a step finds in the
//! page tables later is not remembered, for it may be from before.
//!
//! LOCKING: the state is a leaf of the locking order, held for one lookup, one fill or one flush.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::time::Duration;

use job_stream::address_space::LEVELS;

use super::walk::{Leaf, shift};
use crate::addr::{ByteRange, Gva, Iova, PAGE_SHIFT};
use crate::mmu::HostPage;
use crate::sync::{Arc, AtomicU64, Mutex, Ordering, lock};

/// When entries are made and dropped, apart from flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TlbPolicy {
    /// An entry stays as long as there is room, so that a flush that is missing shows at the next use.
    #[default]
    Sticky,
    /// Nothing is remembered: each step reads the page tables.
    Thrash,
    /// Each new entry drops another one, chosen by a generator with this seed, half of the time.
    Random {
        /// The seed.
        seed: u64,
    },
    /// As [`Self::Sticky`], and a walk looks up this many pages more.
    Prefetch {
        /// How many.
        pages: u8,
    },
}

/// The settings of all TLBs, and the entries that they may have together.
#[derive(Clone, Debug)]
pub(crate) struct TlbConfig {
    pub(crate) policy: TlbPolicy,
    entries: Arc<Entries>,
}

#[derive(Debug)]
struct Entries {
    used: AtomicU64,
    limit: u64,
}

impl TlbConfig {
    pub(crate) fn new(policy: TlbPolicy, limit: u64) -> Self {
        Self { policy, entries: Arc::new(Entries { used: AtomicU64::new(0), limit }) }
    }

    /// How many entries all TLBs have.
    pub(crate) fn used(&self) -> u64 {
        // ORDERING: a figure for people.
        self.entries.used.load(Ordering::Relaxed)
    }

    fn take(&self) -> bool {
        // ORDERING: Relaxed: a count that orders nothing else.
        let more = |used: u64| (used < self.entries.limit).then_some(used.saturating_add(1));
        self.entries.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    fn give_back(&self, count: usize) {
        self.entries.used.fetch_sub(count as u64, Ordering::Relaxed);
    }
}

/// A page that the TLB remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TlbEntry {
    /// The entry of the page tables that maps it. Its page may be larger than this one.
    pub(super) leaf: Leaf,
    /// The memory that the mirror had for it when it was last used.
    pub(super) host: Option<HostPage>,
    /// When it was made, in running time, and after how many flushes.
    pub(super) filled: Duration,
    pub(super) flushes: u64,
    /// When it was last compared with the page tables, and since when those say something else.
    pub(super) checked: Duration,
    pub(super) outdated: Option<Duration>,
}

/// The place where a walk starts, and when it began.
#[derive(Clone, Copy, Debug)]
pub(super) struct WalkStart {
    flushes: u64,
    /// A table that is remembered: its level and its IOVA.
    pub(super) table: Option<(u32, Iova)>,
}

/// What the TLB knows of a page.
#[derive(Clone, Copy, Debug)]
pub(super) enum Lookup {
    Hit(TlbEntry),
    Miss(WalkStart),
}

/// What a flush drops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    /// Leaves.
    Leaves,
    /// Leaves, and what is known of tables.
    All,
}

/// A step that may use what it has looked up. It has to be ended: flushes wait for it.
#[derive(Debug)]
#[must_use = "flushes wait for the end of this step"]
pub(super) struct OpenStep {
    id: u64,
    /// How many flushes had begun before it.
    pub(super) flushes: u64,
}

/// Maximum number of tables that are remembered.
const TABLES: usize = 4096;
/// Flushes that are remembered for reports, and how many of the entries that each has dropped.
const RECENT_FLUSHES: usize = 16;
const DROPPED: usize = 16;
/// Maximum number of entries that a flush drops one by one, under the lock.
const FLUSHED_ONE_BY_ONE: usize = 512;

/// The TLB of one address space.
#[derive(Debug)]
pub(crate) struct Tlb {
    config: TlbConfig,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// How many flushes have begun.
    flushes: u64,
    /// Steps that have not ended: each with the flushes that had begun before it.
    steps: Vec<(u64, u64)>,
    next_step: u64,
    /// By page number.
    pages: BTreeMap<u64, TlbEntry>,
    /// By level and by the bits of the Gva above the table.
    tables: BTreeMap<(u32, u64), Iova>,
    /// The last flushes, newest first: number, and pages with the entries that were dropped.
    recent: VecDeque<(u64, Vec<(u64, Leaf)>)>,
    random: u64,
}

impl Tlb {
    pub(super) fn new(config: TlbConfig) -> Self {
        let seed = if let TlbPolicy::Random { seed } = config.policy { seed } else { 0 };
        let state = State {
            flushes: 0,
            steps: Vec::new(),
            next_step: 0,
            pages: BTreeMap::new(),
            tables: BTreeMap::new(),
            recent: VecDeque::new(),
            // A generator of this kind must not start with 0.
            random: seed.wrapping_mul(2).wrapping_add(1),
        };
        Self { config, state: Mutex::new(state) }
    }

    pub(super) fn policy(&self) -> TlbPolicy {
        self.config.policy
    }

    pub(super) fn begin_step(&self) -> OpenStep {
        let mut state = lock(&self.state);
        let (id, flushes) = (state.next_step, state.flushes);
        state.next_step = id.wrapping_add(1);
        state.steps.push((id, flushes));
        OpenStep { id, flushes }
    }

    /// Whether a flush has begun since the step did: it may be over now.
    pub(super) fn end_step(&self, step: OpenStep) -> bool {
        let mut state = lock(&self.state);
        state.steps.retain(|(id, _)| *id != step.id);
        state.flushes != step.flushes
    }

    pub(super) fn lookup(&self, gva: Gva) -> Lookup {
        let state = lock(&self.state);
        if let Some(entry) = state.pages.get(&page_number(gva)) {
            return Lookup::Hit(*entry);
        }
        let nearest = |level: u32| Some((level, *state.tables.get(&(level, above(gva, level)))?));
        Lookup::Miss(WalkStart { flushes: state.flushes, table: (0..LEVELS).find_map(nearest) })
    }

    /// Remembers what a walk has found: a page, and the tables on the way to it, unless a flush has begun since.
    pub(super) fn fill(
        &self,
        walk: WalkStart,
        gva: Gva,
        entry: TlbEntry,
        tables: impl Iterator<Item = (u32, Iova)>,
    ) {
        if self.config.policy == TlbPolicy::Thrash {
            return;
        }
        let mut state = lock(&self.state);
        if state.flushes != walk.flushes {
            return;
        }
        if state.tables.len() >= TABLES {
            state.tables.clear();
        }
        state.tables.extend(tables.map(|(level, table)| ((level, above(gva, level)), table)));
        let number = page_number(gva);
        state.drop_page(number, &self.config);
        if matches!(self.config.policy, TlbPolicy::Random { .. }) && state.draw() & 1 == 0 {
            state.evict(&self.config);
        }
        if !self.config.take() {
            state.evict(&self.config);
            if !self.config.take() {
                return;
            }
        }
        let flushes = state.flushes;
        state.pages.insert(number, TlbEntry { flushes, ..entry });
    }

    /// Changes the entry of a page, if it is still the one that was looked up.
    pub(super) fn change(&self, gva: Gva, found: &TlbEntry, change: impl FnOnce(&mut TlbEntry)) {
        let mut state = lock(&self.state);
        if let Some(entry) = state.pages.get_mut(&page_number(gva))
            && (entry.leaf, entry.filled, entry.flushes) == (found.leaf, found.filled, found.flushes)
        {
            change(entry);
        }
    }

    /// Drops the entry of a page.
    pub(super) fn forget(&self, gva: Gva) {
        lock(&self.state).drop_page(page_number(gva), &self.config);
    }

    /// Drops what is remembered of tables on the way to a page.
    pub(super) fn forget_tables(&self, gva: Gva) {
        let mut state = lock(&self.state);
        for level in 0..LEVELS {
            state.tables.remove(&(level, above(gva, level)));
        }
    }

    /// Drops entries. The flush is over when all steps from before have ended: see [`Flush::is_over`].
    pub(crate) fn flush(this: &Arc<Self>, range: ByteRange<Gva>, what: Flushed) -> Flush {
        let mut state = lock(&this.state);
        state.flushes = state.flushes.wrapping_add(1);
        let dropped = state.take_pages(page_number(range.first())..=page_number(range.last()));
        this.config.give_back(dropped.len());
        if what == Flushed::All {
            let bits = |level| above(range.first(), level)..=above(range.last(), level);
            state.tables.retain(|(level, index), _| !bits(*level).contains(index));
        }
        let number = state.flushes;
        state.recent.truncate(RECENT_FLUSHES - 1);
        let some = dropped.iter().take(DROPPED).map(|(page, entry)| (*page, entry.leaf)).collect();
        state.recent.push_front((number, some));
        drop(state);
        // Engines need the lock, and these may be many.
        drop(dropped);
        Flush { tlb: Arc::clone(this), number }
    }

    /// Whether the last flush before an entry was made has dropped the same entry: the driver changed it only later. Known
    /// for a few pages of a few flushes.
    pub(super) fn was_flushed_before(&self, gva: Gva, entry: &TlbEntry) -> bool {
        let state = lock(&self.state);
        let dropped = (page_number(gva), entry.leaf);
        state.recent.iter().any(|(number, some)| *number == entry.flushes && some.contains(&dropped))
    }

    /// How many pages it remembers.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        lock(&self.state).pages.len()
    }
}

impl State {
    fn drop_page(&mut self, number: u64, config: &TlbConfig) {
        if self.pages.remove(&number).is_some() {
            config.give_back(1);
        }
    }

    /// Takes the entries of these pages out. If they are many, all others go with them, because engines wait for the lock
    /// in their sections.
    fn take_pages(&mut self, numbers: RangeInclusive<u64>) -> BTreeMap<u64, TlbEntry> {
        let found = self.pages.range(numbers).map(|(number, _)| *number);
        let numbers: Vec<u64> = found.take(FLUSHED_ONE_BY_ONE.saturating_add(1)).collect();
        if numbers.len() > FLUSHED_ONE_BY_ONE {
            return std::mem::take(&mut self.pages);
        }
        numbers.into_iter().filter_map(|number| self.pages.remove_entry(&number)).collect()
    }

    /// Drops a page: the one behind a place that the generator chooses.
    fn evict(&mut self, config: &TlbConfig) {
        let drawn = self.draw();
        let ends = self.pages.first_key_value().zip(self.pages.last_key_value());
        let Some(((first, _), (last, _))) = ends else { return };
        let span = last.saturating_sub(*first).saturating_add(1);
        let from = first.saturating_add(drawn.checked_rem(span).unwrap_or(0));
        let behind = self.pages.range(from..).next();
        if let Some(number) = behind.map(|(number, _)| *number) {
            self.drop_page(number, config);
        }
    }

    /// The next number of a xorshift generator.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

impl Drop for Tlb {
    fn drop(&mut self) {
        self.config.give_back(lock(&self.state).pages.len());
    }
}

/// A flush that has begun.
#[derive(Debug)]
pub(crate) struct Flush {
    tlb: Arc<Tlb>,
    number: u64,
}

impl Flush {
    /// Whether no step uses a translation from before the flush any more.
    pub(crate) fn is_over(&self) -> bool {
        lock(&self.tlb.state).steps.iter().all(|(_, flushes)| *flushes >= self.number)
    }
}

fn page_number(gva: Gva) -> u64 {
    gva.raw() >> PAGE_SHIFT
}

/// The bits of a Gva above what a table of this level maps.
fn above(gva: Gva, level: u32) -> u64 {
    gva.raw() >> shift(level.saturating_add(1))
}

#[cfg(all(test, loom))]
mod loom_models;
#[cfg(all(test, not(loom)))]
mod tests;
