//! Finds translations in the mirror that are no longer valid although no INVALIDATE has come. A new request for a page
//! reveals them: for its other access, or by an audit. Knows nothing of who made the request, nor why.
//!
//! Neither the guest nor its front-end can change a table and send INVALIDATE at the same instant. So a stale
//! translation is only a suspect at first, and becomes a finding if no INVALIDATE of the page comes within [`GRACE`].

use std::time::Duration;

use device_model::addr::{Access, ByteRange, Iova};
use device_model::mmu::miss::{Outcome, Resolution};
use device_model::mmu::{MappedRange, MirrorWriter};

use super::book::Book;
use super::rules::Rule;

/// Time limit for the INVALIDATE of a changed page: Linux in lazy mode takes 10 ms, and hosts are busy.
const GRACE: Duration = Duration::from_secs(1);
/// Maximum number of suspects; further ones are ignored.
const SUSPECTS: usize = 256;

/// A translation that seems to be stale.
#[derive(Clone, Debug)]
struct Suspect {
    page: ByteRange<Iova>,
    access: Access,
    since: Duration,
    seen: String,
}

/// The translations that seem to be stale.
#[derive(Debug, Default)]
pub(super) struct Stale {
    suspects: Vec<Suspect>,
}

impl Stale {
    /// A request for a page was answered, and `mirror` has not been updated yet.
    pub(super) fn resolved<W>(&mut self, now: Duration, resolution: &Resolution<W>, mirror: &MirrorWriter) {
        let request = resolution.request;
        let page = request.iova.page_range();
        let range = match &resolution.outcome {
            Outcome::Mapped { range, .. } => *range,
            Outcome::Refused => page,
            Outcome::NotCovered | Outcome::TimedOut | Outcome::NoChannel => return,
        };
        let mut suspect = None;
        mirror.mapped_ranges(request.space, range, |held| {
            let found = match &resolution.outcome {
                Outcome::Mapped { range, host, .. } => moved(&held, *range, host.address()),
                _ if held.permissions.allow(request.access) => Some((
                    page,
                    "the front-end refuses the page, and the device still holds its translation".to_owned(),
                )),
                _ => None,
            };
            if suspect.is_none() {
                suspect = found;
            }
        });
        if let Some((page, seen)) = suspect {
            self.suspect(Suspect { page, access: request.access, since: now, seen });
        }
    }

    fn suspect(&mut self, suspect: Suspect) {
        let known = self.suspects.iter().any(|other| other.page == suspect.page);
        if !known && self.suspects.len() < SUSPECTS {
            self.suspects.push(suspect);
        }
    }

    /// The front-end has invalidated a range: suspects in it are dropped.
    pub(super) fn invalidated(&mut self, range: ByteRange<Iova>) {
        self.suspects.retain(|suspect| !suspect.page.overlaps(range.page_aligned()));
    }

    /// When [`Self::expire`] has to be called next.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.suspects.iter().map(|suspect| suspect.since.saturating_add(GRACE)).min()
    }

    /// Turns suspects into findings after [`GRACE`].
    pub(super) fn expire(&mut self, book: &mut Book) {
        let now = book.now();
        let ripe = |suspect: &mut Suspect| suspect.since.saturating_add(GRACE) <= now;
        for suspect in self.suspects.extract_if(.., ripe) {
            let waited = now.saturating_sub(suspect.since);
            let seen = format!("{}; no INVALIDATE of it came in {waited:?}", suspect.seen);
            if let Some(found) = book.find(Rule::MissingInvalidate, suspect.page.first().raw(), seen) {
                (found.range, found.access) = (Some(suspect.page), Some(suspect.access));
            }
        }
    }
}

/// The page at which the mirror differs from an answer that maps `range` at `host`, and how.
fn moved(held: &MappedRange, range: ByteRange<Iova>, host: u64) -> Option<(ByteRange<Iova>, String)> {
    let common = held.range.intersection(range)?;
    let place = |base: u64, start: Iova| base.wrapping_add(common.first().raw().wrapping_sub(start.raw()));
    let (was, is) = (place(held.host, held.range.first()), place(host, range.first()));
    let page = common.first().page_range();
    (was != is).then(|| {
        (page, "the front-end gives another page than the one whose translation the device holds".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use device_model::addr::DomainId;
    use device_model::mmu::miss::MissRequest;
    use device_model::mmu::{DrainWaker, HostRange, MirrorConfig, Permissions, mirror};

    use super::*;

    struct Nobody;

    impl DrainWaker for Nobody {
        fn wake(&self) {}
    }

    /// Page-aligned memory.
    #[repr(C, align(4096))]
    struct Pages([u8; 0x4000]);

    /// A mirror that maps pages 1 and 2 for reads, to the beginning of the memory.
    fn held(memory: &mut [u8]) -> MirrorWriter {
        let (mut writer, _) = mirror(MirrorConfig { readers: 1, table_limit: 1 << 20 }, Arc::new(Nobody));
        let range = ByteRange::new(Iova::new(0x1000), 0x2000).unwrap();
        // SAFETY: the memory outlives the mirror, whose readers are gone.
        let host = unsafe { HostRange::new(memory.as_mut_ptr(), 0x2000) };
        let read = Permissions { read: true, write: false };
        writer.map(DomainId::DEVICE, range, host, read).unwrap();
        writer
    }

    fn resolution(page: u64, access: Access, outcome: Outcome) -> Resolution<()> {
        let request = MissRequest { space: DomainId::DEVICE, access, iova: Iova::new(page << 12) };
        Resolution { request, waiters: Vec::new(), outcome }
    }

    fn mapped(page: u64, at: &mut [u8]) -> Outcome {
        let range = ByteRange::new(Iova::new(page << 12), 0x1000).unwrap();
        // SAFETY: it is only compared, never read through.
        let host = unsafe { HostRange::new(at.as_mut_ptr(), 0x1000) };
        Outcome::Mapped { range, host, permissions: Permissions::READ_WRITE }
    }

    fn found(stale: &mut Stale, now: Duration) -> Vec<(Rule, u64)> {
        let mut book = Book::default();
        book.turn_to(now);
        stale.expire(&mut book);
        book.take().iter().map(|finding| (finding.rule, finding.range.unwrap().first().raw())).collect()
    }

    #[test]
    fn another_page_is_found_once_the_grace_is_over() {
        let Pages(memory) = &mut *Box::new(Pages([0; 0x4000]));
        let mirror = held(memory);
        let mut stale = Stale::default();
        let (same, other) = (mapped(2, &mut memory[0x1000..]), mapped(2, &mut memory[0x2000..]));
        stale.resolved(Duration::ZERO, &resolution(2, Access::Write, same), &mirror);
        assert_eq!(stale.deadline(), None);
        stale.resolved(Duration::ZERO, &resolution(2, Access::Write, other), &mirror);
        assert_eq!(stale.deadline(), Some(GRACE));
        assert_eq!(found(&mut stale, GRACE / 2), []);
        assert_eq!(found(&mut stale, GRACE), [(Rule::MissingInvalidate, 0x2000)]);
        assert_eq!(stale.deadline(), None);
    }

    #[test]
    fn a_refusal_is_suspicious_only_for_what_the_device_holds() {
        let Pages(memory) = &mut *Box::new(Pages([0; 0x4000]));
        let mirror = held(memory);
        for (page, access, expected) in
            [(1, Access::Read, true), (1, Access::Write, false), (3, Access::Read, false)]
        {
            let mut stale = Stale::default();
            stale.resolved(Duration::ZERO, &resolution(page, access, Outcome::Refused), &mirror);
            assert_eq!(found(&mut stale, GRACE).len(), usize::from(expected), "{page} {access}");
        }
    }

    #[test]
    fn an_invalidate_that_comes_late_is_in_time() {
        let Pages(memory) = &mut *Box::new(Pages([0; 0x4000]));
        let mirror = held(memory);
        let mut stale = Stale::default();
        stale.resolved(Duration::ZERO, &resolution(1, Access::Read, Outcome::Refused), &mirror);
        stale.invalidated(ByteRange::new(Iova::new(0x1800), 8).unwrap());
        assert_eq!(found(&mut stale, GRACE), []);
    }

    #[test]
    fn a_large_answer_is_compared_with_all_that_the_device_holds_of_it() {
        let Pages(memory) = &mut *Box::new(Pages([0; 0x4000]));
        let mirror = held(memory);
        let mut stale = Stale::default();
        let range = ByteRange::new(Iova::new(0), 0x4000).unwrap();
        // SAFETY: it is only compared, never read through.
        let host = unsafe { HostRange::new(memory.as_mut_ptr(), 0x4000) };
        let outcome = Outcome::Mapped { range, host, permissions: Permissions::READ_WRITE };
        stale.resolved(Duration::ZERO, &resolution(0, Access::Read, outcome), &mirror);
        assert_eq!(found(&mut stale, GRACE), [(Rule::MissingInvalidate, 0x1000)]);
    }
}
