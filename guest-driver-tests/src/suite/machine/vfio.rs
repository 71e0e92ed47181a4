//! The machine in a real guest: a user-space driver in the agent that has the device through VFIO. Each operation
//! goes through the guest's serial port. An unmap returns when VFIO_IOMMU_UNMAP_DMA does, which is after the device's
//! ack. Knows the agent's operations; knows nothing of jobs.

use super::{Area, Command, Machine, Permission, Response, Then, Ticket};
use crate::rig::guest::unexpected;
use crate::rig::hot_plug;
use crate::rig::run::Run;
use crate::soft_guest::PAGE;
use crate::suite::failure::{Failure, Result};
use crate::suite::results::Level;
use guest_agent::protocol::{Command as Request, Event};
use guest_agent::remote::{Bytes, MOST_BYTES, Operation, Outcome, Pieces};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

/// Where areas are placed: below the interrupts' addresses, above what the driver itself uses. Each at a multiple of
/// a size that no area has, so that a range that is rounded up reaches no other.
const FIRST_AREA: u64 = 0x1400_0000;
const STRIDE: u64 = 16 << 20;
/// Addresses are reused after this many areas.
const AREAS: u32 = 150;

/// A user-space driver of a running guest.
pub struct VfioMachine<'r, 'a> {
    run: &'r mut Run<'a>,
    next_area: u32,
    /// Commands that were submitted, for their answers.
    commands: BTreeMap<u64, u32>,
}

impl<'r, 'a> VfioMachine<'r, 'a> {
    /// The driver, which has the device already.
    pub fn new(run: &'r mut Run<'a>) -> Self {
        Self { run, next_area: 1, commands: BTreeMap::new() }
    }

    /// Stops watching memory that was retired so far: the next scenario counts only its own late touches.
    pub fn forget_retired(&mut self) -> Result<()> {
        self.done(Operation::Forget)
    }

    fn operate(&mut self, operation: Operation) -> Result<Outcome> {
        match self.run.ask("What came of an operation", Request::Operate { operation })? {
            Event::Operated { outcome } => Ok(outcome),
            other => Err(unexpected(&other).into()),
        }
    }

    fn done(&mut self, operation: Operation) -> Result<()> {
        match self.operate(operation)? {
            Outcome::Done => Ok(()),
            other => Err(out_of_turn(&other)),
        }
    }

    fn make(&mut self, pieces: usize, pages: usize, access: Permission, of: Option<u32>) -> Result<Area> {
        let id = self.next_area;
        self.next_area += 1;
        let iova = FIRST_AREA + STRIDE * u64::from(id % AREAS);
        let bytes = pages * PAGE as usize;
        let write = access == Permission::ReadWrite;
        let all = Pieces { area: id, first: 0, count: pieces };
        self.done(Operation::Map { pieces: all, bytes, at: iova, write, of })?;
        Ok(Area { id, iova, pieces, pages })
    }
}

fn out_of_turn(outcome: &Outcome) -> Failure {
    Failure::Rig(format!("The agent answered {outcome:?}, which was not asked for"))
}

fn pieces(area: &Area, pieces: &Range<usize>) -> Pieces {
    Pieces { area: area.id, first: pieces.start, count: pieces.len() }
}

impl Machine for VfioMachine<'_, '_> {
    fn level(&self) -> Level {
        Level::Real
    }

    fn map(&mut self, pieces: usize, pages: usize, access: Permission) -> Result<Area> {
        self.make(pieces, pages, access, None)
    }

    fn alias(&mut self, of: &Area, access: Permission) -> Result<Area> {
        self.make(of.pieces, of.pages, access, Some(of.id))
    }

    fn unmap(&mut self, area: &Area, range: Range<usize>, then: Then) -> Result<Duration> {
        let retire = then == Then::Retire;
        match self.operate(Operation::Unmap { pieces: pieces(area, &range), retire })? {
            Outcome::Unmapped { ns } => Ok(Duration::from_nanos(ns)),
            other => Err(out_of_turn(&other)),
        }
    }

    fn map_again(&mut self, area: &Area, range: Range<usize>, access: Permission) -> Result<()> {
        let write = access == Permission::ReadWrite;
        self.done(Operation::MapAgain { pieces: pieces(area, &range), write })
    }

    fn free(&mut self, area: &Area) -> Result<()> {
        self.done(Operation::Free { area: area.id })
    }

    fn write(&mut self, area: &Area, at: u64, bytes: &[u8]) -> Result<()> {
        for (index, part) in bytes.chunks(MOST_BYTES).enumerate() {
            let at = at as usize + index * MOST_BYTES;
            self.done(Operation::Write { area: area.id, at, bytes: Bytes(part.to_vec()) })?;
        }
        Ok(())
    }

    fn read(&mut self, area: &Area, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut all = Vec::with_capacity(len);
        while all.len() < len {
            let (at, len) = (at as usize + all.len(), (len - all.len()).min(MOST_BYTES));
            match self.operate(Operation::Read { area: area.id, at, len })? {
                Outcome::Bytes { bytes } if !bytes.0.is_empty() => all.extend(bytes.0),
                other => return Err(out_of_turn(&other)),
            }
        }
        Ok(all)
    }

    fn checksum(&mut self, area: &Area, at: u64, len: usize) -> Result<u32> {
        match self.operate(Operation::Checksum { area: area.id, at: at as usize, len })? {
            Outcome::Checksum { crc } => Ok(crc),
            other => Err(out_of_turn(&other)),
        }
    }

    fn late(&mut self) -> Result<u64> {
        match self.operate(Operation::Late)? {
            Outcome::Late { bytes } => Ok(bytes),
            other => Err(out_of_turn(&other)),
        }
    }

    fn submit(&mut self, command: &Command) -> Result<Ticket> {
        match self.operate(Operation::Submit { command: Bytes(command.bytes()) })? {
            Outcome::Submitted { ticket } => {
                self.commands.insert(ticket, command.kind);
                Ok(Ticket(ticket))
            }
            other => Err(out_of_turn(&other)),
        }
    }

    fn answer(&mut self, ticket: Ticket, limit: Duration) -> Result<Option<Response>> {
        let limit = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        match self.operate(Operation::Wait { ticket: ticket.0, limit })? {
            Outcome::Answered { answer: Some(answer) } => {
                let command = self.commands.remove(&ticket.0).unwrap_or_default();
                let (bytes, rest_intact, order) = (answer.bytes.0, answer.rest_intact, answer.order);
                Ok(Some(Response { command, bytes, rest_intact, order }))
            }
            Outcome::Answered { answer: None } => Ok(None),
            other => Err(out_of_turn(&other)),
        }
    }

    fn faults_logged(&mut self) -> Result<u64> {
        Ok(self.run.faults_logged())
    }

    fn plug(&mut self) -> Result<()> {
        hot_plug::plug(self.run)?;
        self.done(Operation::TakeFrom { node: Some(hot_plug::NODE) })
    }

    fn unplug(&mut self) -> Result<()> {
        self.done(Operation::TakeFrom { node: None })?;
        // What is watched there is also memory of the guest.
        self.forget_retired()?;
        hot_plug::unplug(self.run).map_err(Failure::from)
    }

    fn control(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let missing = || Failure::Skip(format!("The back-end does not know the command `{command}`"));
        self.run.control(command, arguments)?.ok_or_else(missing)
    }
}
