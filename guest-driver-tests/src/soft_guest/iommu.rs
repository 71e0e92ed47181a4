//! The soft IOMMU: which IOVA is which frame, with which permission, and the faults that it has logged. It answers
//! misses as intel-iommu does. Knows nothing of messages: the caller that changes it must invalidate.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;

use super::addr::{Gpa, Iova, PAGE, Permission};
use super::error::{Error, Result};
use super::turn::held;

/// An entry of the IOMMU's page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The frame.
    pub frame: Gpa,
    /// What the device may do with it.
    pub permission: Permission,
}

/// A fault, as the guest's kernel would log it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The address that the device requested.
    pub iova: Iova,
    /// Whether it wanted to write.
    pub write: bool,
}

/// An IOMMU in front of one device.
#[derive(Debug, Default)]
pub struct Iommu {
    tables: Mutex<Tables>,
}

#[derive(Debug)]
struct Tables {
    entries: BTreeMap<u64, Entry>,
    faults: Vec<Fault>,
    // Like Linux: downwards from a limit, and freed addresses are reused at once.
    lowest: u64,
    freed: HashMap<usize, Vec<Iova>>,
}

// Below the addresses of the interrupt messages, which no IOMMU translates.
const HIGHEST_IOVA: u64 = 0xfee0_0000;

impl Default for Tables {
    fn default() -> Self {
        Self { entries: BTreeMap::new(), faults: Vec::new(), lowest: HIGHEST_IOVA, freed: HashMap::new() }
    }
}

impl Iommu {
    /// Finds a range of `pages` contiguous IOVAs.
    pub fn allocate(&self, pages: usize) -> Iova {
        let mut tables = held(&self.tables);
        if let Some(iova) = tables.freed.get_mut(&pages).and_then(Vec::pop) {
            return iova;
        }
        let bytes = pages as u64 * PAGE;
        // Aligned to its size, as Linux allocates (`size_aligned`).
        let start = (tables.lowest - bytes) & !(bytes.next_power_of_two() - 1);
        tables.lowest = start;
        Iova(start)
    }

    /// Frees a range of IOVAs for reuse, once its invalidation has been acknowledged.
    pub fn release(&self, iova: Iova, pages: usize) {
        held(&self.tables).freed.entry(pages).or_default().push(iova);
    }

    /// Maps a page. An existing entry is replaced: the caller must then invalidate.
    pub fn map(&self, iova: Iova, frame: Gpa, permission: Permission) -> Option<Entry> {
        held(&self.tables).entries.insert(iova.page().0, Entry { frame, permission })
    }

    /// Removes the entries of `pages` pages, and returns them.
    pub fn unmap(&self, iova: Iova, pages: usize) -> Vec<Entry> {
        let mut tables = held(&self.tables);
        (0..pages as u64).filter_map(|page| tables.entries.remove(&(iova.page().0 + page * PAGE))).collect()
    }

    /// The entry of a page, without any fault.
    pub fn look_up(&self, iova: Iova) -> Result<Entry> {
        held(&self.tables).entries.get(&iova.page().0).copied().ok_or(Error::NotMapped(iova))
    }

    /// The IOMMU's answer to a request of the device: the entry, or a fault in the log.
    pub fn translate(&self, iova: Iova, write: bool) -> Option<Entry> {
        let mut tables = held(&self.tables);
        let entry = tables.entries.get(&iova.page().0).copied();
        let allowed = entry.filter(|entry| entry.permission.allows(write));
        if allowed.is_none() {
            tables.faults.push(Fault { iova, write });
        }
        allowed
    }

    /// Logs a fault without a lookup: for a front-end that refuses mapped pages.
    pub fn log_fault(&self, iova: Iova, write: bool) {
        held(&self.tables).faults.push(Fault { iova, write });
    }

    /// The pages around `iova` whose frames are neighbours too and have the same permission: what one huge page
    /// would cover. First page and number of pages.
    pub fn run_around(&self, iova: Iova) -> Option<(Iova, usize)> {
        let tables = held(&self.tables);
        let here = tables.entries.get(&iova.page().0)?;
        let fits = |page: u64| {
            let entry = tables.entries.get(&page);
            entry.is_some_and(|entry| {
                entry.permission == here.permission
                    && entry.frame.0.wrapping_sub(here.frame.0) == page.wrapping_sub(iova.page().0)
            })
        };
        let mut first = iova.page().0;
        while first >= PAGE && fits(first - PAGE) {
            first -= PAGE;
        }
        let mut end = iova.page().0 + PAGE;
        while fits(end) {
            end += PAGE;
        }
        Some((Iova(first), ((end - first) / PAGE) as usize))
    }

    /// The faults logged so far.
    pub fn faults(&self) -> Vec<Fault> {
        held(&self.tables).faults.clone()
    }

    /// How many pages are mapped.
    pub fn mapped_pages(&self) -> usize {
        held(&self.tables).entries.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_access_is_logged_and_an_allowed_one_is_not() {
        let iommu = Iommu::default();
        let iova = iommu.allocate(1);
        iommu.map(iova, Gpa(0x5000), Permission::ReadOnly);
        assert_eq!(iommu.translate(iova.plus(8), false).unwrap().frame, Gpa(0x5000));
        assert_eq!(iommu.faults(), []);
        assert_eq!(iommu.translate(iova.plus(8), true), None);
        assert_eq!(iommu.translate(Iova(0), false), None);
        let expected = [Fault { iova: iova.plus(8), write: true }, Fault { iova: Iova(0), write: false }];
        assert_eq!(iommu.faults(), expected);
    }

    #[test]
    fn iovas_do_not_overlap_and_freed_ones_come_again() {
        let iommu = Iommu::default();
        let (one, three) = (iommu.allocate(1), iommu.allocate(3));
        assert!(three.plus(3 * PAGE) <= one && one.plus(PAGE).0 <= HIGHEST_IOVA);
        iommu.release(three, 3);
        assert_eq!(iommu.allocate(3), three);
    }

    #[test]
    fn a_run_ends_where_the_frames_are_no_neighbours() {
        let iommu = Iommu::default();
        for (page, frame) in [(1, 11), (2, 12), (3, 13), (4, 15)] {
            iommu.map(Iova(page * PAGE), Gpa(frame * PAGE), Permission::ReadWrite);
        }
        assert_eq!(iommu.run_around(Iova(2 * PAGE + 5)), Some((Iova(PAGE), 3)));
    }
}
