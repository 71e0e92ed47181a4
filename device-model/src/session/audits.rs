//! An audit as the session runs it: each turn asks for a few pages again, beside all other work.

use std::time::Duration;

use super::effect::Effect;
use super::miss_port::Waiter;
use super::{Jobs, Session};
use crate::addr::{ByteRange, DomainId, Iova};
use crate::mmu::miss::Outcome;
use crate::telemetry::audit::{Audit, AuditReport};

/// Table entries that one turn examines: about 10 µs.
pub(super) const ENTRIES_A_TURN: usize = 4096;

impl<T, J: Jobs> Session<T, J> {
    /// Starts an audit, unless one is under way.
    pub fn begin_audit(&mut self, now: Duration) {
        if self.audit.is_none() {
            self.audit = Some(Audit::begin(now));
            self.effect(Effect::AuditProgress(AuditReport::default()));
        }
    }

    /// Asks for a few more pages, and ends the audit if all have been answered.
    pub fn continue_audit(&mut self, now: Duration) {
        let possible = self.running && self.has_iommu() && self.has_channel;
        if !possible {
            return self.interrupt_audit(now);
        }
        let Some(audit) = &mut self.audit else { return };
        if let Some(from) = audit.wants(now) {
            let mut ranges = Vec::new();
            let found = |range| ranges.push(range);
            let next = self.mirror.mapped_some(DomainId::DEVICE, from, ENTRIES_A_TURN, found);
            audit.listed(ranges, next);
        }
        for (number, page) in audit.questions(now) {
            self.misses.request(now, page.space, page.iova, page.access, Waiter::Audit(number));
        }
        match audit.finished(now) {
            Some(report) => {
                self.audit = None;
                self.effect(Effect::AuditEnded(report));
            }
            None => {
                let report = audit.report().clone();
                self.effect(Effect::AuditProgress(report));
            }
        }
    }

    /// Takes the answer to one of the audit's questions.
    pub(super) fn audit_answered(&mut self, now: Duration, number: u32, outcome: &Outcome) {
        if let Some(audit) = &mut self.audit {
            audit.answered(now, number, outcome);
        }
    }

    /// The guest invalidates a range: a difference found there does not count as a finding.
    pub(super) fn audit_invalidated(&mut self, range: ByteRange<Iova>) {
        if let Some(audit) = &mut self.audit {
            audit.invalidated(range);
        }
    }

    /// The device stops, or the session ends: ends the audit early.
    pub(super) fn interrupt_audit(&mut self, now: Duration) {
        if let Some(audit) = self.audit.take() {
            self.effect(Effect::AuditEnded(audit.interrupt(now)));
        }
    }
}
