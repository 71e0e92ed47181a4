//! What the control thread asks of the session, which has the tables and the misses. Answers are given in bounded
//! pieces, one a turn, when nothing else is to be done sooner; no other thread is waited for.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use device_model::addr::{Iova, SpaceId};
use device_model::telemetry::audit::AuditReport;
use serde_json::{Value, json};

use super::state::SessionState;
use crate::telemetry::instruments::query_channel::{IotlbList, Question};

/// Table entries that are looked at in one turn: about 10 µs.
const ENTRIES_A_TURN: usize = 4096;

/// A list of the mirror that is being made.
struct Listing {
    list: IotlbList,
    most: usize,
    from: Iova,
    answer: Sender<IotlbList>,
}

/// Queries, and what is being done about them, oldest first.
pub struct Queries {
    mail: Receiver<Question>,
    listings: VecDeque<Listing>,
}

impl Queries {
    /// None yet.
    pub fn new(mail: Receiver<Question>) -> Self {
        Self { mail, listings: VecDeque::new() }
    }

    /// When there is something to be done next.
    pub fn deadline(&self, now: Duration) -> Option<Duration> {
        (!self.listings.is_empty()).then_some(now)
    }
}

impl SessionState {
    /// Answers what was asked, as far as it goes in one turn.
    pub(super) fn answer_queries(&mut self, now: Duration) {
        // Bounded: every client of the control socket has one question at a time.
        while let Ok(question) = self.queries.mail.try_recv() {
            match question {
                Question::Iotlb(most, answer) => {
                    let list = IotlbList::default();
                    self.queries.listings.push_back(Listing { list, most, from: Iova::new(0), answer });
                }
                Question::Misses(most, answer) => {
                    let pending = self.core.misses().pending().take(most);
                    let pending = pending.map(|(request, waiters)| (request, waiters.to_vec()));
                    // The client may have given up, here and below.
                    let _ = answer.send(pending.collect());
                }
                Question::Audit(answer) => {
                    self.core.begin_audit(now);
                    self.carry_out(now);
                    let _ = answer.send(());
                }
            }
        }
        self.list_some();
        self.core.continue_audit(now);
        self.carry_out(now);
    }

    /// Goes on with the oldest list.
    fn list_some(&mut self) {
        let Some(mut listing) = self.queries.listings.pop_front() else { return };
        let Listing { list, most, from, .. } = &mut listing;
        let next = self.core.mirror().mapped_some(SpaceId::DEVICE, *from, ENTRIES_A_TURN, |range| {
            // What was cut where the last turn ended is put together again.
            let joined = list.ranges.last_mut().is_some_and(|last| last.append(&range));
            if !joined && list.ranges.len() < *most {
                list.ranges.push(range);
            } else {
                list.truncated |= !joined;
            }
        });
        match next.filter(|_| !list.truncated) {
            Some(next) => {
                listing.from = next;
                self.queries.listings.push_front(listing);
            }
            None => drop(listing.answer.send(listing.list)),
        }
    }

    /// An audit has come this far.
    pub(super) fn audit_progress(&self, report: AuditReport) {
        let mut news = self.sink.instruments().query_channel.audit();
        (news.running, news.report) = (true, Some(report));
    }

    pub(super) fn audit_ended(&self, report: AuditReport) {
        let instruments = self.sink.instruments();
        let result = audit_json(&report);
        {
            let mut news = instruments.query_channel.audit();
            (news.running, news.report) = (false, Some(report));
        }
        // A client that hears of it finds it.
        instruments.outbox.send("AUDIT_DONE", result);
    }
}

/// The findings of an audit for tools.
pub fn audit_json(report: &AuditReport) -> Value {
    let findings = report.findings.iter();
    let stale: Vec<_> = findings
        .map(|finding| json!({"range": finding.range, "access": finding.access, "found": finding.stale}))
        .collect();
    json!({
        "checked": report.checked,
        "stale": stale,
        "more": report.more,
        "unanswered": report.unanswered,
        "interrupted": report.interrupted,
    })
}
