//! Memory as a job sees it while everything else happens: the oracle sees each access before it is made, and the
//! follower of the job's stream sees what was done.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use super::bug::Bug;
use super::engines::Host;
use super::follower::JobEvent;
use super::guest::page_at;
use super::oracle::{Invariant, violation};
use super::world::World;
use crate::addr::{Access, ByteRange, DomainId, Iova, PAGE_SIZE};
use crate::jobs::job::JobId;
use crate::mmu::{AtomicOperation, HostPage, JobMemory, MemoryError, Width};

/// What touches memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Toucher {
    /// The job; `None`: the queue thread.
    pub(super) job: Option<JobId>,
    /// Its context is lost.
    pub(super) is_dead: bool,
    /// It keeps using its pins, whatever the guest unmaps (registration cache).
    pub(super) keeps: bool,
}

/// What a seeded bug copies from the pins of a job.
#[derive(Debug, Default)]
pub(super) struct Copies {
    places: BTreeMap<(usize, bool), u64>,
    pub(super) evicted: bool,
}

impl World {
    /// Shows an access to the oracle before it is made. (Without a translation, none will be made.)
    pub(super) fn check_access(
        &mut self,
        memory: &impl JobMemory,
        (at, len, access): (Iova, usize, Access),
        by: Toucher,
    ) {
        let Ok(range) = ByteRange::new(at, len as u64) else { return };
        for page in range.pages() {
            let first = page.max(at);
            let Some(address) = memory.locate(DomainId::DEVICE, first, access) else { return };
            self.check_place(first, address, access, by);
        }
    }

    /// An answer without a MISS may have granted what the guest had not mapped.
    fn is_excused(&self) -> bool {
        self.flavor.faulty && self.oracle.excused > 0
    }

    fn check_place(&mut self, at: Iova, address: u64, access: Access, by: Toucher) {
        self.counts.accesses += 1;
        let (page, place) = (page_at(at), self.memory.place(address));
        let (Some(page), Some(place)) = (page, place) else {
            return self.fail(violation(Invariant::I1, format!("{at} leads outside of all memory")));
        };
        self.touched = page;
        self.event("access", page as u64, (place.frame as u64) << 1 | access as u64);
        if self.over {
            // Memory is revoked.
        } else if !place.current {
            let what = format!("A {access} at {at} reaches memory that is not in the memory table any more");
            self.fail(violation(Invariant::I1, what));
        } else if by.keeps && !self.guest.allows(page, place.frame, Some(access)) {
            return self.touch_incoherently(place.frame, access, by);
        } else if !self.guest.allows(page, place.frame, None) {
            let what =
                format!("A {access} at {at} reaches frame {}, which is not there any more", place.frame);
            self.fail(violation(Invariant::I1, what));
        } else if !self.guest.allows(page, place.frame, Some(access)) && !self.is_excused() {
            let what = format!("A {access} at {at} is more than the guest's page table allows");
            self.fail(violation(Invariant::I7, what));
        }
        if access == Access::Write {
            self.guest.written_by_device(place.frame, self.stamp);
            self.oracle.disturb_frame(place.frame, by.job);
        }
    }

    /// A registration cache uses a frame that it no longer owns, and that may belong to another page now.
    fn touch_incoherently(&mut self, frame: usize, access: Access, by: Toucher) {
        self.counts.incoherent_accesses += 1;
        if access == Access::Write {
            self.memory.written_incoherently(frame);
            self.guest.written_by_device(frame, self.stamp);
            self.oracle.disturb_frame(frame, None);
        }
        if let Some(job) = by.job {
            self.oracle.disturb_job(job);
        }
    }
}

/// Memory as a job sees it, with everything else that happens meanwhile.
pub(super) struct Checked<'a, 'h, 'w, 'o, M> {
    memory: &'a M,
    by: Toucher,
    /// The time of the step, and how long the device had been running then.
    times: (Duration, Duration),
    /// A seeded bug may have it use translations of earlier sections.
    goes_stale: bool,
    host: RefCell<&'h mut Host<'w, 'o>>,
}

impl<'a, 'h, 'w, 'o, M: JobMemory> Checked<'a, 'h, 'w, 'o, M> {
    pub(super) fn new(
        memory: &'a M,
        by: Toucher,
        (times, goes_stale): ((Duration, Duration), bool),
        host: &'h mut Host<'w, 'o>,
    ) -> Self {
        Self { memory, by, times, goes_stale, host: RefCell::new(host) }
    }

    /// Lets the operations of this access happen: after its translation, before its copy. The oracle sees both. `Some`:
    /// the address that a seeded bug uses instead.
    fn before(&self, at: Iova, len: usize, access: Access) -> Option<u64> {
        let mut host = self.host.borrow_mut();
        if let Some(around) = host.around.filter(|around| around.access == host.accesses) {
            host.around = None;
            let translated = self.memory.locate(DomainId::DEVICE, at, access);
            for _ in 0..around.take {
                let Host { world, readers, cursor, .. } = &mut **host;
                world.counts.within_steps += 1;
                world.next_operation(readers, cursor, true);
            }
            if let Some(address) = translated {
                host.world.check_place(at, address, access, self.by);
            }
        }
        host.accesses = host.accesses.saturating_add(1);
        if let Some(address) = self.stale(&mut host, at, access) {
            host.world.check_place(at, address, access, self.by);
            return Some(address);
        }
        host.world.check_access(self.memory, (at, len, access), self.by);
        None
    }

    /// The seeded bugs: keep translations of the pin or the previous section, and use them once they are invalidated.
    fn stale(&self, host: &mut Host<'_, '_>, at: Iova, access: Access) -> Option<u64> {
        let sections = host.world.is(Bug::StaleTranslation) && self.goes_stale;
        if !sections && !host.world.is(Bug::StalePinAfterEviction) {
            return None;
        }
        let copies = host.world.copies.entry(self.by.job?).or_default();
        let key = (page_at(at)?, access == Access::Write);
        let found =
            self.memory.locate(DomainId::DEVICE, at, access).map(|address| address - at.page_offset());
        if copies.evicted || sections && found.is_none() {
            return copies.places.get(&key).map(|page| page + at.page_offset());
        }
        copies.places.extend(found.map(|page| (key, page)));
        None
    }

    /// The job has made this access.
    fn did(&self, event: JobEvent<'_>) {
        let mut host = self.host.borrow_mut();
        let Some(job) = self.by.job else { return };
        if let Err(violation) = host.world.oracle.follow(job, event, self.by.is_dead, self.times) {
            host.world.fail(violation);
        }
    }

    fn is(&self, bug: Bug) -> bool {
        self.host.borrow().world.is(bug)
    }
}

impl<M: JobMemory> JobMemory for Checked<'_, '_, '_, '_, M> {
    fn read(&self, space: DomainId, at: Iova, into: &mut [u8]) -> Result<(), MemoryError> {
        match self.before(at, into.len(), Access::Read) {
            Some(stale) if at.page_offset() + into.len() as u64 <= PAGE_SIZE => {
                self.host.borrow().world.memory.read_at(stale, into);
            }
            _ => self.memory.read(space, at, into)?,
        }
        self.did(JobEvent::Read { at, bytes: into });
        Ok(())
    }

    fn write(&self, space: DomainId, at: Iova, from: &[u8]) -> Result<(), MemoryError> {
        self.before(at, from.len(), Access::Write);
        self.memory.write(space, at, from)?;
        self.did(JobEvent::Write { at, bytes: from });
        Ok(())
    }

    fn copy(&self, space: DomainId, from: Iova, to: Iova, len: usize) -> Result<(), MemoryError> {
        self.before(from, len, Access::Read);
        self.before(to, len, Access::Write);
        self.memory.copy(space, from, to, len)?;
        self.did(JobEvent::Copy { from, to, len: len as u64 });
        Ok(())
    }

    fn atomic(
        &self,
        space: DomainId,
        at: Iova,
        width: Width,
        operation: AtomicOperation,
    ) -> Result<u64, MemoryError> {
        for access in operation.accesses() {
            self.before(at, width.bytes() as usize, *access);
        }
        let is_store = matches!(operation, AtomicOperation::Store(_));
        if is_store && self.is(Bug::LoseStore) && self.memory.locate(space, at, Access::Write).is_some() {
            self.did(JobEvent::Value { at, width, operation, old: 0 });
            return Ok(0);
        }
        let old = self.memory.atomic(space, at, width, operation)?;
        if self.is(Bug::RepeatAtomic) && matches!(operation, AtomicOperation::Add(_)) {
            self.memory.atomic(space, at, width, operation)?;
        }
        self.did(JobEvent::Value { at, width, operation, old });
        Ok(old)
    }

    fn host_page(&self, space: DomainId, at: Iova, access: Access) -> Option<HostPage> {
        self.memory.host_page(space, at, access)
    }

    fn locate(&self, space: DomainId, at: Iova, access: Access) -> Option<u64> {
        self.memory.locate(space, at, access)
    }
}
