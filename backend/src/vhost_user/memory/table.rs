//! The memory table: all regions of the front-end's memory, and the translation of its addresses to host addresses.
//! Regions do not overlap in either address space. A change is applied as a whole or not at all.

use std::fs::File;
use std::io;

use device_model::addr::{ByteRange, FrontendVa, Gpa};

use super::region::{Region, RegionError, RegionSpec};

/// Maximum number of regions: as many descriptors as one message can carry in the `vhost` crate.
pub const MAX_REGIONS: usize = 32;

/// Why a table, or a change of it, was refused.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// One of the regions cannot be mapped.
    #[error("Region {index} of the memory table cannot be taken")]
    Region {
        /// Its index in the message.
        index: usize,
        /// Why.
        #[source]
        source: RegionError,
    },
    /// Two regions share addresses.
    #[error("Memory regions at guest-physical {first:#x} and {second:#x} overlap")]
    Overlap {
        /// Guest-physical address of one region.
        first: u64,
        /// Guest-physical address of the other region.
        second: u64,
    },
    /// The numbers of regions and descriptors differ.
    #[error("Memory table of {regions} regions came with {files} descriptors")]
    Descriptors {
        /// Number of regions.
        regions: usize,
        /// Number of descriptors.
        files: usize,
    },
    /// The table is full.
    #[error("Memory table already has {MAX_REGIONS} regions, the most that it can have")]
    Full,
    /// The region to remove does not exist.
    #[error("Memory table has no region of {size:#x} bytes at guest-physical {gpa:#x}")]
    Unknown {
        /// Guest-physical address.
        gpa: u64,
        /// Length.
        size: u64,
    },
}

/// Where a range of the front-end's memory lies in this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// First byte.
    pub host: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

/// The regions, unordered.
#[derive(Default)]
pub struct MemoryTable {
    regions: Vec<Region>,
}

impl MemoryTable {
    /// Maps a whole new table.
    pub fn map(specs: &[RegionSpec], files: &[File]) -> Result<Self, TableError> {
        if specs.len() != files.len() {
            return Err(TableError::Descriptors { regions: specs.len(), files: files.len() });
        }
        let mut table = Self::default();
        for (index, (spec, file)) in specs.iter().zip(files).enumerate() {
            table.add_at(index, *spec, file)?;
        }
        Ok(table)
    }

    /// Adds a region.
    pub fn add(&mut self, spec: RegionSpec, file: &File) -> Result<(), TableError> {
        self.add_at(0, spec, file)
    }

    fn add_at(&mut self, index: usize, spec: RegionSpec, file: &File) -> Result<(), TableError> {
        if self.regions.len() >= MAX_REGIONS {
            return Err(TableError::Full);
        }
        let region = Region::map(spec, file).map_err(|source| TableError::Region { index, source })?;
        let twin = |r: &&Region| r.gpa().overlaps(region.gpa()) || r.user().overlaps(region.user());
        if let Some(other) = self.regions.iter().find(twin) {
            return Err(TableError::Overlap { first: other.spec().gpa, second: spec.gpa });
        }
        self.regions.push(region);
        Ok(())
    }

    /// Whether there is a region that [`Self::remove`] would remove.
    pub fn has(&self, spec: RegionSpec) -> bool {
        self.regions.iter().any(|region| Self::matches(region, spec))
    }

    /// Removes a region, for the caller to drop. Its file offset is not compared: the front-end sends none.
    pub fn remove(&mut self, spec: RegionSpec) -> Result<Region, TableError> {
        let index = self.regions.iter().position(|region| Self::matches(region, spec));
        index
            .map(|index| self.regions.swap_remove(index))
            .ok_or(TableError::Unknown { gpa: spec.gpa, size: spec.size })
    }

    fn matches(region: &Region, spec: RegionSpec) -> bool {
        let own = region.spec();
        (own.gpa, own.size, own.user_address) == (spec.gpa, spec.size, spec.user_address)
    }

    /// The regions.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The host range of a range of front-end addresses; `None` if it does not lie within one region.
    pub fn translate(&self, range: ByteRange<FrontendVa>) -> Option<Translation> {
        let region = self.regions.iter().find(|region| region.user().covers(range))?;
        let offset = range.first().raw() - region.user().first().raw();
        Some(Translation { host: region.host_at(offset), len: usize::try_from(range.len()).ok()? })
    }

    /// The guest-physical address of the front-end address `address`.
    pub fn gpa_of(&self, address: FrontendVa) -> Option<Gpa> {
        let region = self.regions.iter().find(|region| region.user().contains(address))?;
        region.gpa().first().checked_add(address.raw() - region.user().first().raw())
    }

    /// Replaces all memory by zero pages ([`Region::revoke`]). Stops at the first region that fails.
    pub fn revoke(&self) -> io::Result<()> {
        self.regions.iter().try_for_each(Region::revoke)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x10000).unwrap();
        file
    }

    fn spec(gpa: u64, user_address: u64, file_offset: u64) -> RegionSpec {
        RegionSpec { gpa, size: 0x4000, user_address, file_offset }
    }

    fn range(start: u64, len: u64) -> ByteRange<FrontendVa> {
        ByteRange::new(FrontendVa::new(start), len).unwrap()
    }

    #[test]
    fn a_range_is_translated_only_within_one_region() {
        let files = [file(), file()];
        let specs = [spec(0, 0x10_0000, 0), spec(0x8000, 0x10_4000, 0x4000)];
        let table = MemoryTable::map(&specs, &files).unwrap();
        let inside = table.translate(range(0x10_4010, 0x100)).unwrap();
        assert_eq!((inside.host, inside.len), (table.regions()[1].host_at(0x10), 0x100));
        assert!(
            table.translate(range(0x10_3000, 0x2000)).is_none(),
            "neighbours in one space need not be in ours"
        );
        assert!(table.translate(range(0x10_7fff, 2)).is_none());
        assert_eq!(table.gpa_of(FrontendVa::new(0x10_4010)), Some(Gpa::new(0x8010)));
    }

    #[test]
    fn regions_that_overlap_in_either_space_are_refused() {
        for second in [spec(0x3000, 0x20_0000, 0), spec(0x8000, 0x10_3000, 0)] {
            let result = MemoryTable::map(&[spec(0, 0x10_0000, 0), second], &[file(), file()]);
            assert!(matches!(result.err(), Some(TableError::Overlap { first: 0, .. })));
        }
    }

    #[test]
    fn a_region_is_removed_by_its_addresses_and_only_once() {
        let mut table = MemoryTable::map(&[spec(0, 0x10_0000, 0x1000)], &[file()]).unwrap();
        let mut other = spec(0, 0x10_0000, 0);
        other.size = 0x3000;
        assert!(matches!(table.remove(other), Err(TableError::Unknown { gpa: 0, size: 0x3000 })));
        assert!(table.remove(spec(0, 0x10_0000, 0)).is_ok());
        assert!(!table.has(spec(0, 0x10_0000, 0)));
    }

    #[test]
    fn a_table_has_a_bound() {
        let mut table = MemoryTable::default();
        for n in 0..MAX_REGIONS as u64 {
            table.add(spec(n << 20, n << 20, 0), &file()).unwrap();
        }
        assert!(matches!(table.add(spec(1 << 40, 1 << 40, 0), &file()), Err(TableError::Full)));
    }
}
