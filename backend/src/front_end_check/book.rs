//! The findings of a connection that are not reported yet. Each is recorded once, however often it recurs, and memory
//! is bounded, whatever the front-end does. Knows nothing of the rules' meaning.

use std::collections::BTreeSet;
use std::time::Duration;

use super::finding::Finding;
use super::rules::Rule;

/// Maximum number of findings of a connection; later ones are dropped.
const TOLD: usize = 4096;

/// The findings of one connection.
#[derive(Debug, Default)]
pub(super) struct Book {
    fresh: Vec<Finding>,
    told: BTreeSet<(Rule, u64)>,
    /// The time of the event that is being judged.
    now: Duration,
    /// Whether the current message has caused a finding that counts against the front-end.
    pub(super) at_fault: bool,
}

impl Book {
    /// Findings from now on have this time.
    pub(super) fn turn_to(&mut self, now: Duration) {
        self.now = now;
    }

    pub(super) fn now(&self) -> Duration {
        self.now
    }

    /// Adds a finding, unless one of the same rule and `thing` (an address, a message, a ring) was added before. A note
    /// is added once per rule.
    pub(super) fn find(&mut self, rule: Rule, thing: u64, seen: String) -> Option<&mut Finding> {
        let accuses = rule.row().severity.accuses();
        self.at_fault |= accuses;
        let key = (rule, if accuses { thing } else { 0 });
        if self.told.len() >= TOLD || !self.told.insert(key) {
            return None;
        }
        self.fresh.push(Finding::new(self.now, rule, seen));
        self.fresh.last_mut()
    }

    /// Adds the message to the findings made just now that do not name one.
    pub(super) fn name_fresh(&mut self, message: Option<&'static str>) {
        let now = self.now;
        for finding in self.fresh.iter_mut().rev().take_while(|finding| finding.at == now) {
            finding.message = finding.message.or(message);
        }
    }

    /// The findings since the last call.
    pub(super) fn take(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.fresh)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_told_once_and_a_note_once_for_all() {
        let mut book = Book::default();
        for thing in [1, 1, 2] {
            book.find(Rule::UpdateDoesNotCover, thing, String::new());
            book.find(Rule::UpdateUnasked, thing, String::new());
        }
        let rules: Vec<_> = book.take().iter().map(|finding| finding.rule).collect();
        assert_eq!(rules, [Rule::UpdateDoesNotCover, Rule::UpdateUnasked, Rule::UpdateDoesNotCover]);
        assert!(book.take().is_empty());
    }

    #[test]
    fn a_front_end_cannot_make_it_grow_without_bound() {
        let mut book = Book::default();
        for thing in 0..10_000 {
            book.find(Rule::UpdateDoesNotCover, thing, String::new());
        }
        assert_eq!(book.take().len(), TOLD);
    }
}
