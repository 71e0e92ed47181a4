//! Names for addresses: which resource, ring and job an IOVA belongs to. Updated when they change, queried when a
//! record is rendered. Removed names are kept for a while and marked as such, since the interesting address is often
//! one that was just unmapped. Bounded by the guest's quotas. Knows ranges; knows nothing of translations.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::time::Duration;

use crate::addr::{ByteRange, Iova};
use crate::jobs::job::JobId;
use crate::jobs::name::{JobName, OperandName};

/// Removed names that are kept, and the number of backing entries that they may have together.
const REMOVED: usize = 128;
const REMOVED_ENTRIES: usize = 16 << 10;
/// The most packets of a job that one name lists.
const MOST_PACKETS: usize = 4;
/// The most names for one range.
pub const MOST_NAMES: usize = 8;

/// A change of the backings of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackingChange {
    /// The resource now has these stretches of memory, one after the other.
    Attached {
        /// The resource.
        resource: u32,
        /// Its memory.
        entries: Vec<ByteRange<Iova>>,
    },
    /// It has no memory any more.
    Detached {
        /// The resource.
        resource: u32,
    },
}

/// Something with a name.
#[derive(Clone, Debug)]
enum Named {
    Backing { resource: u32, entries: Vec<ByteRange<Iova>> },
    Ring { name: &'static str, parts: Vec<(&'static str, ByteRange<Iova>)> },
    Job(JobName),
}

impl Named {
    fn entries(&self) -> usize {
        match self {
            Self::Backing { entries, .. } => entries.len(),
            Self::Ring { parts, .. } => parts.len(),
            Self::Job(job) => job.operands.len(),
        }
    }
}

/// When something was removed.
#[derive(Debug)]
struct Removed {
    at: Duration,
    what: Named,
}

/// All names.
#[derive(Debug, Default)]
pub struct Names {
    backings: BTreeMap<u32, Named>,
    jobs: BTreeMap<JobId, Named>,
    rings: BTreeMap<&'static str, Named>,
    /// Oldest first.
    removed: VecDeque<Removed>,
}

/// A part of a resource.
struct Part {
    resource: u32,
    entry: usize,
    /// First and last byte of the resource.
    bytes: (u64, u64),
}

/// A name, and for how long it has been out of date.
struct Known<'a> {
    named: &'a Named,
    removed: Option<Duration>,
}

impl Names {
    /// A resource gained or lost its memory.
    pub fn backing_changed(&mut self, now: Duration, change: BackingChange) {
        match change {
            BackingChange::Attached { resource, entries } => {
                let old = self.backings.insert(resource, Named::Backing { resource, entries });
                self.remove(now, old);
            }
            BackingChange::Detached { resource } => {
                let old = self.backings.remove(&resource);
                self.remove(now, old);
            }
        }
    }

    /// A job was submitted.
    pub fn job_begun(&mut self, job: JobName) {
        self.jobs.insert(job.id, Named::Job(job));
    }

    /// A job that has not ended.
    pub fn job(&self, id: JobId) -> Option<&JobName> {
        match self.jobs.get(&id)? {
            Named::Job(job) => Some(job),
            Named::Backing { .. } | Named::Ring { .. } => None,
        }
    }

    /// The job has ended.
    pub fn job_ended(&mut self, now: Duration, id: JobId) {
        let old = self.jobs.remove(&id);
        self.remove(now, old);
    }

    /// A ring is at this address from now on.
    pub fn ring_placed(
        &mut self,
        now: Duration,
        name: &'static str,
        parts: Vec<(&'static str, ByteRange<Iova>)>,
    ) {
        let old = self.rings.insert(name, Named::Ring { name, parts });
        self.remove(now, old);
    }

    /// The device was reset: all names are removed.
    pub fn reset(&mut self, now: Duration) {
        let (backings, jobs) = (std::mem::take(&mut self.backings), std::mem::take(&mut self.jobs));
        for old in backings.into_values().chain(jobs.into_values()) {
            self.remove(now, Some(old));
        }
    }

    fn remove(&mut self, now: Duration, what: Option<Named>) {
        self.removed.extend(what.map(|what| Removed { at: now, what }));
        let entries =
            |removed: &VecDeque<Removed>| removed.iter().map(|one| one.what.entries()).sum::<usize>();
        while self.removed.len() > REMOVED || entries(&self.removed) > REMOVED_ENTRIES {
            self.removed.pop_front();
        }
    }

    /// The names of a range, at most [`MOST_NAMES`]: current ones first, then recently removed ones.
    pub fn of(&self, now: Duration, range: ByteRange<Iova>) -> Vec<String> {
        let current = self.backings.values().chain(self.rings.values()).chain(self.jobs.values());
        let current = current.map(|named| Known { named, removed: None });
        let removed = self.removed.iter().rev();
        let removed = removed
            .map(|removed| Known { named: &removed.what, removed: Some(now.saturating_sub(removed.at)) });
        let all: Vec<_> = current.chain(removed).collect();
        let parts: Vec<_> = all.iter().flat_map(|known| known.parts(range)).collect();
        let mut names = Vec::new();
        for known in &all {
            known.push_names(range, &parts, &mut names);
            if names.len() >= MOST_NAMES {
                break;
            }
        }
        names.truncate(MOST_NAMES);
        names
    }
}

impl Known<'_> {
    /// The first parts of a backing in the range.
    fn parts(&self, range: ByteRange<Iova>) -> Vec<Part> {
        let Named::Backing { resource, entries } = self.named else { return Vec::new() };
        let mut parts = Vec::new();
        let mut offset = 0_u64;
        for (entry, place) in entries.iter().enumerate() {
            if let Some(common) = place.intersection(range) {
                let within = common.first().raw().saturating_sub(place.first().raw());
                let first = offset.saturating_add(within);
                let more = common.last().raw().saturating_sub(common.first().raw());
                parts.push(Part { resource: *resource, entry, bytes: (first, first.saturating_add(more)) });
            }
            // OVERFLOW: saturates beyond any resource.
            offset = offset.saturating_add(u64::try_from(place.len()).unwrap_or(u64::MAX));
            if parts.len() >= MOST_NAMES {
                break;
            }
        }
        parts
    }

    fn push_names(&self, range: ByteRange<Iova>, parts: &[Part], names: &mut Vec<String>) {
        let past = Past(self.removed);
        match self.named {
            Named::Backing { resource, .. } => {
                let mine = self.parts(range).into_iter();
                names.extend(mine.map(|Part { entry, bytes: (first, _), .. }| {
                    format!("resource {resource} (backing entry {entry}, offset {first:#x}){past}")
                }));
            }
            Named::Ring { name, parts } => {
                let hit = parts.iter().filter(|(_, place)| place.overlaps(range));
                names.extend(hit.map(|(part, _)| format!("the {part} of the {name}{past}")));
            }
            Named::Job(job) => names.extend(job_name(job, parts).map(|name| format!("{name}{past}"))),
        }
    }
}

/// The name of the job with its first packets that touch one of the parts, if there are any.
fn job_name(job: &JobName, parts: &[Part]) -> Option<String> {
    let touches = |operand: &&OperandName| {
        let (first, last) = operand.bytes;
        parts
            .iter()
            .any(|part| part.resource == operand.resource && part.bytes.0 <= last && first <= part.bytes.1)
    };
    let mut name = format!("job {}", job.id.raw());
    if let Some(context) = job.context {
        name.push_str(&format!(" of context {context}"));
    }
    let mut packets = job.operands.iter().filter(touches).peekable();
    packets.peek()?;
    for OperandName { packet, opcode, access, .. } in packets.by_ref().take(MOST_PACKETS) {
        name.push_str(&format!(", packet {packet} {opcode} ({access})"));
    }
    if packets.next().is_some() {
        name.push_str(", …");
    }
    Some(name)
}

/// How long ago something was removed.
struct Past(Option<Duration>);

impl fmt::Display for Past {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => Ok(()),
            Some(ago) => write!(f, ", until {ago:?} ago"),
        }
    }
}

#[cfg(test)]
mod tests {
    use job_stream::{Mode, Priority};

    use super::*;

    const NOW: Duration = Duration::from_secs(10);

    fn range(start: u64, len: u64) -> ByteRange<Iova> {
        ByteRange::new(Iova::new(start), len).unwrap()
    }

    fn attached(resource: u32, entries: &[(u64, u64)]) -> BackingChange {
        let entries = entries.iter().map(|(start, len)| range(*start, *len)).collect();
        BackingChange::Attached { resource, entries }
    }

    fn job(id: u64, resource: u32, bytes: (u64, u64)) -> JobName {
        let operand = |packet, opcode, access, bytes| OperandName { packet, opcode, access, resource, bytes };
        JobName {
            id: JobId::new(id),
            context: Some(3),
            mode: Mode::Fence,
            priority: Priority::Normal,
            operands: vec![
                operand(0, "FILL", job_stream::Access::Writes, (0, 3)),
                operand(2, "COPY", job_stream::Access::Reads, bytes),
            ],
        }
    }

    #[test]
    fn an_address_is_called_by_its_resource_and_by_the_packet_that_uses_it() {
        let mut names = Names::default();
        names.backing_changed(NOW, attached(7, &[(0x5000, 0x1000), (0x1_0000, 0x4000)]));
        names.job_begun(job(12, 7, (0x2000, 0x2fff)));
        assert_eq!(
            names.of(NOW, range(0x1_1000, 0x1000)),
            ["resource 7 (backing entry 1, offset 0x2000)", "job 12 of context 3, packet 2 COPY (read)"]
        );
        assert_eq!(names.of(NOW, range(0x1_3000, 0x1000)), ["resource 7 (backing entry 1, offset 0x4000)"]);
        assert_eq!(names.of(NOW, range(0x6000, 0x1000)), [""; 0]);
        let both = names.of(NOW, ByteRange::everything()).pop();
        let packets = "job 12 of context 3, packet 0 FILL (written), packet 2 COPY (read)";
        assert_eq!(both.as_deref(), Some(packets));
    }

    #[test]
    fn what_was_removed_is_named_as_such_and_the_new_owner_first() {
        let mut names = Names::default();
        names.backing_changed(NOW, attached(7, &[(0x5000, 0x1000)]));
        names.job_begun(job(12, 7, (0, 0xfff)));
        names.backing_changed(NOW, BackingChange::Detached { resource: 7 });
        names.job_ended(NOW, JobId::new(12));
        names.backing_changed(NOW, attached(8, &[(0x5000, 0x1000)]));
        let later = NOW + Duration::from_millis(5);
        assert_eq!(
            names.of(later, range(0x5000, 1)),
            [
                "resource 8 (backing entry 0, offset 0x0)",
                "job 12 of context 3, packet 0 FILL (written), packet 2 COPY (read), until 5ms ago",
                "resource 7 (backing entry 0, offset 0x0), until 5ms ago",
            ]
        );
    }

    #[test]
    fn rings_have_names_and_a_reset_ends_all_but_theirs() {
        let mut names = Names::default();
        let parts = vec![("descriptors", range(0x1000, 0x1000)), ("used ring", range(0x3000, 0x806))];
        names.ring_placed(NOW, "control ring", parts);
        names.backing_changed(NOW, attached(1, &[(0x3000, 0x1000)]));
        names.reset(NOW);
        assert_eq!(
            names.of(NOW, range(0x3000, 0x1000)),
            ["the used ring of the control ring", "resource 1 (backing entry 0, offset 0x0), until 0ns ago"]
        );
    }

    #[test]
    fn what_is_remembered_of_the_past_is_bounded() {
        let mut names = Names::default();
        for resource in 0..1000 {
            names.backing_changed(NOW, attached(resource, &[(0x1000, 0x1000)]));
            names.backing_changed(NOW, BackingChange::Detached { resource });
        }
        assert_eq!(names.removed.len(), REMOVED);
        let many = vec![(0x1000, 0x1000); REMOVED_ENTRIES];
        for resource in 0..2 {
            names.backing_changed(NOW, attached(resource, &many));
            names.backing_changed(NOW, BackingChange::Detached { resource });
        }
        assert_eq!(names.removed.len(), 1);
        assert_eq!(names.of(NOW, range(0x1000, 1)).len(), MOST_NAMES);
    }
}
