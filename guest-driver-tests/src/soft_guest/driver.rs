//! The virtio-gpu driver: commands into the rings, responses out of them, any number in flight. Knows buffers and
//! tickets; what a command means is in `gpu`.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::addr::{PAGE, Permission};
use super::dma::{DmaBuffer, DmaSpace};
use super::error::{Error, Result};
use super::front_end::{QUEUES, QueueSetup};
use super::gpu::{Command, Response};
use super::oracle::POISON;
use super::virtqueue::{RingConfig, Used, Virtqueue};

/// How the driver works.
#[derive(Clone, Copy, Debug)]
pub struct DriverConfig {
    /// The control ring.
    pub control: RingConfig,
    /// The cursor ring.
    pub cursor: RingConfig,
    /// Buffers of commands are used once: [`GpuDriver::spent_buffers`] returns those that are done with, to be unmapped,
    /// as a driver in strict mode does. Otherwise they stay mapped and are reused.
    pub fresh_buffers: bool,
    /// How long a completion may take.
    pub timeout: Duration,
}

impl Default for DriverConfig {
    fn default() -> Self {
        Self {
            control: RingConfig::new(64),
            cursor: RingConfig::new(16),
            fresh_buffers: false,
            timeout: Duration::from_secs(10),
        }
    }
}

/// Which ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Queue {
    /// Ring 0.
    Control,
    /// Ring 1.
    Cursor,
}

/// A command in flight: to be given to [`GpuDriver::wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use]
pub struct Ticket(u64);

#[derive(Debug)]
struct InFlight {
    ticket: Ticket,
    command: u32,
    buffers: Buffers,
}

#[derive(Debug)]
struct Buffers {
    request: DmaBuffer,
    response: DmaBuffer,
}

/// A virtio-gpu driver.
#[derive(Debug)]
pub struct GpuDriver {
    space: DmaSpace,
    config: DriverConfig,
    control: Virtqueue,
    cursor: Virtqueue,
    in_flight: HashMap<(Queue, u16), InFlight>,
    done: HashMap<Ticket, Response>,
    idle: Vec<Buffers>,
    spent: Vec<DmaBuffer>,
    next_ticket: u64,
    completed: u64,
}

impl GpuDriver {
    /// A driver with empty rings.
    pub fn new(space: DmaSpace, config: DriverConfig) -> Result<Self> {
        let control = Virtqueue::new(&space, config.control)?;
        let cursor = Virtqueue::new(&space, config.cursor)?;
        Ok(Self {
            space,
            config,
            control,
            cursor,
            in_flight: HashMap::new(),
            done: HashMap::new(),
            idle: Vec::new(),
            spent: Vec::new(),
            next_ticket: 0,
            completed: 0,
        })
    }

    /// The ring addresses that the front-end sends to the back-end.
    pub fn queues(&self) -> [QueueSetup<'_>; QUEUES] {
        [self.control.setup(), self.cursor.setup()]
    }

    /// One of the rings.
    pub fn ring(&mut self, queue: Queue) -> &mut Virtqueue {
        match queue {
            Queue::Control => &mut self.control,
            Queue::Cursor => &mut self.cursor,
        }
    }

    /// Starts over after a reset: what was in flight will never be answered.
    pub fn reset(&mut self) -> Result<()> {
        self.idle.extend(self.in_flight.drain().map(|(_, in_flight)| in_flight.buffers));
        self.done.clear();
        self.control.reset()?;
        self.cursor.reset()
    }

    /// Sends a command without waiting.
    pub fn submit(&mut self, command: &Command) -> Result<Ticket> {
        self.submit_to(Queue::Control, command)
    }

    /// Sends a command to one of the rings without waiting.
    pub fn submit_to(&mut self, queue: Queue, command: &Command) -> Result<Ticket> {
        let ticket = self.queue(queue, command)?;
        self.ring(queue).notify(1)?;
        Ok(ticket)
    }

    /// Puts a command into a ring without a notification: for batches, which end with a notify.
    pub fn queue(&mut self, queue: Queue, command: &Command) -> Result<Ticket> {
        let bytes = command.bytes();
        let buffers = self.buffers(bytes.len(), command.response_len)?;
        buffers.request.write(0, &bytes)?;
        buffers.response.write(0, &vec![POISON; buffers.response.pages() * PAGE as usize])?;
        let readable = buffers.request.segments(0, bytes.len() as u64);
        let writable = buffers.response.segments(0, command.response_len as u64);
        let head = self.ring(queue).submit(&readable, &writable)?;
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.in_flight.insert((queue, head), InFlight { ticket, command: command.kind, buffers });
        Ok(ticket)
    }

    fn buffers(&mut self, request: usize, response: usize) -> Result<Buffers> {
        let pages = |bytes: usize| bytes.div_ceil(PAGE as usize).max(1);
        let (request, response) = (pages(request), pages(response));
        let fits = |idle: &Buffers| idle.request.pages() == request && idle.response.pages() == response;
        if let Some(found) = self.idle.iter().position(fits) {
            return Ok(self.idle.swap_remove(found));
        }
        // As the stock driver maps them: to the device, and from the device.
        Ok(Buffers {
            request: self.space.allocate(request, Permission::ReadOnly)?,
            response: self.space.allocate(response, Permission::WriteOnly)?,
        })
    }

    /// Takes the completions that are there.
    pub fn poll(&mut self) -> Result<usize> {
        let mut count = 0;
        for queue in [Queue::Control, Queue::Cursor] {
            let used = self.ring(queue).take_used()?;
            count += used.len();
            self.finish(queue, used)?;
        }
        Ok(count)
    }

    fn finish(&mut self, queue: Queue, used: Vec<Used>) -> Result<()> {
        for Used { head, len } in used {
            let index = self.completed as u16;
            let not_in_flight = Error::NotInFlight { index, head: head.into() };
            let InFlight { ticket, command, buffers } =
                self.in_flight.remove(&(queue, head)).ok_or(not_in_flight)?;
            let mut all = vec![0; buffers.response.pages() * PAGE as usize];
            buffers.response.read(0, &mut all)?;
            let written = (len as usize).min(all.len());
            let rest_intact = all[written..].iter().all(|&byte| byte == POISON);
            all.truncate(written);
            self.done.insert(ticket, Response { command, bytes: all, rest_intact, order: self.completed });
            self.completed += 1;
            if self.config.fresh_buffers {
                self.spent.extend([buffers.request, buffers.response]);
            } else {
                self.idle.push(buffers);
            }
        }
        Ok(())
    }

    /// Waits for the response to a command.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Response> {
        self.wait_for(ticket, self.config.timeout)
    }

    /// Waits for the response to a command, no longer than `timeout`.
    pub fn wait_for(&mut self, ticket: Ticket, timeout: Duration) -> Result<Response> {
        let deadline = Instant::now() + timeout;
        loop {
            self.poll()?;
            if let Some(response) = self.done.remove(&ticket) {
                return Ok(response);
            }
            let waiting = self.in_flight.iter().find(|(_, in_flight)| in_flight.ticket == ticket);
            let lost = || Error::Timeout { what: "A command that was reset away".into(), after: timeout };
            let queue = waiting.map(|(&(queue, _), _)| queue).ok_or_else(lost)?;
            let left = deadline.saturating_duration_since(Instant::now());
            let used = self.ring(queue).wait_used(left)?;
            self.finish(queue, used)?;
        }
    }

    /// The response to a command, if it is there.
    pub fn try_wait(&mut self, ticket: Ticket) -> Result<Option<Response>> {
        self.poll()?;
        Ok(self.done.remove(&ticket))
    }

    /// Sends a command and waits for its response.
    pub fn run(&mut self, command: &Command) -> Result<Response> {
        let ticket = self.submit(command)?;
        self.wait(ticket)
    }

    /// Sends a command to one of the rings and waits for its response.
    pub fn run_on(&mut self, queue: Queue, command: &Command) -> Result<Response> {
        let ticket = self.submit_to(queue, command)?;
        self.wait(ticket)
    }

    /// Sends a command that must succeed.
    pub fn ok(&mut self, command: &Command) -> Result<Response> {
        must_succeed(self.run(command)?)
    }

    /// Sends a command to the cursor ring that must succeed.
    pub fn cursor_ok(&mut self, command: &Command) -> Result<Response> {
        must_succeed(self.run_on(Queue::Cursor, command)?)
    }

    /// Waits for a command that must succeed.
    pub fn wait_ok(&mut self, ticket: Ticket) -> Result<Response> {
        must_succeed(self.wait(ticket)?)
    }

    /// Commands that are not yet answered.
    pub fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Commands answered so far.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    /// Buffers of commands that are done with, to be unmapped ([`DriverConfig::fresh_buffers`]).
    pub fn spent_buffers(&mut self) -> Vec<DmaBuffer> {
        std::mem::take(&mut self.spent)
    }
}

fn must_succeed(response: Response) -> Result<Response> {
    if response.is_ok() {
        return Ok(response);
    }
    Err(Error::Command { command: response.command, response: response.kind() })
}
