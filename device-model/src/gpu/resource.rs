//! Resources: an image on the host and a backing in the guest, or, for a buffer, a backing alone; and what they cost.
//! Knows formats, ids and quotas; knows nothing of scanouts or jobs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::gpu::error::CommandError;
use crate::gpu::quota::{Budget, Quota, Quotas};
use crate::gpu::request::{CreateBlob, CreateBuffer, CreateResource};
use crate::gpu::scanout::ChannelOrder;
use crate::image::{BYTES_PER_PIXEL, Image, Rect};
use crate::jobs::address_space::AddressSpace;
use crate::jobs::address_space::tlb::Flush;
use crate::jobs::backing::Backing;
use crate::jobs::backing::RawEntry;
use crate::telemetry::names::BackingChange;
use crate::wire::gpu::{BLOB_MEM_GUEST, format};

/// Gallium's number of a linear buffer (PIPE_BUFFER), the only target that RESOURCE_CREATE_3D accepts.
const BUFFER: u32 = 0;

/// The most changes of backings that are kept for observers; the oldest are dropped.
const CHANGES: usize = 1024;

/// How the four bytes of a pixel are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) order: ChannelOrder,
    /// Index of the alpha byte, in formats that have one.
    pub(crate) alpha: Option<u8>,
}

impl Format {
    /// The format with this number (virtio 1.3, 5.7.6.8). Its name gives the bytes in memory order.
    fn from_number(number: u32) -> Result<Self, CommandError> {
        let [blue, green, red, alpha] = match number {
            format::B8G8R8A8 | format::B8G8R8X8 => [0, 1, 2, 3],
            format::A8R8G8B8 | format::X8R8G8B8 => [3, 2, 1, 0],
            format::R8G8B8A8 | format::R8G8B8X8 => [2, 1, 0, 3],
            format::A8B8G8R8 | format::X8B8G8R8 => [1, 2, 3, 0],
            _ => return Err(CommandError::NoSuchFormat { format: number }),
        };
        let opaque = [format::B8G8R8X8, format::X8R8G8B8, format::R8G8B8X8, format::X8B8G8R8];
        let alpha = (!opaque.contains(&number)).then_some(alpha);
        Ok(Self { order: ChannelOrder { blue, green, red }, alpha })
    }
}

/// A resource. Jobs and scanouts share its image, jobs its backing.
#[derive(Debug)]
pub(crate) struct Resource {
    id: u32,
    /// The host's copy of a 2D resource; a buffer has none.
    image: Option<Picture>,
    pub(crate) backing: Option<Backing>,
    /// Bytes of the image or of the buffer.
    bytes: u64,
}

/// An image with its format.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    pub(crate) format: Format,
    pub(crate) image: Arc<Image>,
}

impl Resource {
    /// The image; a buffer has none.
    pub(crate) fn picture(&self) -> Result<&Picture, CommandError> {
        self.image.as_ref().ok_or(CommandError::NotAnImage { id: self.id })
    }

    /// Bytes that a job can name, as far as they are backed.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes of host memory that count against the quota.
    fn host_bytes(&self) -> u64 {
        if self.image.is_some() { self.bytes } else { 0 }
    }
}

impl Picture {
    /// `rect`, if it lies in the image.
    pub(crate) fn bounded(&self, rect: Rect) -> Result<Rect, CommandError> {
        let (width, height) = (self.image.width(), self.image.height());
        if rect.fits(width, height) {
            Ok(rect)
        } else {
            Err(CommandError::RectOutside { rect, width, height })
        }
    }
}

/// All resources of the guest, by id, and what they cost.
///
/// INVARIANT: the budgets include what the resources in the table cost, and the cost of removed resources and detached
/// backings until they are [`retire`](Self::retire)d: memory that a queued job keeps alive stays accounted for.
#[derive(Debug)]
pub(crate) struct Resources {
    by_id: BTreeMap<u32, Resource>,
    count: Budget,
    bytes: Budget,
    entries: Budget,
    /// Changes of backings that were not taken yet.
    changes: VecDeque<BackingChange>,
}

impl Resources {
    pub(crate) fn new(quotas: &Quotas) -> Self {
        Self {
            by_id: BTreeMap::new(),
            count: Budget::new(Quota::Resources, quotas.resources),
            bytes: Budget::new(Quota::ResourceBytes, quotas.resource_bytes),
            entries: Budget::new(Quota::BackingEntries, quotas.backing_entries),
            changes: VecDeque::new(),
        }
    }

    fn changed(&mut self, change: BackingChange) {
        if self.changes.len() >= CHANGES {
            self.changes.pop_front();
        }
        self.changes.push_back(change);
    }

    /// The changes of backings since the last call.
    pub(crate) fn take_changes(&mut self) -> VecDeque<BackingChange> {
        std::mem::take(&mut self.changes)
    }

    /// Creates a resource with a black image. Everything is checked before anything is allocated.
    pub(crate) fn create(&mut self, request: CreateResource) -> Result<(), CommandError> {
        let CreateResource { id, format, width, height } = request;
        self.check_new(id)?;
        let format = Format::from_number(format)?;
        if width == 0 || height == 0 {
            return Err(CommandError::NoPixels { width, height });
        }
        // OVERFLOW: two 32-bit sides fit 64 bits; times the bytes of a pixel they may not, and then no quota allows it.
        let pixels = u64::from(width).saturating_mul(u64::from(height));
        let bytes = pixels.saturating_mul(BYTES_PER_PIXEL);
        self.count.take(1)?;
        if let Err(refusal) = self.bytes.take(bytes) {
            self.count.give_back(1);
            return Err(refusal.into());
        }
        let Some(image) = Image::new(width, height) else {
            self.count.give_back(1);
            self.bytes.give_back(bytes);
            return Err(CommandError::NoMemory { bytes });
        };
        let image = Some(Picture { format, image: Arc::new(image) });
        self.by_id.insert(id, Resource { id, image, backing: None, bytes });
        Ok(())
    }

    /// Creates a buffer, which has only the backing that it will get.
    pub(crate) fn create_buffer(&mut self, request: CreateBuffer) -> Result<(), CommandError> {
        let CreateBuffer { id, target, width, others } = request;
        self.check_new(id)?;
        if target != BUFFER || others.iter().any(|size| *size > 1) {
            return Err(CommandError::NoBuffer { id, target });
        }
        if width == 0 {
            return Err(CommandError::NoPixels { width, height: 1 });
        }
        self.count.take(1)?;
        self.by_id.insert(id, Resource { id, image: None, backing: None, bytes: width.into() });
        Ok(())
    }

    /// Creates a blob of guest memory: a buffer that comes with its backing.
    pub(crate) fn create_blob(
        &mut self,
        request: CreateBlob<impl Iterator<Item = RawEntry>>,
        count: usize,
    ) -> Result<(), CommandError> {
        let CreateBlob { id, memory, blob, size, entries } = request;
        self.check_new(id)?;
        if memory != BLOB_MEM_GUEST || blob != 0 {
            return Err(CommandError::NotGuestMemory { id, memory, blob });
        }
        if size == 0 || count == 0 {
            return Err(CommandError::NoEntries { id });
        }
        self.count.take(1)?;
        let backing = self.backing(count, entries).and_then(|backing| {
            let backed = backing.bytes();
            if backed >= size {
                return Ok(backing);
            }
            self.entries.give_back(count as u64);
            Err(CommandError::BlobTooLarge { id, size, backed })
        });
        match backing {
            Ok(backing) => {
                let entries = backing.ranges().collect();
                self.by_id.insert(id, Resource { id, image: None, backing: Some(backing), bytes: size });
                self.changed(BackingChange::Attached { resource: id, entries });
                Ok(())
            }
            Err(error) => {
                self.count.give_back(1);
                Err(error)
            }
        }
    }

    /// A backing that counts against the quota.
    fn backing(
        &mut self,
        count: usize,
        entries: impl Iterator<Item = RawEntry>,
    ) -> Result<Backing, CommandError> {
        self.entries.take(count as u64)?;
        Ok(Backing::new(entries).inspect_err(|_| self.entries.give_back(count as u64))?)
    }

    fn check_new(&self, id: u32) -> Result<(), CommandError> {
        if id == 0 {
            return Err(CommandError::ResourceZero);
        }
        if self.by_id.contains_key(&id) {
            return Err(CommandError::ResourceExists { id });
        }
        Ok(())
    }

    /// The resource with this id.
    pub(crate) fn get(&self, id: u32) -> Result<&Resource, CommandError> {
        self.by_id.get(&id).ok_or(CommandError::NoSuchResource { id })
    }

    fn get_mut(&mut self, id: u32) -> Result<&mut Resource, CommandError> {
        self.by_id.get_mut(&id).ok_or(CommandError::NoSuchResource { id })
    }

    /// Removes a resource from the table: its id is free at once, its cost when it is retired.
    pub(crate) fn remove(&mut self, id: u32) -> Result<Resource, CommandError> {
        let removed = self.by_id.remove(&id).ok_or(CommandError::NoSuchResource { id })?;
        if removed.backing.is_some() {
            self.changed(BackingChange::Detached { resource: id });
        }
        Ok(removed)
    }

    /// Gives the resource a backing of `count` entries.
    pub(crate) fn attach(
        &mut self,
        id: u32,
        count: usize,
        entries: impl Iterator<Item = RawEntry>,
    ) -> Result<(), CommandError> {
        if self.get(id)?.backing.is_some() {
            return Err(CommandError::BackingExists { id });
        }
        if count == 0 {
            return Err(CommandError::NoEntries { id });
        }
        let backing = self.backing(count, entries)?;
        let entries = backing.ranges().collect();
        self.get_mut(id)?.backing = Some(backing);
        self.changed(BackingChange::Attached { resource: id, entries });
        Ok(())
    }

    /// Detaches the backing: another may be attached at once, its cost is free when it is retired.
    pub(crate) fn detach(&mut self, id: u32) -> Result<Backing, CommandError> {
        let backing = self.get_mut(id)?.backing.take().ok_or(CommandError::NoBacking { id })?;
        self.changed(BackingChange::Detached { resource: id });
        Ok(backing)
    }

    /// No job uses what was removed or detached any more: frees its cost.
    pub(crate) fn retire(&mut self, retired: Retired) {
        let backing = match retired {
            // Its quota is given back with the last use of it.
            Retired::AddressSpace(_) | Retired::Translations(_) => None,
            Retired::Backing(backing) => Some(backing),
            Retired::Resource(resource) => {
                self.count.give_back(1);
                self.bytes.give_back(resource.host_bytes());
                resource.backing
            }
        };
        if let Some(backing) = backing {
            self.entries.give_back(backing.entries() as u64);
        }
    }

    /// Usage: resources, bytes of images, backing entries.
    pub(crate) fn usage(&self) -> (u64, u64, u64) {
        (self.count.used(), self.bytes.used(), self.entries.used())
    }
}

/// What the guest has removed, detached or flushed, and jobs may still use.
#[derive(Debug)]
pub(crate) enum Retired {
    Resource(Resource),
    Backing(Backing),
    AddressSpace(Arc<AddressSpace>),
    /// Translations of an address space, which steps from before the flush may use.
    Translations(Flush),
}

impl Retired {
    /// Whether a job, or a step of one, still uses it.
    pub(crate) fn is_in_use(&self) -> bool {
        match self {
            Self::Resource(resource) => resource.backing.as_ref().is_some_and(Backing::is_shared),
            Self::Backing(backing) => backing.is_shared(),
            Self::AddressSpace(space) => Arc::strong_count(space) > 1,
            Self::Translations(flush) => !flush.is_over(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Iova, RangeError};
    use crate::jobs::error::InvalidMemory;

    fn resources(resource_bytes: u64) -> Resources {
        Resources::new(&Quotas { resource_bytes, backing_entries: 4, resources: 2, ..Quotas::default() })
    }

    fn request(id: u32, width: u32, height: u32) -> CreateResource {
        CreateResource { id, format: format::B8G8R8X8, width, height }
    }

    fn entries(list: &[(u64, u32)]) -> impl Iterator<Item = RawEntry> + '_ {
        list.iter().map(|&(at, len)| RawEntry { at: Iova::new(at), len })
    }

    #[test]
    fn the_size_of_an_image_is_taken_in_64_bits_and_refused_before_it_is_allocated() {
        let mut resources = resources(1 << 20);
        for (width, height) in [
            (1 << 15, 1 << 15),
            ((1 << 15) + 1, 1 << 15),
            (1 << 16, 1 << 16),
            (1 << 31, 2),
            (u32::MAX, u32::MAX),
        ] {
            let refusal = resources.create(request(1, width, height)).unwrap_err();
            assert!(matches!(&refusal, CommandError::OverQuota(over) if over.quota == Quota::ResourceBytes));
        }
        assert_eq!(resources.create(request(1, 0, 5)), Err(CommandError::NoPixels { width: 0, height: 5 }));
        assert_eq!(resources.usage(), (0, 0, 0));
        assert_eq!(resources.create(request(1, 512, 512)), Ok(()));
        assert_eq!(resources.usage(), (1, 1 << 20, 0));
    }

    #[test]
    fn a_second_backing_is_refused_and_the_first_is_kept() {
        let mut resources = resources(1 << 20);
        resources.create(request(1, 1, 1)).unwrap();
        resources.attach(1, 1, entries(&[(0x1000, 16)])).unwrap();
        assert_eq!(
            resources.attach(1, 1, entries(&[(0x2000, 16)])),
            Err(CommandError::BackingExists { id: 1 })
        );
        assert_eq!(resources.usage().2, 1);
        let kept = resources.detach(1).unwrap();
        assert_eq!(kept.locate(0), Some((Iova::new(0x1000), 16)));
    }

    #[test]
    fn a_bad_entry_takes_nothing_from_the_quota() {
        let mut resources = resources(1 << 20);
        resources.create(request(1, 1, 1)).unwrap();
        let empty = InvalidMemory::BadEntry { index: 1, source: RangeError::Empty { start: 0x2000 } };
        assert_eq!(resources.attach(1, 2, entries(&[(0x1000, 16), (0x2000, 0)])), Err(empty.into()));
        let wraps = RangeError::Wraps { start: u64::MAX, len: 2 };
        let wraps = InvalidMemory::BadEntry { index: 0, source: wraps };
        assert_eq!(resources.attach(1, 1, entries(&[(u64::MAX, 2)])), Err(wraps.into()));
        assert_eq!(resources.usage(), (1, 4, 0));
    }

    #[test]
    fn what_was_removed_stays_accounted_for_until_it_is_retired() {
        let mut resources = resources(1 << 20);
        resources.create(request(1, 2, 2)).unwrap();
        resources.attach(1, 3, entries(&[(0, 1), (1, 1), (2, 1)])).unwrap();
        let removed = resources.remove(1).unwrap();
        assert_eq!(resources.usage(), (1, 16, 3));
        resources.retire(Retired::Resource(removed));
        assert_eq!(resources.usage(), (0, 0, 0));
    }

    #[test]
    fn the_eight_formats_say_where_their_channels_are() {
        let channels = |number| {
            let format = Format::from_number(number).unwrap();
            (format.order.blue, format.order.green, format.order.red, format.alpha)
        };
        assert_eq!(channels(format::B8G8R8A8), (0, 1, 2, Some(3)));
        assert_eq!(channels(format::B8G8R8X8), (0, 1, 2, None));
        assert_eq!(channels(format::A8R8G8B8), (3, 2, 1, Some(0)));
        assert_eq!(channels(format::X8R8G8B8), (3, 2, 1, None));
        assert_eq!(channels(format::R8G8B8A8), (2, 1, 0, Some(3)));
        assert_eq!(channels(format::R8G8B8X8), (2, 1, 0, None));
        assert_eq!(channels(format::A8B8G8R8), (1, 2, 3, Some(0)));
        assert_eq!(channels(format::X8B8G8R8), (1, 2, 3, None));
        assert_eq!(Format::from_number(5), Err(CommandError::NoSuchFormat { format: 5 }));
    }
}
