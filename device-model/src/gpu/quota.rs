//! How much the guest may use, and how much it uses. Knows amounts; knows nothing of what they are used for.

use std::fmt;

/// Limits on what one guest may use, over all of its resources together. Each refusal is an error response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Bytes of images.
    pub resource_bytes: u64,
    /// Entries of backings.
    pub backing_entries: u64,
    /// Resources.
    pub resources: u64,
    /// Contexts.
    pub contexts: u64,
    /// Address spaces of all contexts.
    pub address_spaces: u64,
    /// Commands that wait in the in-order ring, including the running job; and separately as many jobs of contexts.
    pub queued_jobs: u64,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            resource_bytes: 256 << 20,
            backing_entries: 16_384,
            resources: 4_096,
            contexts: 64,
            address_spaces: 64,
            queued_jobs: 1_024,
        }
    }
}

/// What a quota limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    /// Bytes of images.
    ResourceBytes,
    /// Entries of backings.
    BackingEntries,
    /// Resources.
    Resources,
    /// Commands in the in-order ring; jobs of contexts.
    QueuedJobs,
    /// Contexts.
    Contexts,
    /// Address spaces.
    AddressSpaces,
    /// Packets of unfinished jobs.
    Packets,
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ResourceBytes => "bytes of resources",
            Self::BackingEntries => "backing entries",
            Self::Resources => "resources",
            Self::QueuedJobs => "queued jobs",
            Self::Contexts => "contexts",
            Self::AddressSpaces => "address spaces",
            Self::Packets => "packets of jobs",
        })
    }
}

/// A guest asked for more than its quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Quota of {limit} {quota} does not allow for {wanted} more than the {used} in use")]
pub struct OverQuota {
    /// Which quota.
    pub quota: Quota,
    /// The amount that was requested.
    pub wanted: u64,
    /// The amount in use.
    pub used: u64,
    /// The quota's limit.
    pub limit: u64,
}

/// One quota with the amount in use.
#[derive(Debug)]
pub(crate) struct Budget {
    quota: Quota,
    limit: u64,
    used: u64,
}

impl Budget {
    pub(crate) fn new(quota: Quota, limit: u64) -> Self {
        Self { quota, limit, used: 0 }
    }

    /// Takes `wanted`, or nothing if that is too much.
    pub(crate) fn take(&mut self, wanted: u64) -> Result<(), OverQuota> {
        let used = self.used.checked_add(wanted).filter(|used| *used <= self.limit);
        let Some(used) = used else {
            return Err(OverQuota { quota: self.quota, wanted, used: self.used, limit: self.limit });
        };
        self.used = used;
        Ok(())
    }

    /// Returns what was taken.
    pub(crate) fn give_back(&mut self, amount: u64) {
        debug_assert!(amount <= self.used, "{amount} {} given back of {}", self.quota, self.used);
        self.used = self.used.saturating_sub(amount);
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_takes_nothing_even_when_the_sum_would_wrap() {
        let mut budget = Budget::new(Quota::ResourceBytes, 10);
        budget.take(10).unwrap();
        let refusal = OverQuota { quota: Quota::ResourceBytes, wanted: u64::MAX, used: 10, limit: 10 };
        assert_eq!(budget.take(u64::MAX), Err(refusal));
        assert_eq!(budget.used(), 10);
        budget.give_back(4);
        assert_eq!(budget.take(4), Ok(()));
    }
}
