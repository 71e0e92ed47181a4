//! A driver in user space at the beck of the host: areas of memory, mappings and commands, one operation at a time.
//! Knows nothing of what a scenario wants with them.

use crate::error::AgentError;
use crate::mapping::Mapping;
use crate::vfio::{Gpu, Ticket};
use guest_agent::remote::{Answer, Bytes, MOST_BYTES, Operation, Outcome, POISON, Pieces};
use job_stream::Crc32c;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// What retired memory holds.
const RETIRED: u8 = 0x5c;

/// What the host has made so far.
#[derive(Default)]
pub(crate) struct Operations {
    areas: BTreeMap<u32, Area>,
    retired: Vec<Rc<Mapping>>,
    tickets: BTreeMap<u64, Ticket>,
    next_ticket: u64,
    /// The NUMA node that memory is taken from, if that matters.
    node: Option<u32>,
}

struct Area {
    at: u64,
    bytes: usize,
    pieces: Vec<Piece>,
}

struct Piece {
    memory: Rc<Mapping>,
    is_mapped: bool,
}

impl Operations {
    /// Does one.
    pub(crate) fn run(&mut self, gpu: &mut Gpu, operation: Operation) -> Result<Outcome, AgentError> {
        match operation {
            Operation::Map { pieces, bytes, at, write, of } => {
                self.make(pieces, bytes, at, of)?;
                self.map_again(gpu, pieces, write)
            }
            Operation::TakeFrom { node } => {
                self.node = node;
                Ok(Outcome::Done)
            }
            Operation::Unmap { pieces, retire } => self.unmap(gpu, pieces, retire),
            Operation::MapAgain { pieces, write } => self.map_again(gpu, pieces, write),
            Operation::Free { area } => self.free(gpu, area),
            Operation::Write { area, at, bytes } => self.write(area, at, &bytes.0),
            Operation::Read { area, at, len } => self.read(area, at, len),
            Operation::Checksum { area, at, len } => self.checksum(area, at, len),
            Operation::Late => Ok(Outcome::Late { bytes: self.late() }),
            Operation::Forget => {
                self.retired.clear();
                Ok(Outcome::Done)
            }
            Operation::Submit { command } => self.submit(gpu, &command.0),
            Operation::Wait { ticket, limit } => self.wait(gpu, ticket, Duration::from_millis(limit)),
        }
    }

    fn area(&mut self, area: u32) -> Result<&mut Area, AgentError> {
        self.areas.get_mut(&area).ok_or(AgentError::NoArea { area })
    }

    fn make(&mut self, pieces: Pieces, bytes: usize, at: u64, of: Option<u32>) -> Result<(), AgentError> {
        let memory: Vec<_> = match of {
            Some(area) => self.area(area)?.pieces.iter().map(|piece| piece.memory.clone()).collect(),
            None => (0..pieces.count).map(|_| poisoned(bytes, self.node)).collect::<Result<_, _>>()?,
        };
        let pieces_of_it = memory.into_iter().map(|memory| Piece { memory, is_mapped: false }).collect();
        self.areas.insert(pieces.area, Area { at, bytes, pieces: pieces_of_it });
        Ok(())
    }

    fn map_again(&mut self, gpu: &mut Gpu, pieces: Pieces, write: bool) -> Result<Outcome, AgentError> {
        let area = self.area(pieces.area)?;
        let (at, bytes) = (area.at, area.bytes);
        for (index, piece) in area.pieces.iter_mut().enumerate().skip(pieces.first).take(pieces.count) {
            gpu.map_for(at + (index * bytes) as u64, &piece.memory, bytes, write)?;
            piece.is_mapped = true;
        }
        Ok(Outcome::Done)
    }

    fn unmap(&mut self, gpu: &mut Gpu, pieces: Pieces, retire: bool) -> Result<Outcome, AgentError> {
        let node = self.node;
        let area = self.area(pieces.area)?;
        let at = area.at + (pieces.first * area.bytes) as u64;
        let len = pieces.count * area.bytes;
        let begin = Instant::now();
        gpu.unmap(at, len)?;
        let ns = begin.elapsed().as_nanos() as u64;
        let bytes = area.bytes;
        let mut old = Vec::new();
        for piece in area.pieces.iter_mut().skip(pieces.first).take(pieces.count) {
            piece.is_mapped = false;
            if retire {
                // Whoever still writes through the translation from before the unmap is seen here.
                piece.memory.write(0, &vec![RETIRED; bytes]);
                old.push(std::mem::replace(&mut piece.memory, poisoned(bytes, node)?));
            }
        }
        self.retired.extend(old);
        Ok(Outcome::Unmapped { ns })
    }

    fn free(&mut self, gpu: &mut Gpu, number: u32) -> Result<Outcome, AgentError> {
        let area = self.area(number)?;
        let (at, bytes) = (area.at, area.bytes);
        for index in (0..).zip(&area.pieces).filter(|(_, piece)| piece.is_mapped).map(|(index, _)| index) {
            gpu.unmap(at + index * bytes as u64, bytes)?;
        }
        for piece in self.areas.remove(&number).into_iter().flat_map(|area| area.pieces) {
            // What is another area's too is not retired.
            if Rc::strong_count(&piece.memory) == 1 {
                piece.memory.write(0, &vec![RETIRED; bytes]);
                self.retired.push(piece.memory);
            }
        }
        Ok(Outcome::Done)
    }

    /// The parts of pieces that some bytes of an area are: piece, first byte in it, how many.
    fn parts(
        &mut self,
        area: u32,
        at: usize,
        len: usize,
    ) -> Result<Vec<(Rc<Mapping>, usize, usize)>, AgentError> {
        let area = self.area(area)?;
        let mut parts = Vec::new();
        let (mut at, end) = (at, at.saturating_add(len));
        while at < end {
            let within = at % area.bytes;
            let count = (area.bytes - within).min(end - at);
            let piece = area.pieces.get(at / area.bytes).ok_or(AgentError::PastTheEnd { at })?;
            parts.push((piece.memory.clone(), within, count));
            at += count;
        }
        Ok(parts)
    }

    fn write(&mut self, area: u32, at: usize, bytes: &[u8]) -> Result<Outcome, AgentError> {
        let mut rest = bytes;
        for (memory, within, count) in self.parts(area, at, bytes.len())? {
            let (part, others) = rest.split_at(count);
            memory.write(within, part);
            rest = others;
        }
        Ok(Outcome::Done)
    }

    fn read(&mut self, area: u32, at: usize, len: usize) -> Result<Outcome, AgentError> {
        let mut bytes = Vec::new();
        for (memory, within, count) in self.parts(area, at, len.min(MOST_BYTES))? {
            let mut part = vec![0; count];
            memory.read(within, &mut part);
            bytes.extend(part);
        }
        Ok(Outcome::Bytes { bytes: Bytes(bytes) })
    }

    fn checksum(&mut self, area: u32, at: usize, len: usize) -> Result<Outcome, AgentError> {
        let mut crc = Crc32c::new();
        for (memory, within, count) in self.parts(area, at, len)? {
            let mut part = vec![0; count];
            memory.read(within, &mut part);
            crc.update(&part);
        }
        Ok(Outcome::Checksum { crc: crc.value() })
    }

    fn late(&self) -> u64 {
        let late =
            |memory: &Rc<Mapping>| memory.bytes().iter().filter(|byte| **byte != RETIRED).count() as u64;
        self.retired.iter().map(late).sum()
    }

    fn submit(&mut self, gpu: &mut Gpu, command: &[u8]) -> Result<Outcome, AgentError> {
        let (number, ticket) = (self.next_ticket, gpu.submit_bytes(command)?);
        self.next_ticket += 1;
        self.tickets.insert(number, ticket);
        Ok(Outcome::Submitted { ticket: number })
    }

    fn wait(&mut self, gpu: &mut Gpu, number: u64, limit: Duration) -> Result<Outcome, AgentError> {
        let ticket = self.tickets.remove(&number).ok_or(AgentError::NoTicket { ticket: number })?;
        let answer = match gpu.answer_within(ticket, limit)? {
            Ok(answer) => answer,
            Err(ticket) => {
                self.tickets.insert(number, ticket);
                return Ok(Outcome::Answered { answer: None });
            }
        };
        let (bytes, rest_intact, order) = (Bytes(answer.bytes), answer.rest_intact, answer.order);
        Ok(Outcome::Answered { answer: Some(Answer { bytes, rest_intact, order }) })
    }
}

fn poisoned(bytes: usize, node: Option<u32>) -> Result<Rc<Mapping>, AgentError> {
    let memory = match node {
        None => Mapping::anonymous(bytes)?,
        Some(node) => Mapping::on_node(bytes, node)?,
    };
    memory.write(0, &vec![POISON; bytes]);
    Ok(Rc::new(memory))
}
