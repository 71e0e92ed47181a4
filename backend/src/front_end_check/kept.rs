//! The findings of the process: the newest ones, the count of each rule, and whether one may be printed. A front-end
//! cannot cause unbounded output. Knows nothing of who reads or prints them.
//!
//! LOCKING: one leaf mutex, held while one record is added or all are copied.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use device_model::locking::lock;

use super::finding::Finding;
use super::rules::{Rule, Severity};
use crate::records::{Newest, Print, Rate};

/// A finding, and what the reporter has found out about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The finding itself.
    pub finding: Finding,
    /// The names of its address; `None` until they are looked up.
    pub names: Option<Vec<String>>,
    /// Path of its trace, or how to get one.
    pub trace: String,
}

#[derive(Debug, Default)]
struct Inner {
    newest: Newest<Kept>,
    counts: BTreeMap<Rule, u64>,
    last_id: u64,
    rate: Rate,
    unprinted: u64,
}

/// All findings so far; shared by all threads.
#[derive(Debug, Default)]
pub struct Findings {
    inner: Mutex<Inner>,
    /// Whether front-ends are checked at all.
    on: AtomicBool,
}

impl Findings {
    /// Front-ends are checked from now on.
    pub fn turn_on(&self) {
        // ORDERING: Relaxed: set once, before a front-end connects.
        self.on.store(true, Ordering::Relaxed);
    }

    /// Whether front-ends are checked: if not, the absence of findings means nothing.
    pub fn is_on(&self) -> bool {
        // ORDERING: Relaxed, as in `turn_on`.
        self.on.load(Ordering::Relaxed)
    }

    /// Adds a finding, numbers it, and returns whether to print it.
    pub fn add(&self, mut finding: Finding) -> (u64, Print) {
        let mut inner = self.lock();
        inner.last_id = inner.last_id.saturating_add(1);
        finding.id = inner.last_id;
        let (id, at) = (finding.id, finding.at);
        let count = inner.counts.entry(finding.rule).or_default();
        *count = count.saturating_add(1);
        inner.newest.push(Kept { finding, names: None, trace: String::new() });
        if inner.rate.take(at) {
            return (id, Print::Report { unprinted: std::mem::take(&mut inner.unprinted) });
        }
        inner.unprinted = inner.unprinted.saturating_add(1);
        (id, Print::Nothing)
    }

    /// The finding with this number, if it is still kept.
    pub fn get(&self, id: u64) -> Option<Kept> {
        self.lock().newest.records.iter().find(|kept| kept.finding.id == id).cloned()
    }

    /// Adds the names and the trace of a finding.
    pub fn named(&self, id: u64, names: Vec<String>, trace: String) {
        let mut inner = self.lock();
        if let Some(kept) = inner.newest.records.iter_mut().find(|kept| kept.finding.id == id) {
            (kept.names, kept.trace) = (Some(names), trace);
        }
    }

    /// The findings that are still kept.
    pub fn newest(&self) -> Newest<Kept> {
        self.lock().newest.clone()
    }

    /// Number of findings of each rule.
    pub fn counts(&self) -> BTreeMap<Rule, u64> {
        self.lock().counts.clone()
    }

    /// Number of findings of this severity.
    pub fn of(&self, severity: Severity) -> u64 {
        let counts = self.counts();
        counts.iter().filter(|(rule, _)| rule.row().severity == severity).map(|(_, count)| count).sum()
    }

    /// Whether a finding counts against a front-end.
    pub fn accuse(&self) -> bool {
        self.counts().keys().any(|rule| rule.row().severity.accuses())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::records::KEPT;

    fn finding(rule: Rule) -> Finding {
        Finding::new(Duration::ZERO, rule, String::new())
    }

    #[test]
    fn a_note_accuses_nobody_and_a_finding_does() {
        let findings = Findings::default();
        assert_eq!(findings.add(finding(Rule::MissLate)).0, 1);
        assert!(!findings.accuse());
        assert_eq!(findings.add(finding(Rule::MissUnanswered)).0, 2);
        findings.add(finding(Rule::MessageSize));
        assert!(findings.accuse());
        let counts = Severity::ALL.map(|severity| findings.of(severity));
        assert_eq!(counts, [1, 1, 1]);
    }

    #[test]
    fn all_are_counted_and_the_newest_are_kept_and_few_are_printed() {
        let findings = Findings::default();
        let printed =
            (0..300).filter(|_| findings.add(finding(Rule::MessageSize)).1 != Print::Nothing).count();
        assert_eq!(printed, 8);
        assert_eq!(findings.counts()[&Rule::MessageSize], 300);
        let newest = findings.newest();
        assert_eq!((newest.records.len(), newest.dropped), (KEPT, 300 - KEPT as u64));
        findings.named(300, vec!["a".to_owned()], "t".to_owned());
        assert_eq!(findings.get(300).unwrap().names, Some(vec!["a".to_owned()]));
    }
}
