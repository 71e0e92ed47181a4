//! One virtqueue as the device sees it: takes chains, copies requests in and responses out, and tracks what is in
//! flight. Every access may find a translation missing; then the ring is rewound to its previous state, the side that
//! missed waits, and the same call is repeated. It holds no section and no lock while it waits.
//!
//! LOCKING: the vring's mutex is held here for one bounded piece of work; the session takes it to start and stop the
//! ring, and waits for at most one copy.

use std::collections::{BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, TryLockError};
use std::time::{Duration, Instant};

use device_model::addr::DomainId;
use device_model::locking::lock;
use device_model::mmu::{JobMemory, Missing, RingMemory};
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use super::chain::{self, Chain, RingError, Segment};
use super::mailbox::Side;
use super::ring_event::RingEvent;
use crate::fault_injection::{Bug, Injection};
use device_model::session::miss_port::{MissAnswer, RingWait, pages_of};

/// Maximum number of descriptors of a chain: the size of the largest ring.
const MAX_CHAIN: usize = super::MAX_QUEUE_SIZE as usize;
/// How much of a request is copied before the next check that its pages are mapped.
const COPY_CHUNK: usize = 64 << 10;

/// The state of a ring that session and queue thread share.
pub struct SharedRing {
    /// Addresses and indices. It has no eventfds: it would use them under its lock.
    pub vring: VringMutex<RingMemory>,
    /// The ring was started again: its used index has to be read from guest memory.
    pub fresh: AtomicBool,
    /// The driver adds commands (VHOST_USER_SET_VRING_KICK).
    pub kick: RingEvent,
    /// The device has completed some (VHOST_USER_SET_VRING_CALL).
    pub call: RingEvent,
    /// The ring is broken (VHOST_USER_SET_VRING_ERR).
    pub error: RingEvent,
    /// Held while the driver is interrupted, so that a stopped ring interrupts it no more.
    interrupting: Mutex<()>,
    /// Number of device resets. A message about the latest may not have reached the queue thread yet.
    pub resets: AtomicU64,
}

/// How long a stop waits for an interrupt that the front-end blocks.
const BLOCKED_INTERRUPT: Duration = Duration::from_millis(50);

impl SharedRing {
    /// A ring that was not started.
    pub fn new(vring: VringMutex<RingMemory>) -> Self {
        Self {
            vring,
            fresh: AtomicBool::new(false),
            kick: RingEvent::default(),
            call: RingEvent::default(),
            error: RingEvent::default(),
            interrupting: Mutex::new(()),
            resets: AtomicU64::new(0),
        }
    }

    /// Whether the session has started and enabled it.
    pub fn is_started(&self) -> bool {
        self.locked(|vring| vring.is_enabled() && vring.get_queue().ready())
    }

    /// Waits for an interrupt that was begun before the ring was stopped. Only a front-end that makes its eventfd block
    /// in mid-write makes this last, and gets its interrupt late.
    pub fn await_interrupt(&self) {
        let begin = Instant::now();
        while let Err(TryLockError::WouldBlock) = self.interrupting.try_lock() {
            if begin.elapsed() > BLOCKED_INTERRUPT {
                return log::warn!(
                    "An interrupt was not delivered before its ring was stopped: does the front-end block its eventfd?"
                );
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Runs `work` on the vring under its lock. The session needs that lock to end cleanly, and the vring panics on a
    /// poisoned one: a panic in `work` resumes after the lock was released.
    fn locked<T>(&self, work: impl FnOnce(&mut VringState<RingMemory>) -> T) -> T {
        let mut vring = self.vring.get_mut();
        let done = catch_unwind(AssertUnwindSafe(|| work(&mut vring)));
        drop(vring);
        done.unwrap_or_else(|panic| resume_unwind(panic))
    }
}

/// A command that the device has taken and must answer. Only [`Virtqueue::complete`] accepts it back.
#[must_use = "The driver waits for every command to be answered"]
#[derive(Debug)]
pub struct Pending {
    /// The ring that it came from.
    pub queue: usize,
    head: u16,
    response: Vec<Segment>,
}

/// A command whose request is not completely copied yet.
struct Inbound {
    chain: Chain,
    /// Copied so far; copying continues behind it, so that invalidations between misses cannot prevent its end.
    request: Vec<u8>,
}

/// An answered command whose answer is not yet in guest memory.
struct Completion {
    pending: Pending,
    response: Vec<u8>,
}

/// Result of [`Virtqueue::take`].
#[derive(Debug)]
pub enum Taken {
    /// A command, with its request.
    Command(Vec<u8>, Pending),
    /// A command whose request cannot be read from guest memory.
    Unreadable(Pending),
    /// No more commands; the driver will kick the queue when it adds one.
    Empty,
    /// The driver added a command just before it saw that it has to kick: call again.
    Again,
    /// Pages are missing: request them, and call again when all were answered.
    Missing(Vec<Missing>),
    /// The ring is stopped, disabled, broken, or waits for translations.
    Idle,
    /// The ring has just broken.
    Broke(RingError),
}

/// Result of [`Virtqueue::publish`].
#[derive(Debug)]
pub enum Published {
    /// There is nothing to publish for now.
    Nothing,
    /// Pages are missing: request them, and call again when all were answered.
    Missing(Vec<Missing>),
    /// The ring has just broken.
    Broke(RingError),
}

/// The misses that one side of the ring waits for.
#[derive(Default)]
struct Wait {
    /// Number of answers still to come.
    left: usize,
    /// A missing page belongs to the ring, not to a buffer.
    in_ring: bool,
    /// One of the pages was refused.
    refused: bool,
}

/// The part of a segment that starts at `offset`.
fn rest_of(segment: Segment, offset: usize) -> Option<Segment> {
    Segment::inclusive(segment.first().checked_add(offset as u64)?, segment.last())
}

/// The device's side of one virtqueue; owned by the queue thread.
pub struct Virtqueue<'a> {
    index: usize,
    shared: &'a SharedRing,
    memory: RingMemory,
    /// Maximum length of a request in bytes.
    max_request: usize,
    injection: &'a Injection,
    /// The command taken off the ring whose request is being copied.
    inbound: Option<Inbound>,
    outbound: VecDeque<Completion>,
    /// Heads that the driver must not offer again before they are used.
    in_flight: BTreeSet<u16>,
    input: Wait,
    output: Wait,
    broken: bool,
    /// The driver has not been interrupted for something that it can find.
    owes_interrupt: bool,
    resets: u64,
    /// Number of times that it was started or enabled.
    starts: u32,
}

impl Pending {
    /// The same command, to be answered a second time: for the seeded bug "repeat fence".
    pub(super) fn again(&self) -> Self {
        Self { queue: self.queue, head: self.head, response: self.response.clone() }
    }
}

impl<'a> Virtqueue<'a> {
    /// A ring that is not started.
    pub fn new(
        (index, shared): (usize, &'a SharedRing),
        memory: RingMemory,
        max_request: usize,
        injection: &'a Injection,
    ) -> Self {
        Self {
            index,
            shared,
            memory,
            max_request,
            injection,
            inbound: None,
            outbound: VecDeque::new(),
            in_flight: BTreeSet::new(),
            input: Wait::default(),
            output: Wait::default(),
            broken: false,
            owes_interrupt: false,
            resets: 0,
            starts: 0,
        }
    }

    /// The session has started or enabled the ring: the ring waits for no miss (a stop drops all misses).
    pub fn restarted(&mut self) {
        self.starts = self.starts.wrapping_add(1);
        self.input = Wait::default();
        self.output = Wait::default();
        self.broken = false;
    }

    /// The device was reset: nothing is in flight.
    pub fn reset(&mut self) {
        self.restarted();
        self.inbound = None;
        self.outbound.clear();
        self.in_flight.clear();
        self.owes_interrupt = false;
        self.resets = self.resets.wrapping_add(1);
    }

    /// Takes the next command off the ring.
    pub fn take(&mut self) -> Taken {
        if self.broken || self.input.left > 0 {
            return Taken::Idle;
        }
        if std::mem::take(&mut self.input.refused) {
            if self.input.in_ring {
                return Taken::Broke(self.break_ring(RingError::Unmapped("read")));
            }
            if let Some(inbound) = self.inbound.take() {
                return Taken::Unreadable(self.pending(inbound.chain));
            }
        }
        match self.shared.locked(|vring| self.find_chain(vring)) {
            Ok(()) => self.copy_in(),
            Err(taken) => taken,
        }
    }

    /// Makes sure that `inbound` holds a chain, or returns why there is none.
    fn find_chain(&mut self, vring: &mut VringState<RingMemory>) -> Result<(), Taken> {
        #[cfg(test)]
        self.injection.panic_if_told("in a ring");
        if !self.is_running(vring) {
            return Err(Taken::Idle);
        }
        if self.inbound.is_none() { self.next_chain(vring) } else { Ok(()) }
    }

    /// Puts the next chain into `inbound`, or returns why there is none.
    fn next_chain(&mut self, vring: &mut VringState<RingMemory>) -> Result<(), Taken> {
        let memory = self.memory.memory();
        let queue = vring.get_queue_mut();
        let before = queue.next_avail();
        let found = chain::take(queue, memory.clone(), MAX_CHAIN);
        let missing = self.memory.take_missing();
        if !missing.is_empty() {
            // `virtio-queue` has advanced in spite of the error: the same head has to be taken again.
            queue.set_next_avail(before);
            return Err(self.input_waits(missing, true));
        }
        match found {
            Ok(Some(chain)) if !self.in_flight.insert(chain.head) => {
                Err(Taken::Broke(self.break_ring(RingError::Twice { head: chain.head })))
            }
            Ok(Some(chain)) => {
                self.inbound = Some(Inbound { chain, request: Vec::new() });
                Ok(())
            }
            Ok(None) => Err(self.wait_for_kick(vring)),
            Err(error) => Err(Taken::Broke(self.break_ring(error))),
        }
    }

    /// Enables kicks, and checks the ring once more: the driver may have added a chain before it saw that.
    fn wait_for_kick(&mut self, vring: &mut VringState<RingMemory>) -> Taken {
        let more = vring.enable_notification();
        let missing = self.memory.take_missing();
        match more {
            _ if !missing.is_empty() => self.input_waits(missing, true),
            Ok(false) => Taken::Empty,
            Ok(true) => Taken::Again,
            Err(source) => Taken::Broke(self.break_ring(RingError::Used(source))),
        }
    }

    fn copy_in(&mut self) -> Taken {
        let Some(Inbound { chain, mut request }) = self.inbound.take() else { return Taken::Idle };
        match self.read_request(&chain, &mut request) {
            Ok(true) => Taken::Command(request, self.pending(chain)),
            Ok(false) => Taken::Unreadable(self.pending(chain)),
            Err(missing) => {
                self.inbound = Some(Inbound { chain, request });
                self.input_waits(missing, false)
            }
        }
    }

    /// Reads the rest of the chain into `request`; `false` if the chain exceeds the limit, or the
    /// host has no memory for it. Allocates only for bytes
    /// whose pages were found to be mapped, one chunk at a time.
    fn read_request(&self, chain: &Chain, request: &mut Vec<u8>) -> Result<bool, Vec<Missing>> {
        let len: u128 = chain.readable.iter().map(|segment| segment.len()).sum();
        if len > self.max_request as u128 {
            return Ok(false);
        }
        let mut before = 0;
        for segment in &chain.readable {
            let end = before + segment.len() as usize;
            while request.len() < end {
                let Some(rest) = rest_of(*segment, request.len() - before) else { return Ok(false) };
                if request.try_reserve(COPY_CHUNK).is_err() {
                    return Ok(false);
                }
                self.read_chunk(rest, request)?;
            }
            before = end;
        }
        Ok(true)
    }

    /// Copies the first bytes of `rest`, or returns which of its first pages are missing.
    fn read_chunk(&self, rest: Segment, request: &mut Vec<u8>) -> Result<(), Vec<Missing>> {
        let have = request.len();
        let chunk = COPY_CHUNK.min(usize::try_from(rest.len()).unwrap_or(COPY_CHUNK));
        let section = self.memory.enter();
        let there = section.check_range(GuestAddress(rest.first().raw()), chunk, Permissions::Read);
        if there {
            request.resize(have + chunk, 0);
            if section.read(DomainId::DEVICE, rest.first(), &mut request[have..]).is_ok() {
                return Ok(());
            }
            request.truncate(have);
        }
        // Each missing page is noted when it is accessed, so that all of them are requested at once.
        let pages = Segment::new(rest.first(), chunk as u64).into_iter().flat_map(Segment::pages);
        for page in pages {
            section.check_range(GuestAddress(page.raw()), 1, Permissions::Read);
        }
        Err(self.memory.take_missing())
    }

    fn pending(&self, chain: Chain) -> Pending {
        Pending { queue: self.index, head: chain.head, response: chain.writable }
    }

    /// Answers a command. The answer reaches the guest with the next successful [`Self::publish`].
    pub fn complete(&mut self, pending: Pending, response: Vec<u8>) {
        self.outbound.push_back(Completion { pending, response });
    }

    /// Writes pending answers to guest memory, in order, and notifies the driver.
    pub fn publish(&mut self) -> Published {
        self.deliver_interrupt();
        if self.broken || self.output.left > 0 || self.outbound.is_empty() {
            return Published::Nothing;
        }
        if std::mem::take(&mut self.output.refused) {
            if self.output.in_ring {
                return Published::Broke(self.break_ring(RingError::Unmapped("write")));
            }
            // The driver has unmapped the buffer: the command is used with a length of zero.
            if let Some(front) = self.outbound.front_mut() {
                front.response.clear();
            }
        }
        let (published, notify) = self.shared.locked(|vring| {
            if !self.is_running(vring) {
                return (Published::Nothing, false);
            }
            match self.find_used_index(vring) {
                Ok(()) => self.publish_all(vring),
                Err(published) => (published, false),
            }
        });
        self.owes_interrupt |= notify;
        self.deliver_interrupt();
        published
    }

    /// Reads the used index of a ring that was started again: no MISS is served during SET_VRING_ADDR.
    fn find_used_index(&mut self, vring: &mut VringState<RingMemory>) -> Result<(), Published> {
        // ORDERING: Acquire pairs with the session's Release at the start of the ring.
        if !self.shared.fresh.load(Ordering::Acquire) {
            return Ok(());
        }
        let memory = self.memory.memory();
        let queue = vring.get_queue_mut();
        let index = queue.used_idx(&*memory, Ordering::Relaxed);
        let missing = self.memory.take_missing();
        if !missing.is_empty() {
            return Err(self.output_waits(missing, true));
        }
        match index {
            Ok(index) => queue.set_next_used(index.0),
            Err(source) => return Err(Published::Broke(self.break_ring(RingError::Used(source)))),
        }
        self.shared.fresh.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Publishes what can be published; also returns whether the driver has to be interrupted.
    fn publish_all(&mut self, vring: &mut VringState<RingMemory>) -> (Published, bool) {
        let mut any = false;
        let result = loop {
            match self.publish_one(vring) {
                Ok(true) => any = true,
                Ok(false) => break Published::Nothing,
                Err(published) => break published,
            }
        };
        (result, any && self.needs_interrupt(vring))
    }

    /// Publishes the oldest answer; `false` if there is none.
    fn publish_one(&mut self, vring: &mut VringState<RingMemory>) -> Result<bool, Published> {
        let Some(front) = self.outbound.front() else { return Ok(false) };
        let memory = self.memory.memory();
        let written = self.write_response(front).map_err(|missing| self.output_waits(missing, false))?;
        let Some(front) = self.outbound.front() else { return Ok(false) };
        let head = front.pending.head;
        let queue = vring.get_queue_mut();
        let before = queue.next_used();
        let result = queue.add_used(&*memory, head, written);
        let missing = self.memory.take_missing();
        if !missing.is_empty() {
            // `add_used` may have written the element and advanced before it missed the index: without this the head
            // would be used twice.
            queue.set_next_used(before);
            return Err(self.output_waits(missing, true));
        }
        result.map_err(|source| Published::Broke(self.break_ring(RingError::Used(source))))?;
        self.in_flight.remove(&head);
        self.outbound.pop_front();
        Ok(true)
    }

    /// Writes as much of the response as fits into the chain; returns its length.
    fn write_response(&self, completion: &Completion) -> Result<u32, Vec<Missing>> {
        let section = self.memory.enter();
        let mut rest = completion.response.as_slice();
        let mut written = 0;
        for segment in &completion.pending.response {
            let room = usize::try_from(segment.len()).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(rest.len().min(room));
            if section.write(DomainId::DEVICE, segment.first(), now).is_err() {
                return Err(self.memory.take_missing());
            }
            written += now.len() as u32;
            rest = later;
        }
        Ok(written)
    }

    fn needs_interrupt(&self, vring: &mut VringState<RingMemory>) -> bool {
        let needed = vring.needs_notification();
        // The driver's notification flags may be on a missing page. A spurious interrupt is harmless.
        let unknown = !self.memory.take_missing().is_empty();
        (unknown || needed.unwrap_or(true)) && !self.injection.fires(Bug::NoInterrupt)
    }

    /// Interrupts the driver, unless the ring is stopped; returns whether it has.
    ///
    /// LOCKING: not under the vring's mutex, which the session takes to stop the ring: the eventfd is the front-end's.
    pub fn interrupt(&self) -> bool {
        let _interrupting = lock(&self.shared.interrupting);
        let runs = self.shared.locked(|vring| self.is_running(vring));
        if runs {
            self.shared.call.signal();
        }
        runs
    }

    /// Interrupts the driver if it has not been told of something. A stop may come between a completion and its interrupt:
    /// the interrupt then follows the next start.
    fn deliver_interrupt(&mut self) {
        if self.owes_interrupt && self.interrupt() {
            self.owes_interrupt = false;
        }
    }

    /// The front-end has replaced the call eventfd of a ring that runs. An interrupt may have gone to the old one, which is
    /// read no more: the driver gets another.
    pub fn call_replaced(&mut self) {
        self.owes_interrupt = true;
    }

    /// Identifies this start of the ring in a miss request.
    pub fn wait(&self) -> RingWait {
        RingWait { queue: self.index, start: self.starts }
    }

    /// One page that a side waits for was answered; `true` if it was the last one. A page that was not answered in time
    /// is requested again: the front-end may have been stopped, and only a refusal means "not mapped".
    pub fn miss_answered(&mut self, asked: RingWait, side: Side, answer: MissAnswer) -> bool {
        if asked != self.wait() {
            return false;
        }
        let wait = match side {
            Side::Input => &mut self.input,
            Side::Output => &mut self.output,
        };
        // Without a channel, another request would get the same answer at once.
        let refused = matches!(answer, MissAnswer::Refused | MissAnswer::NoChannel);
        wait.refused |= refused && wait.left > 0;
        wait.left = wait.left.saturating_sub(1);
        wait.left == 0
    }

    /// Number of commands that the device has not answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn is_running(&self, vring: &VringState<RingMemory>) -> bool {
        // After a reset, the ring is not used before this thread has handled the message about it.
        // ORDERING: Acquire pairs with the session's Release; the vring's mutex orders the rest.
        let current = self.shared.resets.load(Ordering::Acquire) == self.resets;
        current && vring.is_enabled() && vring.get_queue().ready()
    }

    fn input_waits(&mut self, missing: Vec<Missing>, in_ring: bool) -> Taken {
        self.input = Wait { left: pages_of(&missing), in_ring, refused: false };
        Taken::Missing(missing)
    }

    fn output_waits(&mut self, missing: Vec<Missing>, in_ring: bool) -> Published {
        self.output = Wait { left: pages_of(&missing), in_ring, refused: false };
        Published::Missing(missing)
    }

    /// The caller reports the error, once it holds no lock.
    fn break_ring(&mut self, error: RingError) -> RingError {
        self.broken = true;
        error
    }

    /// Signals to the front-end that the ring is broken.
    pub fn signal_error(&self) {
        self.shared.error.signal();
    }
}

#[cfg(test)]
mod tests;
