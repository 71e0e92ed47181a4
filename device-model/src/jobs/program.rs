//! The executor of a job stream: a verified program that can be resumed after every piece of a packet. Knows what each
//! packet does, where its operands lie in the guest and how far it has come; knows nothing of contexts, queues or pins.
//!
//! What must happen exactly once (SIGNAL, TIMESTAMP, both halves of ATOMIC, the user fence) is one access, and the
//! program counter advances in the same step. Everything else may be repeated after a miss.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use job_stream::{At, Atomic, Context, Crc32c, Operand, Packet, Range, Spin, SpinBehaviour, Wait};

use crate::addr::{Access, DomainId, Iova, PAGE_SIZE};
use crate::jobs::address_space::translation::TlbCounts;
use crate::jobs::address_space::{AddressSpace, GvaAccess, Place, TranslationFault};
use crate::jobs::job::{JobError, Step, StepContext};
use crate::jobs::name::{OPERANDS, OperandName};
use crate::jobs::operands::{Operands, Unavailable};
use crate::jobs::working_set::WorkingSet;
use crate::mmu::{AtomicOperation, JobMemory, MemoryError, Missing, PinRange, SeededBug, Width};

/// The least that a packet costs of a step's budget.
const PACKET_COST: usize = 256;

/// The most bytes that are handled in one piece.
const PIECE: usize = 16 << 10;

/// Time on the engine after which a wedged SPIN is removed by force.
pub(crate) const WEDGE: Duration = Duration::from_millis(100);

/// A program that is being executed.
#[derive(Debug)]
pub(crate) struct Execution {
    operands: Operands,
    state: StreamPosition,
    /// The timeout of a WAIT.
    patience: Duration,
    cancelled: Arc<AtomicBool>,
}

/// How far it has come.
#[derive(Debug, Default)]
struct StreamPosition {
    /// The current packet.
    packet: usize,
    /// Bytes of it that are done.
    done: u64,
    /// CHECKSUM: the value so far.
    crc: Crc32c,
    /// ATOMIC: the value that its first half read.
    old: Option<u64>,
    /// WAIT: when it first polled. In running time, like the next two.
    since: Option<Duration>,
    /// SPIN: time spent on the engine, and when it was last counted.
    spent: Duration,
    counted: Option<Duration>,
    /// The job has failed, and only has to write its user fence.
    failed: Option<JobError>,
    bytes: u64,
}

/// The result of one piece of a packet.
enum Piece {
    /// The packet is done.
    Packet,
    /// This many bytes of it are done.
    Bytes(usize),
    /// It keeps the engine.
    Spins { stubborn: bool },
    /// It leaves the engine until its next poll.
    Waits { until: Duration },
}

type Executed = Result<Piece, JobError>;

impl Execution {
    /// The execution of a program over these operands; a WAIT times out after `patience`.
    pub(crate) fn new(operands: Operands, patience: Duration) -> Self {
        Self { operands, state: StreamPosition::default(), patience, cancelled: Arc::default() }
    }

    /// Setting it makes the job fail at its next step.
    pub(crate) fn cancellation(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancelled)
    }

    /// The program.
    #[cfg(any(test, feature = "test-utils"))]
    pub(crate) fn program(&self) -> &job_stream::Program {
        self.operands.program()
    }

    /// Whether it has to fail at its next step.
    pub(crate) fn is_cancelled(&self) -> bool {
        // ORDERING: a request; each step reads it again.
        self.cancelled.load(Ordering::Relaxed)
    }

    /// The packet that it has reached.
    pub(crate) fn packet(&self) -> usize {
        self.state.packet
    }

    /// Bytes of guest memory read and written so far by FILL, COPY and CHECKSUM.
    pub(crate) fn bytes_moved(&self) -> u64 {
        self.state.bytes
    }

    /// What it may still touch.
    pub(crate) fn working_set(&self) -> Vec<PinRange> {
        match self.state.failed {
            None => self.operands.working_set(self.state.packet),
            Some(_) => self.operands.fence_only(),
        }
    }

    /// As [`Self::working_set`] before the first step, in compact form.
    pub(crate) fn touches(&self) -> Arc<WorkingSet> {
        match self.state.failed {
            None => self.operands.touches(),
            Some(_) => self.operands.touches_fence_only(),
        }
    }

    /// What its current packet touches.
    pub(crate) fn comes_next(&self) -> Vec<PinRange> {
        match self.state.failed {
            None => self.operands.of_packet(self.state.packet),
            Some(_) => self.operands.fence_only(),
        }
    }

    /// Whether others can observe its progress in memory.
    pub(crate) fn tells_by_memory(&self) -> bool {
        let tells = |packet: &Packet| matches!(packet, Packet::Signal(_) | Packet::Atomic(_));
        self.operands.fence().is_some() || self.operands.program().packets().iter().any(tells)
    }

    /// The first few operands that its packets name.
    pub(crate) fn operand_names(&self) -> Vec<OperandName> {
        let program = self.operands.program();
        let name = |(packet, operand): (usize, Operand)| {
            let opcode = program.packets().get(packet)?.opcode().name();
            let bytes = (operand.range.address, operand.range.last()?);
            let (access, resource) = (operand.access, operand.range.space.raw());
            Some(OperandName { packet, opcode, access, resource, bytes })
        };
        let of_resource = |(_, operand): &(usize, Operand)| operand.range.space.is_resource();
        program.operands().filter(of_resource).filter_map(name).take(OPERANDS).collect()
    }

    /// Whether an operand lies in an address space.
    pub(crate) fn is_translated(&self) -> bool {
        self.operands.is_translated()
    }

    /// The error of a job for which `missing` was refused.
    pub(crate) fn refusal(&self, missing: Missing) -> JobError {
        self.operands.refusal(missing)
    }

    /// What its current packet needs beyond `missing`, and the mirror lacks.
    pub(crate) fn look_ahead(
        &self,
        memory: &impl JobMemory,
        probe: impl Fn(Iova, Access) -> Option<Missing>,
        missing: Missing,
    ) -> Vec<Missing> {
        let mut ahead = Vec::new();
        let packet = match self.state.failed {
            None => self.operands.program().packets().get(self.state.packet).cloned(),
            Some(_) => self.operands.fence().map(|context| Packet::Context(*context)),
        };
        for operand in packet.iter().flat_map(Packet::operands) {
            let done = if operand.is_value { 0 } else { self.state.done };
            self.operands.look_ahead(memory, &probe, (&operand, done), (missing, &mut ahead));
        }
        self.operands.end_step();
        ahead
    }

    /// The address space that a fault is about.
    pub(crate) fn space_of(&self, fault: &TranslationFault) -> Option<&Arc<AddressSpace>> {
        self.operands.space_of(fault)
    }

    /// Whether a flush of an address space may be over since the last call.
    pub(crate) fn take_flush_ended(&self) -> bool {
        self.operands.take_flush_ended()
    }

    /// How often TLBs were asked since the last call.
    pub(crate) fn take_tlb_counts(&self) -> TlbCounts {
        self.operands.take_tlb_counts()
    }

    /// A flush that is likely missing, as found since the last call.
    pub(crate) fn take_overdue(&self) -> Option<TranslationFault> {
        self.operands.take_overdue()
    }

    /// Its current packet needs no memory.
    pub(crate) fn is_spinning(&self) -> bool {
        self.state.failed.is_none()
            && matches!(self.operands.program().packets().get(self.state.packet), Some(Packet::Spin(_)))
    }

    /// It has reached a WAIT, not counting packets that touch no memory, and needs only one word until that holds.
    pub(crate) fn is_waiting(&self) -> bool {
        let passed =
            |packet: &&Packet| matches!(packet, Packet::Nop(_) | Packet::Context(_) | Packet::Barrier(_));
        let mut packets = self.operands.program().packets().iter().skip(self.state.packet).skip_while(passed);
        self.state.failed.is_none() && matches!(packets.next(), Some(Packet::Wait(_)))
    }

    /// It has left its engine: time no longer counts for SPIN.
    pub(crate) fn left_engine(&mut self) {
        self.state.counted = None;
    }

    /// Fails it with an error: from now on it only writes its user fence. `Err`: it has no fence or cannot write it, so
    /// it ends with this error.
    pub(crate) fn fail(&mut self, error: JobError) -> Result<(), JobError> {
        match self.state.failed {
            Some(first) => Err(first),
            None if self.operands.fence().is_none() => Err(error),
            None => {
                self.state.failed = Some(error);
                Ok(())
            }
        }
    }

    /// The seeded bug: SIGNALs and the user fence are written before what they announce.
    pub(crate) fn signal_early(&self, memory: &impl JobMemory, _why: SeededBug) {
        let later = self.operands.program().packets().iter().skip(self.state.packet);
        let signals = later.filter_map(|packet| match packet {
            Packet::Signal(signal) => Some((signal.at, signal.wide, signal.value)),
            _ => None,
        });
        let fence = self.operands.fence().and_then(|context| Some((context.fence?, true, context.done)));
        for (at, wide, value) in signals.chain(fence) {
            // What is missing now is reported when the packet is executed.
            let _ = store(&self.operands, memory, at, (wide, value));
        }
        self.operands.end_step();
    }

    /// Goes on for about `context.budget` bytes.
    pub(crate) fn step(&mut self, memory: &impl JobMemory, context: StepContext) -> Step {
        self.operands.begin_step(context.running);
        let step = self.go_on(memory, context);
        self.operands.end_step();
        step
    }

    fn go_on(&mut self, memory: &impl JobMemory, context: StepContext) -> Step {
        // A step of its own, also for a job that spins: the fence needs a step that has memory.
        if self.is_cancelled() && self.state.failed.is_none() {
            return self.broken(JobError::Killed);
        }
        let mut left = context.budget.max(1);
        while left > 0 {
            let Some(packet) = self.next_packet() else { return self.finish(memory) };
            let context = StepContext { budget: left, ..context };
            let piece = self.state.execute(&packet, &self.operands, memory, (context, self.patience));
            match piece {
                Ok(Piece::Packet) => {
                    self.state.next_packet();
                    left = left.saturating_sub(PACKET_COST);
                    // A step that begins with a SPIN has no memory, and one that polls a WAIT none beyond it: what
                    // follows is for the next step.
                    if matches!(packet, Packet::Spin(_) | Packet::Wait(_)) {
                        return Step::Yield;
                    }
                }
                Ok(Piece::Bytes(bytes)) => left = left.saturating_sub(bytes.max(PACKET_COST)),
                Ok(Piece::Spins { stubborn }) => return Step::Spinning { stubborn },
                Ok(Piece::Waits { until }) => return Step::Waiting { until },
                Err(Unavailable::Memory(MemoryError::Missing(missing))) => return Step::Missing(missing),
                Err(Unavailable::Memory(bug)) => return self.broken(JobError::Memory(bug)),
                Err(Unavailable::Fault(fault)) => return Step::Fault(fault),
                Err(Unavailable::Error(error)) => return self.broken(error),
            }
        }
        Step::Yield
    }

    fn next_packet(&self) -> Option<Packet> {
        let packets = self.operands.program().packets().get(self.state.packet);
        packets.filter(|_| self.state.failed.is_none()).cloned()
    }

    /// The job fails by itself: the next steps write its fence.
    fn broken(&mut self, error: JobError) -> Step {
        match self.fail(error) {
            Ok(()) => Step::Yield,
            Err(error) => Step::Error(error),
        }
    }

    /// Writes the user fence, after everything before it.
    fn finish(&mut self, memory: &impl JobMemory) -> Step {
        if let Some(Context { fence: Some(at), done, failed, .. }) = self.operands.fence() {
            let value = if self.state.failed.is_none() { *done } else { *failed };
            match store(&self.operands, memory, *at, (true, value)) {
                Ok(()) => {}
                Err(Unavailable::Memory(MemoryError::Missing(missing))) => return Step::Missing(missing),
                Err(Unavailable::Memory(bug)) => {
                    return Step::Error(self.state.failed.unwrap_or(JobError::Memory(bug)));
                }
                Err(Unavailable::Fault(fault)) => return Step::Fault(fault),
                Err(Unavailable::Error(error)) => return Step::Error(self.state.failed.unwrap_or(error)),
            }
        }
        self.state.failed.map_or(Step::Done, Step::Error)
    }
}

impl StreamPosition {
    /// Goes on to the next packet.
    fn next_packet(&mut self) {
        let Self { packet, failed, bytes, .. } = *self;
        // OVERFLOW: bounded by the packets of the program.
        *self = Self { packet: packet.saturating_add(1), failed, bytes, ..Self::default() };
    }

    /// Executes a piece of `packet`: at most `context.budget` bytes. A WAIT times out after `patience`.
    fn execute(
        &mut self,
        packet: &Packet,
        operands: &Operands,
        memory: &impl JobMemory,
        (context, patience): (StepContext, Duration),
    ) -> Result<Piece, Unavailable> {
        let StepContext { now, running, budget: left } = context;
        match packet {
            Packet::Nop(_) | Packet::Context(_) => Ok(Piece::Packet),
            Packet::Barrier(_) => {
                // ORDERING: the packet's promise: everything before it is visible before anything after it.
                fence(Ordering::SeqCst);
                Ok(Piece::Packet)
            }
            Packet::Fill(fill) => self.fill(operands, memory, (fill.to, fill.pattern), left),
            Packet::Copy(copy) => self.copy(operands, memory, (copy.from, copy.to), left),
            Packet::Checksum(sum) => self.checksum(operands, memory, (sum.from, sum.to), left),
            Packet::Signal(signal) => {
                store(operands, memory, signal.at, (signal.wide, signal.value))?;
                Ok(Piece::Packet)
            }
            Packet::Timestamp(stamp) => {
                store(operands, memory, stamp.at, (true, nanoseconds(now)))?;
                Ok(Piece::Packet)
            }
            Packet::Atomic(atomic) => self.atomic(operands, memory, atomic),
            Packet::Wait(wait) => self.wait(operands, memory, wait, (running, patience)),
            Packet::Spin(spin) => self.spin(spin, running).map_err(Unavailable::Error),
        }
    }

    fn fill(
        &mut self,
        operands: &Operands,
        memory: &impl JobMemory,
        (to, pattern): (Range, u32),
        left: usize,
    ) -> Result<Piece, Unavailable> {
        let Some((at, len)) = self.run(operands, memory, (to, GvaAccess::Write), left)? else {
            return Ok(Piece::Packet);
        };
        let mut piece = [0; PIECE];
        let bytes = piece.get_mut(..len).unwrap_or_default();
        let skipped = (self.done & 3) as usize;
        let pattern = pattern.to_le_bytes();
        bytes.iter_mut().zip(pattern.iter().cycle().skip(skipped)).for_each(|(to, from)| *to = *from);
        write(memory, at, bytes)?;
        Ok(self.advance(len, to.length))
    }

    fn copy(
        &mut self,
        operands: &Operands,
        memory: &impl JobMemory,
        (from, to): (Range, At),
        left: usize,
    ) -> Result<Piece, Unavailable> {
        let source = self.run(operands, memory, (from, GvaAccess::Read), left)?;
        let target = self.run(operands, memory, (to.range(from.length), GvaAccess::Write), left)?;
        let (Some((source, readable)), Some((target, writable))) = (source, target) else {
            return Ok(Piece::Packet);
        };
        let len = readable.min(writable);
        match (source, target) {
            (Place::Iova(source), Place::Iova(target)) => {
                memory.copy(DomainId::DEVICE, source, target, len)?
            }
            (Place::Null, target) => write(memory, target, [0; PIECE].get(..len).unwrap_or_default())?,
            (Place::Iova(_), Place::Null) => {}
        }
        Ok(self.advance(len, from.length))
    }

    fn checksum(
        &mut self,
        operands: &Operands,
        memory: &impl JobMemory,
        (from, to): (Range, At),
        left: usize,
    ) -> Result<Piece, Unavailable> {
        let Some((at, len)) = self.run(operands, memory, (from, GvaAccess::Read), left)? else {
            store(operands, memory, to, (false, self.crc.value().into()))?;
            return Ok(Piece::Packet);
        };
        let mut piece = [0; PIECE];
        let bytes = piece.get_mut(..len).unwrap_or_default();
        // What is nowhere reads as 0, which is there already.
        if let Place::Iova(at) = at {
            memory.read(DomainId::DEVICE, at, bytes)?;
        }
        self.crc.update(bytes);
        self.advance(len, u64::MAX);
        Ok(Piece::Bytes(len))
    }

    fn atomic(
        &mut self,
        operands: &Operands,
        memory: &impl JobMemory,
        atomic: &Atomic,
    ) -> Result<Piece, Unavailable> {
        let old = match self.old {
            Some(old) => old,
            None => {
                let operation = match atomic.operation {
                    job_stream::AtomicOperation::Add => AtomicOperation::Add(atomic.operand),
                    job_stream::AtomicOperation::CompareAndSwap => {
                        AtomicOperation::CompareExchange { expected: atomic.expected, new: atomic.operand }
                    }
                };
                value(operands, memory, atomic.at, (atomic.wide, operation))?
            }
        };
        self.old = Some(old);
        if let Some(at) = atomic.old {
            store(operands, memory, at, (atomic.wide, old))?;
        }
        Ok(Piece::Packet)
    }

    fn wait(
        &mut self,
        operands: &Operands,
        memory: &impl JobMemory,
        wait: &Wait,
        (now, patience): (Duration, Duration),
    ) -> Result<Piece, Unavailable> {
        if wait.holds(value(operands, memory, wait.at, (wait.wide, AtomicOperation::Load))?) {
            return Ok(Piece::Packet);
        }
        let timeout = if wait.timeout == 0 { patience } else { Duration::from_nanos(wait.timeout) };
        let until = self.since.get_or_insert(now).saturating_add(timeout);
        if until <= now {
            return Err(Unavailable::Error(JobError::WaitTimedOut { packet: self.packet }));
        }
        Ok(Piece::Waits { until })
    }

    /// Counts the time since the last reading, if the job has been on its engine since.
    fn spin(&mut self, spin: &Spin, now: Duration) -> Executed {
        let before = self.counted.unwrap_or(now);
        // A stop while the clock was read may make this reading too early.
        let now = now.max(before);
        self.counted = Some(now);
        self.spent = self.spent.saturating_add(now.saturating_sub(before));
        match spin.behaviour {
            SpinBehaviour::Wedged if self.spent >= WEDGE => Err(JobError::Wedged { packet: self.packet }),
            SpinBehaviour::Wedged => Ok(Piece::Spins { stubborn: true }),
            _ if self.spent >= Duration::from_nanos(spin.duration) => Ok(Piece::Packet),
            behaviour => Ok(Piece::Spins { stubborn: behaviour == SpinBehaviour::Stubborn }),
        }
    }

    /// Where the operand goes on, and how many bytes can be handled there in one piece; `None`: all are done.
    fn run(
        &self,
        operands: &Operands,
        memory: &impl JobMemory,
        (range, access): (Range, GvaAccess),
        left: usize,
    ) -> Result<Option<(Place, usize)>, Unavailable> {
        let Some(rest) = range.length.checked_sub(self.done).filter(|rest| *rest > 0) else {
            return Ok(None);
        };
        let at = range.at().plus(self.done);
        let Some((place, in_entry)) = operands.find(memory, at, access)? else { return Ok(None) };
        // One page at a time, so that little has to be repeated after a miss.
        let in_page = match place {
            Place::Iova(at) => at.page_offset(),
            Place::Null => at.address & (PAGE_SIZE - 1),
        };
        let to_page_end = PAGE_SIZE.saturating_sub(in_page);
        let len = rest.min(in_entry).min(to_page_end).min(PIECE as u64);
        Ok(Some((place, usize::try_from(len).unwrap_or(usize::MAX).min(left))))
    }

    fn advance(&mut self, len: usize, total: u64) -> Piece {
        self.done = self.done.saturating_add(len as u64);
        self.bytes = self.bytes.saturating_add(len as u64);
        if self.done >= total { Piece::Packet } else { Piece::Bytes(len) }
    }
}

fn width(wide: bool) -> Width {
    if wide { Width::Wide } else { Width::Word }
}

/// Writes bytes that lie in one page.
fn write(memory: &impl JobMemory, at: Place, bytes: &[u8]) -> Result<(), MemoryError> {
    match at {
        Place::Iova(at) => memory.write(DomainId::DEVICE, at, bytes),
        Place::Null => Ok(()),
    }
}

fn store(
    operands: &Operands,
    memory: &impl JobMemory,
    at: At,
    (wide, new): (bool, u64),
) -> Result<(), Unavailable> {
    value(operands, memory, at, (wide, AtomicOperation::Store(new))).map(drop)
}

/// Operates on the value at `at`, which is aligned and in one piece: verification found that, and a page of an address
/// space is larger than a value.
fn value(
    operands: &Operands,
    memory: &impl JobMemory,
    at: At,
    (wide, operation): (bool, AtomicOperation),
) -> Result<u64, Unavailable> {
    let access = match operation {
        AtomicOperation::Load => GvaAccess::Read,
        AtomicOperation::Store(_) => GvaAccess::Write,
        AtomicOperation::Add(_) | AtomicOperation::CompareExchange { .. } => GvaAccess::Atomic,
    };
    let unaligned = MemoryError::Unaligned(Iova::new(at.address));
    match operands.find(memory, at, access)?.ok_or(unaligned)? {
        (Place::Iova(place), _) => Ok(memory.atomic(DomainId::DEVICE, place, width(wide), operation)?),
        (Place::Null, _) => Ok(0),
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod address_space_tests;
#[cfg(test)]
mod tests;
