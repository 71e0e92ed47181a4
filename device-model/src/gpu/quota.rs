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
    /// TLB entries of all address spaces. With fewer, the device reads page tables more often.
    pub tlb_entries: u64,
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
            tlb_entries: 65_536,
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

/// One quota that contexts share. Each context has an equal share to itself; what no context has to itself is a pool for
/// all. So a context that is alone may use everything, and one that comes later still has its share: until the others have
/// given back what they took from the pool, all together may then use more than the limit, at most twice as much.
#[derive(Debug)]
pub(crate) struct SharedBudget {
    quota: Quota,
    limit: u64,
    share: u64,
    /// The sum of what all use.
    used: u64,
    /// The sum of what each uses beyond its share.
    pooled: u64,
}

impl SharedBudget {
    /// `most`: the largest number of contexts.
    pub(crate) fn new(quota: Quota, limit: u64, most: u64) -> Self {
        Self { quota, limit, share: limit.checked_div(most).unwrap_or(limit), used: 0, pooled: 0 }
    }

    /// Takes `wanted` for a context that uses `own`, or nothing if that is too much. `contexts`: the number of them.
    pub(crate) fn take(&mut self, own: &mut u64, wanted: u64, contexts: u64) -> Result<(), OverQuota> {
        let refusal = OverQuota { quota: self.quota, wanted, used: self.used, limit: self.limit };
        let new = own.checked_add(wanted).ok_or(refusal)?;
        let extra = self.beyond_share(new).saturating_sub(self.beyond_share(*own));
        let pool = self.limit.saturating_sub(self.share.saturating_mul(contexts));
        let pooled = self.pooled.checked_add(extra).ok_or(refusal)?;
        if extra > 0 && pooled > pool {
            return Err(refusal);
        }
        (self.pooled, *own) = (pooled, new);
        self.used = self.used.saturating_add(wanted);
        Ok(())
    }

    /// Returns what was taken for a context that uses `own`.
    pub(crate) fn give_back(&mut self, own: &mut u64, amount: u64) {
        debug_assert!(amount <= *own, "{amount} {} given back of {own}", self.quota);
        let new = own.saturating_sub(amount);
        let extra = self.beyond_share(*own).saturating_sub(self.beyond_share(new));
        self.pooled = self.pooled.saturating_sub(extra);
        self.used = self.used.saturating_sub(amount);
        *own = new;
    }

    /// All contexts are gone.
    pub(crate) fn clear(&mut self) {
        (self.used, self.pooled) = (0, 0);
    }

    pub(crate) fn used(&self) -> u64 {
        self.used
    }

    fn beyond_share(&self, own: u64) -> u64 {
        own.saturating_sub(self.share)
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

    #[test]
    fn a_context_that_is_alone_may_use_everything_and_one_that_comes_later_has_its_share() {
        let mut budget = SharedBudget::new(Quota::QueuedJobs, 64, 8);
        let (mut first, mut second) = (0, 0);
        budget.take(&mut first, 64, 1).unwrap();
        let full = OverQuota { quota: Quota::QueuedJobs, wanted: 1, used: 64, limit: 64 };
        assert_eq!(budget.take(&mut first, 1, 1), Err(full));
        for _ in 0..8 {
            budget.take(&mut second, 1, 2).unwrap();
        }
        assert_eq!(budget.take(&mut second, 1, 2), Err(OverQuota { used: 72, ..full }));
        assert_eq!((first, second, budget.used()), (64, 8, 72));
        // The first one has to give back what is now the other's share before it gets more.
        for _ in 0..8 {
            budget.give_back(&mut first, 1);
            assert!(budget.take(&mut first, 1, 2).is_err() || budget.used() <= 64);
        }
        let all = first;
        budget.give_back(&mut first, all);
        budget.take(&mut second, 48, 2).unwrap();
        assert_eq!(budget.take(&mut second, 1, 2), Err(OverQuota { used: 56, ..full }));
        budget.take(&mut first, 8, 2).unwrap();
        assert_eq!(budget.used(), 64);
    }

    #[test]
    fn where_there_is_less_than_one_for_each_there_are_no_shares() {
        let mut budget = SharedBudget::new(Quota::QueuedJobs, 2, 64);
        let mut own = [0; 3];
        let taken = own.iter_mut().filter_map(|own| budget.take(own, 1, 3).ok()).count();
        assert_eq!((taken, budget.used()), (2, 2));
    }

    #[test]
    fn however_contexts_come_all_together_use_at_most_twice_the_limit() {
        let mut budget = SharedBudget::new(Quota::QueuedJobs, 1024, 64);
        for contexts in 1..=64 {
            let mut own = 0;
            while budget.take(&mut own, 1, contexts).is_ok() {}
            assert!(own >= 16 && budget.used() < 2048);
        }
    }
}
