//! Answers the queries of the control thread that need the session's mirror and misses. The work is done in bounded
//! pieces, one per turn, after more urgent work; no other thread is waited for.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender};
use std::time::Duration;

use device_model::addr::{DomainId, Iova};
use device_model::telemetry::audit::AuditReport;
use serde_json::{Value, json};

use super::state::SessionState;
use crate::telemetry::instruments::query_channel::{Connected, IotlbList, Question};

/// Table entries that are visited in one turn: about 10 µs.
const ENTRIES_A_TURN: usize = 4096;

/// A list of the mirror's ranges that is being built.
struct Listing {
    list: IotlbList,
    most: usize,
    from: Iova,
    answer: Sender<IotlbList>,
}

/// The queries, and the work that they have caused.
pub struct Queries {
    messages: Receiver<Question>,
    /// In the order in which they get their turns.
    listings: VecDeque<Listing>,
    /// The control thread may send queries until this is dropped.
    _connected: Connected,
}

impl Queries {
    /// No queries yet.
    pub fn new(messages: Receiver<Question>, connected: Connected) -> Self {
        Self { messages, listings: VecDeque::new(), _connected: connected }
    }

    /// When the next piece of work is due.
    pub fn deadline(&self, now: Duration) -> Option<Duration> {
        (!self.listings.is_empty()).then_some(now)
    }
}

impl SessionState {
    /// Answers the queries that have come, as far as one turn allows.
    pub(super) fn answer_queries(&mut self, now: Duration) {
        // Bounded: every client of the control socket has one query at a time.
        while let Ok(question) = self.queries.messages.try_recv() {
            match question {
                Question::Iotlb(most, answer) => {
                    let list = IotlbList::default();
                    self.queries.listings.push_back(Listing { list, most, from: Iova::new(0), answer });
                }
                Question::Misses(most, answer) => {
                    let pending = self.core.misses().pending().take(most);
                    let pending = pending.map(|(request, waiters)| (request, waiters.to_vec()));
                    // The client may have stopped waiting, here and below.
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

    /// Continues one list; the lists take turns.
    fn list_some(&mut self) {
        let Some(mut listing) = self.queries.listings.pop_front() else { return };
        let Listing { list, most, from, .. } = &mut listing;
        let next = self.core.mirror().mapped_some(DomainId::DEVICE, *from, ENTRIES_A_TURN, |range| {
            // Joins a range that the end of the last turn has split.
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
                self.queries.listings.push_back(listing);
            }
            None => drop(listing.answer.send(listing.list)),
        }
    }

    /// Records the progress of an audit.
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
        // A client that receives the event finds the result.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::channel;

    use device_model::addr::{ByteRange, PAGE_SIZE};
    use device_model::mmu::{HostRange, Permissions};
    use device_model::telemetry::stats::Stats;

    use super::*;
    use crate::session::start::{DeviceSettings, start};
    use crate::telemetry::instruments::Instruments;
    use crate::wake::Waker;

    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE as usize]);

    /// The turns after which lists of these lengths, all requested at once and in this order, are complete. One turn
    /// does not cover all ranges of the mirror.
    fn turns_until_answered(most: &[usize]) -> Vec<usize> {
        let (settings, stats) = (DeviceSettings::for_tests(), Arc::new(Stats::default()));
        let instruments = Instruments::start(settings.engines, None, Arc::clone(&stats)).unwrap();
        let mut state = start(&settings, &stats, &instruments, &Waker::new().unwrap()).unwrap();
        let mut page = Box::new(Page([0; PAGE_SIZE as usize]));
        // SAFETY: the memory behind these translations is never accessed, and the page outlives them.
        let host = unsafe { HostRange::new(page.0.as_mut_ptr(), page.0.len()) };
        for index in 0..ENTRIES_A_TURN as u64 * 5 / 2 {
            // A gap after each page keeps the ranges apart.
            let range = ByteRange::new(Iova::new(2 * index * PAGE_SIZE), PAGE_SIZE).unwrap();
            state
                .core
                .mirror_mut()
                .map(DomainId::DEVICE, range, host, Permissions { read: true, write: true })
                .map(drop)
                .unwrap();
        }
        let connection = instruments.query_channel.connection().unwrap();
        let ask = |most: &usize| {
            let (sender, answer) = channel();
            connection.session.send(Question::Iotlb(*most, sender)).unwrap();
            answer
        };
        let answers: Vec<_> = most.iter().map(ask).collect();
        let mut turns = vec![0; most.len()];
        for turn in 1..100 {
            state.answer_queries(Duration::ZERO);
            for (answer, turns) in answers.iter().zip(&mut turns) {
                if answer.try_recv().is_ok() {
                    *turns = turn;
                }
            }
        }
        turns
    }

    #[test]
    fn lists_are_answered_in_the_order_in_which_they_were_asked_for() {
        let turns = turns_until_answered(&[usize::MAX; 3]);
        assert!(turns.is_sorted() && turns[0] > 1, "{turns:?}");
    }

    #[test]
    fn a_short_list_does_not_wait_for_the_end_of_a_long_one() {
        let turns = turns_until_answered(&[usize::MAX, 1]);
        assert!(turns[1] == 2 && turns[0] > 2, "{turns:?}");
    }
}
