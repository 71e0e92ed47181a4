//! The machine without a VM: the soft guest's driver and IOMMU. Strict: each unmap is one INVALIDATE, of exactly its
//! range. Knows frames and the late-touch oracle; knows nothing of jobs.

use super::{Area, Command, Machine, Permission, Response, SoftGuest, Then, Ticket};
use crate::soft_guest::control::Control;
use crate::soft_guest::dma::DmaBuffer;
use crate::soft_guest::{self, Backend, GuestConfig, PAGE, driver};
use crate::suite::failure::{Failure, Result, ensure};
use crate::suite::results::Level;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::{Duration, Instant};

/// A mapping of this many pages is a huge page: its frames are contiguous.
const HUGE: usize = 512;

/// A soft guest on a back-end.
pub struct SoftMachine {
    guest: SoftGuest,
    control: Control,
    areas: BTreeMap<u32, Held>,
    next_area: u32,
    tickets: BTreeMap<u64, driver::Ticket>,
    next_ticket: u64,
}

struct Held {
    buffer: DmaBuffer,
    /// Its frames are another area's.
    is_alias: bool,
    mapped: Vec<bool>,
}

impl SoftMachine {
    /// Boots a guest on this back-end.
    pub fn boot(backend: &Backend, config: GuestConfig) -> Result<Self> {
        let guest = SoftGuest::boot(backend, config)?;
        let (areas, tickets) = (BTreeMap::new(), BTreeMap::new());
        Ok(Self { guest, control: backend.control()?, areas, next_area: 1, tickets, next_ticket: 1 })
    }

    fn held(&mut self, area: &Area) -> Result<&mut Held> {
        self.areas.get_mut(&area.id).ok_or_else(|| Failure::Rig(format!("There is no area {}", area.id)))
    }

    fn keep(&mut self, buffer: DmaBuffer, pieces: usize, pages: usize, is_alias: bool) -> Result<Area> {
        let (id, iova) = (self.next_area, buffer.address(0).0);
        self.next_area += 1;
        self.areas.insert(id, Held { buffer, is_alias, mapped: vec![true; pieces] });
        Ok(Area { id, iova, pieces, pages })
    }

    /// The pages of some pieces, as the buffer counts them.
    fn pages(area: &Area, pieces: &Range<usize>) -> Range<usize> {
        pieces.start * area.pages..pieces.end * area.pages
    }

    fn retire(&mut self, area: &Area, pages: Range<usize>) -> Result<()> {
        let fresh = self.guest.dma.space().frames().take(pages.len())?;
        for frame in &fresh {
            self.guest.dma.oracle().poison(*frame)?;
        }
        let held = self.held(area)?;
        let old: Vec<_> =
            pages.zip(fresh).map(|(page, frame)| held.buffer.replace_frame(page, frame)).collect();
        Ok(self.guest.dma.oracle().retire(&old)?)
    }
}

impl Machine for SoftMachine {
    fn level(&self) -> Level {
        Level::Soft
    }

    fn map(&mut self, pieces: usize, pages: usize, access: Permission) -> Result<Area> {
        let space = self.guest.dma.space();
        let buffer = match (pieces, pages) {
            (1, HUGE..) => space.allocate_run(pages, access)?,
            _ => space.allocate(pieces * pages, access)?,
        };
        for frame in buffer.frames() {
            self.guest.dma.oracle().poison(*frame)?;
        }
        self.keep(buffer, pieces, pages, false)
    }

    fn alias(&mut self, of: &Area, access: Permission) -> Result<Area> {
        let frames = self.held(of)?.buffer.frames().to_vec();
        let buffer = self.guest.dma.space().map(frames, access);
        self.keep(buffer, of.pieces, of.pages, true)
    }

    fn unmap(&mut self, area: &Area, pieces: Range<usize>, then: Then) -> Result<Duration> {
        let pages = Self::pages(area, &pieces);
        let held = self.held(area)?;
        held.mapped.iter_mut().take(pieces.end).skip(pieces.start).for_each(|mapped| *mapped = false);
        let iova = held.buffer.address(pages.start as u64 * PAGE);
        let begin = Instant::now();
        self.guest.dma.space().iommu().unmap(iova, pages.len());
        let ack = self.guest.front_end.invalidate(iova, pages.len() as u64 * PAGE)?;
        let took = begin.elapsed();
        ensure!(
            ack.status == 0,
            "An INVALIDATE was acked with status {}, which means that it failed",
            ack.status
        );
        if then == Then::Retire && !self.held(area)?.is_alias {
            self.retire(area, pages)?;
        }
        Ok(took)
    }

    fn map_again(&mut self, area: &Area, pieces: Range<usize>, access: Permission) -> Result<()> {
        let pages = Self::pages(area, &pieces);
        let held = self.held(area)?;
        held.mapped.iter_mut().take(pieces.end).skip(pieces.start).for_each(|mapped| *mapped = true);
        let places: Vec<_> = pages
            .filter_map(|page| {
                Some((held.buffer.address(page as u64 * PAGE), *held.buffer.frames().get(page)?))
            })
            .collect();
        for (iova, frame) in places {
            self.guest.dma.space().iommu().map(iova, frame, access);
        }
        Ok(())
    }

    fn free(&mut self, area: &Area) -> Result<()> {
        for piece in area.all() {
            if self.held(area)?.mapped.get(piece) == Some(&true) {
                self.unmap(area, piece..piece + 1, Then::Keep)?;
            }
        }
        if let Some(held) = self.areas.remove(&area.id)
            && !held.is_alias
        {
            self.guest.dma.oracle().retire(held.buffer.frames())?;
        }
        Ok(())
    }

    fn write(&mut self, area: &Area, at: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.held(area)?.buffer.write(at, bytes)?)
    }

    fn read(&mut self, area: &Area, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.held(area)?.buffer.read(at, &mut bytes)?;
        Ok(bytes)
    }

    fn late(&mut self) -> Result<u64> {
        Ok(self.guest.dma.oracle().touched()?.len() as u64)
    }

    fn submit(&mut self, command: &Command) -> Result<Ticket> {
        let ticket = self.guest.driver.submit(command)?;
        let number = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.insert(number, ticket);
        Ok(Ticket(number))
    }

    fn answer(&mut self, ticket: Ticket, limit: Duration) -> Result<Option<Response>> {
        let Some(known) = self.tickets.get(&ticket.0).copied() else {
            return Err(Failure::Rig(format!("There is no ticket {}", ticket.0)));
        };
        let found = match self.guest.driver.wait_for(known, limit) {
            Err(soft_guest::Error::Timeout { .. }) => None,
            found => Some(found?),
        };
        if found.is_some() {
            self.tickets.remove(&ticket.0);
        }
        Ok(found)
    }

    fn faults_logged(&mut self) -> Result<u64> {
        Ok(self.guest.dma.space().iommu().faults().len() as u64)
    }

    fn control(&mut self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.control.execute_with(command, arguments)?)
    }

    fn soft(&mut self) -> Option<&mut SoftGuest> {
        Some(&mut self.guest)
    }
}
