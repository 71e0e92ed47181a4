//! One virtqueue as the device sees it: takes chains, copies requests in and responses out, and keeps what is in
//! flight. Every access may find a translation missing; then the ring is rewound to where it was, the side that
//! missed waits, and the same call is made again. Nothing is held while it waits: no section and no lock.
//!
//! LOCKING: the vring's mutex is taken here for one bounded piece of work; the session takes it to start and stop
//! the ring, and finds it free within one copy.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use device_model::addr::SpaceId;
use device_model::locking::lock;
use device_model::mmu::{JobMemory, Missing, RingMemory};
use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory, Permissions};

use super::chain::{self, Chain, RingError, Segment};
use super::mailbox::Side;
use crate::faults::{Bug, Injection};
use device_model::session::miss_port::{MissAnswer, RingWait, pages_of};

/// Most descriptors of a chain: as many as the largest ring has.
const MAX_CHAIN: usize = super::MAX_QUEUE_SIZE as usize;
/// How much of a request is copied before the next look at whether it is there.
const COPY_CHUNK: usize = 64 << 10;

/// What the session and the queue thread share of a ring.
pub struct SharedRing {
    /// Addresses, indices, kick and call.
    pub vring: VringMutex<RingMemory>,
    /// The ring was started anew: its used index has to be read from the guest.
    pub fresh: AtomicBool,
    /// The front-end's error eventfd (VHOST_USER_SET_VRING_ERR), which `VringState` takes but does not show.
    pub error_event: Mutex<Option<File>>,
    /// How often the device was reset: mail about it may still be on its way to the queue thread.
    pub resets: AtomicU64,
}

impl SharedRing {
    /// Looks at the vring, or changes it, under its lock. The session needs that lock to end in good order, and the vring
    /// does not bear with a poisoned one: a panic goes on after the lock was given back.
    fn locked<T>(&self, work: impl FnOnce(&mut VringState<RingMemory>) -> T) -> T {
        let mut vring = self.vring.get_mut();
        let done = catch_unwind(AssertUnwindSafe(|| work(&mut vring)));
        drop(vring);
        done.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Tells the front-end that the ring is broken.
    fn signal_error(&self) {
        let event = lock(&self.error_event);
        if let Some(mut event) = event.as_ref() {
            // A full counter has been heard of already, and a closed one by nobody.
            let _ = event.write(&1u64.to_ne_bytes());
        }
    }
}

/// A command that the device has taken and owes an answer. Only [`Virtqueue::complete`] takes it back.
#[must_use = "The driver waits for every command to be answered"]
#[derive(Debug)]
pub struct Pending {
    /// The ring that it came from.
    pub queue: usize,
    head: u16,
    response: Vec<Segment>,
}

/// A command whose request is not yet copied as a whole.
struct Inbound {
    chain: Chain,
    /// What has been copied: it goes on behind that, so that flushes between its misses do not keep it from its end.
    request: Vec<u8>,
}

/// A command that is answered; the answer is on its way to the guest.
struct Completion {
    pending: Pending,
    response: Vec<u8>,
}

/// What [`Virtqueue::take`] found.
#[derive(Debug)]
pub enum Taken {
    /// A command, with its request.
    Command(Vec<u8>, Pending),
    /// A command whose request cannot be read.
    Unreadable(Pending),
    /// No more commands; the driver will kick.
    Empty,
    /// The driver offered a command in the last moment: call again.
    Again,
    /// Pages are missing: ask for them, and call again when all are answered.
    Missing(Vec<Missing>),
    /// The ring is stopped, disabled, broken, or waits for translations.
    Idle,
    /// The ring has just broken.
    Broke(RingError),
}

/// What [`Virtqueue::publish`] came to.
#[derive(Debug)]
pub enum Published {
    /// Nothing is left to be published for now.
    Nothing,
    /// Pages are missing: ask for them, and call again when all are answered.
    Missing(Vec<Missing>),
    /// The ring has just broken.
    Broke(RingError),
}

/// What a side of the ring waits for.
#[derive(Default)]
struct Wait {
    /// Answers still to come.
    left: usize,
    /// What is missing is part of the ring, not of a buffer.
    in_ring: bool,
    /// One of the answers was no.
    refused: bool,
}

/// The part of a segment from `offset` on.
fn rest_of(segment: Segment, offset: usize) -> Option<Segment> {
    Segment::inclusive(segment.first().checked_add(offset as u64)?, segment.last())
}

/// The device's side of one virtqueue; owned by the queue thread.
pub struct Virtqueue<'a> {
    index: usize,
    shared: &'a SharedRing,
    memory: RingMemory,
    /// Bytes of the largest request.
    max_request: usize,
    injection: &'a Injection,
    /// Taken off the ring; its request is being copied.
    inbound: Option<Inbound>,
    outbound: VecDeque<Completion>,
    /// Heads that the driver must not offer again before they are used.
    in_flight: BTreeSet<u16>,
    input: Wait,
    output: Wait,
    broken: bool,
    resets: u64,
    /// How often it was started or enabled.
    starts: u32,
}

impl Pending {
    /// The seeded bug "repeat fence": the same command, to be answered a second time.
    pub(super) fn again(&self) -> Self {
        Self { queue: self.queue, head: self.head, response: self.response.clone() }
    }
}

impl<'a> Virtqueue<'a> {
    /// A ring that has not started.
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
            resets: 0,
            starts: 0,
        }
    }

    /// The session started or enabled the ring: what it waited for is forgotten (a stop forgets all misses).
    pub fn restarted(&mut self) {
        self.starts = self.starts.wrapping_add(1);
        self.input = Wait::default();
        self.output = Wait::default();
        self.broken = false;
    }

    /// The device was reset: nothing is in flight any more.
    pub fn reset(&mut self) {
        self.restarted();
        self.inbound = None;
        self.outbound.clear();
        self.in_flight.clear();
        self.resets = self.resets.wrapping_add(1);
    }

    /// Takes the next command.
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

    /// Sees to it that there is a chain in `inbound`, or says why there is none.
    fn find_chain(&mut self, vring: &mut VringState<RingMemory>) -> Result<(), Taken> {
        #[cfg(test)]
        self.injection.panic_if_told("in a ring");
        if !self.is_running(vring) {
            return Err(Taken::Idle);
        }
        if self.inbound.is_none() { self.next_chain(vring) } else { Ok(()) }
    }

    /// Puts the next chain into `inbound`, or says why there is none.
    fn next_chain(&mut self, vring: &mut VringState<RingMemory>) -> Result<(), Taken> {
        let memory = self.memory.memory();
        let queue = vring.get_queue_mut();
        let before = queue.next_avail();
        let found = chain::take(queue, memory.clone(), MAX_CHAIN);
        let missing = self.memory.take_missing();
        if !missing.is_empty() {
            // `virtio-queue` moved on all the same: the same head has to be taken again.
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

    /// Asks the driver to kick, and looks once more: it may have added a chain before it saw that.
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

    /// Reads what `request` lacks of the chain; `false` if it is longer than any request is. Memory is taken for what
    /// was proved to be there, a chunk at a time.
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
                self.read_chunk(rest, request)?;
            }
            before = end;
        }
        Ok(true)
    }

    /// Copies the beginning of `rest`, or says which of its first pages are missing.
    fn read_chunk(&self, rest: Segment, request: &mut Vec<u8>) -> Result<(), Vec<Missing>> {
        let have = request.len();
        let chunk = COPY_CHUNK.min(usize::try_from(rest.len()).unwrap_or(COPY_CHUNK));
        let section = self.memory.enter();
        let there = section.check_range(GuestAddress(rest.first().raw()), chunk, Permissions::Read);
        if there {
            request.resize(have + chunk, 0);
            if section.read(SpaceId::DEVICE, rest.first(), &mut request[have..]).is_ok() {
                return Ok(());
            }
            request.truncate(have);
        }
        // A look at each page notes it, if it is missing: all of them are asked for at once.
        let pages = Segment::new(rest.first(), chunk as u64).into_iter().flat_map(Segment::pages);
        for page in pages {
            section.check_range(GuestAddress(page.raw()), 1, Permissions::Read);
        }
        Err(self.memory.take_missing())
    }

    fn pending(&self, chain: Chain) -> Pending {
        Pending { queue: self.index, head: chain.head, response: chain.writable }
    }

    /// Answers a command. It reaches the guest with the next [`Self::publish`] that gets through.
    pub fn complete(&mut self, pending: Pending, response: Vec<u8>) {
        self.outbound.push_back(Completion { pending, response });
    }

    /// Writes answers to the guest, in order, and notifies it.
    pub fn publish(&mut self) -> Published {
        if self.broken || self.output.left > 0 || self.outbound.is_empty() {
            return Published::Nothing;
        }
        if std::mem::take(&mut self.output.refused) {
            if self.output.in_ring {
                return Published::Broke(self.break_ring(RingError::Unmapped("write")));
            }
            // The driver has taken its buffer away: the command is used with nothing written.
            if let Some(front) = self.outbound.front_mut() {
                front.response.clear();
            }
        }
        self.shared.locked(|vring| {
            if !self.is_running(vring) {
                return Published::Nothing;
            }
            match self.find_used_index(vring) {
                Ok(()) => self.publish_all(vring),
                Err(published) => published,
            }
        })
    }

    /// Reads the used index of a ring that was started anew: at SET_VRING_ADDR no MISS is served.
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

    fn publish_all(&mut self, vring: &mut VringState<RingMemory>) -> Published {
        let mut any = false;
        let result = loop {
            match self.publish_one(vring) {
                Ok(true) => any = true,
                Ok(false) => break Published::Nothing,
                Err(published) => break published,
            }
        };
        if any {
            self.notify(vring);
        }
        result
    }

    /// Publishes the oldest answer; `false`: there is none.
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
            // `add_used` may have written the element and moved on before it missed the index: without this the
            // head would be used twice.
            queue.set_next_used(before);
            return Err(self.output_waits(missing, true));
        }
        result.map_err(|source| Published::Broke(self.break_ring(RingError::Used(source))))?;
        self.in_flight.remove(&head);
        self.outbound.pop_front();
        Ok(true)
    }

    /// Writes as much of the response as there is room for; returns how much.
    fn write_response(&self, completion: &Completion) -> Result<u32, Vec<Missing>> {
        let section = self.memory.enter();
        let mut rest = completion.response.as_slice();
        let mut written = 0;
        for segment in &completion.pending.response {
            let room = usize::try_from(segment.len()).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(rest.len().min(room));
            if section.write(SpaceId::DEVICE, segment.first(), now).is_err() {
                return Err(self.memory.take_missing());
            }
            written += now.len() as u32;
            rest = later;
        }
        Ok(written)
    }

    fn notify(&self, vring: &mut VringState<RingMemory>) {
        let needed = vring.needs_notification();
        // The driver's wish may lie on a page that is missing. One interrupt too many does no harm.
        let unknown = !self.memory.take_missing().is_empty();
        if (unknown || needed.unwrap_or(true)) && !self.injection.fires(Bug::NoInterrupt) {
            // The eventfd is the front-end's: if it is full or gone, there is nobody to tell.
            let _ = vring.signal_used_queue();
        }
    }

    /// Interrupts the driver although nothing was completed.
    pub fn interrupt_for_nothing(&self) {
        self.shared.locked(|vring| {
            if self.is_running(vring) {
                // As in `notify`.
                let _ = vring.signal_used_queue();
            }
        });
    }

    /// Who asks for what the ring lacks.
    pub fn wait(&self) -> RingWait {
        RingWait { queue: self.index, start: self.starts }
    }

    /// One page that a side waits for was answered; `true`: it was the last one, go on. A page that was not answered
    /// in time is asked for again: the front-end may have stood still, and only its refusal says that there is nothing.
    pub fn miss_answered(&mut self, asked: RingWait, side: Side, answer: MissAnswer) -> bool {
        if asked != self.wait() {
            return false;
        }
        let wait = match side {
            Side::Input => &mut self.input,
            Side::Output => &mut self.output,
        };
        // Without a channel, asking again would bring the same answer at once.
        let refused = matches!(answer, MissAnswer::Refused | MissAnswer::NoChannel);
        wait.refused |= refused && wait.left > 0;
        wait.left = wait.left.saturating_sub(1);
        wait.left == 0
    }

    /// Commands that the device owes an answer.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn is_running(&self, vring: &VringState<RingMemory>) -> bool {
        // A reset that this thread has not yet heard of: its mail comes first.
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

    fn break_ring(&mut self, error: RingError) -> RingError {
        self.broken = true;
        self.shared.signal_error();
        error
    }
}
