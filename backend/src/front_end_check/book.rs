//! What was found in a connection and is still to be told: each thing once, however often it is done, and of bounded
//! size, whatever the front-end does. Knows nothing of the rules' meaning.

use std::collections::BTreeSet;
use std::time::Duration;

use super::finding::Finding;
use super::rules::Rule;

/// Things that are remembered as told; beyond that, nothing new is.
const TOLD: usize = 4096;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Book {
    fresh: Vec<Finding>,
    told: BTreeSet<(Rule, u64)>,
    /// The time of what is being looked at.
    now: Duration,
    /// Whether the message that is being looked at was found fault with.
    pub(super) at_fault: bool,
}

impl Book {
    /// What is found from now on, is found at this time.
    pub(super) fn turn_to(&mut self, now: Duration) {
        self.now = now;
    }

    pub(super) fn now(&self) -> Duration {
        self.now
    }

    /// Notes what was seen, unless the same rule was broken with the same `thing` (an address, a message, a ring)
    /// before. A note is for all things alike.
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

    /// What was found just now is about this message, where nothing better is known.
    pub(super) fn name_fresh(&mut self, message: Option<&'static str>) {
        let now = self.now;
        for finding in self.fresh.iter_mut().rev().take_while(|finding| finding.at == now) {
            finding.message = finding.message.or(message);
        }
    }

    /// What was found since the last call.
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
