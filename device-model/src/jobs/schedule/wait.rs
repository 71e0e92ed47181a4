//! What a job waits for when translations are missing: which of its waits it is, and the pages that are not answered
//! yet. Knows values only; knows nothing of who answers.

use std::collections::BTreeSet;

use crate::jobs::job::JobId;
use crate::mmu::Missing;
use crate::mmu::miss::MissRequest;

/// One wait of a job for translations. Answers to requests of another wait do not count: an engine may be delayed
/// between parking a job and requesting its pages, for as long as a stop and the next start take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct JobWait {
    /// The job.
    pub job: JobId,
    /// The number of the wait, unique in a device.
    pub(super) number: u64,
}

/// The pages of a wait that are not answered yet.
#[derive(Debug)]
pub(super) struct Unanswered {
    wait: JobWait,
    pages: BTreeSet<MissRequest>,
}

impl JobWait {
    /// A wait with this number, for tests of code that only passes it on.
    #[cfg(test)]
    pub(crate) const fn for_tests(job: JobId, number: u64) -> Self {
        Self { job, number }
    }
}

impl Unanswered {
    /// All of `missing`, each pair of page and access once, however often it is named.
    pub(super) fn new(wait: JobWait, missing: &[Missing]) -> Self {
        Self { wait, pages: requests(missing).collect() }
    }

    /// How many there are.
    pub(super) fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Whether this page was requested in this wait, and is not answered.
    pub(super) fn contains(&self, wait: JobWait, page: MissRequest) -> bool {
        self.wait == wait && self.pages.contains(&page)
    }

    /// The page is answered. `false`: this wait did not wait for it.
    pub(super) fn answered(&mut self, wait: JobWait, page: MissRequest) -> bool {
        self.wait == wait && self.pages.remove(&page)
    }
}

/// How many answers a request for all of `missing` gets: one for each page and access, however often it is named.
pub fn pages_of(missing: &[Missing]) -> usize {
    requests(missing).collect::<BTreeSet<_>>().len()
}

fn requests(missing: &[Missing]) -> impl Iterator<Item = MissRequest> {
    let requests = |one: &Missing| {
        let (space, access) = (one.space, one.access);
        one.pages().map(move |iova| MissRequest { space, access, iova })
    };
    missing.iter().flat_map(requests)
}
