//! Misses: which pages have been requested, for whom, and what the answers mean. A state machine of values; time is a
//! parameter. Knows nothing of sockets: its user sends the misses that it returns, and passes on the answers.
//!
//! An UPDATE names no request, and the reply to its MISS comes on another socket. So misses are answered in the order
//! in which they were sent. An UPDATE belongs to the oldest unanswered miss and is only *staged* until the reply says
//! success. What is then mapped has the permission that this MISS asked for, whatever the UPDATE claimed (I7).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::{HostRange, Missing, Permissions};
use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use crate::running_clock::RunningClock;

/// How long a front-end may stall, beyond the first timeout, before its misses time out.
const LONGEST_STILL: Duration = Duration::from_secs(60);
/// The most misses that are sent and not answered: fewer than fill the channel's socket (278).
pub const MISS_WINDOW: usize = 128;
/// The most distinct misses in the table; requests beyond that wait as ranges.
pub const MISS_LIMIT: usize = 4096;

/// A request for one page and one permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MissRequest {
    /// The address space.
    pub space: DomainId,
    /// The permission: one of the two, never both (QEMU checks a request for both as a write only).
    pub access: Access,
    /// The first address of the page.
    pub iova: Iova,
}

impl MissRequest {
    /// The page as a range.
    pub fn range(self) -> ByteRange<Iova> {
        self.iova.page_range()
    }

    /// The page in the form in which an access reports it.
    pub fn missing(self) -> Missing {
        Missing { space: self.space, range: self.range(), access: self.access }
    }
}

/// What a request did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requested {
    /// The page had not been requested: it is queued.
    Queued,
    /// It had been requested: the waiter waits for the same answer.
    Joined,
}

/// What an UPDATE belongs to. It is acked as good in each case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpdateVerdict {
    /// The oldest miss: kept until its reply.
    Staged,
    /// A miss from before [`MissTable::clear`]: not to be cached.
    Stale,
    /// No miss: not to be cached.
    Unsolicited,
}

/// What a reply meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer<W> {
    /// The oldest miss is settled.
    Resolved(Resolution<W>),
    /// Its miss has to be sent again, and is queued: its UPDATE was invalidated or did not cover the page.
    AskedAgain,
    /// It was the reply to a miss from before [`MissTable::clear`].
    Stale,
    /// No miss was sent: an error of the front-end.
    Unexpected,
}

/// A settled miss.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolution<W> {
    /// What was requested.
    pub request: MissRequest,
    /// Who waited, in order, and for which page: this one, or another that a large UPDATE has settled with it. May be
    /// empty.
    pub waiters: Vec<(MissRequest, W)>,
    /// The outcome.
    pub outcome: Outcome,
}

/// The outcome of a miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The range has to be mapped, then the waiters go on.
    Mapped {
        /// What the UPDATE covered.
        range: ByteRange<Iova>,
        /// The host memory.
        host: HostRange,
        /// What the MISS proved.
        permissions: Permissions,
    },
    /// The guest's IOMMU has no such mapping: a page fault of the device.
    Refused,
    /// It was granted twice, and no UPDATE covered the page. The waiters treat it like a refusal.
    NotCovered,
    /// The front-end did not answer in time.
    TimedOut,
    /// There is no channel to send it on.
    NoChannel,
}

/// A staged translation: it waits for the reply to its miss.
#[derive(Clone, Copy, Debug)]
struct Staged {
    range: ByteRange<Iova>,
    host: HostRange,
    claimed: Permissions,
}

/// A miss that is not settled.
#[derive(Debug)]
struct Miss<W> {
    waiters: Vec<W>,
    sent: bool,
    /// One answer that did not cover the page has come.
    fell_short: bool,
    /// In running time (see [`MissTable::pause`]).
    deadline: Duration,
}

/// A miss that was sent, in the order of sending.
#[derive(Debug)]
struct Sent {
    /// `None`: it is from before a clear, and its answer is dropped.
    request: Option<MissRequest>,
    staged: Option<Staged>,
    /// Its UPDATE came, and was invalidated.
    invalidated: bool,
}

/// All misses of a session. `W` identifies a waiter.
#[derive(Debug)]
pub struct MissTable<W> {
    misses: BTreeMap<MissRequest, Miss<W>>,
    /// Requests that do not fit into `misses` yet, oldest first.
    waiting: VecDeque<(Missing, W)>,
    queue: VecDeque<MissRequest>,
    sent: VecDeque<Sent>,
    /// The deadline of each miss that has a waiter.
    deadlines: BTreeSet<(Duration, MissRequest)>,
    /// Stands still while a reply to the front-end is pending, for it cannot answer misses then.
    clock: RunningClock,
    /// When the front-end last answered or was last found stalled, in running time.
    answered: Duration,
    /// The start of the current stall, in running time. `None`: it was not found stalled.
    still_since: Option<Duration>,
    timeout: Duration,
}

impl<W: Copy + PartialEq> MissTable<W> {
    /// An empty table; an unanswered miss times out after `timeout`.
    pub fn new(timeout: Duration) -> Self {
        Self {
            misses: BTreeMap::new(),
            waiting: VecDeque::new(),
            queue: VecDeque::new(),
            sent: VecDeque::new(),
            deadlines: BTreeSet::new(),
            clock: RunningClock::default(),
            answered: Duration::ZERO,
            still_since: None,
            timeout,
        }
    }

    /// `waiter` needs every page of `missing`. They are requested in order, as room allows.
    pub fn ask(&mut self, now: Duration, missing: Missing, waiter: W) {
        self.waiting.push_back((missing, waiter));
        self.admit(now);
    }

    /// Moves waiting pages into the table, as far as there is room.
    fn admit(&mut self, now: Duration) {
        while self.misses.len() < MISS_LIMIT
            && let Some((missing, waiter)) = self.waiting.pop_front()
        {
            let first = missing.range.first();
            self.request(now, missing.space, first, missing.access, waiter);
            let next = first.page_range().last().checked_add(1);
            let rest = next.and_then(|next| ByteRange::inclusive(next, missing.range.last()));
            if let Some(range) = rest {
                self.waiting.push_front((Missing { range, ..missing }, waiter));
            }
        }
    }

    /// `waiter` needs the page of `iova` for `access`. A page and permission is requested only once at a time.
    pub fn request(
        &mut self,
        now: Duration,
        space: DomainId,
        iova: Iova,
        access: Access,
        waiter: W,
    ) -> Requested {
        let request = MissRequest { space, access, iova: iova.page() };
        if let Some(miss) = self.misses.get_mut(&request) {
            let given_up = miss.waiters.is_empty();
            if !miss.waiters.contains(&waiter) {
                miss.waiters.push(waiter);
            }
            if given_up {
                self.start_clock(now, request);
            }
            return Requested::Joined;
        }
        let miss = Miss { waiters: vec![waiter], sent: false, fell_short: false, deadline: Duration::ZERO };
        self.misses.insert(request, miss);
        self.queue.push_back(request);
        self.start_clock(now, request);
        Requested::Queued
    }

    /// The next miss to send, if the window has room; it counts as sent.
    pub fn next_to_send(&mut self, now: Duration) -> Option<MissRequest> {
        self.admit(now);
        if self.sent.len() >= MISS_WINDOW {
            return None;
        }
        let request = self.queue.pop_front()?;
        if let Some(miss) = self.misses.get_mut(&request) {
            miss.sent = true;
        }
        self.sent.push_back(Sent { request: Some(request), staged: None, invalidated: false });
        Some(request)
    }

    /// A valid UPDATE came. It belongs to the oldest miss, or to none.
    pub fn on_update(
        &mut self,
        range: ByteRange<Iova>,
        host: HostRange,
        claimed: Permissions,
    ) -> UpdateVerdict {
        let Some(head) = self.sent.front_mut() else { return UpdateVerdict::Unsolicited };
        let Some(request) = head.request else { return UpdateVerdict::Stale };
        if !range.overlaps(page(request.iova)) {
            return UpdateVerdict::Unsolicited;
        }
        head.staged = Some(Staged { range, host, claimed });
        head.invalidated = false;
        UpdateVerdict::Staged
    }

    /// The reply to the oldest miss came: success, or refused.
    pub fn on_reply(&mut self, now: Duration, success: bool) -> Answer<W> {
        let Some(head) = self.sent.pop_front() else { return Answer::Unexpected };
        self.still_since = None;
        self.answered = self.clock.running(now);
        let Some(request) = head.request else { return Answer::Stale };
        if !success {
            return self.settle(request, Outcome::Refused);
        }
        let covers = |staged: &Staged| {
            let whole = staged.range.whole_pages();
            whole.is_some_and(|pages| pages.contains(request.iova)) && staged.claimed.allow(request.access)
        };
        match head.staged.filter(covers) {
            Some(Staged { range, host, .. }) => {
                self.settle(request, Outcome::Mapped { range, host, permissions: request.access.into() })
            }
            None if head.invalidated || self.falls_short_first(request) => {
                self.ask_again(request);
                self.start_clock(now, request);
                Answer::AskedAgain
            }
            None => self.settle(request, Outcome::NotCovered),
        }
    }

    /// An invalidation began: discards what is staged of its range. Its miss is sent again when the reply comes.
    pub fn invalidate(&mut self, space: DomainId, range: ByteRange<Iova>) {
        for sent in &mut self.sent {
            let of_space = sent.request.is_some_and(|request| request.space == space);
            if of_space && sent.staged.is_some_and(|staged| staged.range.page_aligned().overlaps(range)) {
                sent.staged = None;
                sent.invalidated = true;
            }
        }
    }

    /// When [`Self::expire`] has to be called next; never while paused.
    pub fn next_deadline(&self) -> Option<Duration> {
        let (deadline, _) = self.deadlines.first()?;
        self.clock.when(self.not_while_answering(*deadline))
    }

    /// Whether [`Self::expire`] would time anything out now.
    pub fn is_due(&self, now: Duration) -> bool {
        self.next_deadline().is_some_and(|deadline| deadline <= now)
    }

    /// The front-end has not even read what it was sent: it is stalled, not late. Restarts the timeout, but not for
    /// ever, since the front-end may never read again. Returns whether it did.
    pub fn put_off(&mut self, now: Duration) -> bool {
        let running = self.clock.running(now);
        let since = *self.still_since.get_or_insert(running);
        let bears = running.saturating_sub(since) < LONGEST_STILL;
        if bears {
            self.answered = running;
        }
        bears
    }

    /// The front-end has read all that it was sent. If it was last found stalled, it gets the whole timeout from now
    /// on. Returns whether it does.
    pub fn reads_again(&mut self, now: Duration) -> bool {
        let stood_still = self.still_since.take().is_some();
        if stood_still {
            self.answered = self.clock.running(now);
        }
        stood_still
    }

    /// Times out what was not answered in time. A late answer can still be put into the mirror.
    pub fn expire(&mut self, now: Duration) -> Vec<Resolution<W>> {
        let running = self.clock.running(now);
        let mut given_up = Vec::new();
        if running < self.not_while_answering(Duration::ZERO) {
            return given_up;
        }
        while let Some(&(_, request)) = self.deadlines.first().filter(|(deadline, _)| *deadline <= running) {
            self.stop_clock(request);
            let Some(miss) = self.misses.get_mut(&request) else { continue };
            let waiters =
                std::mem::take(&mut miss.waiters).into_iter().map(|waiter| (request, waiter)).collect();
            if !miss.sent {
                self.remove_queued(|queued| *queued == request);
            }
            given_up.push(Resolution { request, waiters, outcome: Outcome::TimedOut });
        }
        given_up
    }

    /// A reply to the front-end on the main socket is pending: it cannot answer misses, so the timeout stands still.
    pub fn pause(&mut self, now: Duration) {
        self.clock.pause(now);
    }

    /// No reply is pending any more.
    pub fn resume(&mut self, now: Duration) {
        self.clock.resume(now);
    }

    /// The device stops: forgets everything, with its waiters. Replies that are still due are dropped when they come.
    pub fn clear(&mut self) {
        self.misses.clear();
        self.waiting.clear();
        self.queue.clear();
        self.deadlines.clear();
        for sent in &mut self.sent {
            *sent = Sent { request: None, staged: None, invalidated: false };
        }
    }

    /// The channel is gone: ends all requests. Replies that were due will not come.
    pub fn channel_lost(&mut self) -> Vec<Resolution<W>> {
        self.sent.clear();
        self.queue.clear();
        self.deadlines.clear();
        let mut lost: Vec<(MissRequest, Vec<W>)> = std::mem::take(&mut self.misses)
            .into_iter()
            .map(|(request, miss)| (request, miss.waiters))
            .collect();
        for (missing, waiter) in self.waiting.drain(..) {
            let request = |iova| MissRequest { space: missing.space, access: missing.access, iova };
            lost.extend(missing.pages().map(|iova| (request(iova), vec![waiter])));
        }
        let end = |(request, waiters): (MissRequest, Vec<W>)| Resolution {
            request,
            waiters: waiters.into_iter().map(|waiter| (request, waiter)).collect(),
            outcome: Outcome::NoChannel,
        };
        lost.into_iter().map(end).collect()
    }

    /// The channel was replaced: replies that were due will not come. What is still wanted is queued again.
    pub fn channel_replaced(&mut self) {
        for sent in std::mem::take(&mut self.sent).into_iter().rev() {
            if let Some(request) = sent.request {
                self.ask_again(request);
            }
        }
    }

    /// Misses that are sent and not answered, including those from before a clear.
    pub fn outstanding(&self) -> usize {
        self.sent.len()
    }

    /// What is requested or about to be, and who waits for it.
    pub fn pending(&self) -> impl Iterator<Item = (MissRequest, &[W])> {
        self.misses.iter().map(|(request, miss)| (*request, miss.waiters.as_slice()))
    }

    /// Whether there is nothing to send and nothing to wait for.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.sent.is_empty() && self.waiting.is_empty()
    }

    /// Ends a miss. A large UPDATE also ends the unsent ones that it covers.
    fn settle(&mut self, request: MissRequest, outcome: Outcome) -> Answer<W> {
        self.stop_clock(request);
        let waiters = self.misses.remove(&request).map(|miss| miss.waiters).unwrap_or_default();
        let mut waiters: Vec<_> = waiters.into_iter().map(|waiter| (request, waiter)).collect();
        if let Outcome::Mapped { range, .. } = outcome
            && let Some(pages) = range.whole_pages()
        {
            waiters.extend(self.remove_queued(|queued| covered(*queued, request, pages)));
        }
        Answer::Resolved(Resolution { request, waiters, outcome })
    }

    /// Whether this is the first answer to `request` that did not cover its page.
    fn falls_short_first(&mut self, request: MissRequest) -> bool {
        let miss = self.misses.get_mut(&request);
        miss.is_some_and(|miss| !std::mem::replace(&mut miss.fell_short, true))
    }

    /// Queues a sent miss again, before all others, or forgets it if it has no waiter any more.
    fn ask_again(&mut self, request: MissRequest) {
        let Some(miss) = self.misses.get_mut(&request) else { return };
        if miss.waiters.is_empty() {
            self.misses.remove(&request);
        } else {
            miss.sent = false;
            self.queue.push_front(request);
        }
    }

    /// Removes queued misses; returns their waiters.
    fn remove_queued(&mut self, mut which: impl FnMut(&MissRequest) -> bool) -> Vec<(MissRequest, W)> {
        let mut removed = Vec::new();
        let (misses, deadlines) = (&mut self.misses, &mut self.deadlines);
        self.queue.retain(|request| {
            let miss = if which(request) { misses.remove(request) } else { return true };
            if let Some(miss) = miss {
                deadlines.remove(&(miss.deadline, *request));
                removed.extend(miss.waiters.into_iter().map(|waiter| (*request, waiter)));
            }
            false
        });
        removed
    }

    /// A miss may wait longer than the timeout behind a thousand others that are answered one by one. So none is late
    /// until the front-end has been silent for the timeout. (It answers in order, so it cannot skip a single miss.)
    fn not_while_answering(&self, deadline: Duration) -> Duration {
        deadline.max(self.answered.saturating_add(self.timeout))
    }

    /// Restarts the timeout of `request`.
    fn start_clock(&mut self, now: Duration, request: MissRequest) {
        self.stop_clock(request);
        let deadline = self.clock.running(now).saturating_add(self.timeout);
        if let Some(miss) = self.misses.get_mut(&request) {
            miss.deadline = deadline;
            self.deadlines.insert((deadline, request));
        }
    }

    fn stop_clock(&mut self, request: MissRequest) {
        if let Some(miss) = self.misses.get(&request) {
            self.deadlines.remove(&(miss.deadline, request));
        }
    }
}

fn covered(other: MissRequest, answered: MissRequest, pages: ByteRange<Iova>) -> bool {
    other.space == answered.space && other.access == answered.access && pages.contains(other.iova)
}

fn page(iova: Iova) -> ByteRange<Iova> {
    ByteRange::new(iova, PAGE_SIZE).unwrap_or(ByteRange::everything())
}

#[cfg(test)]
mod tests;
