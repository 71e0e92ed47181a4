//! A driver of the device in user space, through VFIO: small, slow, and free to do what a kernel's driver must not.
//! Made of, from the outside in: `bind` (whose the PCI function is), `container` (what the IOMMU maps), `function`
//! (the device's registers), `queue` (a ring that is polled), `command` (virtio-gpu's words), and `Gpu`, which is all
//! of them.

mod bind;
mod command;
mod container;
mod function;
mod queue;

pub(crate) use command::{Command, OK};
pub(crate) use queue::{Answer, Ticket};

use crate::error::AgentError;
use crate::mapping::Mapping;
use bind::Taken;
use container::Container;
use function::Function;
use queue::Queue;
use std::time::Duration;

/// Where the rings lie. All I/O addresses are below those of the interrupts, and a buffer lies at a multiple of its
/// size: an IOMMU that rounds a range up does not reach another.
const RINGS: u64 = 0x1000_0000;
/// Virtio: 3D commands, the rules of virtio 1, addresses of the IOMMU (virtio 1.3, 5.7.3 and 6).
const FEATURES: u64 = 1 | 1 << 32 | 1 << 33;
const REPLY_LIMIT: Duration = Duration::from_secs(20);

/// The device, taken from the kernel's driver and brought up.
pub(crate) struct Gpu {
    function: Function,
    control: Queue,
    /// The cursor's queue carries nothing, but QEMU does not start a device of which only one queue is there.
    _cursor: Queue,
    container: Container,
    taken: Taken,
}

impl Gpu {
    /// Takes the device and brings it up.
    pub(crate) fn take() -> Result<Self, AgentError> {
        let taken = Taken::take()?;
        let mut container = Container::open(&taken.group()?)?;
        let function = Function::open(container.device(taken.name())?)?;
        let features = function.begin(FEATURES)?;
        if features != FEATURES {
            return Err(AgentError::Features { wanted: FEATURES, found: features });
        }
        let control = Queue::new(&mut container, RINGS)?;
        let cursor = Queue::new(&mut container, RINGS + queue::BYTES as u64)?;
        for (index, queue) in (0..).zip([&control, &cursor]) {
            function.enable_queue(index, queue.addresses())?;
        }
        function.start()?;
        Ok(Self { function, control, _cursor: cursor, container, taken })
    }

    /// Resets the device and gives it back to the kernel's driver.
    pub(crate) fn give_back(self) -> Result<(), AgentError> {
        let Self { function, control, _cursor, container, taken } = self;
        function.reset()?;
        drop((function, control, container));
        taken.give_back()
    }

    /// Lets the device at `memory`, from `iova` on.
    pub(crate) fn map(&mut self, iova: u64, memory: &Mapping, len: usize) -> Result<(), AgentError> {
        self.map_for(iova, memory, len, true)
    }

    /// The same, with or without the right to write.
    pub(crate) fn map_for(
        &mut self,
        iova: u64,
        memory: &Mapping,
        len: usize,
        write: bool,
    ) -> Result<(), AgentError> {
        self.container.map(iova, memory, len, write)
    }

    /// Takes it away again; returns when the device has acked that it is gone.
    pub(crate) fn unmap(&mut self, iova: u64, len: usize) -> Result<(), AgentError> {
        self.container.unmap(iova, len)
    }

    /// Hands a command to the device.
    pub(crate) fn submit(&mut self, command: &Command) -> Result<Ticket, AgentError> {
        self.submit_bytes(&command.bytes())
    }

    /// The same for one of the host's making.
    pub(crate) fn submit_bytes(&mut self, command: &[u8]) -> Result<Ticket, AgentError> {
        let ticket = self.control.submit(command)?;
        self.function.notify(0)?;
        Ok(ticket)
    }

    /// Whether the device has answered.
    pub(crate) fn is_answered(&mut self, ticket: &Ticket) -> Result<bool, AgentError> {
        self.control.is_answered(ticket)
    }

    /// The type of the device's answer; waits for it.
    pub(crate) fn wait(&mut self, ticket: Ticket) -> Result<u32, AgentError> {
        let answer = self.control.wait(ticket, REPLY_LIMIT)?;
        answer
            .map(|answer| answer.kind())
            .map_err(|_| AgentError::NoAnswer { seconds: REPLY_LIMIT.as_secs() })
    }

    /// The device's answer, if it comes within `limit`; else the ticket, to wait again.
    pub(crate) fn answer_within(
        &mut self,
        ticket: Ticket,
        limit: Duration,
    ) -> Result<Result<Answer, Ticket>, AgentError> {
        self.control.wait(ticket, limit)
    }

    /// Hands a command to the device, which must not refuse it.
    pub(crate) fn run(&mut self, command: &Command) -> Result<(), AgentError> {
        let ticket = self.submit(command)?;
        let (command, response) = (command.kind(), self.wait(ticket)?);
        if response == OK { Ok(()) } else { Err(AgentError::Refused { command, response }) }
    }
}
